"""The ``planner`` suite: what a planner's plans are, on validation text and on the items of tasks.

``usage``        mean belief over plans at the starts of chunks, u; ``utilization`` is H(u) / log K
``persistence``  share of neighbouring chunks whose likeliest plan is the same
``entropy``      of the belief at a chunk's start; and of the belief after the n-th token of a chunk (0: behind a move)
``chunk_mi``     I(plan; chunk) = H(u) - mean H(belief at a chunk's start), at most log K
``token_mi``     I(plan; next token | what came before) = H(sum_k g_k p_k) - sum_k g_k H(p_k), g the gate
``divergence``   Jensen-Shannon divergence of the next token under plan i and plan j, all pairs: from 0 to log 2
``forecast``     how well a chunk's first belief, moved once by the chain, foresees the next one: cross-entropy, beside
                 that of u, and the share of chunks whose likeliest plan it names
``nll``          nats a token: as it is; under every plan alone (``forced``); and ``ablated``: with a uniform gate, with
                 the prior as gate, without evidence of tokens, without the forecast

All in nats. An ablation of a planner that was trained with the part measures mismatch as well as use: what a part is
good for, only a model that was trained without it can tell. Divergences and token_mi are means over 256 tokens of a
batch at most.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from stepladder.core.stats import ratio_stderr
from stepladder.data.packing import encode
from stepladder.data.stream import Stream
from stepladder.data.tokenizers import IGNORE, PAD, Tokenizer
from stepladder.eval.beliefs import ABLATIONS, Given, Sample, Seen, look, planner_of
from stepladder.eval.exact import sheets
from stepladder.eval.halting import texts
from stepladder.eval.suite import Job, Outcome, suite
from stepladder.eval.trace import label
from stepladder.models.heads.planner import PlannerHead
from stepladder.run import cache_folder

TEXT_TOKENS = 1 << 14
"""Tokens of a text source, at most: fewer if ``eval.text_tokens`` is smaller."""
SHOWN = 160
"""Tokens of the excerpt that the page colours by plan."""
WORDS = 8
"""Tokens that stand for a plan: those that it favours most."""


# What it comes to -----------------------------------------------------------------------------------------------------


def entropy(p: np.ndarray) -> np.ndarray:
    """In nats, over the last axis."""
    return -np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=-1)


def cell(source: str, head: PlannerHead, given: list[Given], seen: list[Seen], tokenizer: Tokenizer) -> dict[str, Any]:
    """The numbers of one source; None for what there is nothing to tell from."""
    count = head.plan.plans
    moves = head.chain().moves_KK.detach().exp().double().cpu().numpy()
    states = np.concatenate([s.plan[s.begun] for s in seen])
    used = states.mean(0)
    pairs_of_chunks = [_neighbours(s) for s in seen]
    before, after = (np.concatenate(each) for each in zip(*pairs_of_chunks, strict=True))
    surprise = lambda p: float(-(after * np.log(np.maximum(p, 1e-300))).sum(-1).mean()) if len(after) else None  # noqa: E731
    same = lambda p: float((p.argmax(-1) == after.argmax(-1)).mean()) if len(after) else None  # noqa: E731
    own = float(entropy(states).mean())
    scored = sum(int((g.targets != IGNORE).sum()) for g in given)
    names = [name for name in seen[0].nll if name != "own"]
    return {
        "source": source,
        "tokens": scored,
        "chunks": len(states),
        "plans": count,
        "usage": used.tolist(),
        "utilization": float(entropy(used) / math.log(count)) if count > 1 else None,
        "persistence": same(before),
        "entropy": own,
        "entropy_by_place": _by_place(head, given, seen),
        "chunk_mi": float(entropy(used)) - own,
        **_sample(count, used, [s.sample for s in seen]),
        "forecast": {"nats": surprise(before @ moves), "nats_of_usage": surprise(used), "names": same(before @ moves)},
        "nll": _ratio([s.nll["own"] for s in seen], given)[0],
        "forced": [_ratio([s.forced[..., k] for s in seen], given)[0] for k in range(count)],
        "ablated": {
            name: dict(zip(("more", "stderr"), _ratio([s.nll[name] - s.nll["own"] for s in seen], given), strict=True))
            for name in names
        },
        "words": _words([s.sample for s in seen], used, tokenizer),
        "excerpt": _excerpt(given[0], seen[0], tokenizer),
    }


def _neighbours(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """Beliefs at the starts of chunks that follow one another, (n, K) each."""
    row, place = np.nonzero(seen.begun)
    second = np.flatnonzero(seen.follows[row, place])
    return seen.plan[row[second - 1], place[second - 1]], seen.plan[row[second], place[second]]


def _by_place(head: PlannerHead, given: list[Given], seen: list[Seen]) -> list[float | None]:
    sure = np.concatenate([entropy(s.belief)[g.live] for s, g in zip(seen, given, strict=True)])
    place = np.concatenate([s.place[g.live] for s, g in zip(seen, given, strict=True)])
    groups = [sure[place == n] for n in range(head.plan.chunk)]
    return [float(group.mean()) if len(group) else None for group in groups]


def _ratio(parts: list[np.ndarray], given: list[Given]) -> tuple[float | None, float | None]:
    """Nats a scored token, and the standard error over rows."""
    tops = np.concatenate([part.sum(1) for part in parts])
    bottoms = np.concatenate([(g.targets != IGNORE).sum(1) for g in given])
    tops, bottoms = tops[bottoms > 0], bottoms[bottoms > 0]
    if not len(bottoms) or not np.isfinite(tops).all():
        return None, None
    stderr = ratio_stderr(tops, bottoms)
    return float(tops.sum() / bottoms.sum()), stderr if math.isfinite(stderr) else None


def _sample(count: int, used: np.ndarray, samples: list[Sample]) -> dict[str, Any]:
    """Information about the next token; divergences of all pairs, with the bound log 2 and errors over tokens."""
    told = np.concatenate([s.information for s in samples])
    apart = np.concatenate([s.divergence for s in samples])
    found: dict[str, Any] = {"token_mi": {"mean": None, "stderr": None}, "divergence": None}
    if not len(told):
        return found
    root = math.sqrt(len(told))
    spread = (lambda x: x.std(0, ddof=1) / root) if len(told) > 1 else (lambda x: np.full(x.shape[1:], np.nan))
    error = float(spread(told))
    found["token_mi"] = {"mean": float(told.mean()), "stderr": error if math.isfinite(error) else None}
    if count > 1:
        first, second = np.tril_indices(count, -1)
        means, weights = apart.mean(0), used[first] * used[second]
        matrix = np.zeros((count, count))
        matrix[first, second] = matrix[second, first] = means
        errors = spread(apart)
        found["divergence"] = {
            "mean": float(means.mean()),
            "least": float(means.min()),
            "most": float(means.max()),
            "by_usage": float((means * weights).sum() / weights.sum()) if weights.sum() > 0 else None,
            "bound": math.log(2),
            "stderr": float(errors.max()) if np.isfinite(errors).all() else None,
            "pairs": matrix.tolist(),
        }
    return found


def _words(samples: list[Sample], used: np.ndarray, tokenizer: Tokenizer) -> list[list[str]]:
    """Tokens that every plan favours: largest p_k(v) log(p_k(v) / sum_j u_j p_j(v)), means over the sampled tokens."""
    total = max(1, sum(len(s.information) for s in samples))
    p = sum(s.words for s in samples) / total
    favour = p * np.log(np.maximum(p, 1e-30) / np.maximum(used @ p, 1e-30))
    best = np.argsort(-favour, axis=1, kind="stable")[:, :WORDS]
    return [[label(tokenizer, int(v)) for v in row if favour[k, v] > 0] for k, row in enumerate(best)]


def _excerpt(given: Given, seen: Seen, tokenizer: Tokenizer) -> dict[str, Any]:
    """The first row: its tokens, the plans that each is put down to, and the beliefs at the starts of its chunks."""
    live = np.flatnonzero(given.live[0])[:SHOWN]
    tokens = given.tokens[0, live]
    credit = np.concatenate((seen.plan[0, :1], seen.credit[0, live[1:] - 1]))
    starts = [int(n) for n in live if seen.begun[0, n]]
    return {
        "tokens": [label(tokenizer, int(token)) for token in tokens],
        "credit": credit.round(4).tolist(),
        "starts": starts,
        "plans": seen.plan[0, starts].round(4).tolist(),
    }


# The suite ------------------------------------------------------------------------------------------------------------


def sources(job: Job) -> Iterator[tuple[str, Iterator[Given]]]:
    """Validation texts, then the items of tasks, batch by batch."""
    serves = {source.serves for source in job.run.data.sources}
    if "text" in serves:
        stream = job.stream or Stream(job.run.data, job.run.seed, cache_folder(), job.tokenizer)
        for name, batches in stream.valid_text(job.config.batch).items():
            yield name, _texts(batches, min(job.config.text_tokens, TEXT_TOKENS))
    if "task" in serves:
        for sheet in sheets(job.run, job.config.seed, job.config.samples):
            yield sheet.name, _items(encode(sheet.examples, job.tokenizer), job.config.batch)


def _texts(batches: Iterator[Any], limit: int) -> Iterator[Given]:
    for batch in batches:
        yield Given(batch.tokens, batch.targets, batch.documents, batch.tokens != PAD, batch.index)
        limit -= int((batch.targets != IGNORE).sum())
        if limit <= 0:
            return


def _items(encoded: Any, size: int) -> Iterator[Given]:
    for first in range(0, len(encoded.question), size):
        index = np.arange(first, min(first + size, len(encoded.question)))
        tokens, scored = texts(encoded, index)
        targets = np.where(scored[:, 1:], tokens[:, 1:], IGNORE)
        yield Given(tokens[:, :-1], targets, np.zeros_like(targets), tokens[:, :-1] != PAD, index)


def table(results: dict[str, Any]) -> Table:
    """A row a source; nats."""
    shown = Table(title="planner: nats", box=SIMPLE)
    shown.add_column("source")
    names = ("used", "stays", "entropy", "I(chunk)", "I(token)", "JS of pairs", "own", "uniform gate")
    for name in names:
        shown.add_column(name, justify="right")
    for c in results["cells"]:
        apart, lost = c["divergence"], c["ablated"].get("uniform", {})
        js = "" if apart is None else f"{apart['mean']:.3f} ({apart['least']:.3f}-{apart['most']:.3f})"
        more = "" if lost.get("more") is None else f"{lost['more']:+.3f}"
        more += "" if lost.get("stderr") is None else f"±{lost['stderr']:.3f}"
        shares = [_shown(c["utilization"], "{:.0%}"), _shown(c["persistence"], "{:.0%}")]
        nats = [_shown(value, "{:.3f}") for value in (c["entropy"], c["chunk_mi"], c["token_mi"]["mean"])]
        shown.add_row(c["source"], *shares, *nats, js, _shown(c["nll"], "{:.3f}"), more)
    return shown


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def chain(head: PlannerHead) -> dict[str, Any]:
    """The chain by itself: moves, its stationary law, and the chunks that it stays with each plan on average."""
    prior, moves = (log.detach().exp().double().cpu().numpy() for log in head.chain())
    system = np.vstack((moves.T - np.eye(len(moves)), np.ones(len(moves))))
    law = np.linalg.lstsq(system, np.append(np.zeros(len(moves)), 1.0), rcond=None)[0]
    leaves = 1 - np.diag(moves)
    return {
        "prior": prior.tolist(),
        "moves": moves.tolist(),
        "stationary": law.tolist(),
        "stays": float(np.diag(moves).mean()),
        "row_entropy": float(entropy(moves).mean()),
        "dwell": [float(1 / each) if each > 0 else None for each in leaves],
        "chunk": head.plan.chunk,
    }


@suite("planner", needs="any", show=table, texts=True)
def planner(job: Job) -> Outcome:
    """What a planner's plans are: use, persistence, entropy, information, divergence, ablations, an excerpt."""
    head = planner_of(job.model)
    if head is None:
        return Outcome({"message": f"nothing to evaluate: the architecture '{job.run.model.kind}' has no planner"})
    if not head.filters:
        return Outcome({"message": f"nothing to evaluate: control={head.plan.control} fixes the gate; no belief moves"})
    cells, records, items = [], [], []
    named = list(sources(job))
    for name, batches in named:
        given = list(batches)
        if not given:
            continue
        seen = []
        for batch in given:
            seen.append(look(job.model, batch))
            job.advance(1 / len(given) / len(named))
        cells.append(cell(name, head, given, seen, job.tokenizer))
        for g, s in zip(given, seen, strict=True):
            records += _records(name, g, s)
            digests = (
                hashlib.sha256(row.tobytes() + to.tobytes()).hexdigest()
                for row, to in zip(g.tokens, g.targets, strict=True)
            )
            items += [(name, int(index), digest) for index, digest in zip(g.index, digests, strict=True)]
    if not cells:
        return Outcome({"message": "nothing to evaluate: the run has neither validation text nor tasks"})
    return Outcome({"cells": cells, "chain": chain(head), "planner_eval": ancestors(cells)}, records, items)


def _records(name: str, given: Given, seen: Seen) -> list[dict[str, Any]]:
    scored = (given.targets != IGNORE).sum(1)
    return [
        {
            "source": name,
            "index": int(given.index[row]),
            "tokens": int(scored[row]),
            "nll": {key: float(value[row].sum()) for key, value in seen.nll.items()},
            "forced": seen.forced[row].sum(0).tolist(),
            "plans": seen.plan[row][seen.begun[row]].argmax(-1).tolist(),
        }
        for row in range(len(scored))
    ]


def ancestors(cells: list[dict[str, Any]]) -> dict[str, float | None]:
    """Under the names of the prototype's planner_eval.json; means over sources, None where it has nothing to say.

    forced_state_divergence and plan_js_div_loss: over all pairs (there the former was of plans 0 and 1 alone).
    """

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    apart = mean([c["divergence"] and c["divergence"]["mean"] for c in cells])
    lost = {name: mean([c["ablated"].get(name, {}).get("more") for c in cells]) for name in ABLATIONS}
    return {
        "planner_mask_delta_loss": lost["uniform"],
        "forced_state_divergence": apart,
        "state_persistence": mean([c["persistence"] for c in cells]),
        "expert_utilization": mean([c["utilization"] for c in cells]),
        "plan_js_div_loss": apart,
        "feedback_delta_loss": lost["no forecast"],
    }
