"""What the broken miniatures deviate from: a small recurrent architecture and a halting one that keep every law."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepladder.core.config import Field
from stepladder.core.errors import UserError
from stepladder.models.base import Context, Cost, Part, State
from stepladder.models.layers import linear, norm
from stepladder.models.lm import LanguageModel
from stepladder.models.mixers.attention import Attention
from stepladder.models.recurrences.loop import Loop
from stepladder.models.recurrences.once import Once
from stepladder.models.spec import Macro
from stepladder.models.stack import Stack

BROKEN: list[tuple[str, type[Macro], str]] = []
"""(law, architecture that breaks it, pattern in the finding that shows that the right thing was found)."""


def breaks(**findings: str) -> Any:
    """Class decorator: the laws that must catch this miniature, and what they must say."""

    def note(cls: type[Macro]) -> type[Macro]:
        BROKEN.extend((law, cls, finding) for law, finding in findings.items())
        return cls

    return note


class Memory(Part):
    """The healthy mixer: s_t = sigmoid(a) s_{t-1} + W x_t, reset at every document; out(s_t)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.write, self.out = linear(width, width), linear(width, width)
        self.decay = nn.Parameter(torch.zeros(width))

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        s_BTD, last_BD = self.scan(self.write(x_BTD), state, ctx)
        return self.out(s_BTD), last_BD

    def scan(self, v_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, Tensor]:
        s_BD = torch.zeros_like(v_BTD[:, 0]) if state is None else state
        found = []
        for place in range(v_BTD.shape[1]):
            s_BD = s_BD.masked_fill(ctx.positions_BT[:, place, None] == 0, 0.0)
            s_BD = self.decay.sigmoid() * s_BD + v_BTD[:, place]
            found.append(s_BD)
        return torch.stack(found, 1), s_BD

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        matrices = self.write.weight.numel() + self.out.weight.numel()
        return Cost(self.own_params(), 2 * matrices, len(self.decay) * self.itemsize())


class OneHead(Attention):
    """Attention with one head and no positions."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1, 1, None, 1.0)


class Mini(Macro):
    """Blocks of ``Mixer`` inside ``Recurrence``; subclasses replace one of them. Not registered."""

    tiny: ClassVar[dict[str, Any]] = {"width": 16, "depth": 2}
    Mixer: ClassVar[type[Part]] = Memory
    Recurrence: ClassVar[type[Part]] = Once

    def mixer(self) -> Part:
        return self.Mixer(self.width)

    def core(self, stack: Part) -> Part:
        return self.Recurrence(stack)

    def build(self, vocab: int) -> LanguageModel:
        parts = [part for _ in range(self.depth) for part in self.block(self.mixer(), self.depth)]
        return LanguageModel(vocab, self.width, self.core(Stack(parts)), tied=self.tied)


class Healthy(Mini):
    """Keeps every law."""


class PlainLoop(Loop):
    """The shared loop without re-injection."""

    def __init__(self, core: Part, width: int, ticks: int) -> None:
        super().__init__(core, width, ticks, inject=False)


class Looped(Mini):
    """The core, applied for a number of ticks."""

    tiny: ClassVar[dict[str, Any]] = {"width": 16, "depth": 1, "ticks": 5}
    Recurrence: ClassVar[type[Part]] = PlainLoop
    ticks: int = Field(5, ge=1)

    def core(self, stack: Part) -> Part:
        return self.Recurrence(stack, self.width, self.ticks)


class HaltingLoop(PlainLoop):
    """Adaptive computation time (Graves, 2016), a decision per token; a halted token holds its state."""

    def __init__(self, core: Part, width: int, ticks: int) -> None:
        super().__init__(core, width, ticks)
        self.halt = nn.Linear(width, 1)

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        ticks = self.ticks if ctx.ticks is None else ctx.ticks
        if ticks < 1:
            raise UserError(f"ticks={ticks}: give at least 1")
        states = (None,) * ticks if state is None else state
        h_BTD, out_BTD, after = x_BTD, torch.zeros_like(x_BTD), []
        spent_BT, taken_BT = torch.zeros_like(x_BTD[..., 0]), torch.zeros_like(ctx.positions_BT)
        for tick, before in enumerate(states):
            new_BTD, carried = self.core(self.norm(h_BTD), before, ctx.at_tick(tick))
            after.append(carried)
            p_BT = self.halt(new_BTD)[..., 0].sigmoid()
            alive_BT = taken_BT == tick
            last_BT = (spent_BT + p_BT > 0.99) if tick < ticks - 1 else torch.ones_like(alive_BT)
            weight_BT = torch.where(last_BT, 1 - spent_BT, p_BT) * alive_BT
            out_BTD = out_BTD + weight_BT[..., None] * new_BTD
            h_BTD = torch.where(alive_BT[..., None], new_BTD, h_BTD)
            spent_BT = spent_BT + weight_BT
            # Counted up only while alive and not at its last tick, so a halted token stays behind `tick`.
            taken_BT = taken_BT + (alive_BT & ~last_BT).long()
        ctx.add_loss("ponder", (taken_BT + 1).to(x_BTD) - spent_BT.detach() + weight_BT * 0.1)
        ctx.note("ticks", taken_BT + 1)
        return out_BTD, tuple(after)

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        count = self.ticks if ticks is None else ticks
        own = Cost(self.norm.weight.numel() + self.halt.weight.numel() + 1)
        return own + Cost(0, 2 * self.halt.weight.numel()).repeated(count) + self.core.cost(context).repeated(count)


class HealthyHalting(Looped):
    """Keeps every law although tokens take different numbers of ticks."""

    Recurrence: ClassVar[type[Part]] = HaltingLoop


class Chaotic(Mini):
    """S4: floor and modulo in an unrolled loop amplify rounding; no law, but the probe must show it."""

    class Mixer(Memory):
        def forward(self, x_BTD, state, ctx):
            u_BTD = x_BTD.sigmoid()
            for _ in range(12):
                u_BTD = 3.99 * u_BTD * (1 - u_BTD)
            return super().forward(norm(x_BTD.shape[-1]).to(x_BTD)(u_BTD), state, ctx)
