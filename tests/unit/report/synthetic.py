"""A ladder's folder made of nothing but its files, with effects of known size: no model, no torch."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stepladder.core.files import append_lines, read_lines, write_json
from stepladder.core.keys import key

GRID = {"parity": ((4, 8), (16, 32)), "addition": ((2, 3), (5, 8))}  # task: (training sizes, sizes beyond)
CHANCE = {"parity": 0.5, "addition": 0.0}


@dataclass
class Rung:
    """How good a rung truly is, and what it costs relative to the control."""

    iid: float = 0.7
    ood: float = 0.4
    bits: float = 2.0
    spread: float = 0.01  # sd of a seed's accuracy
    params: int = 100_000
    flops: float = 2e5
    residual: float = 0.0
    seconds: float = 100.0
    tokenizer: str = "byte-1"
    floor: bool = False
    overlap: int = 0  # of validation documents with training
    status: dict[int, str] = field(default_factory=dict)  # seed -> status other than complete; "missing": no folder
    extra: dict = field(default_factory=dict)


def ladder(folder: Path, rungs: dict[str, Rung], seeds=(0, 1, 2), items=200, grid=GRID, text=True, curve=20, **fields):
    """Write the folder; the first rung is the control. Returns the folder."""
    control = next(iter(rungs))
    write_json(
        folder / "ladder.json",
        {
            "name": folder.name,
            "control": control,
            "match": "params",
            "seeds": list(seeds),
            "tasks": list(grid),
            "margin": 0.03,
            "margin_bits": 0.02,
            "alpha": 0.05,
            "command": f"stepladder climb ladders/{folder.name}.yaml",
            "rungs": {
                name: {
                    "factor": None if name == control else f"the factor of {name}",
                    "fields": {"kind": name, "width": 64},
                    "params": rung.params,
                    "flops_per_token": rung.flops,
                    "state_bytes": 4096,
                    "train_flops": 3e12,
                    "residual": rung.residual,
                    "matched": abs(rung.residual) <= 0.01,
                    "floor": rung.floor,
                    **rung.extra,
                }
                for name, rung in rungs.items()
            },
            "runs": {name: {str(seed): f"{place(name)}-s{seed}" for seed in seeds} for name in rungs},
            **fields,
        },
    )
    for number, (name, rung) in enumerate(rungs.items()):
        for seed in seeds:
            if rung.status.get(seed) != "missing":
                run(folder / f"{place(name)}-s{seed}", number, rung, seed, items, grid, text, curve)
    return folder


def place(name: str) -> str:
    """A folder name for any rung name."""
    return "".join(letter if (letter.isalnum() and letter.isascii()) or letter in "-_." else "~" for letter in name)


def run(here: Path, number: int, rung: Rung, seed: int, items: int, grid: dict, text: bool, curve: int) -> None:
    """One run's folder."""
    draw = key(seed, "synthetic", number).generator()
    sources = [{"kind": "task", "task": {"kind": task, "train": [1, max(ranges[0])]}} for task, ranges in grid.items()]
    write_json(here / "config.json", {"seed": seed, "model": {"kind": here.name}, "data": {"sources": sources}})
    steps = np.arange(1, curve + 1)
    losses = 0.5 + 3 * np.exp(-steps / (curve / 4)) + draw.normal(0, 0.03, curve)
    append_lines(
        here / "metrics.jsonl",
        [
            {"step": int(s), "tokens": int(s) * 1024, "loss": float(v), "lr": 1e-3, "event": None}
            for s, v in zip(steps, losses, strict=True)
        ],
    )
    status = rung.status.get(seed, "complete")
    if status == "started":
        return
    summary = {
        "status": status, "steps": curve, "tokens": curve * 1024, "final_loss": float(losses[-1]),
        "seconds": rung.seconds + seed, "train_flops": 3e12, "params": rung.params, "tokens_per_s": 5000.0,
        "peak_memory_bytes": 10_000_000, "skipped_steps": 0, "hash": f"{number:02d}{seed:02d}" + "ab" * 30,
    }  # fmt: skip
    write_json(here / "summary.json", summary)
    session = {"started": f"day {seed}", "device": "cpu", "code": {"version": "0.1.0"}, "packages": {"torch": "2.13.0"}}
    write_json(here / "provenance.json", {"sessions": [session]})
    counts = {"documents": 50, "exact": rung.overlap, "normalised": rung.overlap}
    write_json(here / "data.json", {"fingerprint": "f", "overlap": {"pydoc": counts}})
    if status != "complete":
        return
    meta = {"seed": 1234, "items_digest": "d1", "decoding": {"temperature": 0}, "grid_version": 1, "code": "0.1.0"}
    meta["tokenizer"] = rung.tokenizer
    algorithmic(here, rung, draw, items, grid, meta)
    if text:
        likelihood(here, rung, draw, meta)


def algorithmic(here: Path, rung: Rung, draw, items: int, grid: dict, meta: dict) -> None:
    shift = draw.normal(0, rung.spread)
    records, cells = [], []
    for task, ranges in grid.items():
        for regime, sizes in zip(("iid", "ood"), ranges, strict=True):
            for size in sizes:
                hard = key(0, "items", task, size).generator().random(items)  # the same items for every run
                rate = np.clip((rung.iid if regime == "iid" else rung.ood) + shift, 0, 1)
                right = np.where(draw.random(items) < 0.5, hard, draw.random(items)) < rate
                records += [
                    {
                        "task": task, "size": size, "regime": regime, "index": i, "question": f"{task}{size}:{i}=",
                        "answer": "1", "output": "1" if ok else "0", "correct": bool(ok), "stop": "eos", "ticks": 2.0,
                    }
                    for i, ok in enumerate(right)
                ]  # fmt: skip
                mean = float(right.mean())
                cells.append(
                    {
                        "task": task,
                        "size": size,
                        "regime": regime,
                        "n": items,
                        "accuracy": mean,
                        "chance": CHANCE.get(task, 0.0),
                    }
                )
    append_lines(here / "records" / "algorithmic.jsonl", records)
    write_json(
        here / "results_algorithmic.json", {"suite": "algorithmic", "status": "complete", "meta": meta, "cells": cells}
    )


def likelihood(here: Path, rung: Rung, draw, meta: dict) -> None:
    sizes = key(0, "documents").generator().integers(400, 600, 50)
    bits = rung.bits + draw.normal(0, 0.002) + key(0, "prose").generator().normal(0, 0.3, 50) + draw.normal(0, 0.01, 50)
    nll = bits * sizes * math.log(2)
    tokens = sizes
    if rung.tokenizer != "byte-1":  # fewer tokens, in other windows of the same text (or not of all of it)
        sizes, nll = (column.reshape(-1, 2).sum(axis=1) for column in (sizes, nll))
        tokens = sizes // 3
        meta = meta | {"items_digest": rung.tokenizer}
        if rung.tokenizer == "short":
            sizes, nll, tokens = sizes[:-1], nll[:-1], tokens[:-1]
    append_lines(
        here / "records" / "likelihood.jsonl",
        [
            {"source": "pydoc", "index": i, "nll": float(n), "tokens": int(t), "bytes": int(b)}
            for i, (n, t, b) in enumerate(zip(nll, tokens, sizes, strict=True))
        ],
    )
    total = {"source": "pydoc", "nll": float(nll.sum()), "tokens": int(tokens.sum()), "bytes": int(sizes.sum())}
    total["perplexity"] = math.exp(total["nll"] / total["tokens"])
    total["bits_per_byte"] = total["nll"] / total["bytes"] / math.log(2)
    write_json(
        here / "results_likelihood.json",
        {"suite": "likelihood", "status": "complete", "meta": meta, "likelihood": [total]},
    )


def depth(here: Path, shift: float = 0.0) -> None:
    """Accuracy over length x ticks, for one run."""
    cells = [
        {
            "task": "parity",
            "size": size,
            "ticks": ticks,
            "n": 100,
            "accuracy": min(1.0, max(0.0, 0.5 + shift + ticks / size)),
        }
        for size in (4, 8, 16, 32)
        for ticks in (1, 2, 4, 8, 16)
    ]
    write_json(here / "results_depth.json", {"suite": "depth", "status": "complete", "meta": {}, "cells": cells})


def suite(here: Path, name: str, cells: list[dict], records: int = 3, **body) -> None:
    """The results of any other suite, with records that only count."""
    path = here / "records" / f"{name}.jsonl"
    path.unlink(missing_ok=True)
    append_lines(path, [{"index": i} for i in range(records)])
    head = {"suite": name, "status": "complete", "meta": {"items_digest": "d2"}, "records": records}
    write_json(here / f"results_{name}.json", {**head, "cells": cells, **body})


def halting(here: Path, shift: float = 0.0, budget: int = 4, gain: float = 0.1, chooses: bool = True) -> None:
    """Exits of one run on parity: half of the tokens stop at tick 1 at training sizes, none beyond."""
    cells, bars, fixed = [], [], []
    for size, regime in ((4, "iid"), (16, "ood")):
        shares = {1: 0.5, 2: 0.3, budget: 0.2} if regime == "iid" else {2: 0.25, budget: 0.75}
        mean = sum(ticks * share for ticks, share in shares.items())
        at = {"accuracy": 0.8 + shift, "mean_ticks": mean}
        exits = {
            "learned": 0.8 + shift, "random": 0.8 + shift - gain, "fixed": 0.75, "oracle": 0.95, "oracle_ticks": 1.5,
            "gain": gain, "gain_stderr": 0.02, "over_fixed": 0.05 + shift, "over_fixed_stderr": 0.03,
        }  # fmt: skip
        exits = exits if chooses else dict.fromkeys(exits)
        about = {"task": "parity", "size": size}
        cells.append({**about, "regime": regime, "n": 100, "tokens": 200, "exact": 0.7, **at, **exits})
        bars += [{**about, "ticks": ticks, "tokens": round(200 * share)} for ticks, share in shares.items()]
        fixed += [{**about, "regime": regime, "ticks": t, "accuracy": t / budget} for t in range(1, budget + 1)]
    calibration = [
        {"task": "parity", "regime": r, "tokens": 200, "error": e, "overconfidence": e}
        for r, e in (("iid", 0.03), ("ood", 0.2))
    ]
    executed = {
        "budget": budget if chooses else None, "ticks": 2.5, "batch_ticks": 4.0, "batch_rows": 128, "context": 64,
        "flops_declared": 2e5, "flops": 1.6e5, "flops_batch": 1.9e5,
    }  # fmt: skip
    informative = [{"task": "parity", "ticks_and_size": 0.4}]
    body = {"histogram": bars, "fixed": fixed, "calibration": calibration, "informative": informative}
    suite(here, "halting", cells, executed=executed, chooses=chooses, **body)


def heads(here: Path, norms) -> None:
    """Metric lines again, with gradient norms of a halting head."""
    path = here / "metrics.jsonl"
    lines = read_lines(path)
    path.unlink()
    append_lines(path, [{**line, "grad_norms": {"halting": norm}} for line, norm in zip(lines, norms, strict=True)])


def needles(here: Path, shift: float = 0.0) -> None:
    """A suite that goes by a field of its cells, and has a cell beyond the model."""
    lengths = (64, 256, 1024)
    cells = [
        {"kind": kind, "length": length, "depth": depth, "accuracy": 0.9 - length / 2000 + shift, "status": "complete"}
        for kind in ("one", "two")
        for length in lengths
        for depth in (0.25, 0.75)
    ]
    cells += [{"kind": "one", "length": 4096, "depth": 0.25, "accuracy": None, "status": "beyond the model"}]
    cells[-2] |= {"accuracy": None, "status": "beyond the model"}
    suite(here, "longctx", cells, by="length")


def timing(folder: Path, seconds: dict[str, list[float]], **fields) -> None:
    """Times side by side."""
    rounds = len(next(iter(seconds.values())))
    about = {"device": "H100", "rounds": rounds, "steps": 8, "tokens": 2048, "errors": {}}
    write_json(folder / "timing.json", {**about, "seconds": seconds, **fields})
