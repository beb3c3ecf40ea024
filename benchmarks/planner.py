"""What a planner costs, and how much faster it trains than token by token: ``python benchmarks/planner.py``.

Three figures, forward and backward of one batch:

- the share of the filter (beliefs, blend, gate) in a training step of ``apelr_v2`` with a GRU as executor;
- how much faster that step is than the naive loop: one token, one plan after the other, every distribution whole,
  the formulas of the specification, autograd through all of it;
- how much memory a step takes above the weights and their gradients, beside one tensor of tokens x plans x vocabulary.

Before anything is timed, the step and the loop must agree in float64 in likelihood and every gradient; a red gate
prints no figure. Times are medians over rounds, taken in turns; intervals are from the lowest to
the highest round.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from stepladder.models.heads.belief import Belief, Evidence, gate, lookahead, scan
from stepladder.models.lm import LanguageModel
from stepladder.models.zoo import spec

GOAL, SHARE = 20.0, 0.05
"""Least speed-up over the loop, largest share of the filter."""


def model_of(options: argparse.Namespace, vocab: int, dtype: torch.dtype) -> LanguageModel:
    """The ancestor's shape: a GRU under the planner."""
    torch.manual_seed(0)
    fields = {"width": options.width, "depth": options.depth, "plans": options.plans, "chunk": options.chunk}
    return spec("apelr_v2", executor="gru", **fields).build(vocab).to(dtype)


def batch_of(options: argparse.Namespace, tokens: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and what follows them."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (options.batch, tokens + 1), generator=g)
    return ids[:, :-1], ids[:, 1:]


def ours(model: LanguageModel, x_BT: torch.Tensor, y_BT: torch.Tensor) -> torch.Tensor:
    """The likelihood as it is shipped."""
    nll_BT = model(x_BT, targets=y_BT).nll_BT
    assert nll_BT is not None
    return nll_BT


def naive(model: LanguageModel, x_BT: torch.Tensor, y_BT: torch.Tensor) -> torch.Tensor:
    """The likelihood token by token: the recursion of the specification, epsilon left out."""
    seen: dict[str, torch.Tensor] = {}
    handle = model.head.register_forward_pre_hook(lambda _, given: seen.update(h=given[0]))
    head, plan = model.head, model.head.plan
    score, head.experts.score = head.experts.score, _nothing  # type: ignore[method-assign]
    model(x_BT, targets=y_BT)
    head.experts.score = score  # type: ignore[method-assign]
    handle.remove()
    h_BTD, chain, found, chunk = seen["h"], head.chain(), [], []
    b_BK, moves_KK = chain.prior_K.exp().expand(len(x_BT), -1), chain.moves_KK.exp()
    weights = head.experts.heads.weight.chunk(plan.plans)
    rows = torch.arange(len(x_BT))
    for place, (h_BD, y_B) in enumerate(zip(h_BTD.unbind(1), y_BT.unbind(1), strict=True)):
        chunk.append(h_BD)
        if (place + 1) % plan.chunk == 0:
            b_BK = ((b_BK @ moves_KK).log() + head.context(torch.stack(chunk).mean(0))).softmax(-1)
            chunk = []
        ahead, forecasts = b_BK, torch.zeros_like(b_BK)
        for _ in range(plan.horizon):
            ahead = ahead @ moves_KK
            forecasts = forecasts + ahead / plan.horizon
        g_BK = (1 - plan.feedback) * b_BK + plan.feedback * forecasts
        said_BKV = torch.stack([F.linear(h_BD, weight).log_softmax(-1) for weight in weights], 1)
        found.append(-(g_BK.log()[..., None] + said_BKV).logsumexp(1)[rows, y_B])
        b_BK = (b_BK.log() + said_BKV[rows, :, y_B]).softmax(-1)
    return torch.stack(found, 1)


def _nothing(h_ND: torch.Tensor, ids_NJ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands for the experts while only hidden states are wanted; see ``naive``."""
    return h_ND.new_zeros(len(h_ND), PLANS[0]), h_ND.new_zeros(*ids_NJ.shape, PLANS[0])


PLANS = [8]


def filtering(model: LanguageModel, options: argparse.Namespace) -> Callable[[], None]:
    """Forward and backward of the filter alone."""
    shape = options.batch, options.tokens, options.plans
    evidence_BTK, context_BTK = (torch.randn(shape, requires_grad=True) for _ in range(2))
    place_BT = torch.arange(options.tokens).expand(options.batch, -1)
    given = Evidence(evidence_BTK, context_BTK, place_BT == 0, (place_BT + 1) % options.chunk == 0)
    none_BK = torch.zeros(options.batch, options.plans)

    def run() -> None:
        chain, plan = model.head.chain(), model.head.plan
        found = scan(chain, given, Belief(none_BK, none_BK), None, options.chunk)
        blend = lookahead(chain.moves_KK, plan.horizon, plan.feedback)
        gate(found.now, blend, plan.temperature).logsumexp(-1).sum().backward()

    return run


def step(
    model: LanguageModel, likelihood: Callable[..., torch.Tensor], given: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Forward and backward."""
    model.zero_grad(set_to_none=True)
    likelihood(model, *given).mean().backward()


def disagreement(options: argparse.Namespace) -> float:
    """The largest relative difference between the step and the loop, in float64."""
    given, found = batch_of(options, 3 * options.chunk + 1, 61), []
    model = model_of(options, 61, torch.float64)
    for likelihood in (ours, naive):
        model.zero_grad(set_to_none=True)
        nll_BT = likelihood(model, *given)
        nll_BT.mean().backward()
        found.append([nll_BT.detach(), *(p.grad for p in model.parameters())])
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-9)) for a, b in zip(*found, strict=True))


def timed(run: Callable[[], None]) -> float:
    """Seconds of one call; with one thread those of the processor, which other work on the machine leaves alone."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begun = clock()
    run()
    return clock() - begun


def peak(options: argparse.Namespace) -> float:
    """MiB that a step takes above weights and gradients, in a process of its own."""
    model = model_of(options, options.vocab, torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    given = batch_of(options, options.tokens, options.vocab)
    small = tuple(each[:, : options.chunk + 1] for each in given)
    ours(model, *small).mean().backward()  # libraries take their own memory at first use
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours(model, *given).mean().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> int:
    """Print the figures; 1 if a gate or a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    for name, value in {"batch": 1, "tokens": 256, "plans": 8, "vocab": 8192, "width": 256, "depth": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", action="store_true", help="only the memory, for a process of its own")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    PLANS[0] = options.plans
    if options.peak:
        print(peak(options))
        return 0
    off = disagreement(options)
    print(f"torch {torch.__version__}, {platform.machine()}, {options.threads} threads")
    print(f"gate: step and loop differ by {off:.1e} in float64 (allowed: 1e-9)")
    if not off < 1e-9:
        return 1
    model = model_of(options, options.vocab, torch.float32)
    given, alone = batch_of(options, options.tokens, options.vocab), filtering(model, options)
    runs = {
        "step": lambda: step(model, ours, given),
        "filter": alone,
        "loop": lambda: step(model, naive, given),
    }
    alone()
    step(model, ours, given)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            times[name].append(timed(run))
    ratios = [slow / fast for slow, fast in zip(times["loop"], times["step"], strict=True)]
    shares = [part / whole for part, whole in zip(times["filter"], times["step"], strict=True)]
    ratio, share = statistics.median(ratios), statistics.median(shares)
    shape = f"B={options.batch} T={options.tokens} K={options.plans} V={options.vocab} D={options.width}"
    print(f"{shape}: step {statistics.median(times['step']):.3f} s, loop {statistics.median(times['loop']):.2f} s")
    print(f"speed-up {ratio:.1f} ({min(ratios):.1f} to {max(ratios):.1f}), goal {GOAL:.0f}")
    print(f"share of the filter {share:.2%} ({min(shares):.2%} to {max(shares):.2%}), goal at most {SHARE:.0%}")
    same = [f"--{name}={value}" for name, value in vars(options).items() if name not in ("peak", "rounds")]
    found = subprocess.run([sys.executable, __file__, "--peak", *same], capture_output=True, text=True, check=True)
    whole = 4 * options.batch * options.tokens * options.plans * options.vocab / 2**20
    print(f"memory of a step: {float(found.stdout):.0f} MiB; one tensor of T x K x V: {whole:.0f} MiB")
    return 0 if ratio >= GOAL and share <= SHARE and float(found.stdout) < whole else 1


if __name__ == "__main__":
    sys.exit(main())
