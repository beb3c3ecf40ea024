"""A body applied tick after tick to every token, until a policy lets the token stop.

Shape suffixes beside those of models.base: R rows that still run, r rank of the per-tick modulation.

    s_0 = e                                                    e is the input; for k = 1, 2, ...
    g_k = body( FiLM_k( norm(s_{k-1}) + W e ) )
    s_k = s_{k-1} + sigmoid(a) * (g_k - s_{k-1})               one gate a channel
    h   = sum_k w_k norm_out(s_k)                              w from the policy, summing to 1

K ticks are K passes: every pass makes a state that the policy may weigh.

*Hold.* A token that stops at tick n has its output; other tokens go on finding, at later ticks, the keys and values
of its tick n (mixers.held), which are copied and so exact whatever tells the ticks apart. Nothing of a token's later
states reaches anybody, so a tick may be computed for it (with gradients, where shapes are static) or left out.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepladder.core.errors import UserError
from stepladder.models.base import Context, Cost, Part, State
from stepladder.models.halting import Halting, Progress
from stepladder.models.layers import linear, norm
from stepladder.models.mixers.held import HeldAttention, Holding
from stepladder.models.noise import uniform
from stepladder.models.stack import Residual, Stack

SITE = -101
"""Of the draws of exits, among the sites of a model's noise."""


class FiLM(nn.Module):
    """x -> x (1 + g_k) + b_k, what tells tick k from the others; (g_k, b_k) = E_k M with E (K, r) and M (r, 2 D).

    Only K ticks exist, so the map from ticks to vectors has rank K at most and a larger r adds parameters and no
    function: it is refused. (The ancestor spent rank 512 on 8 ticks.) M starts at 0, so all ticks start alike. A tick
    beyond the K of training is modulated as the last one.
    """

    def __init__(self, width: int, ticks: int, rank: int) -> None:
        super().__init__()
        if rank > ticks:
            raise UserError(
                f"film_rank={rank}: {ticks} ticks are told apart by a map of rank {ticks} at most; give film_rank <= "
                f"{ticks}"
            )
        self.tick = nn.Parameter(torch.randn(ticks, rank))
        self.map = nn.Parameter(torch.zeros(rank, 2 * width))

    def forward(self, ticks: int) -> list[tuple[Tensor, Tensor]]:
        """1 + g_k and b_k, (D,) each, of ticks 1 .. ``ticks``; made once a call."""
        made = (self.tick[:, :, None] * self.map).sum(1).chunk(2, dim=-1)
        pairs = list(zip((1 + made[0]).unbind(0), made[1].unbind(0), strict=True))[:ticks]
        return pairs + pairs[-1:] * (ticks - len(pairs))


class RecursiveHalting(Part):
    """The loop above. ``body`` is a Stack of Residual parts, its attention being HeldAttention.

    The output is normed and goes to the head as it is (LanguageModel with ``final_norm=False``): the head is linear, so
    its one call on the mixture gives the mixture of all ticks' logits, sum_k w_k U norm_out(s_k).

    Losses: "ponder", what the policy charges for the weights. In training mode also "deep", ``deep`` x the mean
    likelihood of the states of those ticks that a token executed (weights equal and without gradient; a tick after its
    exit is not supervised), and "compute", a policy's own lesson, if it has any.

    Trace, all (B, T): "ticks", those that a token executed; "ponder", sum_k k w_k; and (B, T, ticks): "halt", what the
    policy offered, held after the exit; "change", |s_k - s_{k-1}| / |s_k|, 0 after the exit.

    What is computed: in training mode and with gradients every tick of every token, what comes after the exit weighing
    0. Otherwise the loop ends when no token of the batch runs; and in a call of one token, decoding, rows that have
    stopped are left out of the body. Either gives the same function; the last one rounds as a smaller batch does.
    """

    def __init__(
        self, body: Stack, width: int, vocab: int, *, ticks: int, film_rank: int, deep: float, halting: Halting
    ) -> None:
        super().__init__()
        self.ticks, self.deep, self.vocab, self.width = ticks, deep, vocab, width
        self.body, self.halting = body, halting
        self.norm, self.inject = norm(width), linear(width, width)
        self.film = FiLM(width, ticks, film_rank) if film_rank else None
        self.gate = nn.Parameter(torch.zeros(width))
        self.norm_out = norm(width)
        self.attends = [isinstance(part, Residual) and isinstance(part.part, HeldAttention) for part in body]
        self.first = self.attends.index(True)  # of the body's parts, the one that plans for all attention

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        ticks = self.ticks if ctx.ticks is None else ctx.ticks
        if ticks < 1:
            raise UserError(f"ticks={ticks}: every token takes at least one; give ticks >= 1")
        if state is not None and len(state) != ticks:
            raise UserError(
                f"this sequence was begun with {len(state)} ticks and cannot go on with {ticks}; "
                "start it again with the new tick count"
            )
        caches = ((None,) * len(self.attends),) * ticks if state is None else state
        whole = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        luck = uniform(ctx, SITE, 1)[..., 0] if self.training and self.halting.draws else None

        again_BTD, s_BTD, gate = self.inject(x_BTD), x_BTD, torch.sigmoid(self.gate)
        modulations = [None] * ticks if self.film is None else self.film(ticks)
        progress = self.halting.start(torch.ones_like(ctx.positions_BT, dtype=torch.bool), x_BTD.dtype, luck)
        mixed_BTD = torch.zeros_like(x_BTD, dtype=progress.left.dtype)
        states, after = [s_BTD], []
        reads: list[Tensor] = []
        weights: list[Tensor] = []
        offers: list[Tensor] = []
        plan = self._planner().plan(caches[0][self.first], x_BTD, ctx)
        shown = tuple(Holding(None, plan) if attends else None for attends in self.attends)
        for tick, past in enumerate(caches, 1):
            shown = tuple(
                each and replace(each, past=before, plan=plan, running_BT=progress.running, rows_R=None)
                for each, before in zip(shown, past, strict=True)
            )
            rows_R = None if whole else self._rows(progress, x_BTD.shape[1])
            if rows_R is not None and len(rows_R) == 0:
                shown = tuple(each and replace(each, past=each.skipped()) for each in shown)
            else:
                s_BTD, shown = self._tick(
                    s_BTD, again_BTD, shown, rows_R, modulations[tick - 1], gate, ctx.at_tick(tick - 1)
                )
                weight_BT, progress = self.halting(s_BTD, states[-1], progress, tick, ticks)
                states.append(s_BTD)
                reads.append(self.norm_out(s_BTD))
                weights.append(weight_BT)
                offers.append(progress.offer)
                mixed_BTD = mixed_BTD + weight_BT[..., None] * reads[-1]
            after.append(tuple(each and each.past for each in shown))

        charge_BT = self.halting.charge(weights, ticks)
        if charge_BT is not None:
            ctx.add_loss("ponder", charge_BT)
        if self.training and (self.deep or self.halting.learns):
            ctx.when_scored(reads, lambda nll_KBT: self._lessons(nll_KBT, states, progress, ctx), learn=self.deep > 0)
        ctx.note("ticks", progress.ticks)
        ctx.note("ponder", progress.expected)
        if ctx.tracing:
            ctx.note("halt", torch.stack(offers + offers[-1:] * (ticks - len(offers)), -1))
            ctx.note("change", _changes(states, progress, ticks))
        return mixed_BTD.to(x_BTD.dtype), tuple(after)

    def _planner(self) -> HeldAttention:
        """All attention of the body sees the same tokens, so one layer plans for every one and every tick."""
        residual = self.body.parts[self.first]
        assert isinstance(residual, Residual)
        assert isinstance(residual.part, HeldAttention)
        return residual.part

    @staticmethod
    def _rows(progress: Progress, tokens: int) -> Tensor | None:
        """The rows to compute; None for all. Rows are taken out of calls of one token, where each row halts as one."""
        running_B = progress.running.any(1)
        if tokens > 1 and bool(running_B.any()):
            return None
        rows_R = running_B.nonzero()[:, 0]
        return None if len(rows_R) == len(running_B) else rows_R

    def _tick(
        self,
        s_BTD: Tensor,
        again_BTD: Tensor,
        shown: State,
        rows_R: Tensor | None,
        modulation: tuple[Tensor, Tensor] | None,
        gate_D: Tensor,
        ctx: Context,
    ) -> tuple[Tensor, State]:
        """The states after a tick, those of rows that are left out as they were; and what each layer shows."""
        old, again = s_BTD, again_BTD
        if rows_R is not None:
            old, again = old.index_select(0, rows_R), again.index_select(0, rows_R)
            plan = shown[self.first].plan.of(rows_R)
            shown = tuple(each and replace(each, rows_R=rows_R, plan=plan) for each in shown)
            taken = {
                name: getattr(ctx, name).index_select(0, rows_R) for name in ("tokens_BT", "positions_BT", "key_B")
            }
            ctx = replace(ctx, **taken)
        x = self.norm(old) + again
        if modulation is not None:
            x = x * modulation[0] + modulation[1]
        new, shown = self.body(x, shown, ctx)
        new = old + gate_D * (new - old)
        return new if rows_R is None else s_BTD.index_copy(0, rows_R, new), shown

    def _lessons(self, nll_KBT: Tensor, states: list[Tensor], progress: Progress, ctx: Context) -> None:
        """The losses that want to know how good every tick's state would have been as the output."""
        if self.deep:
            number_K = torch.arange(1, len(nll_KBT) + 1, device=nll_KBT.device)
            executed_KBT = number_K[:, None, None] <= progress.ticks
            ctx.add_loss("deep", self.deep * torch.where(executed_KBT, nll_KBT, 0.0).sum(0) / progress.ticks)
        if self.halting.learns:
            ctx.add_loss("compute", self.halting.lesson(states, nll_KBT.detach()))

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        count = self.ticks if ticks is None else ticks
        return tuple(self.body.init_state(batch, capacity, device, dtype, ticks) for _ in range(count))

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        """Of ``ticks`` ticks for every token. Lessons: one head call a tick, with gradients only for "deep"."""
        count = self.ticks if ticks is None else ticks
        policy, body = self.halting.cost(), self.body.cost(context, ticks)
        outer = self.own_params() - policy.params - body.params
        lessons = count * 2 * self.width * self.vocab * (3 if self.deep else 1) + 3 * count * policy.flops
        once = Cost(outer + policy.params, 2 * self.inject.weight.numel() + count * policy.flops)
        return once + body.repeated(count) + Cost(lessons=lessons if self.deep or self.halting.learns else 0.0)


def _changes(states: list[Tensor], progress: Progress, ticks: int) -> Tensor:
    """|s_k - s_{k-1}| / |s_k| of executed ticks, (B, T, ticks)."""
    norms = [(new - old).norm(dim=-1) / new.norm(dim=-1).clamp(min=1e-12) for old, new in pairwise(states)]
    found = torch.stack(norms + [torch.zeros_like(norms[0])] * (ticks - len(norms)), -1)
    number_K = torch.arange(1, ticks + 1, device=found.device)
    return torch.where(number_K <= progress.ticks[..., None], found, 0.0)
