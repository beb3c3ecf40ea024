"""The vector Turing machine: k heads on the circle, a tape of vectors, a control that moves, weighs and writes.

A machine has a circle of N cells (M numbers each), a control Q in R^M, k heads at angles theta_i, and their weights
w_i. Angles are measured from the machine's own cell backwards. Head i stands u = N theta_i / 2 pi cells behind it,
between cell own - n, n = floor u, and the one before, at s = u - n:

    J = sum_i w_i ((1 - s_i) e[own - n_i] + s_i e[own - n_i - 1])       numbers mod N: at most 2k cells, never dense

One tick, t = 0, 1, ...; everything on the right is from before it, |.|^2 is a mean over the M channels:

    S        = J^T T                                                                                 read
    g_t      = [sigma(-kappa t / (1 + |Q - q_0|^2)) - h]_+ / (1 - 2h)             gate: 1/2 at t = 0, 0 = halted
    T       <- T + g_t J tanh(D_T [S; Q])^T                                                          write
    Q       <- Q + g_t tanh(D_Q [S; Q])
    theta_i <- theta_i + g_t [2 reach 2 pi / N]_1 tanh(D_theta [S; Q; sin theta_i; cos theta_i; w_i])
    w_i     <- w_i + g_t tanh(D_w [S; Q; sin theta_i; cos theta_i; w_i]) / k

D_T and D_Q are linear, SiLU, linear. D_theta and D_w have one hidden layer in common, and its map of [S; Q] is made
once for all heads: the split of a sum of products is exact. At first, with a_i and v_i linear in the input,

    theta_i = c_i^1 b_i + [c_i^spread]_1 pi tanh(a_i / pi),   c_i^p = (2 pi / N) (N / 2 pi)^(p (i - 1) / (k - 1))
    w_i     = (1 + 2 tanh(v_i / 2)) / k

[x]_1 = min(x, 1): on a circle of few cells a radian is the bound. The home b_i is learned and 1 at first, so heads
begin about 1, ..., N / 2 pi cells behind their machine's own one.

A gate that has reached 0 stays there: nothing moves any more, so the distance stays and t grows. So each machine halts
on its own, without a jump, and what it would go on to compute weighs nothing.

Suffixes beside those of models.base: E machines of a row, A = 2k addressed cells, M width of a cell, S cells at hand.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepladder.models.base import Context
from stepladder.models.layers import linear, no_autocast, residual_gain

TURN = 2 * math.pi


@dataclass(frozen=True)
class Places:
    """Where every machine (B, E) stands among the cells at hand.

    own_BE: number of its own cell on the circle. cells_BE: how many cells hold tokens. first_BE: index of cell 0 among
    the S cells at hand. random: how far behind a token's cell its random one lies, None without: they make up the
    other half of the circle, so that it has 2 x cells.
    """

    own_BE: Tensor
    cells_BE: Tensor
    first_BE: Tensor
    random: int | None

    @property
    def circle(self) -> Tensor:
        """Cells of the circle."""
        return self.cells_BE if self.random is None else 2 * self.cells_BE

    def index(self, number_BEA: Tensor) -> Tensor:
        """Of numbered cells among those at hand."""
        first = self.first_BE[..., None]
        if self.random is None:
            return first + number_BEA
        cells = self.cells_BE[..., None]
        return first + torch.where(number_BEA < cells, number_BEA, number_BEA - cells + self.random)

    def token(self, number_BEA: Tensor) -> Tensor:
        """Of numbered cells: the token that a cell belongs to, or -1 - q for the random cell of token q."""
        cells = self.cells_BE[..., None]
        return torch.where(number_BEA < cells, number_BEA, cells - number_BEA - 1)

    def strides(self, heads: int, last: float, dtype: torch.dtype) -> Tensor:
        """Angles (B, E, H): one cell for the first head, (N / 2 pi)^last cells for the last, geometric between."""
        share = torch.linspace(0, last, heads, device=self.own_BE.device, dtype=dtype)
        return (TURN / self.circle.to(dtype))[..., None] ** (1 - share)

    def only(self, place: int) -> Places:
        """The places of machine ``place`` alone."""
        one = slice(place, place + 1)
        return Places(self.own_BE[:, one], self.cells_BE[:, one], self.first_BE[:, one], self.random)


def wrapped(angle: Tensor) -> Tensor:
    """The same angle within half a turn of 0. Small ones are left as they are, to the last bit."""
    return angle - TURN * torch.round(angle.detach() / TURN)


def address(angle_BEH: Tensor, weight_BEH: Tensor, at: Places) -> tuple[Tensor, Tensor]:
    """J: numbers of the 2k cells that the heads touch, and their coefficients, both (B, E, A)."""
    circle, own = at.circle[..., None], at.own_BE[..., None]
    u_BEH = angle_BEH / TURN * circle
    back_BEH = u_BEH.detach().floor()
    s_BEH = u_BEH - back_BEH
    near_BEH = torch.remainder(own - back_BEH.long(), circle)  # of integers: whatever the angle, a cell of the circle
    far_BEH = torch.remainder(near_BEH - 1, circle)
    return torch.cat((near_BEH, far_BEH), dim=-1), torch.cat((weight_BEH * (1 - s_BEH), weight_BEH * s_BEH), dim=-1)


def gathered(cells_BSM: Tensor, index_BEA: Tensor, share_BEA: Tensor) -> Tensor:
    """sum_a share_a cell_a, (B, E, M)."""
    batch, size, width = cells_BSM.shape
    row_B = torch.arange(batch, device=cells_BSM.device) * size
    flat = (index_BEA + row_B[:, None, None]).flatten()
    rows_BEAM = cells_BSM.reshape(-1, width).index_select(0, flat).view(*index_BEA.shape, width)
    return (rows_BEAM * share_BEA[..., None]).sum(-2)


def overlap(index_BEA: Tensor, share_BEA: Tensor, other_BEA: Tensor, others_BEA: Tensor) -> Tensor:
    """<J, J'> of two sparse addresses, (B, E); cells that an address names twice count with the sum of their shares."""
    same = index_BEA[..., :, None] == other_BEA[..., None, :]
    return torch.where(same, share_BEA[..., :, None] * others_BEA[..., None, :], 0.0).sum((-1, -2))


class RankOne:
    """The tapes of all machines of a row over the one T_0 they share: T_t = T_0 + sum_{s<t} J_s U_s^T, never formed.

    J_t^T T_t = J_t^T T_0 + sum_{s<t} <J_t, J_s> U_s. The gate is in J_s.
    """

    def __init__(self, cells_BSM: Tensor) -> None:
        self.cells_BSM = cells_BSM
        self.written: list[tuple[Tensor, Tensor, Tensor]] = []

    def read(self, index_BEA: Tensor, share_BEA: Tensor) -> Tensor:
        """J^T T, (B, E, M)."""
        read_BEM = gathered(self.cells_BSM, index_BEA, share_BEA)
        for index, share, value_BEM in self.written:
            read_BEM = read_BEM + overlap(index_BEA, share_BEA, index, share)[..., None] * value_BEM
        return read_BEM

    def write(self, index_BEA: Tensor, share_BEA: Tensor, value_BEM: Tensor) -> None:
        """T <- T + J U^T."""
        self.written.append((index_BEA, share_BEA, value_BEM))


class Explicit:
    """The tape of one machine a row (E = 1), as it is told in the paper: gather to read, scatter to write."""

    def __init__(self, cells_BSM: Tensor) -> None:
        self.cells_BSM = cells_BSM

    def read(self, index_BEA: Tensor, share_BEA: Tensor) -> Tensor:
        """J^T T, (B, 1, M)."""
        return gathered(self.cells_BSM, index_BEA, share_BEA)

    def write(self, index_BEA: Tensor, share_BEA: Tensor, value_BEM: Tensor) -> None:
        """T <- T + J U^T. Out of place: a state that was passed in stays as it is."""
        added_BAM = share_BEA[:, 0, :, None] * value_BEM
        self.cells_BSM = self.cells_BSM.scatter_add(1, index_BEA[:, 0, :, None].expand_as(added_BAM), added_BAM)


@dataclass(frozen=True)
class Start:
    """A machine before its first tick; decay is kappa."""

    control_BEM: Tensor
    angle_BEH: Tensor
    weight_BEH: Tensor
    decay_BE: Tensor

    def only(self, place: int) -> Start:
        """The start of machine ``place`` alone."""
        return Start(*(getattr(self, each.name)[:, place : place + 1] for each in fields(self)))


class _Trail:
    """What is noted of a run. Of a tape that is never formed: |T + g J U^T|^2 = |T|^2 + 2 g S . U + g^2 |J|^2 |U|^2."""

    @torch.no_grad()  # throughout: what is only noted must leave nothing to the backward pass, nor to recomputation
    def __init__(self, cells_BSM: Tensor, at: Places) -> None:
        self.looks: dict[str, list[Tensor]] = defaultdict(list)
        self.acts: dict[str, list[Tensor]] = defaultdict(list)
        place_S = torch.arange(cells_BSM.shape[1], device=cells_BSM.device)
        offset_BES = place_S - at.first_BE[..., None]
        own_BES = (offset_BES >= 0) & (offset_BES < at.cells_BE[..., None])
        if at.random is not None:
            own_BES = own_BES | own_BES.roll(at.random, -1)
        self.square_BE = torch.where(own_BES, cells_BSM.square().sum(-1)[:, None], 0.0).sum(-1)

    @torch.no_grad()
    def look(self, read_BEM: Tensor, at: Places, away_BEM: Tensor, seen: dict[str, Tensor]) -> None:
        """Before a tick, and after the last. ``away``: of the control from its target."""
        behind_BEH = seen["angle"] / TURN * at.circle[..., None]
        sizes = {"read": read_BEM.norm(dim=-1), "tape": self.square_BE.clamp(min=0).sqrt()}
        more = {"behind": behind_BEH, "distance": away_BEM.square().mean(-1), **sizes}
        for name, value in (seen | more).items():
            self.looks[name].append(value.detach())

    @torch.no_grad()
    def act(self, gate_BE: Tensor, index_BEA: Tensor, share_BEA: Tensor, read_BEM: Tensor, written_BEM: Tensor) -> None:
        """In a tick."""
        size_BE = overlap(index_BEA, share_BEA, index_BEA, share_BEA)
        step_BEM = gate_BE[..., None] * written_BEM
        self.square_BE = self.square_BE + 2 * (read_BEM * step_BEM).sum(-1) + size_BE * step_BEM.square().sum(-1)
        self.acts["gate"].append(gate_BE.detach())
        self.acts["write"].append(step_BEM.norm(dim=-1))

    def notes(self, ticks: int) -> dict[str, Tensor]:
        """Along a third axis: looks ticks + 1, acts ticks. Of ticks that were left out, nothing moved."""
        rest = ticks + 1 - len(self.looks["read"])
        looks = {name: each + each[-1:] * rest for name, each in self.looks.items()}
        acts = {name: each + [torch.zeros_like(each[0])] * rest for name, each in self.acts.items()}
        return {name: torch.stack(each, dim=2) for name, each in (looks | acts).items()}


@dataclass(frozen=True)
class Final:
    """A machine after its last tick: its own cell, what its heads read there, its control.

    ticks_BE: ticks with a gate above 0. notes: diagnostics by name, (B, E, ticks or ticks + 1, ...); none unless asked.
    """

    own_BEM: Tensor
    read_BEM: Tensor
    control_BEM: Tensor
    ticks_BE: Tensor
    notes: dict[str, Tensor]


class Machine(nn.Module):
    """The networks of a machine and its run. ``past`` is the width of what it starts from beside its own token."""

    def __init__(
        self,
        width: int,
        past: int,
        inner: int,
        heads: int,
        expand: int,
        ticks: int,
        halt: float,
        reach: float,
        spread: float,
    ) -> None:
        super().__init__()
        self.heads, self.halt, self.reach, self.spread, self.hidden = heads, halt, reach, spread, expand * inner
        gain = residual_gain(ticks)  # what a tick feeds back is scaled like what a block adds to its stream
        self.start_control = linear(width + past, inner)
        self.start_heads = linear(width + past, 2 * heads, gain=0.5)
        self.behind = nn.Parameter(torch.ones(heads))
        self.decay_in, self.decay_out = linear(inner, self.hidden), linear(self.hidden, 1, gain=0.5)
        self.decay_bias = nn.Parameter(torch.tensor([math.log(math.expm1(2 / ticks))]))  # kappa = 2 / ticks
        self.target = nn.Parameter(0.1 * torch.randn(inner))
        self.first = linear(2 * inner, 3 * self.hidden)
        self.head_in, self.head_out = linear(3, self.hidden), linear(self.hidden, 2, gain)
        self.control_out, self.write_out = (linear(self.hidden, inner, gain) for _ in range(2))

    def flops(self, ticks: int) -> int:
        """Of the matrix products of one machine."""
        start = (self.start_control, self.start_heads, self.decay_in, self.decay_out)
        tick = (self.first, self.control_out, self.write_out)
        each_head = self.head_in.weight.numel() + self.head_out.weight.numel()
        per_tick = sum(m.weight.numel() for m in tick) + self.heads * each_head
        return 2 * (sum(m.weight.numel() for m in start) + ticks * per_tick)

    def start(self, x_BED: Tensor, past_BEP: Tensor, at: Places) -> Start:
        """The machines of tokens x with ``past`` behind them."""
        seen = torch.cat((x_BED, past_BEP.to(x_BED.dtype)), dim=-1)
        wide = torch.promote_types(seen.dtype, torch.float32)
        control_BEM = self.start_control(seen).to(wide)
        with no_autocast(seen.device):  # an angle in bfloat16 is off by several cells of a long tape
            heads = F.linear(seen.to(wide), self.start_heads.weight.to(wide))
        offset_BEH, height_BEH = heads.chunk(2, dim=-1)
        home_BEH = at.strides(self.heads, 1.0, wide) * self.behind.to(wide)
        # Bounded: with a spread of 1 the last head reaches half a turn, so all of the circle.
        stride_BEH = at.strides(self.heads, self.spread, wide).clamp(max=1)
        offset_BEH = stride_BEH * math.pi * torch.tanh(offset_BEH / math.pi)
        weight_BEH = (1 + 2 * torch.tanh(height_BEH / 2)) / self.heads
        decay = self.decay_out(F.silu(self.decay_in(control_BEM.to(seen.dtype))))[..., 0].to(wide)
        return Start(control_BEM, home_BEH + offset_BEH, weight_BEH, F.softplus(decay + self.decay_bias.to(wide)))

    def gate(self, control_BEM: Tensor, decay_BE: Tensor, tick: int) -> Tensor:
        """g_t, (B, E)."""
        distance_BE = (control_BEM - self.target.to(control_BEM.dtype)).square().mean(-1)
        fading_BE = torch.sigmoid(-decay_BE * tick / (1 + distance_BE))
        return (fading_BE - self.halt).relu() / (1 - 2 * self.halt)

    def step(
        self, read_BEM: Tensor, control_BEM: Tensor, angle_BEH: Tensor, weight_BEH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a tick of gate 1 would add to control and cell (B, E, M), and to heads and weights (B, E, H)."""
        wide = control_BEM.dtype
        seen = torch.cat((read_BEM, control_BEM), dim=-1).to(self.first.weight.dtype)
        of_control, of_write, of_heads = self.first(seen).split(self.hidden, dim=-1)
        moved = torch.tanh(self.control_out(F.silu(of_control)).to(wide))
        written = torch.tanh(self.write_out(F.silu(of_write)).to(wide))
        features = torch.stack((angle_BEH.sin(), angle_BEH.cos(), weight_BEH), dim=-1)
        with no_autocast(seen.device):
            own = F.linear(features, self.head_in.weight.to(wide))
            turned_weighed = F.linear(F.silu(of_heads.to(wide)[..., None, :] + own), self.head_out.weight.to(wide))
        turned, weighed = torch.tanh(turned_weighed).unbind(-1)
        return moved, written, turned, weighed / self.heads

    def forward(self, tape: RankOne | Explicit, start: Start, at: Places, ticks: int, ctx: Context, name: str) -> Final:
        """Run machines for at most ``ticks`` ticks. ``ctx`` has their positions (B, E) in the place of the tokens'.

        Taps, at every tick: name.control (B, E, M), .angle and .weight (B, E, H), .gate (B, E), .read and .write
        (B, E, M). Control, angle, weight and read are met once more after the last tick, with tick = ``ticks``.
        Machines side by side, without gradients, end when none of them runs: the rest weighs 0, so no bit changes.
        """
        control, weight, angle = start.control_BEM, start.weight_BEH, start.angle_BEH
        step = (2 * self.reach * TURN / at.circle.to(angle.dtype)[..., None]).clamp(max=1)
        trail = _Trail(tape.cells_BSM, at) if ctx.tracing else None
        count_BE = torch.zeros_like(at.own_BE)
        adaptive = isinstance(tape, RankOne) and ctx.edits is None
        adaptive = adaptive and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        for tick in range(ticks + 1):
            now = ctx.at_tick(tick)
            control = now.edited(f"{name}.control", control)
            gate = torch.zeros_like(start.decay_BE)
            if tick < ticks:
                gate = now.edited(f"{name}.gate", self.gate(control, start.decay_BE, tick))
                if adaptive and not bool((gate > 0).any()):
                    continue  # all have halted: nothing moves until the last read
            angle = wrapped(now.edited(f"{name}.angle", wrapped(angle)))
            weight = now.edited(f"{name}.weight", weight)
            number, share = address(angle, weight, at)
            index = at.index(number)
            found = tape.read(index, share)
            read = now.edited(f"{name}.read", found)
            if trail is not None:
                seen = {"angle": angle, "weight": weight, "cell": at.token(number), "share": share}
                trail.look(found, at, control - self.target, seen)
            if tick == ticks:
                break
            moved, written, turned, weighed = self.step(read, control, angle, weight)
            written = now.edited(f"{name}.write", written)
            if trail is not None:
                trail.act(gate, index, share, found, written)
            tape.write(index, gate[..., None] * share, written)
            control = control + gate[..., None] * moved
            angle = angle + gate[..., None] * step * turned
            weight = weight + gate[..., None] * weighed
            count_BE = count_BE + (gate > 0)
        own = tape.read(at.index(at.own_BE[..., None]), torch.ones_like(share[..., :1]))
        return Final(own, read, control, count_BE, {} if trail is None else trail.notes(ticks))
