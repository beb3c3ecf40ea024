"""The recurrence of ``mixers.lstm`` with forward and backward written out.

The loop over tokens holds only what depends on the token before: one product and a handful of elementwise operations,
written into arrays that were allocated once. Gradients of the weights are one product over all tokens. To autograd and
torch.compile the whole loop is one operator, so nothing is recorded or unrolled token by token.

Suffixes as in mixers.lstm; time comes first here, so that a token is one block of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stepladder.models.kernels.loop import Loop, before, blocks, some_rows, stepwise


class Given(NamedTuple):
    """x_TBG: W x + b, in the order i, f, o, g. weight_GH: U. reset_TB: where h and c before the token count as 0."""

    x_TBG: Tensor
    weight_GH: Tensor
    reset_TB: Tensor
    h_BH: Tensor
    c_BH: Tensor


class Made(NamedTuple):
    """All outputs h, the last cell; kept: gates and cells."""

    y_TBH: Tensor
    c_BH: Tensor
    gates_TBG: Tensor
    c_TBH: Tensor


def lstm(given: Given) -> tuple[Tensor, Tensor]:
    """All outputs h (T, B, H) and the last cell (B, H). All tensors of one type, float32 or wider."""
    y_TBH, c_BH, *_ = _LOOP(given)
    return y_TBH, c_BH


def _shapes(given: Given, keep: bool) -> Made:
    tokens, batch, gates = given.x_TBG.shape
    places, new, cell = tokens if keep else 1, given.x_TBG.new_empty, given.c_BH.shape
    return Made(new(tokens, *cell), new(cell), new(places, batch, gates), new(places, *cell))


def _forward(given: Given, keep: bool) -> Made:
    made, (x_TBG, weight_GH, reset_TB, h_BH, c_BH) = _shapes(given, keep), given
    cell, tokens = Cell(weight_GH, c_BH), len(x_TBG)
    views = made.y_TBH, made.gates_TBG, made.c_TBH
    for x_BG, reset_B, y_BH, gates_BG, new_BH in zip(
        x_TBG.unbind(0), some_rows(reset_TB), *(stepwise(view, tokens) for view in views), strict=False
    ):
        if reset_B is not None:
            h_BH, c_BH = h_BH.masked_fill(reset_B[:, None], 0.0), c_BH.masked_fill(reset_B[:, None], 0.0)
        cell.forward(x_BG, h_BH, c_BH, new_BH, y_BH)
        if keep:
            gates_BG.copy_(cell.gates_BG)
        h_BH, c_BH = y_BH, new_BH
    made.c_BH.copy_(c_BH)
    return made


def _backward(slopes: tuple[Tensor, ...], given: Given, made: Made) -> tuple[Tensor, ...]:
    """What needs no later token is computed for a block of tokens at once."""
    (dy_TBH, dc_BH), (_, weight_GH, reset_TB, h_BH, c_BH), (y_TBH, _, gates_TBG, c_TBH) = slopes, given, made
    found_TBH, heard_TBH = before(c_BH, c_TBH, reset_TB), before(h_BH, y_TBH, reset_TB)
    cell, dc_BH, resets = Cell(weight_GH, c_BH), dc_BH.clone(), list(some_rows(reset_TB))
    dc_B1H, dh_BH, later_BH = dc_BH[:, None], torch.empty_like(dc_BH), torch.zeros_like(dc_BH)
    dx_TBG, dweight_GH = torch.empty_like(gates_TBG), torch.zeros_like(weight_GH)
    for block in blocks(len(gates_TBG), gates_TBG[0].numel()):
        ready = cell.ready(gates_TBG[block], found_TBH[block], c_TBH[block], dx_TBG[block])
        views = (reversed(view.unbind(0)) for view in (dy_TBH[block], *ready))
        for reset_B, dy_BH, *at in zip(reversed(resets[block]), *views, strict=True):
            torch.add(dy_BH, later_BH, out=dh_BH)
            cell.back(dh_BH, dc_BH, dc_B1H, at, later_BH)
            if reset_B is not None:
                dc_BH.masked_fill_(reset_B[:, None], 0.0)
                later_BH.masked_fill_(reset_B[:, None], 0.0)
        dweight_GH.addmm_(dx_TBG[block].flatten(0, 1).t(), heard_TBH[block].flatten(0, 1))
    return dx_TBG, dweight_GH, later_BH, dc_BH


class Cell:
    """The cell, over x from outside and F numbers of its own past. It holds the arrays that a token needs."""

    def __init__(self, weight_GF: Tensor, c_BH: Tensor) -> None:
        batch, self.inner = c_BH.shape
        self.weight_GF, self.weight_FG = weight_GF, weight_GF.t().contiguous()  # the transposed view is slow on a CPU
        self.gates_BG, self.tanh_BH = c_BH.new_empty(batch, 4 * self.inner), torch.empty_like(c_BH)
        self.sigmoids = self.gates_BG[:, : 3 * self.inner]
        self.i, self.f, self.o, self.g = self.gates_BG.split(self.inner, dim=1)

    def forward(self, x_BG: Tensor, past_BF: Tensor, c_BH: Tensor, into_BH: Tensor, h_BH: Tensor) -> None:
        """Fills ``gates_BG``, ``into`` with the next c, and h."""
        torch.addmm(x_BG, past_BF, self.weight_FG, out=self.gates_BG)
        self.sigmoids.sigmoid_()
        self.g.tanh_()
        torch.mul(self.f, c_BH, out=into_BH).addcmul_(self.i, self.g)
        torch.mul(self.o, torch.tanh(into_BH, out=self.tanh_BH), out=h_BH)

    def ready(self, gates_CBG: Tensor, found_CBH: Tensor, c_CBH: Tensor, into_CBG: Tensor) -> list[Tensor]:
        """What ``back`` is given, for some tokens. into: for the gradients of the gates. found: c one token earlier."""
        slopes_CBG, slope_CBH = self._slopes(gates_CBG, found_CBH, c_CBH)
        fours, o = (4, self.inner), slice(2 * self.inner, 3 * self.inner)
        factors = [slope_CBH, slopes_CBG.unflatten(2, fours), slopes_CBG[..., o]]
        forget_CBH = gates_CBG[..., self.inner : 2 * self.inner]
        return [*factors, forget_CBH, into_CBG, into_CBG.unflatten(2, fours), into_CBG[..., o]]

    def back(self, dh_BH: Tensor, dc_BH: Tensor, dc_B1H: Tensor, ready: Sequence[Tensor], later_BF: Tensor) -> None:
        """From dh and dc to the gates' gradients, dc one token earlier, and ``later``: that of the past."""
        slope, to_c, to_o, forget, dx_BG, all_four, do = ready
        dc_BH.addcmul_(dh_BH, slope)
        torch.mul(to_c, dc_B1H, out=all_four)
        torch.mul(to_o, dh_BH, out=do)
        dc_BH.mul_(forget)
        torch.mm(dx_BG, self.weight_GF, out=later_BF)

    def _slopes(self, gates_CBG: Tensor, found_CBH: Tensor, c_CBH: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of gradients that go back through the cell.

        For the gates before their nonlinearities: by the gradient of h for o, by that of c for the others. For c: by
        that of h.
        """
        (i, f, o, g), tanh, into = gates_CBG.split(self.inner, dim=2), c_CBH.tanh(), torch.empty_like(gates_CBG)
        to_i, to_f, to_o, to_g = into.split(self.inner, dim=2)
        for gate, slope, to in ((i, g, to_i), (f, found_CBH, to_f), (o, tanh, to_o)):
            torch.ops.aten.sigmoid_backward.grad_input(slope, gate, grad_input=to)  # slope gate (1 - gate)
        torch.ops.aten.tanh_backward.grad_input(i, g, grad_input=to_g)  # i (1 - g^2)
        return into, torch.ops.aten.tanh_backward(o, tanh)


_LOOP = Loop("lstm", Given, Made, _forward, _backward, _shapes, outputs=2)
