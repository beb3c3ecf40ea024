"""Halting policies: after every tick, how much of the output a state makes up, and whether its place goes on.

A place is whatever halts on its own: a token, or a thought. Policies decide place by place from that place's states
alone, so no result depends on batch-mates. What a place computes after it has halted weighs nothing; where others
see its state, whoever loops *holds* it as it was when it halted. So the loop may end as soon as no place runs.

All of a policy's arithmetic is in float32 or wider, whatever the states are. Shapes: B batch, N places, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepladder.core.errors import UserError
from stepladder.models.base import Cost


@dataclass(frozen=True)
class Progress:
    """Where every place (B, N) stands after a tick.

    running: whether it takes another tick. ticks: how many it has executed. left: the weight its states have not had
    yet, 1 at the start, 0 once it has halted. expected: sum over its ticks of tick x weight, differentiable; once
    it has halted, its expected number of ticks. offer: what the policy offered at its last tick, a probability.
    luck: a uniform number in [0, 1), the same at all of its ticks, where a policy may draw its exit; None where not.
    """

    running: Tensor
    ticks: Tensor
    left: Tensor
    expected: Tensor
    offer: Tensor
    luck: Tensor | None = None


class Halting(nn.Module):
    """Base of the policies. A subclass writes ``decide``; weights, the cap and the accounts are the same for all.

    A place that stops gives its state all the weight it has left, also at the cap of ``ticks``, so weights
    always sum to 1. Nothing is offered and nothing stops before ``min_ticks`` (None: only the cap stops).
    price: what one expected tick costs in the training objective; 0 leaves the term out.
    mixes: whether the output is the mean of the states under the offers; if not, it is the state at the exit alone.
    draws: whether exits are drawn in training, so that whoever loops gives ``start`` its luck.
    learns: whether ``lesson`` wants the likelihood that every tick's state would have had as the output.
    """

    mixes: bool = True
    draws: bool = False
    learns: bool = False

    def __init__(self, min_ticks: int | None, price: float = 0.0) -> None:
        super().__init__()
        self.min_ticks, self.price = min_ticks, price

    def least(self, ticks: int) -> int:
        """The fewest ticks that a place can execute under a cap of ``ticks``."""
        return ticks if self.min_ticks is None else min(self.min_ticks, ticks)

    def start(self, running_BN: Tensor, dtype: torch.dtype, luck_BN: Tensor | None = None) -> Progress:
        """Before the first tick. ``running_BN``: the places that take part; the others weigh nothing, ever."""
        none = torch.zeros(running_BN.shape, device=running_BN.device, dtype=torch.promote_types(dtype, torch.float32))
        return Progress(running_BN, running_BN.long() * 0, none + 1, none, none, luck_BN)

    def decide(self, new_BND: Tensor, old_BND: Tensor, before: Progress) -> tuple[Tensor, Tensor]:
        """The weight offered to the new state and whether to stop, (B, N) both, where a place runs.

        new, old: the states after and before this tick. An offer must not exceed ``before.left`` unless it stops.
        """
        raise NotImplementedError

    def forward(
        self, new_BND: Tensor, old_BND: Tensor, before: Progress, tick: int, ticks: int
    ) -> tuple[Tensor, Progress]:
        """The weights (B, N) of the states that tick number ``tick`` of at most ``ticks`` (from 1) has computed."""
        running = before.running
        if tick < self.least(ticks):
            offer, stop = torch.zeros_like(before.offer), torch.zeros_like(running)
        else:
            offer, stop = self.decide(new_BND, old_BND, before)
        if tick == ticks:
            stop = torch.ones_like(stop)
        share = torch.where(running, torch.where(stop, before.left, offer), 0.0)
        weight = share if self.mixes else (running & stop).to(share.dtype)
        return weight, replace(
            before,
            running=running & ~stop,
            ticks=before.ticks + running,
            left=before.left - share,
            expected=before.expected + tick * weight,
            offer=torch.where(running, offer, before.offer),
        )

    def charge(self, weights: Sequence[Tensor], ticks: int) -> Tensor | None:
        """What the weights (B, N) of the executed ticks cost in the objective under a cap of ``ticks``, (B, N).

        Here ``price`` x the expected number of ticks. None where there is nothing to pay.
        """
        if not self.price:
            return None
        return self.price * sum((tick * weight for tick, weight in enumerate(weights, 1)), torch.zeros_like(weights[0]))

    def lesson(self, states: Sequence[Tensor], nll_KBN: Tensor) -> Tensor:
        """A loss (B, N) for the policy's own parameters, if it ``learns`` from how good every exit would have been.

        states: (B, N, D) each, the first state and those after every tick. nll_KBN: of the state of every tick, without
        gradient.
        """
        raise NotImplementedError

    def cost(self) -> Cost:
        """Parameters, and FLOPs of matrix products per decision. Most policies make none."""
        return Cost(sum(p.numel() for p in self.parameters()))


class Fixed(Halting):
    """Every place takes every tick, and the last state is the output."""

    def __init__(self) -> None:
        super().__init__(min_ticks=None)

    def decide(self, new_BND: Tensor, old_BND: Tensor, before: Progress) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(before.offer), torch.zeros_like(before.running)


def something_to_decide(ticks: int, min_ticks: int) -> None:
    """Refuse a policy that could only ever stop at the cap."""
    if min_ticks >= ticks:
        raise UserError(
            f"min_ticks={min_ticks} and ticks={ticks} leave nothing to decide; raise ticks, or take a fixed number"
        )


def probability(state_BND: Tensor, weight_D: Tensor, bias: Tensor, wide: torch.dtype) -> Tensor:
    """sigmoid(<w, norm of the state> / sqrt D + b), (B, N), of the state detached: the head moves, not the state."""
    seen_BND = F.rms_norm(state_BND.detach().to(wide), state_BND.shape[-1:])
    # A product and a sum instead of a matrix product: autocast would take that one to bfloat16.
    dot_BN = (seen_BND * weight_D.to(wide)).sum(-1) / math.sqrt(state_BND.shape[-1])
    return torch.sigmoid(dot_BN + bias.to(wide))


class ACT(Halting):
    """Adaptive computation time: the output is the mean of the states under a learned halting mass.

    Source: Graves, 2016, "Adaptive computation time for recurrent neural networks", sections 2 and 2.1. With p_k the
    sigmoid of an affine map of state k, a place halts at the first tick n where p_1 + ... + p_n >= 1 - epsilon, or at
    the cap; state k weighs p_k for k < n, and state n the remainder 1 - sum_{k<n} p_k.
    Differs from it in: the price is put on the expected number of ticks, sum_k k w_k, instead of n + remainder: its
    slope is -(n - k) in every p_k before n, so an earlier tick is pushed harder, and its value lies between 1 and the
    cap; ``min_ticks``; a start at which the weights of all allowed ticks are equal. The head reads the state
    normed, so that states cannot buy a halt by growing, and detached: the price moves the head, not the states. Adam
    makes any gradient that is alone a full step, however small the price, and before the output is listened to
    the price is alone; it then trained states to please the head, and all halted at tick 1 before they were
    of any use. The likelihood reaches the states through the mean, and the head through the weights. The head starts
    at 0; its logit is divided by sqrt(width), so that it does not move faster in wider models; it is not decayed.
    Defects of the ancestors that this repairs: a head without a gradient (the ponder term was a float, and the mass
    weighed no output), a price of the wrong sign, no remainder at the cap, halting in bfloat16 where 1 - mass cannot
    reach 0, and decisions for the whole batch. One trait of the method remains: where p_1 >= 1 - epsilon
    there is one state, of weight 1, so that place teaches the head nothing.

    ``scale`` multiplies p, nothing else: what is accumulated is never rescaled and the remainder closes the mass to 1
    whatever it is (the ancestor multiplied the mass itself at every tick; at its 1e-4 nothing ever halted). A scale at
    which even p = 1 at every tick could not halt a place before the cap is refused.
    """

    def __init__(
        self, width: int, ticks: int, min_ticks: int, epsilon: float, price: float, scale: float = 1.0
    ) -> None:
        something_to_decide(ticks, min_ticks)
        most = scale * (ticks - min_ticks)
        if most <= 1 - epsilon:
            raise UserError(
                f"halting_mass_scale={scale:g}: {ticks - min_ticks} ticks before the cap credit at most {most:g} of "
                f"the {1 - epsilon:g} that halt a place, so none would ever halt; raise it above "
                f"{(1 - epsilon) / (ticks - min_ticks):.3g}"
            )
        super().__init__(min_ticks, price)
        self.epsilon, self.scale = epsilon, scale
        self.weight = nn.Parameter(torch.zeros(width))
        # p = 1 / (allowed ticks): equal weights, so the expected number of ticks starts midway.
        self.bias = nn.Parameter(torch.full((1,), -math.log(ticks - min_ticks)))

    def decide(self, new_BND: Tensor, old_BND: Tensor, before: Progress) -> tuple[Tensor, Tensor]:
        p_BN = self.scale * probability(new_BND, self.weight, self.bias, before.left.dtype)
        return p_BN, before.left - p_BN <= self.epsilon
