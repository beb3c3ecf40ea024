"""Training times side by side: what is measured, what is said of those that fall out, and what is left behind."""

import json
import subprocess

import pytest

from stepladder.core.errors import UserError
from stepladder.experiments import race as racing
from stepladder.experiments.climb import _time
from stepladder.experiments.ladder import expand, read
from stepladder.run import Run

SMALL = {
    "model": {"kind": "transformer", "width": 16, "depth": 1, "heads": 2},
    "data": {"sequence": 32, "sources": [{"kind": "task", "task": "parity"}]},
    "train": {"steps": 3, "batch": 2},
}


@pytest.fixture
def config(tmp_path):
    def write(name, **changes):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**SMALL, **changes}))
        return path

    return write


@pytest.fixture
def race(tmp_path, monkeypatch):
    monkeypatch.setattr(racing, "TURN", 0.02)
    ends = []
    monkeypatch.setattr(racing.Racer, "end", lambda racer, end=racing.Racer.end: (end(racer), ends.append(racer)))

    def run(control, configs, rounds=2):
        found = racing.race(control, configs, tmp_path, rounds)
        assert len(ends) == len(configs)
        assert all(racer.process.poll() is not None for racer in ends)
        return found

    return run


def test_every_rung_is_timed_in_every_round_and_more_work_takes_longer(config, race):
    slow = {**SMALL["model"], "depth": 24}
    found = race("plain", {"plain": config("plain"), "deep": config("deep", model=slow)}, rounds=3)
    assert found["errors"] == {}
    assert (found["rounds"], found["tokens"]) == (3, 64)
    assert found["steps"] * min(found["seconds"]["plain"]) > 0.005  # turns are long enough to be measured
    assert all(
        deep > plain > 0 for deep, plain in zip(found["seconds"]["deep"], found["seconds"]["plain"], strict=True)
    )


def test_seconds_are_for_the_tokens_of_the_controls_step(config, race):
    """Twice the rows a step, three times the steps a second or not: ratios are of time per token."""
    twice = config("twice", train={"steps": 3, "batch": 64})
    found = race("plain", {"plain": config("plain"), "twice": twice})
    per_step = min(found["seconds"]["twice"]) * 64 * 32 / found["tokens"]
    assert per_step > min(found["seconds"]["plain"]) > min(found["seconds"]["twice"])


def test_a_rung_that_cannot_start_has_a_reason_and_no_time(config, race):
    broken = config("broken", model={"kind": "transformer", "width": 15, "heads": 2})
    found = race("plain", {"plain": config("plain"), "broken": broken})
    assert list(found["seconds"]) == ["plain"]
    assert "broken" in found["errors"]
    assert found["errors"]["broken"].startswith("error: ")


def test_without_the_control_nothing_is_timed(config, race):
    broken = config("broken", model={"kind": "transformer", "width": 15, "heads": 2})
    found = race("broken", {"plain": config("plain"), "broken": broken})
    assert found["seconds"] == {"plain": []}


def test_a_racer_that_dies_in_mid_race_has_no_time(config, race, monkeypatch):
    turn, turns = racing.Racer.turn, []

    def shot(racer, steps):
        turns.append(racer)
        if len(turns) == 4:
            racer.process.kill()
        return turn(racer, steps)

    monkeypatch.setattr(racing.Racer, "turn", shot)
    monkeypatch.setattr(racing, "TURN", 0.0)  # turn 1 measures the control, 2 and 3 are the first round
    found = race("plain", {"plain": config("plain"), "other": config("other")}, rounds=2)
    assert list(found["seconds"]) == ["plain"]
    assert found["errors"] == {"other": "exit status -9"}


def test_a_climb_times_its_rungs_once(tmp_path, monkeypatch):
    calls = []

    def stub(control, configs, logs, rounds, plugins):
        calls.append((control, sorted(configs), rounds))
        return {"seconds": {name: [1.0] * rounds for name in configs}, "errors": {}}

    monkeypatch.setattr("stepladder.experiments.climb.race", stub)
    path = tmp_path / "ladder.json"
    tree = {"name": "l", "control": "plain", "seeds": [0], "run": SMALL, "timing": 4}
    path.write_text(json.dumps({**tree, "rungs": {"plain": {}, "wide": {"model.width": 32}}, "match": "none"}))
    ladder = read(path, [])
    rungs = expand(ladder, tmp_path / "cache")
    (tmp_path / "configs").mkdir()
    said = []
    for name, rung in rungs.items():
        (tmp_path / "configs" / f"{name}-s0.json").write_text(json.dumps(rung.run.tree()))
    for _ in range(2):
        _time(ladder, rungs, tmp_path, (), said.append)
    assert calls == [("plain", ["plain", "wide"], 4)]
    assert json.loads((tmp_path / "timing.json").read_text())["seconds"]["wide"] == [1.0] * 4
    _time(read(path, ["timing=0"]), rungs, tmp_path / "elsewhere", (), said.append)
    assert len(calls) == 1


def test_a_racer_says_in_one_sentence_what_its_file_lacks(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text("{}")
    command = [racing.sys.executable, "-m", "stepladder.experiments.race", str(path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 1
    assert found.stderr.startswith("error: ")
    with pytest.raises(UserError):
        Run.of({}, str(path))
