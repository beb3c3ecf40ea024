"""Climbing: what is started, what is believed, and what is left behind. Children are stubs of a few lines."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from stepladder.core.errors import UserError
from stepladder.core.files import read_json, write_json
from stepladder.eval.suite import SUITES, decisive
from stepladder.experiments import climb as climbing
from stepladder.experiments.ladder import expand, read
from stepladder.report.evidence import gather
from stepladder.run import TrainConfig

LADDER = {
    "name": "first",
    "control": "plain",
    "seeds": [0],
    "run": {
        "model": {"kind": "transformer", "width": 16, "depth": 1, "heads": 2},
        "data": {"sequence": 32, "sources": [{"kind": "task", "task": {"kind": "parity", "train": [2, 8]}}]},
        "train": {"steps": 3, "batch": 4},
        "eval": {"suites": ["algorithmic"]},
    },
    "rungs": {"plain": {}, "loop": {"model.kind": "shared_loop"}},
}
DONE = """
import json, pathlib, sys
home, hash, tree = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
home.mkdir(parents=True, exist_ok=True)
(home / "config.json").write_text(tree)
(home / "summary.json").write_text(json.dumps({"status": "complete", "final_loss": 1.0, "hash": hash}))
(home / "results_algorithmic.json").write_text(json.dumps({"status": "complete"}))
"""


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Climb the ladder with children that run ``script``; returns (folder, failed) and keeps what was said."""
    said = []

    def climb(script=DONE, overrides=(), scripts=None, **options):
        path = tmp_path / "ladder.json"
        path.write_text(json.dumps(LADDER))
        ladder = read(path, list(overrides))
        rungs = expand(ladder, tmp_path / "cache")

        def start(job, home, gpu, plugins):
            climb.gpus.append(gpu)
            words = [str(home / job.run.name), job.run.hash(), json.dumps(job.run.tree())]
            log = home / "logs" / f"{job.run.name}.log"
            log.parent.mkdir(exist_ok=True)
            text = (scripts or {}).get(job.rung, script)
            with log.open("ab") as sink:
                return subprocess.Popen(
                    [sys.executable, "-c", text, *words], stdout=sink, stderr=sink, start_new_session=True
                )

        monkeypatch.setattr(climbing, "_start", start)
        return climbing.climb(ladder, rungs, tmp_path / "runs", jobs=2, say=said.append, **options)

    climb.said, climb.gpus = said, []
    climb.home = tmp_path / "runs" / "first"
    return climb


def test_hashes_of_all_runs_are_declared_and_finished_runs_are_left_alone(go):
    home, failed = go()
    assert failed == []
    declared = read_json(home / "ladder.json")["hashes"]
    for rung in ("plain", "loop"):
        assert declared[rung]["0"] == read_json(home / f"{rung}-s0" / "summary.json")["hash"]
    assert go("raise SystemExit(9)") == (home, [])
    assert go.said[-1] == "2 of 2 runs are already done"


def test_another_climb_of_one_name_is_refused_before_anything_is_written(go):
    home, _ = go()
    before = (home / "ladder.json").read_bytes()
    with pytest.raises(
        UserError, match=r"first holds another climb .* \(plain-s0: train.lr is 0.003 there and 0.5 here\).*name=first2"
    ):
        go(overrides=["run.train.lr=0.5"])
    assert (home / "ladder.json").read_bytes() == before


def test_a_ladder_is_climbed_by_one_process_at_a_time(go):
    with climbing._locked(go.home), pytest.raises(UserError, match="being climbed by another process"):
        go()
    assert not (go.home / "ladder.json").exists()


def test_a_crash_is_recorded_and_the_others_go_on(go):
    home, failed = go(scripts={"loop": "print('boom'); raise SystemExit(7)"})
    assert failed == ["loop-s0"]
    summary = read_json(home / "loop-s0" / "summary.json")
    assert (summary["status"], summary["reason"]) == ("crashed", "exit status 7: boom")
    assert read_json(home / "plain-s0" / "summary.json")["status"] == "complete"


@pytest.mark.parametrize("code", ["2", "143", "130"])
def test_a_users_error_or_an_interruption_leaves_a_run_pending(go, code):
    home, failed = go(scripts={"loop": f"print('error: no GPU here'); raise SystemExit({code})"})
    assert failed == ["loop-s0"]
    assert not (home / "loop-s0").exists()
    line = next(line for line in go.said if "loop-s0" in line)
    assert ("not run: error: no GPU here" if code == "2" else "interrupted") in line
    write_json(home / "plain-s0" / "summary.json", {"status": "diverged", "hash": "of another run"})
    evidence = gather(home)
    assert evidence.runs["loop", 0].pending
    assert evidence.runs["plain", 0].reason == "holds another run"


def test_a_child_killed_by_a_signal_of_ours_is_no_crash(go):
    script = "import os; os.kill(os.getpid(), 15)"
    home, failed = go(scripts={"loop": script})
    assert failed == ["loop-s0"]
    assert not (home / "loop-s0").exists()


@pytest.mark.parametrize(
    ("suites", "results", "expected"),
    [
        (["algorithmic"], {"algorithmic": "complete"}, True),
        (["algorithmic"], {"algorithmic": "interrupted"}, False),
        (["algorithmic"], {}, False),
        (["self-test"], {"self_test": "failed"}, True),
        (["self_test"], {"self_test": "passed"}, True),
        (["self-test"], {"self_test": "interrupted"}, False),
        (["all"], {"algorithmic": "complete"}, False),
        (["all"], dict.fromkeys(SUITES.names(), "complete"), True),
    ],
)
def test_finished_means_evaluated_to_the_end_on_every_suite(tmp_path, suites, results, expected):
    path = tmp_path / "ladder.json"
    path.write_text(json.dumps({**LADDER, "run": {**LADDER["run"], "eval": {"suites": suites}}}))
    run = expand(read(path, []), tmp_path)["plain"].run
    write_json(tmp_path / "run" / "summary.json", {"status": "complete", "hash": run.hash()})
    for suite, status in results.items():
        write_json(tmp_path / "run" / f"results_{suite}.json", {"status": status})
    assert climbing.finished(tmp_path / "run", run) is expected


@pytest.mark.parametrize("other", [{"samples": 10}, {"temperature": 0.5}, {"max_new_tokens": 3}])
def test_other_items_or_another_decoding_are_another_evaluation(tmp_path, other):
    path = tmp_path / "ladder.json"
    path.write_text(json.dumps({**LADDER, "run": {**LADDER["run"], "eval": {"suites": ["algorithmic"], "samples": 9}}}))
    run = expand(read(path, []), tmp_path)["plain"].run
    write_json(tmp_path / "run" / "summary.json", {"status": "complete", "hash": run.hash()})
    results = {"status": "complete", "meta": decisive(run.eval)}
    write_json(tmp_path / "run" / "results_algorithmic.json", results)
    assert climbing.finished(tmp_path / "run", run)
    more = run.model_copy(update={"eval": run.eval.model_copy(update=other)})
    assert not climbing.finished(tmp_path / "run", more)


def test_an_unknown_suite_is_refused_before_anything_is_written(go):
    with pytest.raises(UserError, match="algorithmic"):
        go(overrides=["run.eval.suites=[algoritmic]"])
    assert not go.home.exists()


def test_what_an_evaluation_would_fail_on_is_refused_before_anything_is_written(go):
    with pytest.raises(UserError, match=r"eval.tasks: 'copy' is no task of this run"):
        go(overrides=["run.eval.tasks=[copy]"])
    assert not go.home.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_reach_every_child_once_and_wait_for_its_checkpoint(go, number, code):
    script = """
import pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1] + ".got")
got = []
signal.signal(signal.SIGTERM, lambda n, f: got.append(n))
signal.signal(signal.SIGINT, lambda n, f: got.append(n))
here.write_text("up")
while not got: time.sleep(0.01)
time.sleep(0.3)
here.write_text(repr([int(n) for n in got]))
sys.exit(143)
"""

    def interrupt():
        deadline = time.monotonic() + 20
        while len(list(go.home.glob("*.got"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.1)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    sender = threading.Thread(target=interrupt)
    sender.start()
    with pytest.raises(SystemExit) as ended:
        go(script)
    sender.join()
    assert ended.value.code == code
    assert go.said[-1] == "interrupted; the same command goes on from the checkpoints"
    assert [path.read_text() for path in go.home.glob("*.got")] == ["[15]", "[15]"]
    assert not list(go.home.glob("*/summary.json"))
    assert signal.getsignal(number) is before


def test_children_have_a_session_of_their_own(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(climbing.subprocess, "Popen", lambda command, **options: given.update(options, command=command))
    path = tmp_path / "ladder.json"
    path.write_text(json.dumps(LADDER))
    rung = expand(read(path, []), tmp_path)["plain"]
    climbing._start(climbing.Job("plain", climbing.planned(rung, "plain", 3)), tmp_path, "1", ("mine.py",))
    assert given["start_new_session"] is True
    assert given["command"][-2:] == ["--plugin", "mine.py"]
    assert read_json(tmp_path / "configs" / "plain-s3.json")["seed"] == 3


def test_runs_go_to_the_gpu_with_the_fewest(go, monkeypatch):
    monkeypatch.setattr(climbing, "visible_gpus", lambda train: ["3", "5"])
    assert go(overrides=["seeds=[0, 1]"])[1] == []
    assert sorted(go.gpus) == ["3", "3", "5", "5"]


def test_without_a_gpu_no_device_is_chosen(go):
    go()
    assert go.gpus == [None, None]


def test_gpus_are_those_that_this_process_may_see(monkeypatch):
    monkeypatch.setattr(climbing.session, "pick_device", lambda train: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert climbing.visible_gpus(TrainConfig(steps=1)) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-abc")
    assert climbing.visible_gpus(TrainConfig(steps=1)) == ["2", "GPU-abc"]
