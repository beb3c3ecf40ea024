"""How fast the memory machines train: ``python benchmarks/memory.py``.

``lstm``, ``ntm`` and ``dnc`` with hand-written passes (fused) and as the plain loop under autograd (naive), beside
torch.nn.LSTM and the package ``dnc`` from PyPI (``pip install --no-deps dnc``; left out, and said so, where it is
missing). The plain loop is not slowed down on purpose: it takes its tokens by ``unbind``, so that autograd does not
fill an array of the whole sequence for every token, and all heads are computed at once.

Before anything is timed, fused must equal naive in float64 in outputs, every gradient and the last state, on packed
documents, and ``lstm`` must equal torch.nn.LSTM; a red gate prints no speed. Then forward and backward of one mixer on
one batch are timed in turns, after a warm-up of each. Shown are the median time; the ratio to the naive loop, median
over rounds with the lowest and highest; what is kept for the backward pass; and the time of the second call, which on a
GPU is the last one before the fused loops are recorded as CUDA graphs.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor, nn

from stepladder.models.base import Context, Sink, leaves
from stepladder.models.noise import row_keys
from stepladder.models.zoo import spec

try:
    import dnc as peer
except ImportError:
    peer = None

GOAL = 5.0
"""Least ratio of lstm and ntm at the first batch size, on a CPU at 512 tokens and width 128."""

NAMES = ("lstm", "ntm", "dnc")
Run = Callable[[Tensor], tuple[Tensor, list[Tensor]]]


def context(positions_BT: Tensor) -> Context:
    """What a part is told about a batch."""
    keys = row_keys(0, len(positions_BT), positions_BT.device)
    return Context(torch.zeros_like(positions_BT), positions_BT, True, None, keys, 0, False, Sink())


def mixer(name: str, scan: str, width: int, device: str, dtype: torch.dtype) -> nn.Module:
    """The mixer of a one-layer model, the same weights for both implementations."""
    torch.manual_seed(0)
    model = spec(name, width=width, inner=width, depth=1, scan=scan).build(11)
    return model.core.core.parts[0].part.to(device, dtype)


def ours(part: nn.Module, positions_BT: Tensor) -> Run:
    """A call of one of our parts: outputs and final state."""

    def run(x_BTD: Tensor) -> tuple[Tensor, list[Tensor]]:
        y_BTD, state = part(x_BTD, None, context(positions_BT))
        return y_BTD, leaves(state)

    return run


class TorchLSTM(nn.Module):
    """torch's own, with a linear map behind it as ours has."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        width, inner = like.project.in_features, like.recur.in_features
        self.lstm, self.out = nn.LSTM(width, inner, batch_first=True), nn.Linear(inner, width, bias=False)
        order = torch.arange(4 * inner).unflatten(0, (4, inner))[[0, 1, 3, 2]].flatten()  # torch: i, f, g, o
        with torch.no_grad():
            self.lstm.weight_ih_l0.copy_(like.project.weight[order])
            self.lstm.weight_hh_l0.copy_(like.recur.weight[order])
            self.lstm.bias_ih_l0.copy_(like.bias[order])
            self.lstm.bias_hh_l0.zero_()
            self.out.weight.copy_(like.out.weight)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, list[Tensor]]:
        y_BTH, state = self.lstm(x_BTD)
        return self.out(y_BTH), [each[0] for each in state]


def package_dnc(width: int, device: str) -> Run:
    """The DNC of the package, as large as ours."""
    machine = peer.DNC(
        input_size=width,
        hidden_size=width,
        rnn_type="lstm",
        num_layers=1,
        nr_cells=64,
        cell_size=32,
        read_heads=2,
        batch_first=True,
        gpu_id=-1 if device == "cpu" else 0,
    )
    return lambda x_BTD: (machine(x_BTD, (None, None, None), reset_experience=True)[0], [])


def train(run: Run, x_BTD: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """Forward and backward: outputs, last state, gradients by parameters and input."""
    x_BTD = x_BTD.clone().requires_grad_()
    y_BTD, state = run(x_BTD)
    loss = y_BTD.square().sum() + sum(leaf.square().sum() for leaf in state)
    slopes = torch.autograd.grad(loss, [x_BTD, *parameters], allow_unused=True)
    return [y_BTD.detach(), *(leaf.detach() for leaf in state), *(torch.zeros(()) if s is None else s for s in slopes)]


def disagreement(options: argparse.Namespace) -> dict[str, float]:
    """The largest relative difference of every pair, in float64."""
    g = torch.Generator().manual_seed(0)
    tokens, batch, double = 77, 3, torch.float64
    x_BTD = torch.randn(batch, tokens, options.width, generator=g, dtype=double).to(options.device)
    begin = torch.rand(batch, tokens, generator=g) < 1 / 20
    begin[:, 0] = True
    place = torch.arange(tokens)
    positions_BT = (place - torch.where(begin, place, 0).cummax(1).values).to(options.device)
    found = {}

    def compare(name: str, want: list[Tensor], got: list[Tensor]) -> None:
        pairs = zip(want, got, strict=True)
        found[name] = max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-3)) for a, b in pairs)

    for name in NAMES:
        parts = [mixer(name, scan, options.width, options.device, double) for scan in ("naive", "fused")]
        compare(name, *(train(ours(part, positions_BT), x_BTD, list(part.parameters())) for part in parts))
    part, one = (
        mixer("lstm", "fused", options.width, options.device, double),
        torch.arange(tokens, device=options.device),
    )
    theirs = TorchLSTM(part).to(options.device, double)
    runs = theirs, ours(part, one.expand(batch, -1))
    compare("torch.nn.LSTM", *(train(run, x_BTD, [])[:4] for run in runs))
    return found


def kept_bytes(run: Run, x_BTD: Tensor) -> int:
    """Of what autograd holds for the backward pass, parameters left out."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(x_BTD.clone().requires_grad_())
    return sum(held.values())


def seconds(run: Run, x_BTD: Tensor) -> float:
    """Of one forward and backward."""
    begun = time.perf_counter()
    run(x_BTD.clone().requires_grad_())[0].sum().backward()
    if x_BTD.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def entries(options: argparse.Namespace, batch: int) -> dict[str, Run]:
    """All that is timed, by name."""
    positions_BT = torch.arange(options.tokens, device=options.device).expand(batch, -1)
    found: dict[str, Run] = {}
    for name in NAMES:
        for scan in ("naive", "fused"):
            part = mixer(name, scan, options.width, options.device, torch.float32)
            found[f"{name} {scan}"] = ours(part, positions_BT)
        if name == "lstm":
            found["lstm torch.nn.LSTM"] = TorchLSTM(part).to(options.device)
        if name == "dnc" and peer is not None:
            found[f"dnc package {version('dnc')}"] = package_dnc(options.width, options.device)
    return found


def measured(options: argparse.Namespace, batch: int) -> dict[str, float]:
    """Times all in turns, prints the table, returns the median ratios."""
    x_BTD = torch.randn(batch, options.tokens, options.width, device=options.device)
    runs = entries(options, batch)
    for run in runs.values():
        seconds(run, x_BTD)
    early = {name: seconds(run, x_BTD) for name, run in runs.items()}
    for run in runs.values():
        seconds(run, x_BTD)
    times = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, x_BTD))
    print(f"\nbatch {batch} x {options.tokens} tokens, width {options.width}, {options.rounds} rounds in turns")
    print(f"{'':24}{'ms':>8}  {'naive / this (lowest to highest)':34}{'kept, MiB':>10}{'2nd call, ms':>14}")
    medians = {}
    for name, run in runs.items():
        ratios = [a / b for a, b in zip(times[f"{name.split()[0]} naive"], times[name], strict=True)]
        medians[name] = statistics.median(ratios)
        ratio = f"{medians[name]:.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        kept = kept_bytes(run, x_BTD) / 2**20
        print(f"{name:24}{statistics.median(times[name]) * 1e3:8.0f}  {ratio:34}{kept:10.1f}{early[name] * 1e3:14.0f}")
    return medians


def main() -> int:
    """Print the tables; 1 if the gate is red or the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"tokens": 512, "width": 128, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    moved = disagreement(options)
    shown = ", ".join(f"{name} {value:.1e}" for name, value in moved.items())
    print(f"gate: float64 outputs, gradients and state differ by at most: {shown} (allowed: 1e-10)")
    if not max(moved.values()) <= 1e-10:
        return 1
    if peer is None:
        print("the package dnc is not installed, so it is left out: pip install --no-deps dnc")
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine()
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, {device}, {options.threads} threads, float32"
    )
    first, *_ = [measured(options, batch) for batch in options.batch]
    slow = [name for name in ("lstm fused", "ntm fused") if first[name] < GOAL]
    verdict = "missed by " + ", ".join(slow) if slow else "ok"
    print(f"\ngoal, {GOAL:.0f} x the naive loop at batch {options.batch[0]}: {verdict}")
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(main())
