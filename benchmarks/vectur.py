"""How much faster ``vectur`` runs all prefixes at once than one after the other: ``python benchmarks/vectur.py``.

The naive way runs every position's machine on a tape of its own, by gather and scatter; the shipped one sums rank-one
writes over the tape they share. Before anything is timed, both must agree in float64 in likelihood, every gradient and
the last state, on packed documents; a red gate prints no speed. Then forward and backward of one batch are timed in
turns, after a warm-up of each. The ratio is the median over rounds of (naive time / shipped time); the interval shown
is from the lowest to the highest round. Attention of equal width is timed beside them, for scale.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time

import torch

from stepladder.models.base import leaves
from stepladder.models.lm import LanguageModel
from stepladder.models.zoo import spec

GOAL = 5.0
"""Least ratio at 512 tokens on a CPU."""

VOCAB = 259


def models(options: argparse.Namespace, dtype: torch.dtype) -> list[LanguageModel]:
    """The model with explicit tapes, the same weights with rank-one writes, and a transformer of equal width."""
    torch.manual_seed(0)
    shape = {"width": options.width, "depth": options.depth}
    fields = {**shape, "ticks": options.ticks}
    kinds = [spec("vectur", **fields, tape=tape) for tape in ("explicit", "rank_one")] + [spec("transformer", **shape)]
    found = [kind.build(VOCAB).to(options.device, dtype) for kind in kinds]
    found[1].load_state_dict(found[0].state_dict())
    return found


def batch(options: argparse.Namespace, tokens: int) -> dict[str, torch.Tensor]:
    """Random tokens in documents of 200 on average."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (options.batch, tokens + 1), generator=g)
    documents = (torch.rand(options.batch, tokens, generator=g) < 1 / 200).cumsum(1)
    made = {"tokens_BT": ids[:, :-1], "targets": ids[:, 1:], "documents": documents}
    return {name: value.to(options.device) for name, value in made.items()}


def train(model: LanguageModel, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Forward and backward: likelihood, last state, gradients."""
    model.zero_grad(set_to_none=True)
    out = model(**given)
    out.nll_BT.mean().backward()
    return [out.nll_BT.detach(), *(s.detach() for s in leaves(out.state)), *(p.grad for p in model.parameters())]


def disagreement(options: argparse.Namespace) -> float:
    """The largest relative difference between the two, in float64."""
    given = batch(options, 97)
    naive, shipped = (train(model, given) for model in models(options, torch.float64)[:2])
    pairs = ((a, b) for a, b in zip(naive, shipped, strict=True) if a.numel())
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-3)) for a, b in pairs)


def seconds(model: LanguageModel, given: dict[str, torch.Tensor]) -> float:
    """Of one forward and backward."""
    begun = time.perf_counter()
    train(model, given)
    if given["targets"].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def main() -> int:
    """Print the ratio; 1 if the gate is red or the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options = {"tokens": 512, "batch": 1, "width": 128, "depth": 1, "ticks": 4, "rounds": 5}
    for name, value in options.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    moved = disagreement(options)
    print(f"gate: float64 likelihood, gradients and state differ by {moved:.1e} (allowed: 1e-10)")
    if not moved <= 1e-10:
        return 1
    tried, given = models(options, torch.float32), batch(options, options.tokens)
    for model in tried:
        seconds(model, given)
    times = [[seconds(model, given) for model in tried] for _ in range(options.rounds)]
    ratios = [naive / shipped for naive, shipped, _ in times]
    naive, shipped, attention = (statistics.median(column) for column in zip(*times, strict=True))
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine()
    print(f"python {platform.python_version()}, torch {torch.__version__}, {device}, {options.threads} threads")
    print(
        f"vectur, width {options.width}, depth {options.depth}, {options.ticks} ticks, batch {options.batch} x "
        f"{options.tokens} tokens, float32, forward + backward, {options.rounds} rounds in turns:"
    )
    print(
        f"prefix by prefix {naive * 1e3:.0f} ms, all at once {shipped * 1e3:.0f} ms; attention {attention * 1e3:.0f} ms"
    )
    ratio = statistics.median(ratios)
    verdict = "ok" if ratio >= GOAL else "SLOW"
    print(f"ratio {ratio:.1f} ({min(ratios):.1f} to {max(ratios):.1f}), goal {GOAL:.0f}: {verdict}")
    return int(ratio < GOAL)


if __name__ == "__main__":
    sys.exit(main())
