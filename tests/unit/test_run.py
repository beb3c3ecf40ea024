"""Plain flags: small runs from a few words, and curricula whose plan fits the overrides beside them."""

from __future__ import annotations

from typing import Any

import pytest

from stepladder.core.config import override
from stepladder.core.errors import UserError
from stepladder.core.files import write_json
from stepladder.data.curriculum import curriculum
from stepladder.data.stream import DataConfig
from stepladder.run import Run, read, switches
from stepladder.train.request import agree

FLAGS: dict[str, Any] = {"alg_tasks": "parity,addition", "alg_tokens": 1e5, "total_tokens": 4e5}


def planned(tokens_per_step: int, text: str | None = "pydoc", total: float = 4e5) -> DataConfig:
    sources = curriculum(["parity", "addition"], text, 1e5, total, tokens_per_step)
    return DataConfig.model_validate({"sequence": 64, "sources": sources})


@pytest.mark.parametrize(
    ("flags", "sources", "steps"),
    [
        ({}, ["copy"], 500),
        ({"steps": 7, "tasks": "parity,copy"}, ["parity", "copy"], 7),
        ({"text": "pydoc", "tasks": "parity"}, ["parity", "pydoc"], 500),
        ({"text": "a.jsonl", "model": "ssm"}, ["a"], 500),
    ],
)
def test_plain_flags_weigh_all_sources_alike(flags: dict[str, Any], sources: list[str], steps: int) -> None:
    run = read(None, [], flags)
    assert [source.label for source in run.data.sources] == sources
    assert {source.weight for source in run.data.sources} == {1.0}
    assert (run.train.steps, run.train.tokens) == (steps, None)
    assert (run.model.kind, run.data.sequence) == (flags.get("model", "transformer"), 64)


def test_a_curriculum_is_written_out_in_the_run() -> None:
    run = read(None, [], {**FLAGS, "model": "act"}, name="a", seed=3)
    assert (run.model.kind, run.name, run.seed) == ("act", "a", 3)
    assert (run.train.tokens, run.train.steps) == (400_000, None)
    assert run.data == planned(32 * 64)
    assert run.tree()["data"]["sources"][2]["weight"] == [[45, 0.0], [52, 0.85]]  # 1e5 / 2048 = 49 steps, a tenth = 4
    assert Run.of(run.tree()) == run
    assert read(None, [], {**FLAGS, "text": "my.txt"}).data.sources[2].label == "my"
    alone = read(None, [], {**FLAGS, "total_tokens": 1e5})
    assert alone.data == planned(32 * 64, None, 1e5)


def test_the_plan_knows_how_many_tokens_a_step_has() -> None:
    run = read(None, ["train.batch=8", "data.sequence=128", "train.micro=4"], FLAGS)
    assert run.data.sources == planned(8 * 128).sources
    assert run.data.sequence == 128


def test_overrides_reach_into_the_plan() -> None:
    task = "{kind: parity, train: [2, 8]}"
    run = read(None, ["data.sources.2.weight=0.25", f"data.sources.0.task={task}", "train.tokens=5e5"], FLAGS)
    assert run.data.sources[2].weight == 0.25
    assert run.data.sources[0].task.train == (2, 8)
    assert run.train.tokens == 500_000
    assert run.data.sources[1] == planned(32 * 64).sources[1]
    alphabet = read(None, ["data.tokenizer=alphabet"], {**FLAGS, "total_tokens": 1e5})
    assert alphabet.data.tokenizer.kind == "alphabet"


@pytest.mark.parametrize("tasks", [None, "all"])
def test_all_tasks_are_those_that_fit(tasks: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {**FLAGS, "alg_tasks": tasks}
    short = [source.label for source in read(None, ["data.sequence=40"], flags).data.sources]
    assert "stepladder: without 'listops': " in capsys.readouterr().err
    long = [source.label for source in read(None, ["data.sequence=4096"], flags).data.sources]
    assert capsys.readouterr().err == ""
    assert {"parity", "addition", "pydoc"} <= set(short) < set(long)
    assert set(long) - set(short) >= {"listops"}


def test_a_curriculum_can_go_on_to_a_larger_total(tmp_path) -> None:
    first, longer = read(None, [], FLAGS), read(None, [], {**FLAGS, "total_tokens": 8e5})
    write_json(tmp_path / "config.json", first.tree())
    assert agree(longer, tmp_path, resume=True, extend=True).extended == {"tokens": 800_000}


@pytest.mark.parametrize(
    ("flags", "overrides", "says"),
    [
        ({"tasks": "copy", "steps": 5}, [], "--steps --tasks cannot be given with a curriculum"),
        ({"alg_tokens": None}, [], "a curriculum needs --alg-tokens too"),
        ({"total_tokens": None}, [], "a curriculum needs --total-tokens too"),
        ({"alg_tokens": None, "total_tokens": None}, [], "a curriculum needs --alg-tokens --total-tokens too"),
        ({"alg_tokens": 5e5}, [], "give 0 < alg_tokens <= total_tokens"),
        ({"alg_tokens": 1000}, [], "makes no step of 2048 tokens"),
        ({"alg_tokens": 1000}, ["train.batch=32"], "makes no step of 2048 tokens"),
        ({"alg_tokens": float("nan")}, [], "alg_tokens = nan"),
        ({"total_tokens": float("inf")}, [], "total_tokens = inf"),
        ({"alg_tasks": "parety"}, [], "did you mean 'parity'"),
        ({"alg_tasks": ""}, [], "needs a task"),
        ({"total_tokens": 1e5, "text": "pydoc"}, [], "'pydoc' would never be read"),
        ({}, ["train.steps=5"], "exactly one budget"),
        ({}, ["data.sequence=2"], "data.sequence = 2"),
        ({"alg_tasks": None}, ["data.sequence=8"], "no task fits into rows of 8 tokens"),
    ],
)
def test_mistakes_are_one_sentence(flags: dict[str, Any], overrides: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        read(None, overrides, {**FLAGS, **flags})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_step_small_enough_for_the_budget_is_a_way_out() -> None:
    assert read(None, ["train.batch=8"], {**FLAGS, "alg_tokens": 1000}).train.batch == 8


def test_a_run_file_and_the_flags_of_a_curriculum_are_refused(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: transformer\n")
    with pytest.raises(UserError, match=r"run\.yaml or --alg-tasks --alg-tokens --total-tokens, not both"):
        read(path, [], FLAGS)


def test_an_empty_list_of_tasks_is_refused():
    with pytest.raises(UserError, match="--tasks names no task"):
        read(None, [], {"tasks": ""})


# Images -------------------------------------------------------------------------------------------------------------


def seeing(**parts):
    tree = {
        "model": {"kind": "transformer", "width": 32, "depth": 1, "heads": 2},
        "encoder": {"kind": "patch", "side": 12, "patch": 3, "channels": 3},
        "data": {"sources": [{"kind": "images"}]},
        "train": {"steps": 1},
    }
    return {**tree, **parts}


def test_a_source_of_images_takes_the_geometry_of_the_encoder():
    run = Run.of(seeing())
    source = run.data.sources[0]
    assert (source.side, source.channels, source.slots) == (12, 3, 16)
    assert Run.of(run.tree()) == run
    assert Run.of(seeing(encoder={"kind": "patch", "side": 8})).data.sources[0].slots == 4
    assert Run.of(seeing(data={"sources": ["images", {"kind": "text", "path": "pydoc"}]})).data.sources[0].slots == 16
    assert Run.of(run.tree()).hash() != Run.of(seeing(encoder={"kind": "conv"})).hash()
    assert run.build(20).vision.slots == 16


def test_the_encoder_can_be_named_alone_and_a_wrong_one_is_a_sentence():
    assert Run.of(seeing(encoder="conv")).encoder.kind == "conv"
    with pytest.raises(UserError, match=r"encoder\.kind: unknown encoder 'cov' — did you mean 'conv'"):
        Run.of(seeing(encoder="cov"))
    with pytest.raises(UserError, match=r"unknown key 'encoder\.patsh' — did you mean 'patch'"):
        Run.of(seeing(encoder={"kind": "patch", "patsh": 2}))
    with pytest.raises(UserError, match=r"data\.sources\.0 has images and the run has no encoder"):
        Run.of(seeing(encoder=None))
    with pytest.raises(UserError, match=r"data\.sources\.0\.slots is 3 and the encoder has 16"):
        Run.of(seeing(data={"sources": [{"kind": "images", "slots": 3}]}))
    pixels = {"sources": [{"kind": "images", "levels": 4, "side": 8}]}
    assert Run.of(seeing(encoder=None, data=pixels)).data.sources[0].slots == 0


def test_flags_are_overrides_that_go_with_a_file():
    assert switches(False, None, None, False) == []
    given = switches(True, 0.01, 0.002, True)
    run = Run.of(override(seeing(), given))
    assert (run.train.optimizer, run.train.muon_lr, run.train.lr) == ("muon", 0.01, 0.002)
    assert run.train.freeze_encoder
