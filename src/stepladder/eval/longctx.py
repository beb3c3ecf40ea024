"""The ``longctx`` suite: needles in a haystack. Does the model find one fact in a long text, and how deep may it lie?

Items are those of ``haystack``: kinds of needles x lengths in tokens x depths. Three figures of a cell:

``accuracy``  the greedy continuation of the question is the answer, token for token, and ends there: by the
              end-of-sequence token, as the task ``needle`` teaches, or by a full stop, as the fact in the text goes on.
``prefix``    the same without the end.
``choice``    the answer is likelier than three others of as many tokens, in ``multi_key`` those that the text gives for
              the other keys; if several are likeliest each has its share, so that a model without preference scores
              ``choice_chance``.

Greedy decoding writes an answer exactly when the answer is its choice at every place, so one forward over the prompt
and one short one for each choice tell all. ``output`` in the records is what greedy decoding writes, up to its first
mistake.

With ``eval.memorize`` every item is asked twice more behind what was memorised of its text without the question:
``adapted``, the whole prompt; and ``recall``, the question alone, which nothing but a memory can answer.

A length is ``trained`` if it fits into a row of the run's training data. A cell that cannot be asked has no figures and
says why in ``status``: "beyond the model" (more tokens than its learned positions, or refused by it), or "too short"
(no room for text around the needle).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor

from stepladder.core.errors import UserError
from stepladder.core.keys import key
from stepladder.core.stats import proportion_stderr, wilson
from stepladder.data.corpora import PYDOC, Corpus
from stepladder.data.shards import prepare
from stepladder.data.stream import Stream
from stepladder.data.tasks.needle import possible
from stepladder.data.tokenizers import EOS, Tokenizer
from stepladder.eval.decode import Sampling, choose, evaluating
from stepladder.eval.exact import written
from stepladder.eval.haystack import CHOICES, KINDS, Documents, Item, flaw, items, spellable
from stepladder.eval.memorize import Memorizer
from stepladder.eval.suite import Job, Outcome, suite
from stepladder.models.lm import LanguageModel
from stepladder.run import cache_folder

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SAMPLES = 20
"""Items of a cell, at most: fewer if ``eval.samples`` is smaller."""
TOKENS = 1 << 14
"""Tokens of a batch, about: what bounds the memory at every length."""

CANNOT_SPELL = (
    "nothing to evaluate: the run's tokenizer '{}' does not have all characters of {}; train with tokenizer 'byte' or"
    " 'bpe', or on a text that has them"
)

_FIGURES = ("accuracy", "stderr", "low", "high", "chance", "prefix", "choice", "choice_chance")


def reach(model: LanguageModel) -> int | None:
    """The most tokens of a document that a model with learned positions takes; None for any other."""
    table = getattr(getattr(model, "embed", None), "positions", None)
    return None if table is None else int(table.num_embeddings)


def answer(model: LanguageModel, batch: Sequence[Item], tokenizer: Tokenizer, seed: int) -> list[dict[str, Any]]:
    """One record for every item; prompts and answers must have the same number of tokens throughout."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    prompts = torch.from_numpy(np.stack([item.prompt for item in batch])).to(device)
    options = torch.from_numpy(np.stack([item.options for item in batch])).to(device)  # [B, CHOICES, A]
    root = key(seed, "longctx", "noise")
    noise = torch.tensor([(root / item.kind / item.length / item.index).seed() for item in batch], device=device)
    with evaluating(model):
        first = model(prompts, key=noise, logits_at="last")
        # The state is a value: every choice goes on from the same one.
        logits = [_logits(first.logits, model(options[:, c], first.state).logits) for c in range(CHOICES)]
        picks, usable = (
            t.view(len(batch), -1).cpu().numpy() for t in choose(logits[0].flatten(0, 1), Sampling(), None)
        )
        likely = torch.stack([_likelihood(l, options[:, c]) for c, l in enumerate(logits)], dim=1).cpu().numpy()
    return [_record(item, tokenizer, *row) for item, *row in zip(batch, picks, usable, likely, strict=True)]


def _logits(first: Tensor | None, rest: Tensor | None) -> Tensor:
    """The logits (B, A + 1, V) at the end of the prompt and at every token of an answer of A tokens."""
    assert first is not None
    assert rest is not None
    return torch.cat((first[:, -1:], rest), dim=1)


def _likelihood(logits: Tensor, answer_BA: Tensor) -> Tensor:
    """Log-likelihood (B,) of an answer, in nats; its end is not part of it."""
    return logits[:, :-1].double().log_softmax(dim=-1).gather(2, answer_BA[:, :, None]).sum(dim=(1, 2))


def _record(
    item: Item, tokenizer: Tokenizer, picks: np.ndarray, usable: np.ndarray, likely: np.ndarray
) -> dict[str, Any]:
    right = (picks[:-1] == item.options[0]) & usable[:-1]
    said = len(right) if right.all() else int(right.argmin()) + 1  # tokens up to the first mistake
    prefix = bool(right.all())
    ends = bool(usable[-1]) and (picks[-1] == EOS or tokenizer.pieces[picks[-1]].startswith(b"."))
    top = likely == likely.max()
    return {
        "kind": item.kind,
        "length": item.length,
        "depth": item.depth,
        "index": item.index,
        "place": item.start,
        "question": item.question,
        "answer": item.choices[0],
        "others": list(item.choices[1:]),
        "output": written(picks[: said + (prefix and not ends)], tokenizer),
        "correct": prefix and ends,
        "prefix": prefix,
        "choice": float(top[0] / top.sum()) if np.isfinite(likely).all() else 0.0,
        "usable": bool(usable.all()),
    }


def documents(job: Job) -> Documents | str:
    """The validation documents of the run's texts, or else those of 'pydoc'; or a sentence that says why not."""
    if not spellable(job.tokenizer):
        return CANNOT_SPELL.format(job.tokenizer.kind, "the needles, which are those of the task 'needle'")
    if any(source.serves == "text" for source in job.run.data.sources):
        stream = job.stream or Stream(job.run.data, job.run.seed, cache_folder(), job.tokenizer)
        return Documents([shards.valid for shards in stream.texts.values()], job.tokenizer)
    try:
        shards = prepare(Corpus(PYDOC), job.tokenizer, cache_folder())
        strange = shards.about["splits"]["valid"]["unknown"]
    except UserError:  # of an alphabet that knows the tasks' characters only
        strange = 1
    if strange:
        return CANNOT_SPELL.format(job.tokenizer.kind, "a text, and the run has no text source")
    return Documents([shards.valid], job.tokenizer)


def _batches(asked: Sequence[Item], length: int, most: int) -> Iterator[list[Item]]:
    """Items in batches of at most ``most`` and about TOKENS tokens, of equal shapes."""

    def shape(item: Item) -> tuple[int, int]:
        return len(item.prompt), item.options.shape[1]

    rows = max(1, min(most, TOKENS // length))
    for _, group in itertools.groupby(sorted(asked, key=shape), key=shape):
        same = list(group)
        yield from (same[i : i + rows] for i in range(0, len(same), rows))


def memorized(job: Job, memorizer: Memorizer, item: Item, feed: bool) -> dict[str, Any]:
    """What the record of an item gains by memorising. feed: whether its answer is memorised too, when all is scored."""
    question = job.tokenizer.encode(item.question).astype(np.int64)
    alone = replace(item, prompt=np.concatenate((item.prompt[:1], question)))
    if memorizer.config.reset:
        memorizer.reset()
    memorizer.read(item.prompt[: -len(question)])
    found: dict[str, Any] = {}
    with memorizer.applied():
        for name, each in (("adapted", item), ("recall", alone)):
            (record,) = answer(job.model, [each], job.tokenizer, job.config.seed)
            found |= {f"{name}_correct": record["correct"], f"{name}_choice": record["choice"]}
    if feed:
        memorizer.read(np.concatenate((question, item.options[0], [EOS])))
    return found


def _ask(job: Job, asked: Sequence[Item], length: int, memorizer: Memorizer | None) -> list[dict[str, Any]] | str:
    """The records of items of one length, in their order; or what the model said when it refused the length."""
    limit = reach(job.model)
    if limit is not None and length - 1 > limit:  # the end of sequence is never fed
        return f"{limit} learned positions"
    records: dict[tuple[int, float], dict[str, Any]] = {}
    for batch in _batches(asked, length, job.config.batch):
        try:
            found = answer(job.model, batch, job.tokenizer, job.config.seed)
        except UserError as error:
            if length <= job.run.data.sequence:
                raise  # it was trained at this length
            return str(error)
        records |= {(record["index"], record["depth"]): record for record in found}
    if memorizer is not None:
        last = {item.choices[0]: place for place, item in enumerate(asked)}  # depths of an item share its answer
        with evaluating(job.model):
            for place, item in enumerate(asked):
                feed = memorizer.config.use_correct_answer and last[item.choices[0]] == place
                records[item.index, item.depth] |= memorized(job, memorizer, item, feed)
    return [records[item.index, item.depth] for item in asked]


def _cell(about: dict[str, Any], group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    n, right = len(group), sum(record["correct"] for record in group)
    low, high = wilson(right, n)
    return {
        **about,
        "status": "complete",
        "n": n,
        "accuracy": right / n,
        "stderr": proportion_stderr(right, n),
        "low": low,
        "high": high,
        "chance": 1 / possible(KINDS[about["kind"]][0]),
        "prefix": sum(record["prefix"] for record in group) / n,
        "choice": sum(record["choice"] for record in group) / n,
        "choice_chance": 1 / CHOICES,
        **{
            f"{name}_{figure}": sum(record[f"{name}_{field}"] for record in group) / n
            for name in ("adapted", "recall")
            for figure, field in (("accuracy", "correct"), ("choice", "choice"))
            if f"{name}_{field}" in group[0]
        },
    }


def area(depths: Sequence[float], accuracies: Sequence[float]) -> float:
    """The area under a curve over depths, by the trapezoid rule, over the range of depths: the mean of the curve."""
    points = itertools.pairwise(zip(depths, accuracies, strict=True))
    return sum((b - a) * (low + high) / 2 for (a, low), (b, high) in points) / (depths[-1] - depths[0])


def table(results: dict[str, Any]) -> Table:
    """Accuracy in per cent: a row for every kind and length, a column for every depth."""
    shown = Table(title="longctx: needle found, %, by depth", box=SIMPLE, caption=results.get("note"))
    shown.add_column("kind")
    more = ("adapted", "recall") if "memorize" in results and results["memorize"]["applied"] else ()
    for column in ("length", *(f"{depth:g}" for depth in DEPTHS), "area", "choice", *more):
        shown.add_column(column, justify="right")
    shown.add_column("")
    curves = itertools.groupby(results["cells"], key=lambda cell: (cell["kind"], cell["length"]))
    for ((kind, length), curve), about in zip(curves, results["curves"], strict=True):
        row = list(curve)
        remark = "" if about["trained"] else "untrained"
        if about["status"] != "complete":
            numbers, remark = [""] * (len(row) + 2 + len(more)), about["status"]
        else:
            choice = sum(cell["choice"] for cell in row) / len(row)
            means = [sum(cell[f"{name}_accuracy"] for cell in row) / len(row) for name in more]
            parts = (*(cell["accuracy"] for cell in row), about["area"], choice, *means)
            numbers = [f"{100 * part:.0f}" for part in parts]
        shown.add_row(kind, str(length), *numbers, remark)
    return shown


@suite("longctx", needs="any", show=table, texts=True)
def longctx(job: Job) -> Outcome:
    """Needles in validation text, by length and depth: greedy answers, and the likelihood of the right one."""
    texts = documents(job)
    if isinstance(texts, str):
        return Outcome({"message": texts})
    lengths = sorted(set(job.config.lengths))
    memorizer = None if job.config.memorize is None else Memorizer(job.model, job.config.memorize)
    cells: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    asked: list[Any] = []
    for kind, length in itertools.product(KINDS, lengths):
        drawn = _draw(texts, job, kind, length)
        asked += [_question(item) for item in drawn or ()]
        found = "no room for a haystack" if drawn is None else _ask(job, drawn, length, memorizer)
        status = "complete" if isinstance(found, list) else "too short" if drawn is None else "beyond the model"
        about = {"kind": kind, "length": length, "trained": length <= job.run.data.sequence, "status": status}
        if isinstance(found, list):
            curve = [_cell({**about, "depth": d}, [r for r in found if r["depth"] == d]) for d in DEPTHS]
            records += found
            curves.append({**about, "area": area(DEPTHS, [cell["accuracy"] for cell in curve])})
        else:
            about["reason"] = found
            curve = [{**about, "depth": d, "n": 0, **dict.fromkeys(_FIGURES)} for d in DEPTHS]
            curves.append({**about, "area": None})
        cells += curve
        job.advance(length / sum(lengths) / len(KINDS))
    body: dict[str, Any] = {"cells": cells, "curves": curves, "by": "length"}
    body["haystack"] = {"documents": texts.count, "tokens": texts.tokens}
    if memorizer is not None:
        body["memorize"] = memorizer.about()
    if texts.tokens < lengths[-1]:
        body["note"] = f"the validation text has {texts.tokens} tokens: longer haystacks repeat it"
    return Outcome(body, records, asked)


def _draw(texts: Documents, job: Job, kind: str, length: int) -> list[Item] | None:
    """The items of a kind and length, each of them checked; None if there is no room for them."""
    drawn: list[Item] = []
    for index in range(min(job.config.samples, SAMPLES)):
        found = items(texts, job.config.seed, kind, length, DEPTHS, index)
        if found is None:
            return None
        drawn += found
    for item in drawn:
        if problem := flaw(item, job.tokenizer):
            raise RuntimeError(f"longctx item {kind}, {length} tokens, depth {item.depth}, {item.index}: {problem}")
    return drawn


def _question(item: Item) -> tuple[Any, ...]:
    """What the digest of the items is taken over."""
    text = hashlib.sha256(item.prompt.tobytes()).hexdigest()
    return item.kind, item.length, item.depth, item.index, text, item.choices
