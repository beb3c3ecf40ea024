"""Halting policies by name: what a configuration chooses for an architecture whose places decide their ticks.

The interface and its accounts are ``models.halting.Halting``, with ``ACT`` and ``Fixed``; here are three more, and a
typed configuration for each: ``policy: {kind: controller, price: 0.02}``. A new policy is a Halting and a Policy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepladder.core.config import Field, Kinded, register
from stepladder.core.registry import Registry
from stepladder.models.base import Cost
from stepladder.models.halting import ACT, Fixed, Halting, Progress, probability, something_to_decide
from stepladder.models.layers import no_autocast

POLICIES: Registry[type[Policy]] = Registry("halting policy")


class Policy(Kinded):
    """Base of the configurations. Fields that a policy does not have do not apply to it."""

    def build(self, width: int, ticks: int) -> Halting:
        """The policy for states of ``width`` numbers under a usual cap of ``ticks``."""
        raise NotImplementedError


class Geometric(Halting):
    """Exits as coin tosses with a learned bias, drawn towards a geometric prior.

    Source: Banino et al., 2021, "PonderNet". With l_k the sigmoid of an affine map of state k, state k weighs
    q_k = l_k prod_{j<k} (1 - l_j), the probability of leaving there; once ``tau`` of the mass is spent, or at the cap,
    the rest goes to the state at hand. The loss "ponder" is ``price`` x KL(q || g), g being the geometric distribution
    of mean ``prior`` over the allowed ticks, truncated at the cap: its pull is towards a depth, not towards 1.
    Differs from it in: the likelihood is that of the mixed state, not the mean of likelihoods; nothing is drawn, also
    at test time; the head reads the state normed and detached (see ACT).
    """

    def __init__(self, width: int, ticks: int, min_ticks: int, tau: float, prior: float, price: float) -> None:
        something_to_decide(ticks, min_ticks)
        super().__init__(min_ticks, price)
        self.tau, self.prior = tau, prior
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.full((1,), -math.log(max(prior - 1, 0.1))))  # q starts near g

    def decide(self, new_BND: Tensor, old_BND: Tensor, before: Progress) -> tuple[Tensor, Tensor]:
        offer_BN = probability(new_BND, self.weight, self.bias, before.left.dtype) * before.left
        return offer_BN, before.left - offer_BN <= 1 - self.tau

    def charge(self, weights: Sequence[Tensor], ticks: int) -> Tensor | None:
        if not self.price:
            return None
        first = self.least(ticks)
        # g_k is proportional to (1 - 1/prior)^(k - first); at a prior of 1 nearly all of it is at the first tick.
        stay = math.log1p(-1 / self.prior) if self.prior > 1 else -30.0
        whole = math.log(sum(math.exp(stay * later) for later in range(ticks - first + 1)))
        logs = [stay * later - whole for later in range(ticks - first + 1)]
        total = torch.zeros_like(weights[0])
        for weight, log in zip(weights[first - 1 :], logs, strict=False):
            # w ln w is 0 at 0, where its slope is not finite: a weight that small is taken as it is.
            total = total + weight * (weight.clamp(min=1e-12).log() - log)
        return self.price * total


class Convergence(Halting):
    """A place stops when a tick hardly moves it: |s_k - s_{k-1}| <= threshold |s_k|; its last state is the output.

    Nothing is learned: the rule of deep equilibrium models (Bai et al., 2019), asked place by place.
    """

    mixes = False

    def __init__(self, min_ticks: int, threshold: float) -> None:
        super().__init__(min_ticks)
        self.threshold = threshold

    def decide(self, new_BND: Tensor, old_BND: Tensor, before: Progress) -> tuple[Tensor, Tensor]:
        wide = before.left.dtype
        new_BND, old_BND = new_BND.detach().to(wide), old_BND.detach().to(wide)
        stop_BN = (new_BND - old_BND).square().sum(-1) <= self.threshold**2 * new_BND.square().sum(-1)
        return torch.zeros_like(before.offer), stop_BN


class Controller(Halting):
    """A small network of its own decides, and is paid for likelihood and charged for compute; a place's output is the
    state at which it stops.

    It reads the state, the change that the tick made (both normed), and the logarithm of the change's relative size;
    one hidden layer of tanh, and a bias for every tick, give l_k, the probability of stopping there. So exits are
    distributed as q_k = l_k prod_{j<k} (1 - l_j), the rest at the cap. In training the exit is drawn: the first tick at
    which q_1 + ... + q_k reaches a uniform number that comes from the call's key, one for every token. Otherwise it is
    the median, where 1/2 is reached, and nothing is drawn.

    The loss "compute" is -sum_k q_k (R_k - b), R_k = -(nll of the state of tick k) - ``price`` k: the expected reward,
    differentiated exactly. All K likelihoods are at hand in training, so no draw stands for the sum, as it would in
    REINFORCE (Williams, 1992); the baseline b = sum_k q_k (-nll_k) takes nothing from the slope, since q sums to 1, and
    makes the loss read as price x expected ticks.

    Where gradients end: nll_k enters the reward as a number, so the reward trains neither states nor head to make deep
    exits look good; the controller reads detached states, so they do not learn to please it. The output's likelihood
    does not reach the controller (a hard exit has no slope), so its only teacher is the reward. A tick after the
    drawn exit is computed in training as the place would have gone on, while all others see its keys and values as
    they were held at its exit.

    Source: the roadmap of the recursive-halting ancestor, which has no code for it. Differs from it in: the entropy of
    a tick's logits is no input, since that would take a head call at every tick of decoding.
    """

    mixes, draws, learns = False, True, True

    def __init__(self, width: int, ticks: int, min_ticks: int, hidden: int, price: float) -> None:
        something_to_decide(ticks, min_ticks)
        super().__init__(min_ticks, price)
        self.up = nn.Parameter(torch.randn(hidden, 2 * width) / math.sqrt(2 * width))
        self.size = nn.Parameter(torch.zeros(hidden))
        self.out = nn.Parameter(torch.zeros(hidden))
        # A hazard of 2 / (allowed ticks + 1) leaves about midway. Ticks beyond those of training share the last one's.
        self.bias = nn.Parameter(torch.full((ticks - 1,), -math.log((ticks - min_ticks) / 2)))

    def hazard(self, new_BND: Tensor, old_BND: Tensor, bias_BN: Tensor, wide: torch.dtype) -> Tensor:
        """l_k (B, N), differentiable in the controller's parameters alone."""
        new, old = new_BND.detach().to(wide), old_BND.detach().to(wide)
        size = new.shape[-1:]
        seen = torch.cat((F.rms_norm(new, size), F.rms_norm(new - old, size)), -1)
        tiny = torch.finfo(wide).tiny
        moved = ((new - old).square().sum(-1) / new.square().sum(-1).clamp(min=tiny)).clamp(min=1e-12).log() / 2
        with no_autocast(new.device):
            inner = F.linear(seen, self.up.to(wide))
        inner = torch.tanh(inner + moved[..., None] * self.size.to(wide))
        return torch.sigmoid((inner * self.out.to(wide)).sum(-1) / math.sqrt(len(self.out)) + bias_BN.to(wide))

    def decide(self, new_BND: Tensor, old_BND: Tensor, before: Progress) -> tuple[Tensor, Tensor]:
        bias_BN = self.bias[before.ticks.clamp(max=len(self.bias) - 1)]
        offer_BN = self.hazard(new_BND, old_BND, bias_BN, before.left.dtype).detach() * before.left
        reach = 0.5 if before.luck is None else before.luck
        return offer_BN, 1 - (before.left - offer_BN) >= reach

    def lesson(self, states: Sequence[Tensor], nll_KBN: Tensor) -> Tensor:
        count, first = len(nll_KBN), self.least(len(nll_KBN))
        nll_KBN = nll_KBN.detach()
        left, leaving = torch.ones_like(nll_KBN[0]), []
        for tick, (old, new) in enumerate(pairwise(states), 1):
            if tick == count:
                share = left
            elif tick < first:
                share = torch.zeros_like(left)
            else:
                bias = self.bias[min(tick, len(self.bias)) - 1]
                share = self.hazard(new, old, bias, left.dtype) * left
            leaving.append(share)
            left = left - share
        q_KBN = torch.stack(leaving)
        baseline_BN = (q_KBN.detach() * nll_KBN).sum(0)
        ticks_K = torch.arange(1, count + 1, device=q_KBN.device, dtype=q_KBN.dtype)
        return (q_KBN * (nll_KBN - baseline_BN + self.price * ticks_K[:, None, None])).sum(0)

    def charge(self, weights: Sequence[Tensor], ticks: int) -> Tensor | None:
        return None  # the lesson has the price

    def cost(self) -> Cost:
        return Cost(sum(p.numel() for p in self.parameters()), 2 * self.up.numel())


# What a configuration says ------------------------------------------------------------------------------------------


@register(POLICIES, "fixed")
class FixedPolicy(Policy):
    """Every token takes every tick; the last state is the output."""

    def build(self, width: int, ticks: int) -> Halting:
        return Fixed()


class Deciding(Policy):
    """What policies that may stop before the cap share."""

    min_ticks: int = Field(1, ge=1, description="ticks that every token takes")


@register(POLICIES, "act")
class ACTPolicy(Deciding):
    """A token halts when its halting mass reaches tau; see models.halting.ACT."""

    tau: float = Field(0.99, gt=0, lt=1, description="halting mass at which a token stops; the rest is its last tick's")
    ponder: float = Field(0.01, ge=0, description="price of an expected tick per token, in nats, in the objective")
    halting_mass_scale: float = Field(
        1.0, gt=0, description="factor on each tick's halting probability, on nothing else"
    )

    def build(self, width: int, ticks: int) -> Halting:
        return ACT(width, ticks, self.min_ticks, 1 - self.tau, self.ponder, self.halting_mass_scale)


@register(POLICIES, "ponder", aliases=("pondernet", "geometric"))
class PonderPolicy(Deciding):
    """Exit probabilities drawn towards a geometric prior; see Geometric."""

    tau: float = Field(0.95, gt=0, lt=1, description="spent mass at which a token stops; the rest is its last tick's")
    prior: float | None = Field(None, ge=1, description="mean ticks of the prior, not truncated; default: half the cap")
    price: float = Field(0.01, ge=0, description="weight of the divergence from the prior, in the objective")

    def build(self, width: int, ticks: int) -> Halting:
        return Geometric(width, ticks, self.min_ticks, self.tau, self.prior or max(1.0, ticks / 2), self.price)


@register(POLICIES, "convergence")
class ConvergencePolicy(Deciding):
    """A token stops when its state hardly moves; see Convergence."""

    threshold: float = Field(0.1, gt=0, description="relative change of the state, in one tick, that counts as none")

    def build(self, width: int, ticks: int) -> Halting:
        something_to_decide(ticks, self.min_ticks)
        return Convergence(self.min_ticks, self.threshold)


@register(POLICIES, "controller")
class ControllerPolicy(Deciding):
    """A small network decides, paid in likelihood and charged for ticks; see Controller."""

    hidden: int = Field(16, ge=1, description="hidden width of the controller")
    price: float = Field(0.01, ge=0, description="price of a tick, in nats, in the controller's reward")

    def build(self, width: int, ticks: int) -> Halting:
        return Controller(width, ticks, self.min_ticks, self.hidden, self.price)
