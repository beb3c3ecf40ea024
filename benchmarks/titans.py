"""How much faster a neural memory is in chunks than token by token: ``python benchmarks/titans.py``.

Before anything is timed, both must agree in float64 in output, every gradient and the last memory, on one document and
on packed ones; a red gate prints no speed. Then forward and backward of one mixer are timed in turns, after a warm-up
of each: the recurrence, the chunks on one document, and the chunks on packed documents. If ``titans-pytorch`` can be
imported, its memory of the same width, heads, chunk and network stands in the same turns; it computes another function
(one rate a chunk for momentum and forgetting, no document resets), so only its time is told. Ratios are medians over
rounds, with the lowest and the highest round.

What the backward pass keeps is counted too, in bytes a token, at three lengths, with and without recomputation.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from stepladder.models.base import Context, Part, Sink, leaves
from stepladder.models.noise import row_keys
from stepladder.models.zoo import spec

GOAL = 10.0
"""Least ratio at 1024 tokens on a CPU."""


def mixer(options: argparse.Namespace, scan: str, dtype: torch.dtype) -> Part:
    """One memory mixer; equal weights for every ``scan``."""
    torch.manual_seed(0)
    fields = {"heads": options.heads, "memory_layers": options.layers, "memory_expand": options.expand}
    described = spec("titans_lmm", width=options.width, depth=1, chunk=options.chunk, scan=scan, **fields)
    return described.mixer().to(options.device, dtype)  # type: ignore[attr-defined, no-any-return]


def context(options: argparse.Namespace, tokens: int, packed: bool, recompute: bool = False) -> Context:
    """One document, or documents of 200 tokens on average."""
    index = torch.arange(tokens).expand(options.batch, -1)
    starts = (torch.rand(options.batch, tokens, generator=torch.Generator().manual_seed(0)) < 1 / 200) & packed
    places = index - torch.where(starts | (index == 0), index, 0).cummax(1).values
    keys = row_keys(0, options.batch, torch.device(options.device))
    places = places.to(options.device)
    return Context(places, places, packed, None, keys, 0, recompute, Sink())


def inputs(options: argparse.Namespace, tokens: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(options.batch, tokens, options.width, generator=torch.Generator().manual_seed(1))
    return x.to(options.device, dtype).requires_grad_()


def train(part: Part, x: Tensor, ctx: Context) -> list[Tensor]:
    """Forward and backward: output, last state, gradients."""
    part.zero_grad(set_to_none=True)
    x.grad = None
    y, state = part(x, None, ctx)
    y.square().mean().backward()
    found = [x.grad, *(p.grad for p in part.parameters())]
    return [y.detach(), *(leaf.detach() for leaf in leaves(state)), *(g for g in found if g is not None)]


def disagreement(options: argparse.Namespace) -> float:
    """The largest relative difference between recurrence and chunks, in float64."""
    worst = 0.0
    for packed in (False, True):
        tokens = 3 * options.chunk + 1
        x, ctx = inputs(options, tokens, torch.float64), context(options, tokens, packed)
        pair = [train(mixer(options, scan, torch.float64), x, ctx) for scan in ("naive", "chunked")]
        for a, b in zip(*pair, strict=True):
            worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp(min=1e-3)))
    return worst


def kept(options: argparse.Namespace, tokens: int, recompute: bool) -> float:
    """Bytes a token that the backward pass keeps, each storage once."""
    part, x = mixer(options, "chunked", torch.float32), inputs(options, tokens, torch.float32)
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ctx = replace(context(options, tokens, packed=False), recompute=recompute)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = part(x, None, ctx)
    total = sum(held.values()) / x[..., 0].numel()
    y.sum().backward()  # only now may what was kept be freed
    return total


def peer(options: argparse.Namespace) -> Callable[[], object] | None:
    """Forward and backward of titans-pytorch's memory of the same sizes, or None."""
    try:
        from titans_pytorch import NeuralMemory  # type: ignore[import-not-found]
    except ImportError as error:
        print(f"titans-pytorch is not here ({error}): pip install titans-pytorch")
        return None
    network = {"depth": options.layers, "expansion_factor": float(options.expand)}
    head_width = options.width // options.heads
    memory = NeuralMemory(
        options.width, options.chunk, dim_head=head_width, heads=options.heads, default_model_kwargs=network
    ).to(options.device)
    x = inputs(options, options.tokens, torch.float32)

    def run() -> None:
        memory.zero_grad(set_to_none=True)
        memory(x)[0].square().mean().backward()

    return run


def seconds(run: Callable[[], object], device: str) -> float:
    """Of one forward and backward."""
    begun = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def main() -> int:
    """Print the ratios; 1 if the gate is red or the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"tokens": 1024, "batch": 1, "width": 128, "heads": 2, "layers": 2, "expand": 2, "chunk": 64, "rounds": 5}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    moved = disagreement(options)
    print(f"gate: float64 output, gradients and memory differ by {moved:.1e} (allowed: 1e-10)")
    if not moved <= 1e-10:
        return 1
    x = inputs(options, options.tokens, torch.float32)
    whole, packed = (context(options, options.tokens, packed) for packed in (False, True))
    plain, chunks = (mixer(options, scan, torch.float32) for scan in ("naive", "chunked"))
    runs: dict[str, Callable[[], object]] = {
        "token by token": lambda: train(plain, x, whole),
        "chunks": lambda: train(chunks, x, whole),
        "chunks, packed documents": lambda: train(chunks, x, packed),
    }
    other = peer(options)
    if other is not None:
        runs["titans-pytorch"] = other
    for run in runs.values():
        run()
    times = {name: [] for name in runs}  # type: dict[str, list[float]]
    for _ in range(options.rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, options.device))
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine()
    print(f"python {platform.python_version()}, torch {torch.__version__}, {device}, {options.threads} threads")
    shown = ", ".join(f"{name} {getattr(options, name)}" for name in sizes)
    print(f"one mixer of titans_lmm, {shown}; float32, forward + backward, rounds in turns:")
    ratio = 0.0
    for name, column in times.items():
        ratios = [slow / fast for slow, fast in zip(times["token by token"], column, strict=True)]
        found = statistics.median(ratios)
        ratio = found if name == "chunks" else ratio
        print(
            f"{name}: {statistics.median(column) * 1e3:.0f} ms, {found:.1f} x ({min(ratios):.1f} to {max(ratios):.1f})"
        )
    for recompute in (False, True):
        counts = [kept(options, options.tokens * times, recompute) for times in (1, 2, 4)]
        lengths = " ".join(f"{count / 1024:.1f}" for count in counts)
        print(f"KiB a token kept for backward at 1, 2, 4 x the tokens, recompute={recompute}: {lengths}")
    print(f"ratio {ratio:.1f}, goal {GOAL:.0f}: {'ok' if ratio >= GOAL else 'SLOW'}")
    return int(ratio < GOAL)


if __name__ == "__main__":
    sys.exit(main())
