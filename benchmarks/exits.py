"""What early exits save in decoding: ``python benchmarks/exits.py``.

``recursive_halting`` decodes with exits that are forced: every token of every row stops at a tick drawn uniformly from
ticks / 2 - spread .. ticks / 2 + spread, so the mean is ticks / 2 and, but for spread 0, rows stop at different ticks.
Rows that have stopped are left out of the body (models.recurrences.recursive_halting), so wall time should fall as
executed ticks do. The wider the spread, the more ticks run with few rows, which a processor does less well.

Before anything is timed, decoding with rows left out must equal, in float64, one uncached pass with the same exits,
the same decoding with every tick computed, and each row decoded alone; a red gate prints no speed. Then the ways to
decode are timed in turns, token by token, after a warm-up of each:

``all ticks``       no token stops early
``exits +-N``       forced exits of that spread, rows left out; the thing measured
``+-N, all rows``   the same exits of the widest spread, every tick computed for every row
``R rows``          a batch of R rows whose tokens take all ticks, and one that takes a single tick

Time is that of the clock on the wall; with one thread on a CPU, the time that the thread ran: the same on a free core,
and on a shared one it leaves out the turns of others. Shown are the median time of a token of the batch, and the
speed-up over ``all ticks``, median over tokens with the quartiles: whatever else the machine does hits neighbours
alike. Ideal is ticks / mean executed ticks, which no decoder reaches whose prelude and head always run; what FLOPs
allow, these included, is printed beside it.

No processor is r times as fast with a batch of 1 / r of the rows: weights are read however few there are. So each
spread has its bound: the speed-up if rows left at no cost at all, and every tick were a batch of just those that run,
prepared like any other. With D_k(r) the time of a token of r rows that take k ticks, a tick of r rows takes
c(r) = (D_K(r) - D_1(r)) / (K - 1), and the bound is D_K(B) / (D_1(B) + sum_{k>1} c(r_k)), r_k being the rows that run
at tick k. All of it is measured in the same turns.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Way:
    """A way to decode. plan: exits of every token, (R, T). whole: compute every tick of every row."""

    plan_RT: Tensor
    ticks: int
    whole: bool = False


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
        out = model(tokens_BT[:, first:last], state, logits_at="last", spend_state=True)
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


def running(plan_BT: Tensor, ticks: int) -> list[int]:
    """The rows that run at each tick, the same for every token."""
    return [int((plan_BT[:, 0] >= tick).sum()) for tick in range(1, ticks + 1)]


def sizes(counts: dict[str, list[int]]) -> list[int]:
    """The batches that are timed for the bounds: all numbers of rows that run at some tick."""
    return sorted({rows for each in counts.values() for rows in each if rows}, reverse=True)


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
        never, ticks = torch.full_like(widest, options.ticks), options.ticks
        ways = {"all ticks": Way(never, ticks)}
        ways |= {f"exits +-{spread}": Way(plan, ticks) for spread, (_, plan) in plans.items()}
        ways[f"+-{max(plans)}, all rows"] = Way(widest, ticks, whole=True)
        counts = {f"exits +-{spread}": running(plan, ticks) for spread, (_, plan) in plans.items()}
        for rows in sizes(counts):
            ways |= {f"{rows} rows, {count} ticks": Way(never[:rows], count) for count in (ticks, 1)}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.rounds + 1):
            found = timed(model, tokens, ways, options)
            if turn:
                times = {name: times[name] + found[name] for name in ways}
    return report(options, model, times, counts)


def timed(
    model: LanguageModel, tokens: Tensor, ways: dict[str, Way], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of every decoded token of the batch, the prompt left out; the ways take turns token by token."""
    clock = time.thread_time if not tokens.is_cuda and options.threads == 1 else time.perf_counter
    states, times = {}, {name: [] for name in ways}

    def call(name: str, way: Way, first: int, last: int) -> None:
        model.core.train(way.whole)
        model.core.halting = Planned(way.plan_RT[:, first:last])
        chunk = tokens[: len(way.plan_RT), first:last]
        states[name] = model(chunk, states[name], ticks=way.ticks, logits_at="last", spend_state=True).state

    for name, way in ways.items():
        states[name] = model.init_state(len(way.plan_RT), tokens.shape[1], ticks=way.ticks)
        call(name, way, 0, options.prompt)
    for place in range(options.prompt, tokens.shape[1]):
        for name, way in ways.items():
            begun = clock()
            call(name, way, place, place + 1)
            if tokens.is_cuda:
                torch.cuda.synchronize()
            times[name].append(clock() - begun)
    model.core.train(False)
    return times


def tick(rows: int, ticks: int, times: dict[str, list[float]]) -> list[float]:
    """Seconds that a tick of a batch of ``rows`` takes, c(r) of the top of this file, by token; 0 for no rows."""
    if not rows:
        return [0.0] * len(times["all ticks"])
    pairs = zip(times[f"{rows} rows, {ticks} ticks"], times[f"{rows} rows, 1 ticks"], strict=True)
    return [(full - one) / (ticks - 1) for full, one in pairs]


def bound(counts: list[int], times: dict[str, list[float]]) -> float:
    """The speed-up if the ticks are batches of ``counts`` rows, see the top of this file; median over tokens."""
    parts = [times[f"{counts[0]} rows, 1 ticks"], *(tick(rows, len(counts), times) for rows in counts[1:])]
    return statistics.median(full / sum(mine) for full, *mine in zip(times["all ticks"], *parts, strict=True))


def report(
    options: argparse.Namespace, model: LanguageModel, times: dict[str, list[float]], counts: dict[str, list[int]]
) -> int:
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
    print(f"{'':18}{'ms/token':>10}   speed-up over all ticks (quartiles), bound")
    speed, most = {}, {name: bound(each, times) for name, each in counts.items()}
    for name, own in times.items():
        if "rows, " in name:
            continue
        ratios = [full / mine for full, mine in zip(times["all ticks"], own, strict=True)]
        speed[name] = statistics.median(ratios)
        low, _, high = statistics.quantiles(ratios, n=4)
        spread = f"{speed[name]:.2f} ({low:.2f} to {high:.2f})"
        limit = f", {most[name]:.2f}" if name in most else ""
        print(f"{name:18}{statistics.median(own) * 1e3:10.2f}   {spread}{limit}")
    costs = {rows: statistics.median(tick(rows, options.ticks, times)) for rows in sizes(counts)}
    print(f"a tick of r rows, ms: {', '.join(f'{rows}: {cost * 1e3:.2f}' for rows, cost in costs.items())}")
    ideal, context = options.ticks / mean, options.prompt + options.new
    one, two, full = (model.cost(context, ticks).flops for ticks in (1, 2, options.ticks))
    allowed = full / (one + (mean - 1) * (two - one))
    print(f"\nideal {ideal:.2f}; FLOPs, prelude and head included, allow {allowed:.2f}")
    shares = {name: speed[name] / ideal for name in times if name.startswith("exits")}
    verdicts = (
        f"{name} {share:.2f} of at most {most[name] / ideal:.2f} {'ok' if share >= GOAL else 'missed'}"
        for name, share in shares.items()
    )
    print(f"achieved / ideal, goal at least {GOAL}: {', '.join(verdicts)}")
    return int(min(shares.values()) < GOAL)


if __name__ == "__main__":
    sys.exit(main())
