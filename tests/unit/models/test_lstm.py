"""The LSTM is the paper's: torch's own, gate by gate, and its forget gates start open."""

from __future__ import annotations

import torch
from torch import nn

from stepladder.models.zoo import spec
from stepladder.run import TrainConfig
from stepladder.train.optim import adamw


def part_of(model):
    return model.core.core.parts[0].part


def test_it_is_torchs_lstm():
    torch.manual_seed(0)
    model = spec("lstm", width=8, depth=1, inner=6).build(11).double()
    part, seen = part_of(model), {}
    part.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out[0], state=out[1]))
    model(torch.randint(0, 11, (3, 20)))
    theirs = nn.LSTM(8, 6, batch_first=True).double()
    order = torch.arange(24).unflatten(0, (4, 6))[[0, 1, 3, 2]].flatten()  # torch keeps i, f, g, o
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(part.project.weight[order])
        theirs.weight_hh_l0.copy_(part.recur.weight[order])
        theirs.bias_ih_l0.copy_(part.bias[order])
        theirs.bias_hh_l0.zero_()
    y, (h, c) = theirs(seen["x"])
    torch.testing.assert_close(seen["y"], part.out(y), rtol=0, atol=1e-12)
    torch.testing.assert_close((seen["state"].h_BH, seen["state"].c_BH), (h[0], c[0]), rtol=0, atol=1e-12)


def test_a_cell_keeps_its_content_before_training():
    """Forget gates have bias 1, all others 0; so what is in c fades by about sigmoid(1) = 0.73 a token, not by half."""
    torch.manual_seed(0)
    part = part_of(spec("lstm", width=64, depth=1).build(11))
    i, f, o, g = part.bias.detach().chunk(4)
    assert bool((f == 1).all())
    assert not bool(torch.cat((i, o, g)).any())


def test_gate_biases_do_not_decay():
    model = spec("lstm", width=24, depth=1).build(11)
    _, kept = adamw(model, TrainConfig(steps=1)).param_groups
    assert any(each is part_of(model).bias for each in kept["params"])
