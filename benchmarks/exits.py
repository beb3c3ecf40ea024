"""What early exits save in decoding: ``python benchmarks/exits.py``.

``recursive_halting`` decodes with exits that are forced: every token of every row stops at a tick drawn uniformly from
ticks / 2 - spread .. ticks / 2 + spread, so the mean is ticks / 2 and, but for spread 0, rows stop at different ticks.
Rows that have stopped are left out of the body (models.recurrences.recursive_halting), so wall time should fall as
executed ticks do. The wider the spread, the more ticks run with few rows, which a processor does less well.

Before anything is timed, decoding with rows left out must equal, in float64, one uncached pass with the same exits,
the same decoding with every tick computed, and each row decoded alone; a red gate prints no speed. Then four ways to
decode are timed in turns, token by token, after a warm-up of each:

``all ticks``       no token stops early
``exits +-N``       forced exits of that spread, rows left out; the thing measured
``+-N, all rows``   the same exits of the widest spread, every tick computed for every row

Shown are the median time of a token of the batch, and the speed-up over ``all ticks``, median over tokens with the
quartiles: whatever else the machine does hits neighbours alike. Ideal is ticks / mean executed ticks, which no decoder
reaches whose prelude and head always run; what FLOPs allow, these included, is printed beside it.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from itertools import pairwise

import torch
from torch import Tensor

from stepladder.models.halting import Halting, Progress
from stepladder.models.lm import LanguageModel
from stepladder.models.zoo import spec

GOAL = 0.7
"""Least share of the ideal speed-up, on a CPU at batch 32 and half of the ticks."""


class Planned(Halting):
    """Stops every place at the tick that ``plan`` (B, N) says; its state there is the output."""

    mixes = False

    def __init__(self, plan_BN: Tensor) -> None:
        super().__init__(min_ticks=1)
        self.plan = plan_BN

    def decide(self, new_BND: Tensor, old_BND: Tensor, before: Progress) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(before.offer), before.ticks + 1 >= self.plan


def model_of(options: argparse.Namespace, dtype: torch.dtype) -> LanguageModel:
    """The model, its weights stirred so that ticks differ."""
    torch.manual_seed(0)
    fields = {name: getattr(options, name) for name in ("width", "depth", "prelude", "heads", "kv_heads", "ticks")}
    model = spec("recursive_halting", policy="fixed", **fields).build(options.vocab).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return model


def run(model: LanguageModel, tokens_BT: Tensor, plan_BT: Tensor, prompt: int, *, whole: bool = False) -> Tensor:
    """Logits (B, T - prompt, V) of the tokens behind the prompt, fed one by one, with the exits of ``plan_BT``.

    whole: compute every tick of every row, as training does.
    """
    state = model.init_state(len(tokens_BT), tokens_BT.shape[1])
    borders, found = [0, *range(prompt, tokens_BT.shape[1] + 1)], []
    model.core.train(whole)  # no part of it is stochastic
    for first, last in pairwise(borders):
        model.core.halting = Planned(plan_BT[:, first:last])
        out = model(tokens_BT[:, first:last], state, logits_at="last")
        state = out.state
        found.append(out.logits)
    model.core.train(False)
    return torch.cat(found[1:], 1)


def disagreement(options: argparse.Namespace) -> dict[str, float]:
    """The largest differences of logits, in float64, relative to the largest logit."""
    model, (tokens, plan) = model_of(options, torch.float64), drawn(options, 8, 12, max(options.spread))
    rows = tokens.shape[0]
    got = run(model, tokens, plan, 8)
    model.core.halting = Planned(plan)
    uncached = model(tokens).logits[:, 8:]
    alone = torch.cat([run(model, tokens[row : row + 1], plan[row : row + 1], 8) for row in range(min(rows, 4))])
    pairs = {
        "uncached": (got, uncached),
        "every tick computed": (got, run(model, tokens, plan, 8, whole=True)),
        "row alone": (got[: len(alone)], alone),
    }
    never = run(model, tokens, plan.clone().fill_(options.ticks), 8)
    if float((never - got).abs().max()) < 1e-3:
        raise SystemExit("exits change nothing: the gate would see nothing")
    return {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}


def drawn(options: argparse.Namespace, prompt: int, new: int, spread: int) -> tuple[Tensor, Tensor]:
    """Tokens and the exits forced on them, (B, prompt + new)."""
    g = torch.Generator().manual_seed(0)
    shape, middle = (options.batch, prompt + new), options.ticks // 2
    tokens = torch.randint(options.vocab, shape, generator=g)
    # A permutation of equal shares in every column, those left over in the middle: each step's mean is ticks / 2.
    count = 2 * spread + 1
    ladder = torch.arange(options.batch) % count + middle - spread
    ladder[options.batch // count * count :] = middle
    plan = torch.stack([ladder[torch.randperm(options.batch, generator=g)] for _ in range(shape[1])], 1)
    return tokens.to(options.device), plan.to(options.device)


def main() -> int:
    """Print the table; 1 if the gate is red or the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = {
        "width": 512, "depth": 2, "prelude": 1, "heads": 8, "kv_heads": 2, "ticks": 8, "vocab": 1024,
        "batch": 32, "prompt": 48, "new": 16, "rounds": 3,
    }  # fmt: skip
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--spread", type=int, nargs="+", default=[0, 1, 3])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_default_device(options.device)

    with torch.no_grad():
        moved = disagreement(options)
        shown = ", ".join(f"{name} {value:.1e}" for name, value in moved.items())
        print(f"gate: float64 logits of decoding with rows left out differ by at most: {shown} (allowed: 1e-10)")
        if not max(moved.values()) <= 1e-10:
            return 1
        model = model_of(options, torch.float32)
        plans = {spread: drawn(options, options.prompt, options.new, spread) for spread in options.spread}
        tokens, widest = plans[max(plans)]
        ways = {"all ticks": (torch.full_like(widest, options.ticks), False)}
        ways |= {f"exits +-{spread}": (plan, False) for spread, (_, plan) in plans.items()}
        ways[f"+-{max(plans)}, all rows"] = (widest, True)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.rounds + 1):
            found = timed(model, tokens, ways, options)
            if turn:
                times = {name: times[name] + found[name] for name in ways}
    return report(options, model, times)


def timed(
    model: LanguageModel, tokens: Tensor, ways: dict[str, tuple[Tensor, bool]], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of every decoded token of the batch, the prompt left out; the ways take turns token by token."""
    states, times = {}, {name: [] for name in ways}
    for name, (plan, _) in ways.items():
        model.core.halting = Planned(plan[:, : options.prompt])
        start = model.init_state(options.batch, tokens.shape[1])
        states[name] = model(tokens[:, : options.prompt], start, logits_at="last").state
    for place in range(options.prompt, tokens.shape[1]):
        for name, (plan, whole) in ways.items():
            model.core.train(whole)
            model.core.halting = Planned(plan[:, place : place + 1])
            begun = time.perf_counter()
            states[name] = model(tokens[:, place : place + 1], states[name], logits_at="last").state
            if tokens.is_cuda:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begun)
    model.core.train(False)
    return times


def report(options: argparse.Namespace, model: LanguageModel, times: dict[str, list[float]]) -> int:
    """Print what was measured; 1 if the goal is missed."""
    mean = options.ticks // 2
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine()
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, {device}, {options.threads} threads, float32"
    )
    print(
        f"width {options.width}, {options.prelude} + {options.depth} blocks, {options.ticks} ticks, batch "
        f"{options.batch}, {options.prompt} + {options.new} tokens, {options.rounds} rounds in turns; forced mean "
        f"ticks {mean}"
    )
    print(f"{'':16}{'ms/token':>10}   speed-up over all ticks (quartiles)")
    speed = {}
    for name, own in times.items():
        ratios = [full / mine for full, mine in zip(times["all ticks"], own, strict=True)]
        speed[name] = statistics.median(ratios)
        low, _, high = statistics.quantiles(ratios, n=4)
        spread = f"{speed[name]:.2f} ({low:.2f} to {high:.2f})"
        print(f"{name:16}{statistics.median(own) * 1e3:10.2f}   {spread}")
    ideal, context = options.ticks / mean, options.prompt + options.new
    one, two, most = (model.cost(context, ticks).flops for ticks in (1, 2, options.ticks))
    allowed = most / (one + (mean - 1) * (two - one))
    print(f"\nideal {ideal:.2f}; FLOPs, prelude and head included, allow {allowed:.2f}")
    shares = {name: speed[name] / ideal for name in times if name.startswith("exits")}
    verdicts = (f"{name} {share:.2f} {'ok' if share >= GOAL else 'missed'}" for name, share in shares.items())
    print(f"achieved / ideal, goal at least {GOAL}: {', '.join(verdicts)}")
    return int(min(shares.values()) < GOAL)


if __name__ == "__main__":
    sys.exit(main())
