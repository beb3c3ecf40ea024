"""How much faster ``ssm`` trains with chunked matrix products than with its recurrence: ``python benchmarks/ssd.py``.

Before anything is timed, both must agree in float64 in likelihood, every gradient and the last state, on packed
documents; a red gate prints no speed. Then forward and backward of one batch are timed in turns, after a warm-up of
each. The ratio is the median over rounds of (time of the recurrence / time of the chunks); the interval shown is
from the lowest to the highest round, which covers the median in 1 - 2^(1 - rounds) of all cases.
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
"""Least ratio at 2048 tokens on a CPU."""

VOCAB = 259


def models(options: argparse.Namespace, dtype: torch.dtype) -> list[LanguageModel]:
    """The model with the recurrence, and the same weights with chunks."""
    torch.manual_seed(0)
    found = []
    for scan in ("naive", "chunked"):
        fields = {"width": options.width, "depth": options.depth, "chunk": options.chunk, "scan": scan}
        found.append(spec("ssm", **fields).build(VOCAB).to(options.device, dtype))
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
    given = batch(options, 3 * options.chunk + 1)
    naive, chunked = (train(model, given) for model in models(options, torch.float64))
    pairs = zip(naive, chunked, strict=True)
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
    for name, value in {"tokens": 2048, "batch": 1, "width": 128, "depth": 2, "chunk": 64, "rounds": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    moved = disagreement(options)
    print(f"gate: float64 likelihood, gradients and state differ by {moved:.1e} (allowed: 1e-10)")
    if not moved <= 1e-10:
        return 1
    pair, given = models(options, torch.float32), batch(options, options.tokens)
    for model in pair:
        seconds(model, given)
    times = [[seconds(model, given) for model in pair] for _ in range(options.rounds)]
    ratios = [naive / chunked for naive, chunked in times]
    naive, chunked = (statistics.median(column) for column in zip(*times, strict=True))
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine()
    print(f"python {platform.python_version()}, torch {torch.__version__}, {device}, {options.threads} threads")
    print(
        f"ssm, width {options.width}, depth {options.depth}, batch {options.batch} x {options.tokens} tokens, "
        f"chunk {options.chunk}, float32, forward + backward, {options.rounds} rounds in turns:"
    )
    print(f"recurrence {naive * 1e3:.0f} ms, chunks {chunked * 1e3:.0f} ms")
    ratio = statistics.median(ratios)
    verdict = "ok" if ratio >= GOAL else "SLOW"
    print(f"ratio {ratio:.1f} ({min(ratios):.1f} to {max(ratios):.1f}), goal {GOAL:.0f}: {verdict}")
    return int(ratio < GOAL)


if __name__ == "__main__":
    sys.exit(main())
