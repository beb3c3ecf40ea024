"""The recurrence of ``mixers.gru`` with forward and backward written out; see kernels.lstm for why.

Suffixes as in mixers.gru; time comes first here, so that a token is one block of memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stepladder.models.kernels.loop import Loop, before, blocks, some_rows, stepwise


class Given(NamedTuple):
    """x_TBG: W x + b, in the order r, z, n. weight_GH: U. bias_H: c. reset_TB: where h before the token counts as 0."""

    x_TBG: Tensor
    weight_GH: Tensor
    bias_H: Tensor
    reset_TB: Tensor
    h_BH: Tensor


class Made(NamedTuple):
    """All outputs h; kept: the gates, and q = U_n h + c."""

    y_TBH: Tensor
    gates_TBG: Tensor
    q_TBH: Tensor


def gru(given: Given) -> Tensor:
    """All outputs h (T, B, H). All tensors of one type, float32 or wider."""
    y_TBH: Tensor = _LOOP(given)[0]
    return y_TBH


def _shapes(given: Given, keep: bool) -> Made:
    tokens, batch, gates = given.x_TBG.shape
    places, new, cell = tokens if keep else 1, given.x_TBG.new_empty, given.h_BH.shape
    return Made(new(tokens, *cell), new(places, batch, gates), new(places, *cell))


def _forward(given: Given, keep: bool) -> Made:
    made, (x_TBG, weight_GH, bias_H, reset_TB, h_BH) = _shapes(given, keep), given
    tokens, inner = len(x_TBG), h_BH.shape[1]
    weight_HG = weight_GH.t().contiguous()  # the transposed view is slow on a CPU
    past_BG, difference_BH = torch.empty_like(made.gates_TBG[0]), torch.empty_like(h_BH)
    past_B2H, past_BH = past_BG.split((2 * inner, inner), dim=1)
    views = made.y_TBH, made.gates_TBG, made.q_TBH
    for x_BG, reset_B, y_BH, gates_BG, q_BH in zip(
        x_TBG.unbind(0), some_rows(reset_TB), *(stepwise(view, tokens) for view in views), strict=False
    ):
        if reset_B is not None:
            h_BH = h_BH.masked_fill(reset_B[:, None], 0.0)
        torch.mm(h_BH, weight_HG, out=past_BG)
        both, n = gates_BG.split((2 * inner, inner), dim=1)
        r, z = both.split(inner, dim=1)
        torch.add(x_BG[:, : 2 * inner], past_B2H, out=both).sigmoid_()
        torch.add(past_BH, bias_H, out=q_BH)
        torch.addcmul(x_BG[:, 2 * inner :], r, q_BH, out=n).tanh_()
        torch.addcmul(n, z, torch.sub(h_BH, n, out=difference_BH), out=y_BH)
        h_BH = y_BH
    return made


def _backward(slopes: tuple[Tensor, ...], given: Given, made: Made) -> tuple[Tensor, ...]:
    """What needs no later token is computed for a block of tokens at once."""
    (dy_TBH,), (_, weight_GH, _, reset_TB, h_BH), (y_TBH, gates_TBG, q_TBH) = slopes, given, made
    heard_TBH, resets, inner = before(h_BH, y_TBH, reset_TB), list(some_rows(reset_TB)), h_BH.shape[1]
    dh_BH, later_BH = torch.empty_like(h_BH), torch.zeros_like(h_BH)
    dx_TBG, dweight_GH, dbias_H = (torch.empty_like(gates_TBG), torch.zeros_like(weight_GH), h_BH.new_zeros(inner))
    for block in blocks(len(gates_TBG), gates_TBG[0].numel()):
        r, z, n = gates_TBG[block].split(inner, dim=2)
        to_n = (1 - z) * (1 - n * n)
        to_z = (heard_TBH[block] - n) * z * (1 - z)
        to_r = to_n * q_TBH[block] * r * (1 - r)
        # Slopes of h' by the three products U h, and by what x adds inside n.
        to_CBX = torch.cat((to_r, to_z, to_n * r, to_n), 2)
        d_CBX = torch.empty_like(to_CBX)
        du_CBG = d_CBX[..., : 3 * inner]
        by_gate = (each.unflatten(2, (4, inner)) for each in (to_CBX, d_CBX))
        views = (reversed(view.unbind(0)) for view in (dy_TBH[block], z, *by_gate, du_CBG))
        for reset_B, dy_BH, z_BH, to_B4H, d_B4H, du_BG in zip(reversed(resets[block]), *views, strict=True):
            torch.add(dy_BH, later_BH, out=dh_BH)
            torch.mul(to_B4H, dh_BH[:, None], out=d_B4H)
            torch.mul(dh_BH, z_BH, out=later_BH).addmm_(du_BG, weight_GH)
            if reset_B is not None:
                later_BH.masked_fill_(reset_B[:, None], 0.0)
        dx_TBG[block] = torch.cat((d_CBX[..., : 2 * inner], d_CBX[..., 3 * inner :]), 2)
        dweight_GH.addmm_(du_CBG.flatten(0, 1).t(), heard_TBH[block].flatten(0, 1))
        dbias_H.add_(du_CBG[..., 2 * inner :].sum((0, 1)))
    return dx_TBG, dweight_GH, dbias_H, later_BH


_LOOP = Loop("gru", Given, Made, _forward, _backward, _shapes, outputs=1)
