"""The ``likelihood`` suite: perplexity and bits per byte of validation text.

Windows of the run's sequence length, one after the other, each from an empty state: every token but the first of a
document is predicted once, in the last, shorter window too. Sums run over tokens in float64, so a short window weighs
what it holds. Perplexity belongs to a tokenizer; bits per byte compare across tokenizers: the nats of all predicted
tokens, ends of documents included, over the bytes of the text.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.table import Table

from stepladder.core.stats import ratio_stderr
from stepladder.data.stream import Stream, TextBatch
from stepladder.data.tokenizers import IGNORE, PAD
from stepladder.eval.decode import evaluating
from stepladder.eval.memorize import Memorizer
from stepladder.eval.suite import Job, Outcome, suite
from stepladder.models.lm import LanguageModel
from stepladder.run import cache_folder

WORST = 8.0
"""Bits per byte that a window counts for whose likelihood is not a number: those of a uniform guess over bytes."""


def nats(model: LanguageModel, batch: TextBatch) -> np.ndarray:
    """Negative log-likelihood of every window of a batch, float64 [B]: the sum over its scored tokens."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    parts = (batch.tokens, batch.targets, batch.documents)
    tokens, targets, documents = (torch.from_numpy(part).to(device) for part in parts)
    with evaluating(model):
        nll_BT = model(tokens, targets=targets, documents=documents).nll_BT
    assert nll_BT is not None
    return nll_BT.double().sum(dim=1).cpu().numpy()


def score(model: LanguageModel, source: str, batch: TextBatch) -> list[dict[str, Any]]:
    """One record a window; ``nll`` is None where it is not finite."""
    tokens, sizes = (batch.targets != IGNORE).sum(axis=1), batch.bytes.sum(axis=1)
    rows = zip(batch.index.tolist(), nats(model, batch).tolist(), tokens.tolist(), sizes.tolist(), strict=True)
    return [
        {"source": source, "index": i, "nll": nll if math.isfinite(nll) else None, "tokens": n, "bytes": size}
        for i, nll, n, size in rows
    ]


def summary(source: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Totals over the windows of a source; ``stderr`` is that of bits per byte, over windows (None for one window)."""
    sizes = np.array([record["bytes"] for record in records], dtype=np.float64)
    guess = WORST * math.log(2) * sizes
    nll = np.array([g if r["nll"] is None else r["nll"] for r, g in zip(records, guess, strict=True)])
    tokens, total = sum(record["tokens"] for record in records), float(sizes.sum())
    stderr = ratio_stderr(nll / math.log(2), sizes) if len(records) > 1 and total else math.nan
    return {
        "source": source,
        "nll": float(nll.sum()),
        "tokens": tokens,
        "bytes": int(total),
        "windows": len(records),
        "not_finite": sum(record["nll"] is None for record in records),
        "perplexity": math.exp(min(float(nll.sum()) / tokens, 700.0)) if tokens else None,
        "bits_per_byte": float(nll.sum()) / math.log(2) / total if total else None,
        "stderr": stderr if math.isfinite(stderr) else None,
    }


def _batches(job: Job) -> dict[str, Iterator[TextBatch]]:
    stream = job.stream or Stream(job.run.data, job.run.seed, cache_folder(), job.tokenizer)
    return stream.valid_text(job.config.batch)


def _within(batches: Iterator[TextBatch], limit: int) -> Iterator[TextBatch]:
    """Windows from the front until ``limit`` tokens are scored: the last one is whole, whatever the batch size."""
    scored = 0
    for batch in batches:
        before = scored + np.concatenate(([0], np.cumsum((batch.targets != IGNORE).sum(axis=1))))
        wanted = int((before[:-1] < limit).sum())
        if wanted:
            parts = (batch.tokens, batch.targets, batch.documents, batch.bytes, batch.index)
            yield TextBatch(*(part[:wanted] for part in parts))
        if wanted < len(batch.index):
            return
        scored = int(before[-1])


def brief(job: Job) -> dict[str, float]:
    """Bits per byte of every text source, on about ``train.eval_samples`` windows."""
    limit = job.run.train.eval_samples * job.run.data.sequence
    scores = {}
    for source, batches in _batches(job).items():
        records = [record for batch in _within(batches, limit) for record in score(job.model, source, batch)]
        bits = summary(source, records)["bits_per_byte"]
        if bits is not None:
            scores[f"bits_per_byte/{source}"] = bits
    return scores


def table(results: dict[str, Any]) -> Table:
    """A row a source."""
    shown = Table(title="likelihood of validation text", box=SIMPLE)
    shown.add_column("source")
    adapted = any("adapted" in entry for entry in results["likelihood"])
    names = ("bits per byte", *(("after memorising",) if adapted else ()), "± stderr", "perplexity", "tokens", "bytes")
    for column in names:
        shown.add_column(column, justify="right")
    for entry in results["likelihood"]:
        told = [entry["bits_per_byte"], *([entry["adapted"]["bits_per_byte"]] if adapted else [])]
        numbers = ["" if n is None else f"{n:.4g}" for n in (*told, entry["stderr"], entry["perplexity"])]
        shown.add_row(entry["source"], *numbers, f"{entry['tokens']:,}", f"{entry['bytes']:,}")
    return shown


def measure(
    model: LanguageModel,
    sources: dict[str, Iterator[TextBatch]],
    limit: int,
    advance: Callable[[float], object] = float,
    memorizer: Memorizer | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[tuple[str, int, str]]]:
    """Texts of a Stream's ``valid_text``, ``limit`` tokens each at most: summaries, records, and what was asked.

    With a memorizer every window is scored a second time, behind what was memorised of the window before it (or, where
    it does not reset, of all before it in its source): ``adapted`` of a summary, ``adapted_nll`` of a record.
    """
    records: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    items: list[tuple[str, int, str]] = []
    for source, batches in sources.items():
        first = len(records)
        if memorizer is not None:
            memorizer.reset()
        for batch in _within(batches, limit):
            scored = score(model, source, batch)
            records += scored if memorizer is None else _adapted(model, source, batch, scored, memorizer)
            items += [
                (source, int(i), hashlib.sha256(text.tobytes() + row.tobytes()).hexdigest())
                for i, text, row in zip(batch.index, batch.tokens, batch.targets, strict=True)
            ]
        found.append(summary(source, records[first:]))
        if memorizer is not None:
            adapted = [{**record, "nll": record["adapted_nll"]} for record in records[first:]]
            found[-1]["adapted"] = summary(source, adapted)
        advance(1 / len(sources))
    return found, records, items


def _adapted(
    model: LanguageModel, source: str, batch: TextBatch, scored: list[dict[str, Any]], memorizer: Memorizer
) -> list[dict[str, Any]]:
    """Records with ``adapted_nll``: each window is scored first and memorised then."""
    found = []
    for row, record in enumerate(scored):
        parts = (batch.tokens, batch.targets, batch.documents, batch.bytes, batch.index)
        with memorizer.applied():
            (again,) = score(model, source, TextBatch(*(part[row : row + 1] for part in parts)))
        found.append({**record, "adapted_nll": again["nll"]})
        if memorizer.config.reset:
            memorizer.reset()
        memorizer.read(batch.tokens[row][batch.tokens[row] != PAD])
    return found


@suite("likelihood", needs="text", show=table, quick=brief)
def likelihood(job: Job) -> Outcome:
    """Perplexity and bits per byte of every text source's validation split."""
    memorizer = None if job.config.memorize is None else Memorizer(job.model, job.config.memorize)
    with evaluating(job.model):
        found, records, items = measure(job.model, _batches(job), job.config.text_tokens, job.advance, memorizer)
    about = {} if memorizer is None else {"memorize": memorizer.about()}
    return Outcome({"likelihood": found, **about}, records, items)
