"""The curriculum: what was planned against what the batches hold, and the ancestors' mistakes as miniatures.

Phase 1 has 100 steps and phase 2 200, of 16 rows of 64 tokens.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepladder.core.config import validate
from stepladder.core.errors import UserError
from stepladder.data.curriculum import curriculum, fitting
from stepladder.data.shards import Shards
from stepladder.data.stream import Batch, DataConfig, Stream, TaskSource
from stepladder.data.tasks import TASKS

ROWS = np.arange(16)
STEP = 16 * 64
FIRST, STEPS = 100, 300
TASK_TREES = [{"kind": "parity", "train": [3, 8]}, {"kind": "addition", "train": [1, 4]}]


def plan(tasks: Sequence[Any] = ("parity", "addition"), text: str | None = "pydoc", **changes: float) -> DataConfig:
    budgets: dict[str, Any] = {"alg_tokens": FIRST * STEP, "total_tokens": STEPS * STEP, "tokens_per_step": STEP}
    sources = curriculum(tasks, text, **{**budgets, **changes})
    return validate(DataConfig, {"sequence": 64, "sources": sources}, "plan")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the cache, and a text whose every document says its number again and again."""
    folder = tmp_path_factory.mktemp("curriculum")
    lines = [json.dumps({"text": f"<{number}> and again " * (2 + number % 5)}) for number in range(300)]
    (folder / "numbered.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def stream(folder: Path) -> Stream:
    return Stream(plan(TASK_TREES, str(folder / "numbered.jsonl")), 5, folder / "cache")


@pytest.fixture(scope="module")
def batches(stream: Stream) -> list[Batch]:
    return [stream.batch(step, ROWS, 16) for step in range(STEPS)]


def share(config: DataConfig, step: int) -> float:
    """Of the tasks."""
    return sum(source.share(step) for source in config.sources if source.kind == "task")


# The plan ------------------------------------------------------------------------------------------------------------


def test_the_plan_is_plain_data_in_the_open() -> None:
    sources = curriculum(["copy", "parity"], "pydoc", 1000 * STEP, 3000 * STEP, STEP)
    weight = [[900, 0.5], [1099, 0.075]]
    assert json.loads(json.dumps(sources)) == [
        {"kind": "task", "task": "copy", "ramp": 500, "weight": weight},
        {"kind": "task", "task": "parity", "ramp": 500, "weight": weight},
        {"kind": "text", "path": "pydoc", "weight": [[900, 0.0], [1099, 0.85]]},
    ]


@pytest.mark.parametrize("tasks", [1, 2, 13])
def test_shares_at_chosen_steps(tasks: int) -> None:
    config = plan(TASKS.names()[:tasks])
    assert [share(config, step) for step in (0, 50, 90)] == pytest.approx([1, 1, 1])
    assert [share(config, step) for step in (109, 200, 10**9)] == pytest.approx([0.15] * 3)
    assert (share(config, 99) + share(config, 100)) / 2 == pytest.approx(1.15 / 2)  # the middle lies between the two
    falling = [share(config, step) for step in range(90, 110)]
    assert np.diff(falling) == pytest.approx(-0.85 / 19)
    for step in range(STEPS):
        shares = [source.share(step) for source in config.sources]
        assert sum(shares) == pytest.approx(1)
        assert shares[:-1] == [shares[0]] * tasks


@pytest.mark.parametrize("first", [1, 2, 3, 10, 55, 100, 297, 299])
@pytest.mark.parametrize("persistent", [0.0, 0.15, 0.5])
def test_tasks_get_the_tokens_that_a_sharp_boundary_would_give(first: int, persistent: float) -> None:
    config = plan(alg_tokens=first * STEP, persistent=persistent)
    planned = sum(share(config, step) for step in range(STEPS))
    assert planned == pytest.approx(first + persistent * (STEPS - first))


def test_without_a_second_phase_there_is_no_text() -> None:
    config = plan(text=None, total_tokens=FIRST * STEP)
    assert [source.kind for source in config.sources] == ["task", "task"]
    assert {source.share(step) for source in config.sources for step in range(FIRST)} == {0.5}


def test_what_was_trained_does_not_depend_on_the_total() -> None:
    """So such a run can be extended."""
    assert plan() == plan(total_tokens=9 * STEPS * STEP)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"alg_tokens": 2e9}, r"alg_tokens = 2e\+09 and total_tokens = 307200 make no curriculum"),
        ({"alg_tokens": 0}, "give 0 < alg_tokens <= total_tokens"),
        ({"alg_tokens": float("nan")}, "alg_tokens = nan"),
        ({"total_tokens": float("inf")}, "total_tokens = inf"),
        ({"alg_tokens": 500}, "alg_tokens = 500 makes no step of 1024 tokens; raise it, or make train.batch"),
        ({"total_tokens": FIRST * STEP + 9}, "total_tokens - alg_tokens = 9 makes no step"),
        ({"total_tokens": FIRST * STEP}, "'pydoc' would never be read"),
        ({"text": None}, "needs a text for the rest"),
        ({"tasks": []}, "needs a task"),
        ({"persistent": 1.0}, "persistent = 1 "),
    ],
)
def test_mistakes_are_one_sentence(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        plan(**changes)
    assert "\n" not in str(caught.value)


def test_every_task_takes_part_that_fits_and_the_others_are_named(folder: Path) -> None:
    tasks, left_out = fitting(64)
    assert {"parity", "addition", "listops"} <= set(tasks)
    assert len(tasks) + len(left_out) == len(TASKS.names())
    stream = Stream(plan(tasks), 0, folder / "cache")
    for step in (0, FIRST // 2 - 1, FIRST // 2):
        assert set(stream.batch(step, np.arange(200), 200).source) == set(range(len(tasks)))
    assert fitting(4096) == (TASKS.names(), [])
    tasks, left_out = fitting(40)
    assert "listops" not in tasks
    (sentence,) = (sentence for sentence in left_out if sentence.startswith("without 'listops': "))
    assert sentence.endswith("rows of 40; set data.sequence to at least 41 or train on smaller sizes")
    with pytest.raises(UserError, match=r"set data\.sequence to at least 41"):
        Stream(validate(DataConfig, {"sequence": 40, "sources": [{"kind": "task", "task": "listops"}]}, "x"), 0, folder)


# The mixture ---------------------------------------------------------------------------------------------------------


def deviation(batches: Iterable[Batch], asked: Iterable[Sequence[float]]) -> float:
    """How far the tokens of a source are from its asked share of them, for the worst source, in standard deviations.

    Each row is drawn by itself, so a source's rows at a step are binomial: their variance is B p (1 - p).
    """
    tokens: np.ndarray | float = 0.0
    expected: np.ndarray | float = 0.0
    variance: np.ndarray | float = 0.0
    for batch, shares in zip(batches, asked, strict=True):
        p, (rows, width) = np.array(shares), batch.tokens.shape
        tokens = tokens + width * np.bincount(batch.source, minlength=len(p))
        expected = expected + width * rows * p
        variance = variance + width**2 * rows * p * (1 - p)
    return float((np.abs(tokens - expected) / np.sqrt(np.maximum(variance, 1))).max())


def test_tokens_are_shared_as_asked(stream: Stream, batches: list[Batch]) -> None:
    asked = [[source.share(step) for source in stream.config.sources] for step in range(STEPS)]
    for phase in (slice(0, 90), slice(90, 110), slice(110, STEPS), slice(0, STEPS)):
        # 12 figures; that one of normally distributed ones is beyond 4.5 has a chance of 8e-5
        assert deviation(batches[phase], asked[phase]) < 4.5, phase
    assert all((batch.source < 2).all() for batch in batches[:91])
    text = sum((batch.source == 2).sum() for batch in batches)
    sigma = np.sqrt(sum(16 * p * (1 - p) for *_, p in asked))
    assert abs(text - 16 * 0.85 * (STEPS - FIRST)) < 4.5 * sigma


def test_a_mixture_by_batches_of_unequal_length_is_caught() -> None:
    """The ancestor drew a source for each batch, and its batches of text had many times the tokens of the others."""
    random, asked, batches = np.random.default_rng(0), [0.075, 0.075, 0.85], []
    for _ in range(STEPS - 110):
        source = random.choice(3, p=asked)
        tokens = np.zeros((16, 64 if source == 2 else 4), np.int64)
        batches.append(Batch(tokens, tokens, tokens, np.full(16, source)))
    assert deviation(batches, [asked] * len(batches)) > 4.5


# Difficulty ----------------------------------------------------------------------------------------------------------


def questions(stream: Stream, batch: Batch, name: str) -> list[str]:
    """Every question of a task in a batch, read from its tokens."""
    mine = np.flatnonzero(batch.source == stream.names.index(name))
    texts = [
        stream.tokenizer.decode(batch.tokens[row][batch.documents[row] == document])
        for row in mine
        for document in np.unique(batch.documents[row])
    ]
    return [text[: text.index("=")] for text in texts if "=" in text]


def rarest(stream: Stream, batches: list[Batch]) -> float:
    """How often the rarest size of any task's training range is asked in a stretch of training, 1: as all others."""
    found = []
    for source in stream.config.sources:
        if isinstance(source, TaskSource):
            asked = [q for batch in batches for q in questions(stream, batch, source.label)]
            sizes = Counter(max(map(len, re.findall(r"\d+", question))) for question in asked)
            low, high = source.task.train
            assert low <= min(sizes) <= max(sizes) <= high
            found.append(min(sizes[size] for size in range(low, high + 1)) * (high - low + 1) / len(asked))
    return min(found)


def test_the_whole_range_is_trained_in_the_second_half_of_phase_1(stream: Stream, batches: list[Batch]) -> None:
    # About 330 questions of each size of parity, more of addition's: 0.6 is 7 standard deviations below 1.
    assert rarest(stream, batches[FIRST // 2 : FIRST]) > 0.6
    assert rarest(stream, batches[FIRST:]) > 0.6
    easy = {max(map(len, re.findall(r"\d+", q))) for batch in batches[:16] for q in questions(stream, batch, "parity")}
    assert easy == {3, 4}  # and it is a ramp: 3 + 5 x 16 / 50


@pytest.mark.parametrize("reached", [0.047, 0.5, 1.0])
def test_a_ramp_that_ends_too_late_is_caught(folder: Path, reached: float) -> None:
    """The ancestor's had come to 4.7 % of its way when phase 1 was over; nor may it end with phase 1."""
    sources = [{**source, "ramp": int(FIRST / reached)} for source in curriculum(TASK_TREES, None, FIRST, FIRST, 1)]
    late = Stream(validate(DataConfig, {"sequence": 64, "sources": sources}, "late"), 5, folder / "cache")
    assert rarest(late, [late.batch(step, ROWS, 16) for step in range(FIRST // 2, FIRST)]) < 0.6


# Freshness and resuming ----------------------------------------------------------------------------------------------


def repeats(stream: Stream, steps: Iterable[int]) -> int:
    """Questions that were asked before, among the batches at these steps."""
    asked = [q for step in steps for q in questions(stream, stream.batch(step, ROWS, 16), "copy")]
    assert len(asked) > 2000
    return len(asked) - len(set(asked))


def test_no_example_comes_twice_and_a_second_pass_is_caught(folder: Path) -> None:
    # Of 10**10 questions and more; 5,000 of them hold a pair of equals with a chance of 5000**2 / 2 / 10**10 = 0.1 %.
    fresh = Stream(plan([{"kind": "copy", "train": [10, 12]}], None, total_tokens=FIRST * STEP), 0, folder / "cache")
    assert repeats(fresh, range(FIRST)) == 0
    assert repeats(fresh, (step % 90 for step in range(FIRST))) > 0  # the ancestor: each pass is seeded as the first


def test_any_step_can_come_first(stream: Stream, batches: list[Batch], folder: Path) -> None:
    written = json.loads(json.dumps(stream.config.model_dump(mode="json")))
    resumed = Stream(validate(DataConfig, written, "written"), 5, folder / "cache")
    for step in (299, 110, 100, 99, 90, 50, 49, 0):
        again, before = resumed.batch(step, ROWS[::-1], 16), batches[step]
        for field in ("tokens", "targets", "documents", "source"):
            assert (getattr(again, field)[::-1] == getattr(before, field)).all(), (step, field)
    assert len({batch.tokens.tobytes() for batch in batches}) == STEPS


# Held-out text -------------------------------------------------------------------------------------------------------


def numbers(stream: Stream, rows: np.ndarray) -> set[int]:
    """The numbers of the documents that windows [n, T] come from."""
    return {int(number) for row in rows for number in re.findall(r"<(\d+)>", stream.tokenizer.decode(row))}


def seen(stream: Stream, batches: list[Batch]) -> set[int]:
    return set().union(*(numbers(stream, batch.tokens[batch.source == 2]) for batch in batches))


def scored(stream: Stream) -> set[int]:
    return set().union(*(numbers(stream, windows.tokens) for windows in stream.valid_text()["numbered"]))


def test_no_document_is_both_trained_on_and_scored(
    stream: Stream, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(seen(stream, batches)) > 250
    assert len(scored(stream)) > 10
    assert seen(stream, batches).isdisjoint(scored(stream))
    assert seen(stream, batches) | scored(stream) == set(range(300))
    # The ancestor's perplexity was that of a fresh iterator over the training stream.
    leaky = {name: Shards(s.train, s.train, s.about) for name, s in stream.texts.items()}
    monkeypatch.setattr(stream, "texts", leaky)
    assert not seen(stream, batches).isdisjoint(scored(stream))
