"""The solver: parameters are met by changing as little as possible, and what is left over is told."""

import pytest
import torch

from stepladder.experiments.match import cost, count, match_params
from stepladder.models.zoo import spec

VOCAB = 259


def test_count_is_that_of_the_allocated_model():
    loop = spec("shared_loop", "tiny")
    assert count(loop, VOCAB) == sum(p.numel() for p in loop.build(VOCAB).parameters())


def test_cost_allocates_nothing(monkeypatch):
    monkeypatch.setattr(
        torch.nn.init, "normal_", lambda tensor, **_: tensor if tensor.is_meta else pytest.fail("alloc")
    )
    huge = spec("transformer", width=8192, depth=48, heads=64)
    assert cost(huge, VOCAB, 4096).params > 1e10


def test_a_spec_that_fits_is_left_alone():
    control = spec("transformer", width=64, depth=2, heads=4)
    found = match_params(control, count(control, VOCAB), VOCAB)
    assert found.spec == control
    assert found.residual == 0


@pytest.mark.parametrize("kind", ["shared_loop", "identity"])
@pytest.mark.parametrize(("width", "depth"), [(64, 2), (96, 3), (48, 1)])
def test_params_are_met_within_a_percent_at_the_same_width(kind, width, depth):
    control = spec("transformer", width=width, depth=depth, heads=4)
    target = count(control, VOCAB)
    heads = {"heads": 4} if kind == "shared_loop" else {}
    found = match_params(spec(kind, width=width, depth=depth, **heads), target, VOCAB)
    assert found.params == count(found.spec, VOCAB)
    assert abs(found.residual) <= 0.01
    assert found.residual == pytest.approx((found.params - target) / target)
    assert found.spec.width == width
    assert found.spec.depth == depth


def test_width_is_turned_when_the_hidden_width_cannot_do_it():
    wide, target = spec("transformer", width=32, depth=1, heads=2), 12_000
    assert 2 * VOCAB * wide.width > target  # embedding and head alone are too many
    found = match_params(wide, target, VOCAB)
    assert found.spec.width < 32
    assert abs(found.residual) <= 0.01


def test_fixed_fields_are_left_alone():
    control = spec("transformer", width=32, depth=2, heads=2)
    start = spec("transformer", width=32, depth=2, heads=2, hidden=200)
    found = match_params(start, count(control, VOCAB), VOCAB, fixed=("hidden",))
    assert found.spec.hidden == 200
    assert abs(found.residual) < abs(count(start, VOCAB) / count(control, VOCAB) - 1)
    assert match_params(start, count(control, VOCAB), VOCAB, fixed=("hidden", "width")).spec == start


def test_a_spec_without_knobs_is_reported_not_changed():
    class Fixed(type(spec("identity"))):
        knobs = ()

    fixed = Fixed(width=32)
    found = match_params(fixed, 10**6, VOCAB)
    assert found.spec is fixed
    assert found.residual < -0.5
