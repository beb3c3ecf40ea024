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


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "shared_loop"},
        {"model": {"kind": "shared_loop"}},
        {"model.kind": "shared_loop"},
        {"model": {"kind": "shared_loop", "ticks": 4}},
    ],
)
def test_every_way_of_writing_a_kind_inherits_alike(climb, changes):
    loop = climb(rungs={"plain": {}, "loop": changes})["loop"]
    assert loop.factor == "model.kind: transformer → shared_loop"
    assert (loop.run.model.width, loop.run.model.depth, loop.run.model.heads) == (32, 2, 2)


def test_two_factors_in_one_mapping_are_refused(climb):
    with pytest.raises(UserError, match=r"changes 2 factors \(model.depth, model.kind\)"):
        climb(rungs={"plain": {}, "double": {"model": {"kind": "shared_loop", "depth": 3}}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval.samples": 3}, "'eval.samples'; a factor is a field of model, data or train"),
        ({"eval": {"samples": 3}}, "'eval.samples'; a factor is"),
        ({"seed": 3}, "'seed'; a factor is"),
        ({"name": "x"}, "'name'; a factor is"),
        ({"model": [1]}, "'model'; a factor is"),
        ({"train.log_every": 3}, "'train.log_every', which is no factor"),
        ({"train": {"device": "cpu"}}, "'train.device', which is no factor"),
        ({"model": {"heads": 4}, "model.heads": 1}, "'model.heads' twice"),
        ({"data.sources.9.weight": 2}, "rung odd: .*data.sources.9' does not exist"),
        ({"data.sources.x.weight": 2}, "rung odd: .*data.sources.x' does not exist"),
        ({"model.width.x": 2}, "rung odd: model.width"),
        ({"model.kind": 3}, "rung odd: model.kind"),
    ],
)
def test_what_is_no_factor_is_refused_in_a_sentence(climb, changes, message):
    with pytest.raises(UserError, match=message):
        climb(rungs={"plain": {}, "odd": changes})


def test_two_rungs_that_are_one_run_are_refused(climb):
    with pytest.raises(UserError, match="'a' and 'b' are the same run"):
        climb(rungs={"plain": {}, "a": {"model.kind": "shared_loop"}, "b": {"model": "shared_loop"}})


def test_the_factor_is_not_what_the_solver_turns(climb):
    rungs = climb(rungs={"plain": {}, "wide": {"model.hidden": 200}, "broad": {"model.width": 24}})
    assert rungs["wide"].run.model.hidden == 200
    assert rungs["broad"].run.model.width == 24
    assert rungs["broad"].matched


def test_a_rung_has_the_vocabulary_and_the_context_of_its_own_data(climb):
    rungs = climb(rungs={"plain": {}, "letters": {"data.tokenizer": "alphabet"}, "long": {"data.sequence": 64}})
    assert rungs["letters"].factor == "data.tokenizer.kind: byte → alphabet"
    assert rungs["letters"].matched
    assert rungs["letters"].run.model.hidden > 100  # fewer ids leave more to the blocks
    assert rungs["long"].cost.flops > rungs["plain"].cost.flops


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
    published = {"kind": "corpus", "key": "tinystories", "documents": 9}
    sources = [*BASE["run"]["data"]["sources"], {"kind": "text", "path": "pydoc"}, published]
    run = {**BASE["run"], "data": {**BASE["run"]["data"], "sources": sources}}
    path = tmp_path / "ladder.json"
    path.write_text(json.dumps({**BASE, "run": run}))
    ladder = read(path, [], text="stories.jsonl.gz")
    assert [s.get("path") for s in ladder.run["data"]["sources"]] == [
        None,
        "stories.jsonl.gz",
        "stories.jsonl.gz",
    ]


@pytest.mark.parametrize("source", ["text", {"kind": "text", "path": "pydoc"}])
def test_a_text_is_taken_as_it_is_written(tmp_path, source):
    run = {**BASE["run"], "data": {"sequence": 32, "sources": [source, BASE["run"]["data"]["sources"][0]]}}
    path = tmp_path / "ladder.json"
    path.write_text(json.dumps({**BASE, "run": run}))
    ladder = read(path, [], text="my #1: story.jsonl")
    assert ladder.run["data"]["sources"][0] == {"kind": "text", "path": "my #1: story.jsonl"}


def test_text_for_a_ladder_without_text_is_refused(tmp_path):
    path = tmp_path / "ladder.json"
    path.write_text(json.dumps(BASE))
    with pytest.raises(UserError, match="no text source"):
        read(path, [], text="stories.txt")


HOUSE = sorted((Path(__file__).parents[3] / "ladders").glob("*.yaml"))


def test_the_house_has_ladders():
    assert {"first", "ablation_smoke"} <= {path.stem for path in HOUSE}


NEED_DATA = {"protocol_clrs", "protocol_compgen", "protocol_finetune"}  # test_protocols.py makes them some


@pytest.mark.parametrize("path", [path for path in HOUSE if path.stem not in NEED_DATA], ids=lambda path: path.stem)
def test_the_ladders_of_the_house_are_matched(path, tmp_path):
    ladder = read(path, [])
    rungs = expand(ladder, tmp_path)
    assert ladder.name == path.stem
    assert next(iter(rungs)) == ladder.control
    assert len(ladder.seeds) >= 3  # fewer make no claim
    for name, rung in rungs.items():
        assert rung.matched, f"{name}: {rung.residual:+.2%}"
        if ladder.match == "params":
            assert abs(rung.params / rungs[ladder.control].params - 1) <= 0.01, name


@pytest.mark.parametrize("path", [path for path in HOUSE if path.stem.startswith("ablation")], ids=lambda p: p.stem)
def test_an_ablation_has_every_variant(path, tmp_path):
    kinds = {rung.run.model.kind for rung in expand(read(path, []), tmp_path).values()}
    assert kinds >= {"transformer", "latent", "act", "ssm", "ssm_mem", "nano_absolute", "identity"}
