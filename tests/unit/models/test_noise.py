import math

import pytest
import torch

from stepladder.models.base import Context, Sink
from stepladder.models.noise import Dropout, row_keys, uniform
from stepladder.models.zoo import spec

CPU = torch.device("cpu")


def context(keys, positions_BT, tick=0):
    keys_B = keys if isinstance(keys, torch.Tensor) else row_keys(keys, len(positions_BT), CPU)
    return Context(torch.zeros_like(positions_BT), positions_BT, False, None, keys_B, tick, False, Sink())


def places(batch, length):
    return torch.arange(length).expand(batch, length)


def test_numbers_are_uniform():
    """Kolmogorov-Smirnov over 200 000 numbers: a distance of 1.95/sqrt(n) is passed once in a thousand."""
    u = uniform(context(7, places(50, 40)), site=3, lanes=100).flatten().double()
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    n = len(u)
    distance = (u.sort().values - (torch.arange(n) + 0.5) / n).abs().max()
    assert float(distance) < 1.95 / math.sqrt(n)


@pytest.mark.parametrize("other", ["key", "position", "site", "tick", "lane", "row"])
def test_neighbouring_streams_are_uncorrelated(other):
    """Correlation of 20 000 pairs, one ingredient raised by one; 4.5 standard deviations."""
    at = places(20, 10)
    base = uniform(context(3, at), 0, 100)
    beside = {
        "key": lambda: uniform(context(4, at), 0, 100),
        "position": lambda: uniform(context(3, at + 1), 0, 100),
        "site": lambda: uniform(context(3, at), 1, 100),
        "tick": lambda: uniform(context(3, at, tick=1), 0, 100),
        "lane": lambda: base.roll(1, 2),
        "row": lambda: base.roll(1, 0),
    }[other]()
    pairs = torch.stack((base.flatten(), beside.flatten())).double()
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 4.5 / math.sqrt(pairs.shape[1])


def test_a_number_depends_on_its_own_row_and_position_only():
    keys = row_keys(11, 6, CPU)
    whole = uniform(context(keys, places(6, 20)), 2, 8)
    assert torch.equal(uniform(context(keys[[4, 1]], places(2, 20)), 2, 8), whole[[4, 1]])
    assert torch.equal(uniform(context(keys, places(6, 20)[:, 13:]), 2, 8), whole[:, 13:])
    assert torch.equal(uniform(context(keys, places(6, 20)), 2, 3), whole[..., :3])


def test_integer_keys_never_share_a_row():
    """Small integers too: step numbers make natural keys, and row 2 of key 1 must not be row 1 of key 2."""
    integers = [*range(64), -1, 2**31, 2**32, 2**32 + 1, 2**62, 2**63 - 1]
    keys = torch.cat([row_keys(integer, 64, CPU) for integer in integers])
    assert len(keys.unique()) == len(keys)


def test_a_tensor_of_keys_is_taken_as_it_is():
    keys = torch.tensor([5, 5, 2**60])
    assert torch.equal(row_keys(keys, 3, CPU), keys)
    drawn = uniform(context(keys, places(3, 4)), 0, 16)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_upper_half_of_a_key_counts():
    drawn = [uniform(context(torch.tensor([key]), places(1, 4)), 0, 16) for key in (9, 9 + 2**32, 9 + 2**61)]
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_dropout_keeps_the_expectation_and_drops_its_share():
    layer, x = Dropout(0.3).train(), torch.ones(50, 40, 100)
    y = layer(x, context(1, places(50, 40)))
    share = float((y == 0).double().mean())
    assert abs(share - 0.3) < 4.5 * math.sqrt(0.3 * 0.7 / x.numel())
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / 0.7))


def test_dropout_is_off_in_eval_mode_and_at_rate_zero():
    x, ctx = torch.randn(2, 3, 4), context(1, places(2, 3))
    assert torch.equal(Dropout(0.9).eval()(x, ctx), x)
    assert torch.equal(Dropout(0.0).train()(x, ctx), x)


def test_dropout_keeps_the_type():
    x = torch.ones(2, 3, 4, dtype=torch.bfloat16)
    assert Dropout(0.5).train()(x, context(1, places(2, 3))).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["transformer", "shared_loop"])
def test_every_dropout_of_a_model_has_a_site_of_its_own(name):
    model = spec(name, "tiny", dropout=0.1).build(11)
    sites = [part.site for part in model.modules() if isinstance(part, Dropout)]
    assert len(sites) >= 2
    assert len(set(sites)) == len(sites)
