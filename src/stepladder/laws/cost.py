"""What an architecture declares about itself is what it does: cost, and the ticks that were asked for."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stepladder.core.errors import UserError
from stepladder.laws.law import Subject, Violation, law
from stepladder.laws.measure import Meter
from stepladder.models.base import leaves
from stepladder.models.lm import LanguageModel, ModelState

MARGIN = 0.02
"""Relative error allowed in declared FLOPs and state bytes. Parameters are exact."""

ROWS = 2


def counted(
    model: LanguageModel, subject: Subject, context: int, ticks: int | None, state: ModelState | None = None
) -> tuple[float, float, int | None]:
    """Matrix-product FLOPs per token and state bytes per row of one forward, and the largest reported tick.

    Attention is counted through its plain formula: torch has no counts for the fused kernels of a CPU.
    """
    tokens = subject.tokens(ROWS, context, "cost")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(tokens, state, ticks=ticks, trace=True)
    size = sum(leaf.numel() * leaf.element_size() for leaf in leaves(out.state)) / ROWS
    reported = out.trace.get("ticks")
    return counter.get_total_flops() / tokens.numel(), size, None if reported is None else int(reported.max())


def _off(declared: float, found: float) -> float:
    return abs(declared - found) / max(abs(found), 1.0)


@law("cost", says="declared parameters, FLOPs and state bytes are the counted ones, at every context and tick budget")
def cost(subject: Subject) -> str:
    """Parameters exactly; the rest within 2 %. Tokens that halted early may be counted at the ticks they took."""
    worst, own = 0.0, subject.ticks
    model = subject.build()
    params = sum(parameter.numel() for parameter in model.parameters())
    for context in (8, 31, 64, 200):
        for ticks in (None,) if own is None else (None, 1, own + 2):
            declared = model.cost(context, ticks)
            flops, size, reported = counted(model, subject, context, ticks)
            where = f"at context {context}, ticks={ticks}"
            if declared.params != params:
                raise Violation(f"cost says {declared.params:,} parameters, there are {params:,} ({where})")
            at_reported = model.cost(context, reported).flops if own is not None and reported else declared.flops
            off = min(_off(declared.flops, flops), _off(at_reported, flops))
            if off > MARGIN:
                raise Violation(f"cost says {declared.flops:,.0f} FLOPs per token, {flops:,.0f} are executed ({where})")
            ready = counted(model, subject, context, ticks, model.init_state(ROWS, context, ticks=ticks))[1]
            for kind, bytes_found in (("growing", size), ("preallocated", ready)):
                off = max(off, _off(declared.state_bytes, bytes_found))
                if off > MARGIN:
                    raise Violation(
                        f"cost says a state of {declared.state_bytes:,.0f} bytes, the {kind} one has "
                        f"{bytes_found:,.0f} ({where})"
                    )
            worst = max(worst, off)
    return f"{params:,} parameters; FLOPs and state bytes within {worst:.2%}"


@law("budget", says="any tick budget runs and is honoured, and the reported ticks are the executed ones")
def budget(subject: Subject) -> str:
    """A model without a loop refuses a tick budget instead of ignoring it."""
    own = subject.ticks
    model, tokens = subject.build(stir=0.1), subject.tokens(ROWS, 12, "budget")
    reported = model(tokens, trace=True).trace.get("ticks")
    if reported is None or reported.shape != tokens.shape:
        raise Violation("trace['ticks'] must tell the executed ticks of every token, shape (batch, length)")
    if own is None:
        if "ticks" in type(subject.spec).model_fields:
            raise Violation("the architecture has a field 'ticks' but refuses ticks=2")
        if not bool((reported == 1).all()):
            raise Violation(f"an architecture without a loop reports {int(reported.max())} ticks")
        return "no loop: refuses a tick budget"
    tried = sorted({1, max(1, own - 1), own, own + 1, 2 * own})
    for ticks in tried:
        _honoured(subject, model, ticks)
    runs = [counted(model, subject, 12, ticks) for ticks in tried]
    executed = [flops for flops, _, _ in runs]
    # More must be executed for a larger budget, as long as somebody says to have used it; and for some budget, anyway.
    if max(executed) <= executed[0] or not all(
        a < b or last != ticks
        for (a, b), (_, _, last), ticks in zip(pairwise(executed), runs[1:], tried[1:], strict=True)
    ):
        raise Violation(
            f"ticks {tried} execute {[round(flops) for flops in executed]} FLOPs per token: not more for more"
        )
    for wrong in (0, -1):
        try:
            model(tokens, ticks=wrong)
        except UserError:
            continue
        raise Violation(f"ticks={wrong} is accepted")
    return f"ticks {tried} run and are reported; FLOPs per token {executed[0]:,.0f} to {executed[-1]:,.0f}"


def _honoured(subject: Subject, model: LanguageModel, ticks: int) -> None:
    """Executed FLOPs are those of ``ticks`` (or of the ticks reported, if all tokens halted earlier)."""
    tokens = subject.tokens(ROWS, 12, "budget")
    with torch.no_grad():
        out = model(tokens, ticks=ticks, trace=True)
    reported = out.trace["ticks"]
    if int(reported.min()) < 1 or int(reported.max()) > ticks:
        raise Violation(f"asked for ticks={ticks}, reported {int(reported.min())} to {int(reported.max())}")
    last = int(reported.max())
    flops, _, used = counted(model, subject, 12, ticks)  # on tokens of its own
    declared = [model.cost(12, budget).flops for budget in (ticks, used)]
    if min(_off(each, flops) for each in declared) > MARGIN:
        raise Violation(
            f"asked for ticks={ticks}, reported {last}, but {flops:,.0f} FLOPs per token are executed "
            f"instead of {declared[0]:,.0f}"
        )
    if last < ticks:
        # Every token says that it halted by tick `last`, so a budget of `last` must already give the result.
        with torch.no_grad():
            short = model(tokens, ticks=last)
        meter = Meter()
        meter.close({"logits": short.logits}, {"logits": out.logits}, f"ticks={last}, when all tokens report that many")
