"""``stepladder trace`` on a run that was just trained."""

import os
import subprocess
import sys


def test_a_run_is_traced_from_the_command_line(tmp_path):
    environment = {**os.environ, "STEPLADDER_CACHE": str(tmp_path / "cache"), "COLUMNS": "160", "OMP_NUM_THREADS": "1"}

    def call(*words):
        command = [sys.executable, "-m", "stepladder.cli", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        return done.returncode, done.stdout, done.stderr

    small = ["model.width=16", "model.depth=1", "data.sequence=32", "train.batch=4"]
    train = ["train", "--model", "vectur", "--tasks", "copy", "--steps", "2", "--no-evaluate", "--quiet", *small]
    assert call(*train)[0] == 0
    code, out, err = call("trace", "runs/run", "--text", "abc=abc", "--ticks", "6")
    assert code == 0, err
    assert out.strip() == "page: runs/run/trace/trace.html"
    page = (tmp_path / "runs/run/trace/trace.html").read_text()
    assert "<h2>vectur0</h2>" in page
    assert "tick budget <b>6</b>" in page
    code, out, err = call("trace", "runs/run", "--text", "", "--out", "elsewhere")
    assert code == 2
    assert "nothing to trace" in err
    assert not (tmp_path / "elsewhere").exists()
