"""Ladders: one factor a rung, everything validated before anything runs."""

import json
from pathlib import Path

import pytest

from stepladder.core.errors import UserError
from stepladder.experiments.ladder import expand, read

BASE = {
    "name": "small",
    "control": "plain",
    "seeds": [0, 1],
    "run": {
        "model": {"kind": "transformer", "width": 32, "depth": 2, "heads": 2},
        "data": {"sequence": 32, "sources": [{"kind": "task", "task": {"kind": "parity", "train": [2, 8]}}]},
        "train": {"steps": 10, "batch": 4},
    },
    "rungs": {"plain": {}, "loop": {"model.kind": "shared_loop"}},
}


@pytest.fixture
def climb(tmp_path):
    """Expand the base ladder with changes at its top level."""

    def build(overrides=(), **changes):
        path = tmp_path / "ladder.json"
        path.write_text(json.dumps({**BASE, **changes}))
        return expand(read(path, list(overrides)), tmp_path / "cache")

    return build


def test_control_comes_first_and_is_unchanged(climb):
    rungs = climb()
    assert list(rungs) == ["plain", "loop"]
    assert rungs["plain"].factor == "control"
    assert rungs["plain"].residual == 0


def test_another_kind_inherits_what_both_have_and_is_one_factor(climb):
    loop = climb()["loop"]
    assert loop.factor == "model.kind: transformer → shared_loop"
    assert (loop.run.model.width, loop.run.model.depth, loop.run.model.heads) == (32, 2, 2)
    assert abs(loop.residual) <= 0.01
    assert loop.matched


def test_fields_that_only_the_new_kind_has_belong_to_it(climb):
    rungs = climb(rungs={"plain": {}, "loop": {"model.kind": "shared_loop", "model.ticks": 2}})
    assert rungs["loop"].run.model.ticks == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"model.kind": "shared_loop", "train.lr": 0.1},
        {"model.kind": "shared_loop", "model.depth": 3},
        {"model.heads": 4, "model.positions": "none"},
    ],
)
def test_two_factors_are_refused_by_name(climb, changes):
    with pytest.raises(UserError, match="changes 2 factors") as refusal:
        climb(rungs={"plain": {}, "double": changes})
    assert "one rung for each" in str(refusal.value)


def test_no_factor_is_refused(climb):
    with pytest.raises(UserError, match="changes nothing"):
        climb(rungs={"plain": {}, "same": {"model.width": 32}})


def test_a_control_with_changes_is_refused(climb):
    with pytest.raises(UserError, match="put that under 'run'"):
        climb(rungs={"plain": {"train.lr": 0.1}, "loop": {"model.kind": "shared_loop"}})


def test_equal_flops_shorten_the_costlier_rung(climb):
    rungs = climb(match="train_flops", overrides=["run.train.steps=1000"])
    plain, loop = rungs["plain"], rungs["loop"]
    assert loop.run.train.steps < plain.run.train.steps
    assert abs(loop.residual) <= 0.01
    assert loop.train_flops == pytest.approx(plain.train_flops, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control": "plane"}, "did you mean 'plain'"),
        ({"floors": ["lop"]}, "did you mean 'loop'"),
        ({"seeds": [1, 1]}, "a seed is listed twice"),
        ({"seeds": []}, "seeds"),
        ({"rungs": {"plain": {}, "a/b": {"model.kind": "shared_loop"}}}, "a/b"),
        ({"rungs": {"plain": {}, "loop": {"model.kind": "shared_lop"}}}, "did you mean 'shared_loop'"),
        ({"rungs": {"plain": {}, "loop": {"model.hiden": 3}}}, "did you mean 'hidden'"),
        ({"colour": "red"}, "unknown key 'colour'"),
    ],
)
def test_mistakes_are_named_before_anything_runs(climb, changes, message):
    with pytest.raises(UserError, match=message):
        climb(**changes)


def test_another_text_replaces_the_corpus(tmp_path):
    sources = [*BASE["run"]["data"]["sources"], {"kind": "text", "path": "pydoc"}]
    run = {**BASE["run"], "data": {**BASE["run"]["data"], "sources": sources}}
    path = tmp_path / "ladder.json"
    path.write_text(json.dumps({**BASE, "run": run}))
    ladder = read(path, [], text="stories.jsonl.gz")
    assert [s.get("path") for s in ladder.run["data"]["sources"]] == [None, "stories.jsonl.gz"]


def test_text_for_a_ladder_without_text_is_refused(tmp_path):
    path = tmp_path / "ladder.json"
    path.write_text(json.dumps(BASE))
    with pytest.raises(UserError, match="no text source"):
        read(path, [], text="stories.txt")


@pytest.mark.parametrize("path", sorted(Path("ladders").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_ladders_of_the_house_are_valid(path, tmp_path):
    rungs = expand(read(path, []), tmp_path)
    assert all(rung.matched for rung in rungs.values())
