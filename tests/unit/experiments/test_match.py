"""The solver: parameters are met by changing as little as possible, and what is left over is told."""

import pytest
import torch

from stepladder.core.config import Field
from stepladder.core.errors import UserError
from stepladder.experiments import match
from stepladder.experiments.match import cost, count, match_params, sized
from stepladder.models.mixers.attention import Attention
from stepladder.models.mixers.cross import Cross
from stepladder.models.zoo import ARCHITECTURES, spec

VOCAB = 259
NAMED = {"50M": 50e6, "125M": 125e6, "300M": 300e6, "350M": 350e6, "760M": 760e6, "1B": 1e9, "1B-16k": 1e9}


def on_meta(of, vocab):
    with torch.device("meta"):
        return of.build(vocab)


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


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES.names() if ARCHITECTURES.get(name).sizes])
def test_every_named_size_has_the_parameters_of_its_name(name):
    """Counted on the model itself, each parameter once; a size without a number in its name just builds.

    A large vocabulary is the harder one: it leaves least to turn. The ends are tried with a small one too.
    """
    sizes = ARCHITECTURES.get(name).sizes
    assert set(sizes) <= set(NAMED) | {"nano", "pilot", "mid", "target"}
    for size in sizes:
        for vocab in (259, 32768) if size in ("50M", "1B-16k") else (32768,):
            model = on_meta(sized(name, size, vocab), vocab)
            params = sum(parameter.numel() for parameter in set(model.parameters()))
            wanted = NAMED.get(size, params)
            assert abs(params - wanted) <= 0.05 * wanted, f"{name} at {size}, vocabulary {vocab}: {params:,}"


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES.names() if ARCHITECTURES.get(name).sizes])
def test_the_size_for_16k_tokens_shares_keys_and_values_among_heads(name):
    chosen = sized(name, "1B-16k", VOCAB)
    parts = list(on_meta(chosen, VOCAB).modules())
    attention = [part for part in parts if isinstance(part, Attention)]
    assert bool(attention) == ("kv_heads" in type(chosen).model_fields)
    assert all(part.heads == 4 * part.kv_heads for part in attention)
    for cross in (part for part in parts if isinstance(part, Cross)):
        assert 4 * cross.pair.weight.shape[0] == 2 * cross.query.weight.shape[0]
    if attention:
        assert getattr(chosen, "max_positions", 0) >= 16384


def test_a_size_that_cannot_be_met_is_refused():
    with pytest.raises(
        UserError, match=r"transformer at 50M with a vocabulary of 100000 has [\d,]+ parameters at best"
    ):
        sized("transformer", "50M", 100_000, width=2048, heads=1024)


@pytest.mark.parametrize("name", ["transformer", "act", "ssm_mem"])
@pytest.mark.parametrize("target", [1, 60_000, 123_456, 10**6, 10**7 + 1])
def test_few_builds_find_what_bisection_finds(name, target, monkeypatch):
    start = spec(name, "tiny")
    slow = match._bisect(start, "hidden", target, VOCAB)
    builds = []
    monkeypatch.setattr(match, "count", lambda *of: builds.append(of) or count(*of))
    assert match._nearest(start, "hidden", target, VOCAB) == slow
    assert len(builds) <= 4


def test_a_knob_in_which_parameters_are_not_linear_is_bisected():
    class Wide(ARCHITECTURES.get("identity")):
        knobs = ("width",)
        width: int = Field(8, ge=1, description="model width")

    start = Wide(depth=1)
    found = match._nearest(start, "width", 200_000, VOCAB)
    beside = [count(start.model_copy(update={"width": found.spec.width + step}), VOCAB) for step in (-1, 1)]
    assert found.params == count(found.spec, VOCAB)
    assert abs(found.params - 200_000) <= min(abs(params - 200_000) for params in beside)
