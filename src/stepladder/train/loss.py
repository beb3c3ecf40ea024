"""The training objective: likelihood plus an architecture's named terms, summed over scored tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepladder.core.errors import UserError
from stepladder.core.registry import did_you_mean
from stepladder.models.base import IGNORE, Output


def objective(output: Output, targets_BT: Tensor, weights: Mapping[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum over scored tokens of nll + sum_w weight_w * loss_w, and each term's own sum, detached, unweighted.

    ``output`` must have been computed with ``targets``. A named loss without an entry in ``weights`` weighs 1; an
    entry that no loss answers to is a UserError. Sums, not means: micro-batches add up before the one division by
    all scored tokens of the step, so unequal ones weigh what they should. The likelihood's sum is called "nll".
    """
    for name in weights:
        if name not in output.losses:
            known = ", ".join(output.losses) or "none"
            hint = did_you_mean(name, output.losses) or f"; its named losses: {known}"
            raise UserError(f"train.losses: the model has no loss '{name}'{hint}")
    assert output.nll_BT is not None
    scored_BT = targets_BT != IGNORE
    total = output.nll_BT.sum()
    sums = {"nll": total.detach()}
    for name, value_BT in output.losses.items():
        # where, not a product: a NaN at an unscored position must not reach the sum
        value = torch.where(scored_BT, value_BT, 0.0).sum()
        total = total + weights.get(name, 1.0) * value
        sums[name] = value.detach()
    return total, sums
