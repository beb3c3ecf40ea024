"""The ``halting`` suite: what a model that decides when to stop gains by deciding.

Items are those of the ``algorithmic`` suite, teacher-forced: one forward over question and answer gives what the model
chooses at every answer token (the end-of-sequence token is one), the right tokens being before it. So exits compare
token by token in one context, and a tick budget costs one forward instead of a decoding. An item whose
tokens are all right is one that greedy decoding gets right, unless the task knows several right answers: ``exact``.

*Exit t* is the run of the model in which every place executes exactly t ticks. The model's own policy is asked as
ever, but a weight that would make it stop before t is withheld, and what weight is left at tick t goes to the state of
tick t, as it does at any cap. So a place's exit at the tick where it stops by itself gives its own mixture of states;
at another tick it gives what it had by then, or what the ticks that it did without would have added. (A budget that is
only a cap cannot say the latter; random exits would then seem to lose, by being cut short, even against a policy that
tosses a coin.) The exits of a token:

``learned``   the exit at the number of ticks that the model took for it.
``random``    the learned numbers of ticks, shuffled among the tokens of a cell (one task, one size): equal compute,
              nothing decided. Not one shuffle but the mean over all of them, which is known: every exit, weighted by
              how often it was taken.
``fixed``     one budget for all: the mixture of the two neighbouring whole budgets with the learned mean of ticks.
``oracle``    the earliest exit at which the token is right, else the last. No choice among these exits is better.

``gain`` is learned - random, ``over_fixed`` is learned - fixed, with standard errors over questions. A policy that does
not beat its own shuffle decides nothing that matters *within* a size; the correlation of ticks and size tells about
the rest. ``accuracy`` is the model as it runs, every token at its own exit; it differs from ``learned`` only through
the tokens before, which in an exit's run take that exit too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor

from stepladder.core.stats import ratio_stderr
from stepladder.data.packing import Encoded, encode
from stepladder.data.tokenizers import BOS, EOS, PAD
from stepladder.eval.decode import Sampling, choose, evaluating
from stepladder.eval.exact import Sheet, sheets
from stepladder.eval.suite import Job, Outcome, suite
from stepladder.models.halting import Halting, Progress
from stepladder.models.lm import LanguageModel

NO_CHOICE = "this architecture does not choose its ticks: nothing to compare, ticks are those it always takes"

BINS = 10
"""Bins of the calibration error, of equal numbers of tokens."""


class Exit(Halting):
    """A policy that goes on to the cap: what would make it stop before is withheld, see the top of this file."""

    def __init__(self, policy: Halting) -> None:
        super().__init__(policy.min_ticks, policy.price)
        self.policy = policy
        self.mixes = policy.mixes

    def decide(self, new_BND: Tensor, old_BND: Tensor, before: Progress) -> tuple[Tensor, Tensor]:
        offer, stop = self.policy.decide(new_BND, old_BND, before)
        return torch.where(stop, torch.zeros_like(offer), offer), torch.zeros_like(stop)


@contextmanager
def exits(model: LanguageModel) -> Iterator[None]:
    """Inside, every place executes the whole tick budget that the model is called with; afterwards it is as before."""
    policies = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, Halting)
    ]
    try:
        for parent, name, child in policies:
            setattr(parent, name, Exit(child))
        yield
    finally:
        for parent, name, child in policies:
            setattr(parent, name, child)


def chooses(model: LanguageModel, ticks: int) -> bool:
    """Whether some place may take fewer than ``ticks`` ticks by a decision of the model."""
    return any(isinstance(module, Halting) and module.least(ticks) < ticks for module in model.modules())


@dataclass(frozen=True)
class Choices:
    """What the model chose at the n answer tokens of a sheet, in order.

    item: row of the sheet, int [n]. right: bool [n]; confidence: the probability of the choice, 0 where the logits
    are unusable, [n]; ticks: executed, [n]. at: right at every exit 1..K, bool [K, n]; K = 0 for a model that does
    not choose. loops: ticks that the batch of each token executed, the most that any of its places took, [n].
    """

    item: np.ndarray
    right: np.ndarray
    confidence: np.ndarray
    ticks: np.ndarray
    at: np.ndarray
    loops: np.ndarray

    def of(self, chosen: np.ndarray) -> Choices:
        """Those of a part of the tokens."""
        names = (field.name for field in dataclasses.fields(self))
        return Choices(**{name: getattr(self, name)[..., chosen] for name in names})


def walk(
    model: LanguageModel, encoded: Encoded, budget: int, batch: int, advance: Callable[[float], object] = float
) -> Choices:
    """The model's choices at the answers of some items, by its own exits and at every exit up to ``budget`` (or 0)."""
    total, found = len(encoded.question), []
    with evaluating(model):
        for start in range(0, total, batch):
            rows = np.arange(start, min(start + batch, total))
            found.append(_walk(model, encoded, rows, budget))
            advance(len(rows) / total)
    parts = zip(*found, strict=True)
    return Choices(*(np.concatenate(part, axis=-1) for part in parts))


def _walk(model: LanguageModel, encoded: Encoded, rows: np.ndarray, budget: int) -> tuple[np.ndarray, ...]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    tokens, scored = (torch.from_numpy(part).to(device) for part in texts(encoded, rows))
    inputs, goals, scored = tokens[:, :-1], tokens[:, 1:][scored[:, 1:]], scored[:, 1:]

    def run(ticks: int | None) -> tuple[Tensor, Tensor, Tensor]:
        out = model(inputs, ticks=ticks, logits_at=scored, trace=True)
        assert out.logits is not None
        picks, usable = choose(out.logits, Sampling(), None)
        mass = out.logits.double().softmax(-1).gather(-1, picks[:, None])[:, 0]
        taken = out.trace.get("ticks")  # a model without a loop may report none
        taken = torch.ones_like(inputs) if taken is None else taken
        return (picks == goals) & usable, torch.where(usable, mass, 0.0), taken

    right, confidence, taken = run(None)
    with exits(model):
        at = [run(ticks)[0] for ticks in range(1, budget + 1)]
    table = torch.stack(at) if at else right.new_zeros((0, len(right)))
    item = torch.from_numpy(rows).to(device)[:, None].expand_as(scored)[scored]
    # Right padding is after the text, so by the law of causality it changes nothing; but the batch does compute it.
    loops = torch.full_like(right, int(taken.max()), dtype=torch.int64)
    parts = (item, right, confidence, taken[scored].double(), table, loops)
    return tuple(part.cpu().numpy() for part in parts)


def texts(encoded: Encoded, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[BOS] question answer [EOS] in rows, padded on the right: ids, and which of them are scored. int64, bool."""
    longest = int(encoded.total[rows].max())
    tokens, scored = np.full((len(rows), longest), PAD, np.int64), np.zeros((len(rows), longest), bool)
    for line, row in enumerate(rows):
        asked, said = int(encoded.question_tokens[row]), int(encoded.answer_tokens[row])
        question, answer = encoded.question[row, :asked], encoded.answer[row, :said]
        tokens[line, : asked + said + 2] = np.concatenate(([BOS], question, answer, [EOS]))
        scored[line, asked + 1 : asked + said + 2] = True
    return tokens, scored


# What they say ------------------------------------------------------------------------------------------------------


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: sum over bins of n_b / n x |share right - mean confidence|, in 0..1.

    Bins hold equal numbers of tokens, in the order of their confidence (Nguyen & O'Connor, 2015), so that none is
    empty; with few tokens the error is biased upwards. Differs from the common form in that: its bins are equally wide.
    """
    groups = np.array_split(np.argsort(confidence, kind="stable"), min(bins, len(confidence)))
    return sum(len(g) * abs(float(right[g].mean() - confidence[g].mean())) for g in groups) / len(confidence)


def compare(choices: Choices, question: np.ndarray) -> dict[str, float | None]:
    """The exits of the tokens of one cell, as the top of this file defines them: accuracies and differences.

    question: which question each token belongs to, int [n]; standard errors are over those, since the tokens of one,
    and of a small size's questions that come twice, are not independent.
    """
    if not len(choices.at):
        names = ("learned", "random", "fixed", "oracle", "oracle_ticks")
        return dict.fromkeys((*names, "gain", "gain_stderr", "over_fixed", "over_fixed_stderr"))
    count, tokens = choices.at.shape
    taken = np.clip(choices.ticks.round().astype(np.int64), 1, count)
    learned = choices.at[taken - 1, np.arange(tokens)].astype(float)
    share = np.bincount(taken, minlength=count + 1)[1:] / tokens
    random = share @ choices.at
    mean = float(taken.mean())
    low = min(int(mean), count - 1)
    fixed = (1 - (mean - low)) * choices.at[low - 1] + (mean - low) * choices.at[low]
    hit = choices.at.any(axis=0)
    earliest = np.where(hit, choices.at.argmax(axis=0) + 1, count)
    gain, gain_stderr = _difference(learned - random, question)
    over, over_stderr = _difference(learned - fixed, question)
    return {
        "learned": float(learned.mean()),
        "random": float(random.mean()),
        "fixed": float(fixed.mean()),
        "oracle": float(hit.mean()),
        "oracle_ticks": float(earliest.mean()),
        "gain": gain,
        "gain_stderr": gain_stderr,
        "over_fixed": over,
        "over_fixed_stderr": over_stderr,
    }


def _difference(by_token: np.ndarray, question: np.ndarray) -> tuple[float, float | None]:
    """The mean over tokens, and its standard error over questions."""
    tops, bottoms = np.bincount(question, weights=by_token), np.bincount(question)
    asked = bottoms > 0
    stderr = ratio_stderr(tops[asked], bottoms[asked])
    return float(by_token.mean()), stderr if math.isfinite(stderr) else None


def _cell(name: str, size: int, regime: str, choices: Choices, question: np.ndarray) -> dict[str, Any]:
    items, tokens = np.unique(choices.item), len(choices.item)
    wrong = np.unique(choices.item[~choices.right])
    return {
        "task": name,
        "size": size,
        "regime": regime,
        "n": len(items),
        "tokens": tokens,
        "accuracy": float(choices.right.mean()),
        "exact": 1 - len(wrong) / len(items),
        "mean_ticks": float(choices.ticks.mean()),
        **compare(choices, question),
    }


def _by_ticks(choices: Choices, **about: Any) -> list[dict[str, Any]]:
    """Rows of the tokens that took equally many ticks: how many they are, and how many are right."""
    rows = []
    for ticks in np.unique(choices.ticks).tolist():
        group = choices.of(choices.ticks == ticks)
        number = int(ticks) if float(ticks).is_integer() else ticks
        right, mean = float(group.right.mean()), float(group.confidence.mean())
        rows.append({**about, "ticks": number, "tokens": len(group.right), "accuracy": right, "confidence": mean})
    return rows


def _calibration(name: str, regime: str, choices: Choices) -> dict[str, Any]:
    surplus = float(choices.confidence.mean() - choices.right.mean())
    error = calibration_error(choices.confidence, choices.right)
    return {"task": name, "regime": regime, "tokens": len(choices.item), "error": error, "overconfidence": surplus}


def correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Pearson's; None where one of the two does not vary."""
    return None if np.ptp(first) == 0 or np.ptp(second) == 0 else float(np.corrcoef(first, second)[0, 1])


def _records(sheet: Sheet, choices: Choices) -> list[dict[str, Any]]:
    """One record an item; lists go by answer token. ``right_at``: the exits at which the token is right."""
    cuts = np.searchsorted(choices.item, np.arange(1, len(sheet.index)))
    parts = (np.split(part, cuts) for part in (choices.right, choices.ticks, choices.confidence, choices.at.T))
    rows = zip(sheet.items(), *parts, strict=True)
    return [
        {
            "task": name,
            "size": size,
            "regime": "iid" if size in sheet.task.iid else "ood",
            "index": index,
            "question": question,
            "answer": answer,
            "correct": bool(right.all()),
            "right": right.tolist(),
            "ticks": ticks.tolist(),
            "confidence": confidence.round(6).tolist(),
            "right_at": [(np.flatnonzero(token) + 1).tolist() for token in at],
        }
        for (name, size, index, question, answer), right, ticks, confidence, at in rows
    ]


def table(results: dict[str, Any]) -> Table:
    """Accuracies of answer tokens in per cent, a row a cell."""
    shown = Table(title="halting: answer tokens right, %, by exit", box=SIMPLE, caption=results.get("note"))
    for column in ("task", "size", "", "ticks", "own", "learned", "random", "fixed", "oracle", "gain"):
        shown.add_column(column, justify="left" if column in ("task", "") else "right")
    for cell in results["cells"]:
        numbers = (cell[name] for name in ("accuracy", "learned", "random", "fixed", "oracle"))
        percent = ["" if number is None else f"{100 * number:.1f}" for number in numbers]
        gain, stderr = cell["gain"], cell["gain_stderr"]
        gained = "" if gain is None else f"{100 * gain:+.1f}" + ("" if stderr is None else f"±{100 * stderr:.1f}")
        shown.add_row(cell["task"], str(cell["size"]), cell["regime"], f"{cell['mean_ticks']:.2f}", *percent, gained)
    return shown


@suite("halting", needs="task", show=table)
def halting(job: Job) -> Outcome:
    """Accuracy against executed ticks, calibration, and the learned exits against random, fixed and oracle ones."""
    trained = int(getattr(job.run.model, "ticks", 1))
    budget = trained if chooses(job.model, trained) else 0
    asked = sheets(job.run, job.config.seed, job.config.samples)
    body: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("cells", "histogram", "by_ticks", "fixed", "calibration", "informative")
    }
    records: list[dict[str, Any]] = []
    ticks, loops = [], []

    def advance(share: float) -> None:
        job.advance(share / len(asked))

    for sheet in asked:
        choices = walk(job.model, encode(sheet.examples, job.tokenizer), budget, job.config.batch, advance)
        size_of = sheet.examples.size[choices.item]
        question_of = np.unique(sheet.examples.questions(), return_inverse=True)[1][choices.item]
        for size in (*sheet.task.iid, *sheet.task.ood):
            here, regime = choices.of(size_of == size), "iid" if size in sheet.task.iid else "ood"
            body["cells"].append(_cell(sheet.name, size, regime, here, question_of[size_of == size]))
            about = {"task": sheet.name, "size": size}
            body["histogram"] += [
                {name: row[name] for name in ("task", "size", "ticks", "tokens")} for row in _by_ticks(here, **about)
            ]
            accuracies = enumerate(here.at.mean(axis=1).tolist(), start=1)
            body["fixed"] += [{**about, "regime": regime, "ticks": t, "accuracy": a} for t, a in accuracies]
        body["by_ticks"] += _by_ticks(choices, task=sheet.name)
        for regime, sizes in (("iid", sheet.task.iid), ("ood", sheet.task.ood)):
            if sizes:
                body["calibration"].append(_calibration(sheet.name, regime, choices.of(np.isin(size_of, sizes))))
        found = correlation(choices.ticks, size_of)
        body["informative"].append({"task": sheet.name, "ticks_and_size": found})
        records += _records(sheet, choices)
        ticks.append(choices.ticks)
        loops.append(choices.loops)
    items = (item for sheet in asked for item in sheet.items())
    executed = _executed(job, budget, float(np.concatenate(ticks).mean()), float(np.concatenate(loops).mean()))
    note = {} if budget else {"note": NO_CHOICE}
    return Outcome({**body, "executed": executed, "chooses": bool(budget), **note}, records, items)


def _executed(job: Job, budget: int, ticks: float, loops: float) -> dict[str, Any]:
    """Ticks and forward FLOPs per token, three ways: as declared, where all places take all ticks; at the mean of what
    places took, which a machine that computes each place alone would spend; and as this evaluation computed them, a
    batch going on until its last place has stopped."""
    context = job.run.data.sequence
    declared = job.model.cost(context).flops
    return {
        "budget": budget or None,
        "ticks": ticks,
        "batch_ticks": loops,
        "batch_rows": job.config.batch,
        "context": context,
        "flops_declared": declared,
        "flops": _flops(job.model, context, ticks) if budget else declared,
        "flops_batch": _flops(job.model, context, loops) if budget else declared,
    }


def _flops(model: LanguageModel, context: int, ticks: float) -> float:
    """Forward FLOPs per token at a mean number of ticks: linear between whole ones."""
    low = math.floor(ticks)
    ends = [model.cost(context, count).flops for count in (low, low + 1)]
    return ends[0] + (ticks - low) * (ends[1] - ends[0])
