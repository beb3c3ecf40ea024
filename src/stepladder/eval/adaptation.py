"""The ``adaptation`` suite: does a model get better while it reads? Loss over the position in a long document.

The first ``eval.adapt_tokens`` tokens of validation documents that have as many are read twice: ``whole``, in one go,
and ``restarted``, from an empty state every ``data.sequence`` tokens, which is all that training ever showed. Positions
fall into buckets that end at powers of two; every document is in every bucket, and both readings score the same tokens,
so that ``gain``, restarted less whole, is what the text before the window brings, and not that a document's later parts
are easier or harder. It is 0 where both are the same, within the first window. One document is one observation:
``stderr`` is that of the gain over documents.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.table import Table

from stepladder.core.errors import UserError
from stepladder.data.shards import Shard
from stepladder.data.stream import Stream
from stepladder.eval.decode import evaluating
from stepladder.eval.longctx import TOKENS, reach
from stepladder.eval.suite import Job, Outcome, suite
from stepladder.models.lm import LanguageModel
from stepladder.run import cache_folder

FIRST = 64
"""Where the first bucket ends."""
PIECE = 1024
"""Tokens of a call: what bounds the memory of a document that is read in one go."""


def buckets(tokens: int) -> list[tuple[int, int]]:
    """Ranges of predicted positions, [0, 64), [64, 128), [128, 256), ... up to ``tokens``; the last may be cut."""
    edges = [0]
    while edges[-1] < tokens:
        edges.append(min(max(FIRST, 2 * edges[-1]), tokens))
    return list(itertools.pairwise(edges))


def losses(model: LanguageModel, ids: np.ndarray, restart: int | None = None) -> np.ndarray:
    """Nats of every token but the first, float64 [B, L - 1], given those before it in its row of ids int64 [B, L].

    restart: tokens after which the state is emptied and positions begin anew; None = never.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    rows, found, state = torch.from_numpy(ids).to(device), [], None
    size = PIECE if restart is None else restart
    with evaluating(model):
        for first in range(0, ids.shape[1] - 1, size):
            place = slice(first, min(first + size, ids.shape[1] - 1))
            out = model(rows[:, place], state, targets=rows[:, place.start + 1 : place.stop + 1])
            assert out.nll_BT is not None
            found.append(out.nll_BT.double().cpu().numpy())
            state = out.state if restart is None else None
    return np.concatenate(found, axis=1)


def long_documents(shard: Shard, tokens: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The first ``tokens`` ids of the first ``most`` documents that have as many [N, tokens], and which these are."""
    numbers = np.flatnonzero(np.diff(shard.starts) >= tokens)[:most]
    places = shard.starts[numbers][:, None] + np.arange(tokens)
    return shard.tokens[places].astype(np.int64), numbers


def _groups(count: int, tokens: int, most: int) -> Iterator[slice]:
    rows = max(1, min(most, TOKENS // tokens))
    yield from (slice(first, min(first + rows, count)) for first in range(0, count, rows))


def read(job: Job, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both readings' mean loss by document and bucket, float64 [N, buckets]: whole, restarted."""
    ranges, found = buckets(ids.shape[1] - 1), []
    for rows in _groups(len(ids), ids.shape[1], job.config.batch):
        both = [losses(job.model, ids[rows], restart) for restart in (None, job.run.data.sequence)]
        found.append([np.stack([nll[:, a:b].mean(axis=1) for a, b in ranges], axis=1) for nll in both])
    whole, restarted = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return whole, restarted


def curve(source: str, tokens: int, trained: int, whole: np.ndarray, restarted: np.ndarray) -> list[dict[str, Any]]:
    """One cell a bucket; numbers are None where a loss is not finite. trained: tokens of a row in training."""
    cells = []
    for number, (first, last) in enumerate(buckets(tokens)):
        told = {"source": source, "from": first, "to": last, "trained": last <= trained, "documents": len(whole)}
        pair = whole[:, number], restarted[:, number]
        gain = pair[1] - pair[0]
        if not np.isfinite(gain).all():
            cells.append(told | dict.fromkeys(("nll", "restarted", "gain", "stderr")))
            continue
        stderr = float(gain.std(ddof=1)) / math.sqrt(len(gain)) if len(gain) > 1 else None
        means = {"nll": float(pair[0].mean()), "restarted": float(pair[1].mean()), "gain": float(gain.mean())}
        cells.append(told | means | {"stderr": stderr})
    return cells


def table(results: dict[str, Any]) -> Table:
    """A row for every source and bucket."""
    shown = Table(title="adaptation: nats per token by position", box=SIMPLE, caption=results.get("note"))
    shown.add_column("source")
    for column in ("positions", "whole", "restarted", "gain", "± stderr", "documents"):
        shown.add_column(column, justify="right")
    for cell in results["cells"]:
        numbers = ["" if cell[n] is None else f"{cell[n]:.4f}" for n in ("nll", "restarted", "gain", "stderr")]
        shown.add_row(cell["source"], f"{cell['from']}-{cell['to'] - 1}", *numbers, str(cell["documents"]))
    return shown


@suite("adaptation", needs="text", show=table)
def adaptation(job: Job) -> Outcome:
    """Loss over the position in long documents, read in one go and restarted every trained length."""
    tokens, limit = job.config.adapt_tokens, reach(job.model)
    if limit is not None and tokens - 1 > limit:
        return Outcome({"message": f"nothing to evaluate: the model has {limit} positions; lower eval.adapt_tokens"})
    stream = job.stream or Stream(job.run.data, job.run.seed, cache_folder(), job.tokenizer)
    cells: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    items: list[tuple[str, int, str]] = []
    for source, shards in stream.texts.items():
        ids, numbers = long_documents(shards.valid, tokens, job.config.samples)
        if not len(ids):
            continue
        try:
            whole, restarted = read(job, ids)
        except UserError as error:
            return Outcome({"message": f"nothing to evaluate: {error}"})
        cells += curve(source, tokens - 1, job.run.data.sequence, whole, restarted)
        for number, text, *means in zip(numbers.tolist(), ids, whole.tolist(), restarted.tolist(), strict=True):
            plain = [[v if math.isfinite(v) else None for v in row] for row in means]
            records.append({"source": source, "document": number, "nll": plain[0], "restarted": plain[1]})
            items.append((source, number, hashlib.sha256(text.tobytes()).hexdigest()))
        job.advance(1 / len(stream.texts))
    if not cells:
        return Outcome(
            {"message": f"nothing to evaluate: no validation document has {tokens} tokens; lower eval.adapt_tokens"}
        )
    return Outcome({"cells": cells, "tokens": tokens}, records, items)
