"""The ``algorithmic`` suite: exact match on a grid of sizes, inside the training range (iid) and beyond it (ood).

An answer counts if the model wrote it and then ended the sequence, character for character (a task with several right
answers documents its own rule in ``verify``). Nothing is extracted, stripped or normalised: "12." is wrong for "12".

Beside it, and never instead of it, stands a *lenient* match, which forgives form only. Of what was written, with
compatibility characters resolved (NFKC: full-width digits, ...), any dash as "-", without code fences:

    the answer is    what is read off the output                                  accepted, for instance
    an integer       the first integer; commas inside it are dropped, -0 is 0     12: "12. Actually 13", "= １２."
    anything else    the first line that is not blank, without a trailing period  abc: "abc.", "```\\nabc\\n```"

Digits stay as written otherwise ("012" is not 12), since many answers are strings of digits. Some tasks give further
marks (the share of right elements of a list, the result behind the steps, false accepts and false rejects of a claim):
records and cells have them as ``marks``, a cell the mean over those of its records that have it.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from stepladder.core.stats import proportion_stderr, wilson
from stepladder.data.base import Asked, Examples
from stepladder.data.tokenizers import BOS, EOS, SPECIALS, Tokenizer
from stepladder.eval.decode import Generation, evaluating, generate
from stepladder.eval.memorize import Memorizer
from stepladder.eval.suite import Job, Outcome, suite
from stepladder.models.lm import LanguageModel
from stepladder.run import EvalConfig, Run

_SPECIAL_NAMES = ("<pad>", "<bos>", "<eos>")
_INTEGER = re.compile(r"-?\d+(?:,\d{3})*(?!\d)|-?\d+")


@dataclass(frozen=True)
class Sheet:
    """The questions of one task: ``examples`` with ``index`` [n], the place of each among those of its size."""

    name: str
    task: Asked
    examples: Examples
    index: np.ndarray

    def items(self) -> list[tuple[str, int, int, str, str]]:
        """(task, size, index, question, answer) of every item: what the digest of the items is taken over."""
        sizes, index = self.examples.size.tolist(), self.index.tolist()
        rows = zip(sizes, index, self.examples.questions(), self.examples.answers(), strict=True)
        return [(self.name, *row) for row in rows]


def sheets(run: Run, seed: int, samples: int) -> list[Sheet]:
    """The test items of every task of a run: ``samples`` at each size, the same for every model and run seed."""
    found = []
    for name, task in tasks(run):
        found.append(Sheet(name, task, *task.items(seed, samples)))
    return found


def tasks(run: Run) -> list[tuple[str, Asked]]:
    """The tasks that a run trains on, with the names of their sources; and the groups of its pairs."""
    named = zip(run.data.names(), run.data.sources, strict=True)
    return [asked for name, source in named for asked in source.asked(name)]


def ask(
    model: LanguageModel,
    tokenizer: Tokenizer,
    sheet: Sheet,
    config: EvalConfig,
    ticks: int | None = None,
    advance: Callable[[float], object] = float,
    before: Sequence[np.ndarray] | None = None,
) -> list[dict[str, Any]]:
    """Decode every question of a sheet and score it: one record an item, in the sheet's order.

    before: ids that every question stands behind, one array an item; default: none.
    The bound on the output, unless configured, is the longest answer of that size plus 2 tokens: room for the
    end-of-sequence token, and for a wrong answer to show that it is too long.
    """
    prompts = [np.concatenate(([BOS], ids)) for ids in tokenizer.encode_all(sheet.examples.questions())]
    if before is not None:
        prompts = [np.concatenate(pair) for pair in zip(before, prompts, strict=True)]
    longest: list[int] | int = bounds(sheet, tokenizer)
    generations = generate(
        model,
        prompts,
        max_new=longest if config.max_new_tokens is None else config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        key=config.seed,
        ticks=ticks,
        batch=config.batch,
        advance=advance,
    )
    return [_record(sheet.task, item, one, tokenizer) for item, one in zip(sheet.items(), generations, strict=True)]


def bounds(sheet: Sheet, tokenizer: Tokenizer) -> list[int]:
    """For every item the longest answer of its size plus 2 tokens."""
    lengths = np.array([len(ids) for ids in tokenizer.encode_all(sheet.examples.answers())])
    sizes = sheet.examples.size
    longest = {int(size): int(lengths[sizes == size].max()) + 2 for size in np.unique(sizes)}
    return [longest[size] for size in sizes.tolist()]


def _record(
    task: Asked, item: tuple[str, int, int, str, str], generation: Generation, tokenizer: Tokenizer
) -> dict[str, Any]:
    name, size, index, question, answer = item
    output = written(generation.tokens, tokenizer)
    # A special token before the end is an error that plain decoding would hide: it drops them.
    clean = generation.stop == "eos" and not (generation.tokens < SPECIALS).any()
    marks = task.marks(question, output)
    return {
        "task": name,
        "size": size,
        "regime": "iid" if size in task.iid else "ood",
        "index": index,
        "question": question,
        "answer": answer,
        "output": output,
        "correct": clean and task.verify(question, output),
        "lenient": generation.stop != "nan" and lenient(output, answer),
        "stop": generation.stop,
        "ticks": generation.ticks,
        **({"marks": marks} if marks else {}),
    }


def written(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text behind ids, with special tokens shown by name instead of dropped."""
    edges = np.flatnonzero(ids < SPECIALS).tolist()
    if not edges:
        return tokenizer.decode(ids)
    starts, ends = [0, *(edge + 1 for edge in edges)], [*edges, len(ids)]
    texts = [tokenizer.decode(ids[a:b]) for a, b in zip(starts, ends, strict=True)]
    names = [*(_SPECIAL_NAMES[ids[edge]] for edge in edges), ""]
    return "".join(text + name for text, name in zip(texts, names, strict=True))


def lenient(output: str, answer: str) -> bool:
    """Whether the output would be right if form did not matter; the table at the top of this file is the rule."""
    return _essence(output, answer) == _essence(answer, answer)


def _essence(text: str, answer: str) -> str | None:
    text = re.sub(r"[\u2010-\u2015\u2212]", "-", unicodedata.normalize("NFKC", text))
    text = re.sub(r"^\s*```\w*\s*$|`", "", text, flags=re.MULTILINE)
    if re.fullmatch(r"-?\d+", answer):
        found = _INTEGER.search(text)
        integer = found[0].replace(",", "") if found else None
        return "0" if integer == "-0" else integer
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].removesuffix(".").rstrip() if lines else None


def cells(records: Iterable[dict[str, Any]], by_name: dict[str, Asked]) -> list[dict[str, Any]]:
    """Accuracy of every (task, size): with Wilson's 95 % interval, chance, and why outputs ended."""
    grouped: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in records:
        grouped.setdefault((record["task"], record["size"]), []).append(record)
    return [_cell(name, size, group, by_name[name]) for (name, size), group in grouped.items()]


def _cell(name: str, size: int, group: Sequence[dict[str, Any]], task: Asked) -> dict[str, Any]:
    n, right = len(group), sum(record["correct"] for record in group)
    low, high = wilson(right, n)
    ticks = [record["ticks"] for record in group if record["ticks"] is not None]
    marks = {mark for record in group for mark in record.get("marks", {})}
    return {
        "task": name,
        "size": size,
        "regime": group[0]["regime"],
        "n": n,
        "accuracy": right / n,
        "stderr": proportion_stderr(right, n),
        "low": low,
        "high": high,
        "chance": task.chance(size),
        "unique": len({record["question"] for record in group}),
        "lenient": sum(record["lenient"] for record in group) / n,
        "stops": dict(sorted(Counter(record["stop"] for record in group).items())),
        "ticks": float(np.mean(ticks)) if ticks else None,
        "marks": {mark: float(np.mean(_given(group, mark))) for mark in sorted(marks)},
    }


def _given(group: Iterable[dict[str, Any]], mark: str) -> list[float]:
    """A mark of those records that have it: a rate among wrong claims says nothing of right ones."""
    return [record["marks"][mark] for record in group if mark in record.get("marks", {})]


def brief(job: Job) -> dict[str, float]:
    """Accuracy by task on ``train.eval_samples`` validation items of the training range."""
    scores = {}
    for name, task in tasks(job.run):
        examples = task.glance(job.config.seed, job.run.train.eval_samples)
        sheet = Sheet(name, task, examples, np.arange(len(examples)))
        records = ask(job.model, job.tokenizer, sheet, job.config)
        scores[f"algorithmic/{name}"] = sum(record["correct"] for record in records) / len(records)
    return scores


def table(results: dict[str, Any]) -> Table:
    """Accuracy in per cent with its 95 % interval, a row a cell; narrow enough for a terminal of 80 columns."""
    shown = Table(title="algorithmic: exact match, %", box=SIMPLE)
    for column in ("task", "size", "", "accuracy", "95 %", "chance", "lenient", "n", "ticks"):
        shown.add_column(column, justify="left" if column in ("task", "") else "right")
    for cell in results["cells"]:
        interval = f"{100 * cell['low']:.0f}–{100 * cell['high']:.0f}"
        chance = f"{100 * cell['chance']:.3g}" if cell["chance"] >= 1e-4 else "<0.01"
        ticks = "" if cell["ticks"] is None else f"{cell['ticks']:.3g}"
        numbers = [f"{100 * cell['accuracy']:.1f}", interval, chance, f"{100 * cell['lenient']:.1f}", str(cell["n"])]
        shown.add_row(cell["task"], str(cell["size"]), cell["regime"], *numbers, ticks)
    return shown


@suite("algorithmic", needs="task", show=table, quick=brief)
def algorithmic(job: Job) -> Outcome:
    """Exact match of every task's answers, inside and beyond the sizes trained on."""
    asked = sheets(job.run, job.config.seed, job.config.samples)

    def advance(share: float) -> None:
        job.advance(share / len(asked))

    records = [r for sheet in asked for r in ask(job.model, job.tokenizer, sheet, job.config, advance=advance)]
    items = (item for sheet in asked for item in sheet.items())
    body: dict[str, Any] = {"cells": cells(records, dict(tasks(job.run)))}
    if job.config.memorize is not None:
        memorizer = Memorizer(job.model, job.config.memorize)
        with evaluating(job.model):
            again = [r for sheet in asked for r in memorized(job, sheet, memorizer)]
        body["memorize"] = memorizer.about()
        for cell, adapted in zip(body["cells"], cells(again, dict(tasks(job.run))), strict=True):
            cell["adapted"] = {name: adapted[name] for name in ("accuracy", "stderr", "low", "high", "lenient")}
        told = ("output", "correct", "lenient", "stop")
        records = [
            {**plain, "adapted": {name: record[name] for name in told}}
            for plain, record in zip(records, again, strict=True)
        ]
    return Outcome(body, records, items)


def memorized(job: Job, sheet: Sheet, memorizer: Memorizer) -> list[dict[str, Any]]:
    """The records of a sheet, each question asked when it, alone, was memorised.

    Its answer is fed, if at all, after that, and only where the question is not asked once more.
    """
    found = []
    questions, bound = sheet.examples.questions(), bounds(sheet, job.tokenizer)
    last = {question: place for place, question in enumerate(questions)}
    memorizer.reset()
    for place, (question, answer) in enumerate(zip(questions, sheet.examples.answers(), strict=True)):
        if memorizer.config.reset:
            memorizer.reset()
        ids = np.concatenate(([BOS], job.tokenizer.encode(question)))
        memorizer.read(ids)
        alone = Sheet(sheet.name, sheet.task, sheet.examples.take(np.array([place])), sheet.index[place : place + 1])
        config = job.config.model_copy(update={"max_new_tokens": job.config.max_new_tokens or bound[place]})
        with memorizer.applied():
            found += ask(job.model, job.tokenizer, alone, config)
        if memorizer.config.use_correct_answer and last[question] == place:
            memorizer.read(np.concatenate((ids, job.tokenizer.encode(answer), [EOS])))
    return found
