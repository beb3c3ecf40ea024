import math

import pytest
import torch

from stepladder.core.errors import UserError
from stepladder.models.base import Context, Sink
from stepladder.models.layers import Embedding, linear, norm, residual_gain, rotate


def context(tokens_BT, positions_BT=None):
    if positions_BT is None:
        positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    keys_B = torch.zeros(len(tokens_BT), dtype=torch.int64)
    return Context(tokens_BT, positions_BT, False, None, keys_B, 0, False, Sink())


@pytest.mark.parametrize(("inputs", "gain"), [(64, 1.0), (256, 1.0), (64, 0.25)])
def test_linear_maps_unit_inputs_to_scale_gain(inputs, gain):
    torch.manual_seed(0)
    layer = linear(inputs, 400, gain)
    assert layer.bias is None
    size = layer(torch.randn(400, inputs)).std().item()
    assert size == pytest.approx(gain, rel=0.03)


def test_residual_gain_keeps_the_variance_of_a_deep_stream_bounded():
    """Two writes a block, each of gain 1/sqrt(2 depth), add up to a variance of one."""
    for depth in (1, 4, 36):
        assert 2 * depth * residual_gain(depth) ** 2 == pytest.approx(1.0)
    assert residual_gain(0) == residual_gain(1)


def test_norm_has_unit_mean_square():
    x = 100 * torch.randn(5, 16)
    torch.testing.assert_close(norm(16)(x).square().mean(-1), torch.ones(5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_enter_at_unit_scale_tied_or_not(tied):
    torch.manual_seed(0)
    embed = Embedding(50, 64, tied=tied)
    x_BTD = embed(context(torch.arange(50)[None]))
    assert x_BTD.std().item() == pytest.approx(1.0, rel=0.05)
    assert embed.cost().params == 50 * 64


def test_learned_positions_are_those_of_the_document():
    embed = Embedding(5, 4, positions=6)
    tokens_BT, positions_BT = torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[0, 1, 0, 5]])
    x_BTD = embed(context(tokens_BT, positions_BT))
    assert torch.equal(x_BTD[0, 0], x_BTD[0, 2])
    assert not torch.equal(x_BTD[0, 0], x_BTD[0, 1])
    assert embed.cost().params == (5 + 6) * 4


def test_t9_a_document_longer_than_the_learned_positions_is_refused_not_cut():
    embed = Embedding(5, 4, positions=6)
    tokens_BT = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(UserError, match="a document of 7 tokens does not fit the 6 learned positions"):
        embed(context(tokens_BT, torch.tensor([[3, 4, 5, 6]])))


def test_rotation_turns_pairs_by_position_times_speed():
    """Written out: channel i and i + K/2 form a pair that turns by p x base^(-2i/K)."""
    width, base = 6, 50.0
    x = torch.randn(1, 1, 4, width).double()
    got = rotate(x, torch.tensor([[0, 1, 2, 7]]), base)
    for place, p in enumerate((0, 1, 2, 7)):
        for i in range(width // 2):
            angle = p * base ** (-2 * i / width)
            a, b = x[0, 0, place, i].item(), x[0, 0, place, i + width // 2].item()
            assert got[0, 0, place, i].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-13)
            assert got[0, 0, place, i + width // 2].item() == pytest.approx(
                b * math.cos(angle) + a * math.sin(angle), abs=1e-13
            )


def test_rotation_keeps_lengths_and_the_type():
    x, positions_BT = torch.randn(2, 3, 5, 8), torch.arange(10).view(2, 5) * 1000
    torch.testing.assert_close(rotate(x, positions_BT, 1e4).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotate(x, torch.zeros(2, 5, dtype=torch.int64), 1e4), x)
    assert rotate(x.bfloat16(), positions_BT, 1e4).dtype == torch.bfloat16


def test_rotation_stays_exact_far_out_in_half_precision():
    """Angles in bfloat16 would be off by whole turns at position 60 000."""
    x, far = torch.ones(1, 1, 1, 8), torch.tensor([[60_000]])
    exact = rotate(x.double(), far, 1e4)
    assert (rotate(x.bfloat16(), far, 1e4).double() - exact).abs().max() < 0.02
