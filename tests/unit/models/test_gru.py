"""The GRU is torch's own, gate by gate, and costs what attention costs."""

from __future__ import annotations

import torch
from torch import nn

from stepladder.models.zoo import spec


def part_of(model):
    return model.core.core.parts[0].part


def test_it_is_torchs_gru():
    torch.manual_seed(0)
    model = spec("gru", width=8, depth=1, inner=6).build(11).double()
    part, seen = part_of(model), {}
    with torch.no_grad():
        for bias in (part.bias, part.past_bias):
            bias.normal_()
    part.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out[0], state=out[1]))
    model(torch.randint(0, 11, (3, 20)))
    theirs = nn.GRU(8, 6, batch_first=True).double()
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(part.project.weight)
        theirs.weight_hh_l0.copy_(part.recur.weight)
        theirs.bias_ih_l0.copy_(part.bias)
        theirs.bias_hh_l0.zero_()[12:].copy_(part.past_bias)
    y, h = theirs(seen["x"])
    torch.testing.assert_close(seen["y"], part.out(y), rtol=0, atol=1e-12)
    torch.testing.assert_close(seen["state"], h[0], rtol=0, atol=1e-12)


def test_a_block_has_the_parameters_of_a_transformers():
    mine, theirs = (part_of(spec(name, width=96, depth=1).build(11)).own_params() for name in ("gru", "transformer"))
    assert abs(mine / theirs - 1) < 0.02
