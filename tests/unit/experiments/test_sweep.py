"""Sweeps: which points there are, what is refused before anything runs, what is taken up, and which point is best."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stepladder import cli
from stepladder.core.errors import UserError
from stepladder.core.files import read_json
from stepladder.experiments import climb as climbing
from stepladder.experiments import sweep as planning
from stepladder.experiments.search import search, sweeps
from stepladder.experiments.sweep import plan, read

SWEEP = {
    "name": "little",
    "metric": "algorithmic/copy",
    "goal": "maximise",
    "space": {"model.heads": [1, 2], "train.lr": [0.001, 0.01]},
    "run": {
        "model": {"kind": "transformer", "width": 16, "depth": 1},
        "data": {"sequence": 32, "sources": [{"kind": "task", "task": {"kind": "copy", "train": [2, 4]}}]},
        "train": {"steps": 2, "batch": 2, "eval_samples": 2},
        "eval": {"suites": []},
    },
}
HOUSE = sorted((Path(__file__).parents[3] / "sweeps").glob("*.yaml"))
# A child that is done at once: accuracy 10 x learning rate, plus a hundredth for every seed, unless a test says else.
DONE = """
import json, pathlib, sys
home, tree, hash = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
from stepladder.core.files import append_line
home.mkdir(parents=True, exist_ok=True)
score = 10 * tree["train"]["lr"] + tree["seed"] / 100
append_line(home / "metrics.jsonl", {"step": 2, "eval": {"algorithmic/copy": score}})
summary = {"status": "complete", "final_loss": 1.0, "hash": hash, "reason": None}
(home / "summary.json").write_text(json.dumps({**summary, **json.loads(sys.argv[4])}))
"""
needs_optuna = pytest.mark.skipif(find_spec("optuna") is None, reason="needs Optuna: pip install 'stepladder[sweep]'")


@pytest.fixture
def made(tmp_path):
    """The plan of the little sweep with some parts replaced."""

    def make(*overrides, **parts):
        path = tmp_path / "little.json"
        path.write_text(json.dumps({**SWEEP, **parts}))
        return plan(read(path, overrides), tmp_path / "cache")

    return make


@pytest.fixture
def started(monkeypatch):
    """Names of the runs that were started; the children are stubs. ``started.told(job)`` may change their summary."""

    class Started(list):
        told = staticmethod(lambda job: {})

    names = Started()

    def start(job, home, gpu, plugins):
        names.append(job.run.name)
        words = [str(home / job.run.name), json.dumps(job.run.tree()), job.run.hash(), json.dumps(names.told(job))]
        log = home / "logs" / f"{job.run.name}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as sink:
            return subprocess.Popen([sys.executable, "-c", DONE, *words], stdout=sink, stderr=sink)

    monkeypatch.setattr(climbing, "_start", start)
    return names


def go(made, tmp_path, jobs=2):
    return search(made, tmp_path / "runs", jobs=jobs, say=lambda line: None)


def test_a_grid_is_every_combination_and_a_run_is_named_by_what_it_is(made):
    points = made().points
    assert [tuple(point.values.values()) for point in points] == [(1, 0.001), (1, 0.01), (2, 0.001), (2, 0.01)]
    assert [point.runs[0].model.heads for point in points] == [1, 1, 2, 2]
    wider = made(space={"model.heads": [1, 2, 4], "train.lr": [0.01, 0.001]}).points
    assert {point.runs[0].name for point in points} < {point.runs[0].name for point in wider}
    assert len({run.hash() for point in made(seeds=[0, 1]).points for run in point.runs}) == 8


def test_overrides_reach_a_path_of_the_space_and_a_file_is_told_from_a_value(made, tmp_path):
    points = made("space.train.lr=[0.5]", "space.model.depth=[1, 2]").points
    assert {(p.values["train.lr"], p.values["model.heads"], p.values["model.depth"]) for p in points} == {
        (0.5, heads, depth) for heads in (1, 2) for depth in (1, 2)
    }
    with pytest.raises(UserError, match="no metric 'algorithmic/cpoy'"):  # the word has a slash, and is no file
        sweeps([str(tmp_path / "little.json"), "metric=algorithmic/cpoy"], tmp_path / "runs")


def test_random_draws_stay_within_their_ranges_and_do_not_depend_on_other_paths(made):
    lr = {"low": 1e-4, "high": 1e-1, "log": True}
    space = {"train.lr": lr, "model.depth": {"low": 1, "high": 3, "whole": True}}
    points = made(method="random", points=30, space=space).points
    rates = [point.values["train.lr"] for point in points]
    assert {point.values["model.depth"] for point in points} == {1, 2, 3}
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    assert 5 < sum(rate < 10**-2.5 for rate in rates) < 25
    alone = made(method="random", points=30, space={"train.lr": lr}).points
    assert [point.values["train.lr"] for point in alone] == rates
    other = made(method="random", points=30, space={"train.lr": lr}, seed=1).points
    assert not {point.values["train.lr"] for point in other} & set(rates)


def test_draws_are_without_repetition_and_a_space_too_small_is_refused(made):
    assert len({str(point.values) for point in made(method="random", points=4).points}) == 4
    with pytest.raises(UserError, match="there are 4 different points, not 5"):
        made(method="random", points=5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"space": {"model.heads": [1, 3]}}, "point model.heads=3: .*(invalid: skip leaves such points out)"),
        ({"space": {"model.hedas": [1]}}, "did you mean 'heads'"),
        ({"space": {"seed": [1, 2]}}, "'seed' cannot be varied"),
        ({"space": {"train.lr": [0.1, 0.1]}}, "each of them once"),
        ({"space": {"train.lr": []}}, "one or more values"),
        ({"space": {"train.lr": {"low": 1, "high": 2}}}, "a grid needs a list"),
        ({"space": {"train.lr": {"low": 2, "high": 1}}}, "must be below"),
        ({"space": {"train.lr": {"low": 2}}}, "'space.train.lr.high' is missing; give it a value$"),
        ({"space": {"train.lr": 3}}, "space.train.lr = 3: must be a list$"),
        ({"run": {**SWEEP["run"], "seed": 3}}, "'seed' is not shared"),
        ({"space": {"train.lr": {"low": 0, "high": 1, "log": True}}}, "has no logarithm"),
        ({"space": {"train.log_every": [1, 2]}}, "are the same run"),
        ({"metric": "algorithmic/cpoy"}, "no metric 'algorithmic/cpoy'.*did you mean 'algorithmic/copy'"),
        ({"points": 3}, "a grid has as many as it has combinations"),
        ({"method": "random"}, "say how many to draw"),
        ({"seeds": [1, 1]}, "a seed is listed twice"),
        ({"space": {"model.heads": [3, 5]}, "invalid": "skip"}, "no point is a valid run"),
    ],
)
def test_what_cannot_be_is_one_sentence_before_anything_runs(made, tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        made(**change)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_invalid_points_are_left_out_and_listed_if_the_sweep_says_so(made, started, tmp_path):
    home, failed = go(made(space={"model.heads": [1, 3, 2]}, invalid="skip"), tmp_path)
    assert failed == []
    assert len(started) == 2
    last = read_json(home / "results.json")["points"][-1]
    assert (last["status"], last["point"]) == ("invalid", {"model.heads": 3})
    assert last["reason"].startswith("3 heads do not divide")  # which point it is, the row says


def test_the_best_point_is_that_of_the_best_mean_over_seeds(made, started, tmp_path):
    home, _ = go(made(seeds=[0, 2]), tmp_path)
    found = read_json(home / "results.json")
    assert found["best"]["point"]["train.lr"] == 0.01
    assert found["best"]["objective"] == pytest.approx(0.11)
    assert found["best"]["spread"] == pytest.approx(0.02 / 2**0.5)
    assert [entry["objective"] for entry in found["points"]] == pytest.approx([0.11, 0.11, 0.02, 0.02])
    worst, _ = go(made(seeds=[0, 2], goal="minimise"), tmp_path)
    assert read_json(worst / "results.json")["best"]["point"]["train.lr"] == 0.001
    assert len(started) == 8  # which the second search found done
    told = (home / "results.md").read_text()
    assert "best algorithmic/copy of little" in told
    assert all(name in told for name in read_json(worst / "results.json")["best"]["runs"].values())
    assert len((home / "results.csv").read_text().splitlines()) == 5


def test_a_diverged_run_fails_its_point_and_is_no_best(made, started, tmp_path):
    started.told = lambda job: {"status": "diverged", "reason": "nan"} if job.run.train.lr == 0.01 else {}
    home, _ = go(made(seeds=[0, 1]), tmp_path)
    found = read_json(home / "results.json")
    assert [entry["status"] for entry in found["points"]] == ["complete", "complete", "failed", "failed"]
    assert found["points"][-1]["objective"] is None
    assert "nan" in found["points"][-1]["reason"]
    assert found["best"]["point"]["train.lr"] == 0.001


def test_crashed_runs_are_tried_again_and_finished_ones_left(made, started, tmp_path):
    started.told = lambda job: {"status": "crashed", "reason": "power"} if job.run.model.heads == 1 else {}
    go(made(), tmp_path)
    first = list(started)
    started.told = lambda job: {}
    home, _ = go(made(), tmp_path)
    assert len(first) == 4
    assert sorted(started[4:]) == sorted(p.runs[0].name for p in made().points if p.values["model.heads"] == 1)
    assert {entry["status"] for entry in read_json(home / "results.json")["points"]} == {"complete"}


def test_interrupted_the_results_so_far_are_written_and_the_same_call_goes_on(made, started, tmp_path):
    def interrupt(line):
        if line.startswith("[1/4]"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stop:
        search(made(), tmp_path / "runs", jobs=1, say=interrupt)
    assert stop.value.code == 128 + signal.SIGTERM
    statuses = [entry["status"] for entry in read_json(tmp_path / "runs/little/results.json")["points"]]
    assert sorted(statuses) == ["complete", "open", "open", "open"]
    go(made(), tmp_path)
    assert len(started) == len(set(started)) == 4


def test_a_point_that_another_process_works_at_is_left_to_it(made, started, tmp_path):
    point = made().points[0]
    lock = tmp_path / "runs/little/claims" / point.runs[0].name
    lock.parent.mkdir(parents=True)
    holder = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        home, _ = go(made(), tmp_path)
        assert point.runs[0].name not in started
        other.communicate(b"\n")
    assert [entry["status"] for entry in read_json(home / "results.json")["points"]].count("open") == 1
    go(made(), tmp_path)
    assert len(started) == 4


def test_a_run_whose_sweep_was_killed_holds_its_point_until_it_has_ended(made, tmp_path):
    """Or the next call would start a second process for the same run, which can only fail."""
    made()
    waits = f"""
import subprocess, sys
from pathlib import Path
from stepladder.experiments import climb
from stepladder.experiments.search import search
from stepladder.experiments.sweep import plan, read
popen = subprocess.Popen
climb.subprocess.Popen = lambda command, **options: popen(["sleep", "60"], **options)
search(plan(read(Path({str(tmp_path / "little.json")!r})), Path({str(tmp_path / "cache")!r})), Path("runs"), jobs=1)
"""
    point = made().points[0]
    lock = tmp_path / "runs/little/claims" / point.runs[0].name
    log = tmp_path / "runs/little/logs" / f"{point.runs[0].name}.log"

    def free():
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    def children(pid):
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
        return [int(word) for word in found.stdout.split()]

    with subprocess.Popen([sys.executable, "-c", waits], cwd=tmp_path) as holder:
        until = time.monotonic() + 120
        while not (log.exists() and children(holder.pid)) and time.monotonic() < until:
            time.sleep(0.05)
        (child,) = children(holder.pid)
        holder.kill()
    try:
        assert not free()
    finally:
        os.kill(child, signal.SIGKILL)
    until = time.monotonic() + 10
    while not free() and time.monotonic() < until:
        time.sleep(0.05)
    assert free()


def test_a_mean_is_of_the_figures_below_a_name_and_none_if_one_is_not_finite():
    figures = {"algorithmic/copy": 0.5, "algorithmic/parity": 1.0, "bits_per_byte/a": None, "bits_per_byte/b": 2.0}
    assert planning._figure(figures, "algorithmic") == 0.75
    assert planning._figure(figures, "bits_per_byte") is None
    assert planning._figure(figures, "algo") is None


@needs_optuna
def test_tpe_learns_goes_on_where_it_was_left_and_may_be_asked_for_more(made, started, tmp_path):
    space = {"train.lr": {"low": 1e-3, "high": 1e-1}, "model.heads": [1, 2]}

    def points(count, name):
        home, _ = go(made(f"name={name}", method="tpe", points=count, space=space), tmp_path, jobs=1)
        return [json.dumps(e["point"]) for e in read_json(home / "results.json")["points"]], home

    whole, _ = points(12, "whole")
    assert len(whole) == 12 == len(set(started))
    some, _ = points(5, "parts")
    more, home = points(12, "parts")
    assert set(some) < set(more)
    assert more == whole
    assert points(12, "whole")[0] == whole
    assert len(started) == 24
    drawn = [p.values["train.lr"] for p in made(method="random", points=12, space=space).points]
    found = [json.loads(point)["train.lr"] for point in whole]
    assert sum(rate > 0.08 for rate in found) > sum(rate > 0.08 for rate in drawn) + 1  # it has looked where it is best
    assert read_json(home / "results.json")["best"]["point"]["train.lr"] == max(found)


@needs_optuna
def test_a_tpe_trial_that_was_left_open_is_taken_up_and_a_diverged_one_is_not(made, started, tmp_path):
    space = {"train.lr": {"low": 1e-3, "high": 1e-1}}
    sweep = {"method": "tpe", "points": 3, "space": space}

    def interrupt(line):
        if line.startswith("[2/3]"):
            os.kill(os.getpid(), signal.SIGTERM)

    diverged = {"status": "diverged", "reason": "nan"}
    started.told = lambda job: diverged if len(started) == 1 else {"status": "crashed", "reason": "power"}
    with pytest.raises(SystemExit):
        search(made(**sweep), tmp_path / "runs", jobs=1, say=interrupt)
    first = list(started)
    started.told = lambda job: {}
    home, _ = go(made(**sweep), tmp_path)
    assert len(first) == 2
    assert started[2] == first[1]
    assert len(started) == 4
    statuses = sorted(entry["status"] for entry in read_json(home / "results.json")["points"])
    assert statuses == ["complete", "complete", "failed"]


@needs_optuna
def test_tpe_ends_when_its_space_has_been_seen_and_lists_what_is_no_valid_run(made, started, tmp_path):
    made_plan = made(method="tpe", points=50, space={"model.heads": [1, 2, 3]}, invalid="skip")
    home, _ = go(made_plan, tmp_path)
    found = read_json(home / "results.json")["points"]
    assert sorted((entry["point"]["model.heads"], entry["status"]) for entry in found) == [
        (1, "complete"),
        (2, "complete"),
        (3, "invalid"),
    ]


@needs_optuna
def test_the_corners_of_a_tpe_space_are_tried_before_the_search(made, tmp_path):
    with pytest.raises(UserError, match="heads=3"):
        made(method="tpe", points=2, space={"model.heads": {"low": 1, "high": 3, "whole": True}})
    many = {f"model.{name}": [1, 2] for name in ("heads", "kv_heads")} | {"model.hidden": list(range(1, 100))}
    sweep = planning.Sweep(**{**SWEEP, "method": "tpe", "points": 2, "space": many})
    assert len(list(planning._corners(sweep))) == planning.MOST_CORNERS


def test_without_optuna_tpe_is_refused_in_one_sentence(made, monkeypatch):
    monkeypatch.setattr(planning, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'stepladder\[sweep\]'"):
        made(method="tpe", points=2)


def test_one_flawed_file_of_several_stops_all_before_anything_runs(tmp_path, started):
    for name, heads in (("good", 2), ("bad", 3)):
        (tmp_path / f"{name}.json").write_text(json.dumps({**SWEEP, "name": name, "space": {"model.heads": [heads]}}))
    with pytest.raises(UserError, match="heads=3"):
        sweeps([str(tmp_path / "good.json"), str(tmp_path / "bad.json")], tmp_path / "runs")
    assert started == []
    assert not (tmp_path / "runs").exists()


def test_the_command_says_one_sentence_and_exits_with_2(tmp_path, monkeypatch, capsys):
    path = tmp_path / "little.json"
    path.write_text(json.dumps(SWEEP))
    words = ["stepladder", "sweep", str(path), "space.model.heads=[3]", "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "runs").exists()


def test_a_real_point_is_trained_and_its_figure_is_that_of_its_own_metrics(made, tmp_path):
    home, failed = go(made(space={"train.lr": [0.01]}, metric="final_loss", goal="minimise"), tmp_path)
    best = read_json(home / "results.json")["best"]
    assert failed == []
    assert best["objective"] == read_json(home / best["runs"]["0"] / "summary.json")["final_loss"] > 1


@pytest.mark.parametrize("path", HOUSE, ids=lambda p: p.stem)
def test_a_sweep_of_the_house_is_valid_and_goes_to_wandb(path, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "MOST_CORNERS", 4)
    monkeypatch.setattr(planning, "find_spec", lambda name: True)
    out = tmp_path / path.name
    assert sweeps([str(path)], tmp_path / "runs", wandb=out, say=lambda line: None) == []
    assert not (tmp_path / "runs").exists()
    told = YAML(typ="safe").load(out.read_text())
    sweep = read(path)
    assert told["parameters"].keys() == {*sweep.space, "seed"}
    assert told["metric"] == {"name": sweep.metric, "goal": sweep.goal.replace("ise", "ize")}
    assert told["command"][-1] == "${args_no_hyphens}"
    assert sweep.name == path.stem
    assert read_json(out.with_suffix(".run.json"))["model"]["kind"] == "recursive_halting"


def test_a_wandb_file_does_not_replace_the_sweep(tmp_path):
    path = tmp_path / "little.json"
    path.write_text(json.dumps(SWEEP))
    with pytest.raises(UserError, match="is the sweep itself"):
        sweeps([str(path)], tmp_path / "runs", wandb=tmp_path / "runs" / ".." / "little.json")
    assert json.loads(path.read_text()) == SWEEP


def test_there_are_the_five_sweeps_of_the_ancestor():
    assert [path.stem for path in HOUSE] == ["act", "attention", "film_rank", "learning_rate", "model_config"]


def test_wandb_is_told_numbers_that_it_reads_as_numbers(tmp_path):
    space = {"train.lr": {"low": 1e-5, "high": 1e-2, "log": True}, "model.depth": {"low": 1, "high": 3, "whole": True}}
    path, out = tmp_path / "little.json", tmp_path / "wandb.yaml"
    path.write_text(json.dumps({**SWEEP, "method": "random", "points": 3, "space": space}))
    sweeps([str(path)], tmp_path / "runs", wandb=out, say=lambda line: None)
    old = YAML(typ="safe")
    old.version = (1, 1)  # as W&B reads it
    told = old.load(out.read_text())["parameters"]
    assert told["train.lr"] == {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-2}
    assert told["model.depth"] == {"distribution": "int_uniform", "min": 1, "max": 3}
    path.write_text(json.dumps({**SWEEP, "space": {"model.hidden": [None, 32]}}))
    with pytest.raises(UserError, match="W&B cannot hand on"):
        sweeps([str(path)], tmp_path / "runs", wandb=out)
