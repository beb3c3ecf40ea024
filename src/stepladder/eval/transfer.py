"""The ``transfer`` suite: tasks and texts that a run was not trained on, zero-shot and with demonstrations.

Questions are asked as everywhere, behind the beginning-of-sequence token; with k demonstrations the prompt is, as one
document,

    <bos> question answer <eos>   (k times)   <bos> question

so every demonstration looks as an example did in training, but for what stands before it. Demonstrations are of the
*training* split of the question's own source (and group), of the sizes trained on there. They are drawn by
(``eval.seed``, source, size, index), so every rung sees the same, and fewer are the first of more. None of them is a
test question: that is held by construction and checked for every prompt. No prompt is ever cut: where one does not fit
the learned positions of a model, its cell has a status and no score. Scores are those of ``algorithmic`` (exact match,
lenient, marks), those of texts are those of ``likelihood``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from stepladder.core.errors import UserError
from stepladder.core.keys import key, permute
from stepladder.data.base import strings
from stepladder.data.corpora import normalise
from stepladder.data.pairs import Pairs, Quiz
from stepladder.data.sources import PairSource, Source, TaskSource, Texts
from stepladder.data.stream import Stream
from stepladder.data.tokenizers import BOS, EOS, Tokenizer
from stepladder.eval.exact import Sheet, ask, bounds, cells
from stepladder.eval.likelihood import measure
from stepladder.eval.suite import Job, Outcome, suite
from stepladder.models.lm import LanguageModel
from stepladder.run import EvalConfig, Run, cache_folder

_STRIDE = 64
"""Demonstrations that an item can have at most: where the next item's begin."""

Shown = list[tuple[str, str]]


@dataclass(frozen=True)
class Asked:
    """A sheet and, for every item, its demonstrations (question, answer), as many as were asked for at most."""

    sheet: Sheet
    shown: list[Shown]

    @property
    def most(self) -> int:
        """How many demonstrations every item has at least."""
        return min(map(len, self.shown), default=0)


def asked(run: Run, config: EvalConfig) -> list[Asked]:
    """The test items of every task and group of pairs among the sources, with demonstrations."""
    found, most = [], max(config.shots)
    for name, source in _named(run, config):
        for label, task in source.asked(name):
            sheet = Sheet(label, task, *task.items(config.seed, config.samples))
            found.append(Asked(sheet, demonstrations(source, sheet, most, config.seed)))
    return found


def demonstrations(source: Source, sheet: Sheet, most: int, seed: int) -> list[Shown]:
    """For every item of a sheet at most ``most`` training examples of its source; a leak is a RuntimeError."""
    secret = key(seed, "transfer", sheet.name)
    rows = list(zip(sheet.examples.size.tolist(), sheet.index.tolist(), strict=True))
    shown: list[Shown] = [[] for _ in rows]
    if not most:
        return shown
    if isinstance(source, TaskSource):
        for size in dict.fromkeys(size for size, _ in rows):
            mine = [row for row, (other, _) in enumerate(rows) if other == size]
            places = sheet.index[mine][:, None] * _STRIDE + np.arange(most)
            examples = source.task.batch((secret / size).seed(), "train", places.reshape(-1), source.task.train)
            canonical = (strings(source.task.canonical(each)) for each in (examples, sheet.examples))
            _never_asked(sheet.name, *canonical)
            texts = list(zip(examples.questions(), examples.answers(), strict=True))
            for place, row in enumerate(mine):
                shown[row] = texts[place * most : (place + 1) * most]
        return shown
    assert isinstance(source, PairSource)
    assert isinstance(sheet.task, Quiz)
    pool = trained_rows(source.pairs).get(sheet.task.group)
    if pool is None:
        return shown
    orders = [permute(secret / size / index, len(pool), np.arange(min(most, len(pool)))) for size, index in rows]
    chosen, places = np.unique(pool[np.concatenate(orders)], return_inverse=True)
    texts = [(pair.question, pair.answer) for pair in source.pairs.train.take(chosen)]
    for row, mine in enumerate(places.reshape(len(rows), -1).tolist()):
        shown[row] = [texts[place] for place in mine]
    drawn = [normalise(question) for each in shown for question, _ in each]
    _never_asked(sheet.name, drawn, map(normalise, sheet.examples.questions()))
    return shown


@lru_cache(maxsize=4)
def trained_rows(pairs: Pairs) -> dict[str, np.ndarray]:
    """By group the rows of the training pairs that can be shown.

    A file of the user's may hold a question on both sides: data.json of a run says so, and here it is not shown.
    """
    held = {normalise(pair.question) for pair in pairs.held}
    found: dict[str, list[int]] = {}
    for row, pair in enumerate(pairs.train):
        if normalise(pair.question) not in held:
            found.setdefault(pair.group, []).append(row)
    return {group: np.array(rows) for group, rows in found.items()}


def _never_asked(name: str, shown: Iterable[str], tested: Iterable[str]) -> None:
    """Whatever the data promised, no demonstration is one of the test questions, in their canonical form."""
    if leaked := set(shown) & set(tested):
        raise RuntimeError(f"{name}: {len(leaked)} demonstrations are test questions, such as {min(leaked)!r}")


def prompts(tokenizer: Tokenizer, shown: Sequence[Shown], shots: int) -> list[np.ndarray]:
    """The ids before each question: its first ``shots`` demonstrations."""
    texts = [text for each in shown for pair in each[:shots] for text in pair]
    ids = iter(tokenizer.encode_all(texts))
    return [
        np.concatenate([np.empty(0, np.int64), *([BOS, *next(ids), *next(ids), EOS] for _ in each[:shots])])
        for each in shown
    ]


def score(job: Job, one: Asked, shots: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Cells and records of a sheet with so many demonstrations."""
    sheet, sequence = one.sheet, job.run.data.sequence
    sizes = sheet.examples.size
    before = prompts(job.tokenizer, one.shown, shots)
    questions = job.tokenizer.encode_all(sheet.examples.questions())
    lengths = np.array([len(b) + 1 + len(q) for b, q in zip(before, questions, strict=True)])
    reaches = lengths + np.array(bounds(sheet, job.tokenizer)) - 1
    found, records = [], []
    limit = positions(job.model)
    for size in dict.fromkeys(sizes.tolist()):
        rows = np.flatnonzero(sizes == size)
        about = {
            "shots": shots,
            "longest_prompt": int(lengths[rows].max()),
            "beyond_trained": int((lengths[rows] > sequence).sum()),
        }
        status = _hindrance(one.most, shots, int(reaches[rows].max()), limit)
        if status:
            regime = "iid" if size in sheet.task.iid else "ood"
            empty = {"task": sheet.name, "size": size, "regime": regime, "n": 0, "accuracy": None}
            found.append({**empty, **about, "status": status})
            continue
        part = Sheet(sheet.name, sheet.task, sheet.examples.take(rows), sheet.index[rows])
        mine = [before[row] for row in rows]
        answered = ask(job.model, job.tokenizer, part, job.config, before=mine)
        records += [{**record, "shots": shots} for record in answered]
        found += [{**cell, **about} for cell in cells(answered, {sheet.name: sheet.task})]
    return found, records


def _hindrance(have: int, shots: int, reach: int, limit: int | None) -> str:
    """Why a cell cannot be scored; empty if it can."""
    if have < shots:
        return f"only {have} training examples to show"
    if limit is not None and reach > limit:
        return f"too long: {reach} tokens, {limit} learned positions"
    return ""


def positions(model: LanguageModel) -> int | None:
    """The longest document that a model with learned positions takes; None if any length will do."""
    return None if model.embed.positions is None else model.embed.positions.num_embeddings


def _named(run: Run, config: EvalConfig) -> list[tuple[str, Source]]:
    names = run.data.model_copy(update={"sources": config.transfer}).names()
    return list(zip(names, config.transfer, strict=True))


def rehearse(run: Run, config: EvalConfig) -> None:
    """Read the sources and draw one item each; what the run is trained on is no transfer, and a UserError."""
    trained = {_what(source) for source in run.data.sources}
    for name, source in _named(run, config):
        if _what(source) in trained:
            raise UserError(f"eval.transfer: the run is trained on '{name}'; other suites ask that, so leave it out")
        if isinstance(source, Texts):
            source.corpus(cache_folder())
        for label, task in source.asked(name):
            demonstrations(source, Sheet(label, task, *task.items(config.seed, 1)), max(config.shots), config.seed)


def _what(source: Source) -> tuple[str, str]:
    what = source.task.kind if isinstance(source, TaskSource) else getattr(source, "path", None) or source.label
    return source.kind, what


def table(results: dict[str, Any]) -> Table:
    """Exact match in per cent, a row for every task and size, a column for every number of demonstrations."""
    columns = sorted({cell["shots"] for cell in results["cells"]})
    told = [f"{entry['source']}: {entry['bits_per_byte']:.4g} bits per byte" for entry in results["likelihood"]]
    told += [results["note"]] if results.get("note") else []
    shown = Table(title="transfer: exact match in %, by demonstrations", box=SIMPLE, caption="\n".join(told) or None)
    shown.add_column("task")
    for column in ("size", "", *map(str, columns), "chance"):
        shown.add_column(column, justify="right")
    rows: dict[tuple[str, int, str], dict[int, Any]] = {}
    for cell in results["cells"]:
        rows.setdefault((cell["task"], cell["size"], cell["regime"]), {})[cell["shots"]] = cell
    for (task, size, regime), found in rows.items():
        known = [found[shots]["accuracy"] for shots in columns]
        numbers = ["–" if accuracy is None else f"{100 * accuracy:.1f}" for accuracy in known]
        chance = next((cell["chance"] for cell in found.values() if "chance" in cell), None)
        shown.add_row(task, str(size), regime, *numbers, "" if chance is None else f"{100 * chance:.3g}")
    return shown


@suite("transfer", needs="any", show=table, rehearse=rehearse)
def transfer(job: Job) -> Outcome:
    """Exact match on tasks that the run was not trained on, by demonstrations; bits per byte of such texts."""
    if not job.config.transfer:
        return Outcome({"message": "nothing to evaluate: eval.transfer names no source"})
    everything, shots = asked(job.run, job.config), sorted(set(job.config.shots))
    found: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    items: list[Any] = []
    for one in everything:
        items += [(*item, shown) for item, shown in zip(one.sheet.items(), one.shown, strict=True)]
        for number in shots:
            made, answered = score(job, one, number)
            found += made
            records += answered
            job.advance(1 / (len(everything) * len(shots)))
    texts = tuple(source for source in job.config.transfer if isinstance(source, Texts))
    read: list[dict[str, Any]] = []
    if texts:
        data = job.run.data.model_copy(update={"sources": texts})
        stream = Stream(data, job.run.seed, cache_folder(), job.tokenizer)
        read, scored, windows = measure(job.model, stream.valid_text(job.config.batch), job.config.text_tokens)
        records += scored
        items += windows
    if not found and not any(entry["bytes"] for entry in read):
        raise UserError("transfer scored nothing: the sources of eval.transfer have no test items; give others")
    body: dict[str, Any] = {"by": "shots", "cells": found, "likelihood": read}
    if beyond := sum(cell["beyond_trained"] for cell in found):
        asked_for = len(shots) * sum(len(one.shown) for one in everything)
        told = f"longer than the {job.run.data.sequence} tokens of a training row; none is cut"
        body["note"] = f"{beyond:,} of {asked_for:,} prompts are {told}"
    return Outcome(body, records, items)
