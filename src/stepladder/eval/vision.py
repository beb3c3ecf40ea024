"""The ``vision`` suite: held-out images are shown, what is written about them must be the answer.

As in every suite an answer counts if it is written character for character and then ended; nothing restricts the
model to the names of classes. Beside it stand the likelihood of the right answer and how well the confidence in the
first token of an answer is calibrated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.table import Table

from stepladder.core.stats import proportion_stderr, wilson
from stepladder.data.images import ImageSource, Question, answers, questions
from stepladder.data.tokenizers import EOS, SPECIALS
from stepladder.eval.decode import Pictured, generate, left_padded, shown
from stepladder.eval.exact import written
from stepladder.eval.suite import Job, Outcome, suite

BINS = 10
"""Bins of confidence, of equal width, in the calibration error."""
CONFUSIONS = 5
"""Pairs of answer and output that are shown, the commonest ones."""


def sources(job: Job) -> list[tuple[str, ImageSource]]:
    """The run's sources of images, with their names."""
    named = zip(job.run.data.names(), job.run.data.sources, strict=True)
    return [(name, source) for name, source in named if isinstance(source, ImageSource)]


def _images(source: ImageSource, asked: Sequence[Question]) -> Sequence[Pictured] | None:
    return asked if source.levels is None else None


def ask(
    job: Job, name: str, source: ImageSource, asked: Sequence[Question], advance: Callable[[float], object] = float
) -> list[dict[str, Any]]:
    """Decode every question and score it, one record each."""
    config = job.config
    longest = max(len(ids) for ids in job.tokenizer.encode_all(answers(source, source.gallery.classes)))
    generations = generate(
        job.model,
        [question.tokens for question in asked],
        max_new=config.max_new_tokens or longest + 2,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        key=config.seed,
        batch=config.batch,
        images=_images(source, asked),
        advance=advance,
    )
    records: list[dict[str, Any]] = []
    for question, one in zip(asked, generations, strict=True):
        clean = one.stop == "eos" and not (one.tokens < SPECIALS).any()
        output = written(one.tokens, job.tokenizer)
        records.append(
            {
                **_place(name, source),
                "index": len(records),
                "question": f"{source.question} {question.index}",
                "labels": question.labels,
                "answer": question.answer,
                "output": output,
                "correct": clean and output == question.answer,
                "stop": one.stop,
                "ticks": one.ticks,
            }
        )
    return records


def _place(name: str, source: ImageSource) -> dict[str, Any]:
    """Where an item or a cell stands in the grid: sizes are images of a question, and all are as in training."""
    return {"task": name, "size": source.shown, "regime": "iid"}


def likelihood(job: Job, source: ImageSource, asked: Sequence[Question]) -> list[dict[str, float]]:
    """Of every question: ``nll`` of the right answer and its end, in nats; ``confidence``, the largest probability of
    an answer's first token; and ``first``, whether that token is the right one."""
    device = job.model.embed.tokens.weight.device
    found = []
    for start in range(0, len(asked), job.config.batch):
        here = asked[start : start + job.config.batch]
        texts = [np.concatenate((question.tokens, question.told)) for question in here]
        tokens, inside = (part.to(device) for part in left_padded(texts))
        slots = [_Padded(question) for question in here]
        images = shown(slots, device) if _images(source, here) is not None else None
        given = {} if images is None else {"images": images}
        targets = torch.full_like(tokens, -1)
        for row, question in enumerate(here):
            right = torch.from_numpy(np.append(question.told, EOS)).to(device)
            targets[row, -len(right) :] = right
        mask = targets >= 0
        logits = job.model(tokens, documents=inside, logits_at=mask, key=job.config.seed, **given).logits
        logs, wanted = logits.log_softmax(-1), targets[mask]
        nll = torch.zeros(tokens.shape, dtype=logs.dtype, device=device)
        nll[mask] = -logs.gather(1, wanted[:, None])[:, 0]
        firsts = np.cumsum([0, *(len(question.told) + 1 for question in here[:-1])])
        top, choice = logs[torch.from_numpy(firsts).to(device)].max(-1)
        first = (choice == wanted[torch.from_numpy(firsts).to(device)]).double()
        rows = zip(nll.double().sum(1).tolist(), top.double().exp().tolist(), first.tolist(), strict=True)
        found += [{"nll": n, "confidence": c, "first": f} for n, c, f in rows]
    return found


class _Padded:
    """A question with its answer: the answer has no slots."""

    def __init__(self, question: Question) -> None:
        self.pixels = question.pixels
        self.slots = np.pad(question.slots, (0, len(question.told)), constant_values=-1)


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """The expected calibration error (Guo et al., 2017, equation 3) in ten bins of equal width."""
    places = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    inside = [places == place for place in range(BINS)]
    return float(sum(abs(confidence[i].sum() - right[i].sum()) for i in inside) / len(right))


def _cell(name: str, source: ImageSource, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    n, right = len(records), sum(record["correct"] for record in records)
    low, high = wilson(right, n)
    by_answer: dict[str, list[bool]] = {}
    for record in records:
        by_answer.setdefault(record["answer"], []).append(record["correct"])
    each = {text: float(np.mean(found)) for text, found in sorted(by_answer.items())}
    wrong = Counter((record["answer"], record["output"]) for record in records if not record["correct"])
    ticks = [record["ticks"] for record in records if record["ticks"] is not None]
    confidence, first = (np.array([record[part] for record in records]) for part in ("confidence", "first"))
    return {
        **_place(name, source),
        "n": n,
        "accuracy": right / n,
        "stderr": proportion_stderr(right, n),
        "low": low,
        "high": high,
        "chance": 1 / len(set(answers(source, source.gallery.classes))),
        "macro": float(np.mean(list(each.values()))),
        "by_answer": each,
        "confusions": [[*pair, count] for pair, count in wrong.most_common(CONFUSIONS)],
        "nll": float(np.mean([record["nll"] for record in records])),
        "ece": calibration_error(confidence, first),
        "stops": dict(sorted(Counter(record["stop"] for record in records).items())),
        "ticks": float(np.mean(ticks)) if ticks else None,
        "ticks_median": float(np.median(ticks)) if ticks else None,
    }


def brief(job: Job) -> dict[str, float]:
    """Accuracy by source on ``train.eval_samples`` validation images."""
    scores = {}
    for name, source in sources(job):
        asked = questions(source, job.tokenizer, job.config.seed, job.run.train.eval_samples, "valid")
        records = ask(job, name, source, asked)
        scores[f"vision/{name}"] = sum(record["correct"] for record in records) / len(records)
    return scores


def table(results: dict[str, Any]) -> Table:
    """A row a source, in per cent."""
    shown = Table(title="vision: exact match, %", box=SIMPLE)
    for column in ("images", "accuracy", "95 %", "chance", "nll", "ECE", "n", "ticks"):
        shown.add_column(column, justify="left" if column == "images" else "right")
    for cell in results["cells"]:
        shares = [f"{100 * cell[part]:.1f}" for part in ("accuracy", "low", "high", "chance")]
        numbers = [shares[0], f"{shares[1]}–{shares[2]}", *shares[3:], f"{cell['nll']:.3f}", f"{cell['ece']:.3f}"]
        ticks = "" if cell["ticks"] is None else f"{cell['ticks']:.3g}"
        shown.add_row(cell["task"], *numbers, str(cell["n"]), ticks)
    return shown


@suite("vision", needs="image", show=table, quick=brief)
def vision(job: Job) -> Outcome:
    """Exact match of what is written about held-out images."""
    records, cells, items = [], [], []
    named = sources(job)
    for name, source in named:
        asked = questions(source, job.tokenizer, job.config.seed, job.config.samples)
        found = ask(job, name, source, asked, lambda share: job.advance(share / len(named)))
        more = likelihood(job, source, asked)
        found = [{**record, **extra} for record, extra in zip(found, more, strict=True)]
        cells.append(_cell(name, source, found))
        records += found
        items += [(name, question.index, question.labels, question.answer) for question in asked]
    return Outcome({"cells": cells}, records, items)
