"""The recurrence of ``mixers.lstm`` with forward and backward written out.

The loop over tokens holds only what depends on the token before: one product and a handful of elementwise operations,
written into arrays that were allocated once. Gradients of the weights are one product over all tokens. To autograd and
torch.compile the whole loop is one operator, so nothing is recorded or unrolled token by token.

Suffixes as in mixers.lstm; time comes first here, so that a token is one block of memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepladder.models.kernels.loop import Loop, before, blocks, some_rows, stepwise


def lstm(x_TBG: Tensor, weight_GH: Tensor, reset_TB: Tensor, h_BH: Tensor, c_BH: Tensor) -> tuple[Tensor, Tensor]:
    """All outputs h (T, B, H) and the last cell (B, H).

    x_TBG: W x + b, in the order i, f, o, g. weight_GH: U. reset_TB: where h and c before the token count as 0. All of
    one type, float32 or wider.
    """
    y_TBH, c_BH, *_ = _LOOP(x_TBG, weight_GH, reset_TB, h_BH, c_BH)
    return y_TBH, c_BH


def _forward(
    x_TBG: Tensor, weight_GH: Tensor, reset_TB: Tensor, h_BH: Tensor, c_BH: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y_TBH, the last c_BH, and with ``keep`` what the backward pass needs: gates (T, B, G) and cells (T, B, H)."""
    (tokens, batch, width), inner = x_TBG.shape, h_BH.shape[1]
    places = tokens if keep else 1
    y_TBH = x_TBG.new_empty(tokens, batch, inner)
    gates_TBG, c_TBH = (x_TBG.new_empty(places, batch, size) for size in (width, inner))
    weight_HG, tanh_BH = weight_GH.t().contiguous(), torch.empty_like(h_BH)  # the transposed view is slow on a CPU
    views = gates_TBG, gates_TBG[..., : 3 * inner], *gates_TBG.split(inner, dim=2), c_TBH, y_TBH
    for x_BG, reset_B, gates, sigmoids, i, f, o, g, new_BH, y_BH in zip(
        x_TBG.unbind(0), some_rows(reset_TB), *(stepwise(view, tokens) for view in views), strict=False
    ):
        if reset_B is not None:
            h_BH, c_BH = h_BH.masked_fill(reset_B[:, None], 0.0), c_BH.masked_fill(reset_B[:, None], 0.0)
        torch.addmm(x_BG, h_BH, weight_HG, out=gates)
        sigmoids.sigmoid_()
        g.tanh_()
        torch.mul(f, c_BH, out=new_BH).addcmul_(i, g)
        torch.mul(o, torch.tanh(new_BH, out=tanh_BH), out=y_BH)
        h_BH, c_BH = y_BH, new_BH
    kept = (gates_TBG, c_TBH) if keep else (x_TBG.new_empty(0), x_TBG.new_empty(0))
    return y_TBH, c_BH.clone(), *kept


def _shapes(
    x_TBG: Tensor, weight_GH: Tensor, reset_TB: Tensor, h_BH: Tensor, c_BH: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y_TBH = x_TBG.new_empty(*x_TBG.shape[:2], h_BH.shape[1])
    kept = (torch.empty_like(x_TBG), torch.empty_like(y_TBH)) if keep else (x_TBG.new_empty(0), x_TBG.new_empty(0))
    return y_TBH, torch.empty_like(c_BH), *kept


def _backward(
    dy_TBH: Tensor,
    dc_BH: Tensor,
    x_TBG: Tensor,
    weight_GH: Tensor,
    reset_TB: Tensor,
    h_BH: Tensor,
    c_BH: Tensor,
    y_TBH: Tensor,
    after_BH: Tensor,
    gates_TBG: Tensor,
    c_TBH: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first five but the resets. What needs no later token is computed for all tokens at once."""
    tokens, inner = len(gates_TBG), h_BH.shape[1]
    found_TBH, heard_TBH = before(c_BH, c_TBH, reset_TB), before(h_BH, y_TBH, reset_TB)
    dx_TBG, dc_BH, resets = torch.empty_like(gates_TBG), dc_BH.clone(), list(some_rows(reset_TB))
    dh_BH, later, dweight_GH = torch.empty_like(dc_BH), torch.zeros_like(dc_BH), torch.zeros_like(weight_GH)
    for block in blocks(tokens, gates_TBG[0].numel()):
        slopes_TBG, slope_TBH = slopes(gates_TBG[block], found_TBH[block], c_TBH[block])
        o, f = slice(2 * inner, 3 * inner), slice(inner, 2 * inner)
        back = dx_TBG[block]
        views = dy_TBH[block], slope_TBH, slopes_TBG.unflatten(2, (4, inner)), slopes_TBG[..., o], gates_TBG[block, :, f]
        into = back, back.unflatten(2, (4, inner)), back[..., o]
        for reset_B, dy_BH, slope, to_c, to_o, forget, dx_BG, all_four, do in zip(
            reversed(resets[block]), *(reversed(view.unbind(0)) for view in (*views, *into)), strict=True
        ):
            torch.add(dy_BH, later, out=dh_BH)
            dc_BH.addcmul_(dh_BH, slope)
            torch.mul(to_c, dc_BH[:, None], out=all_four)
            torch.mul(to_o, dh_BH, out=do)
            dc_BH.mul_(forget)
            torch.mm(dx_BG, weight_GH, out=later)
            if reset_B is not None:
                dc_BH.masked_fill_(reset_B[:, None], 0.0)
                later.masked_fill_(reset_B[:, None], 0.0)
        dweight_GH.addmm_(back.flatten(0, 1).t(), heard_TBH[block].flatten(0, 1))
    return dx_TBG, dweight_GH, later, dc_BH


def slopes(gates_TBG: Tensor, before_TBH: Tensor, c_TBH: Tensor) -> tuple[Tensor, Tensor]:
    """Factors by which gradients go back through a cell.

    Of every gate's preactivation (T, B, G): for o by the gradient of h, for the others by that of c. And of c by that of
    h, (T, B, H). before: c one token earlier.
    """
    (i, f, o, g), tanh = gates_TBG.chunk(4, dim=2), c_TBH.tanh()
    found = torch.empty_like(gates_TBG)
    for slope, gate, into in zip((g, before_TBH, tanh), (i, f, o), found.chunk(4, dim=2), strict=False):
        torch.ops.aten.sigmoid_backward.grad_input(slope, gate, grad_input=into)  # slope x gate (1 - gate)
    torch.ops.aten.tanh_backward.grad_input(i, g, grad_input=found.chunk(4, dim=2)[3])  # i (1 - g^2)
    return found, torch.ops.aten.tanh_backward(o, tanh)


_LOOP = Loop("lstm", _forward, _backward, _shapes, tensors=5, outputs=2, kept=2, derived=(0, 1, 3, 4))
