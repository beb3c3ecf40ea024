import pytest

from stepladder.core.config import Field
from stepladder.core.errors import UserError
from stepladder.models.spec import Spec
from stepladder.models.zoo import ARCHITECTURES, spec

NAMES = ARCHITECTURES.names()


@pytest.mark.parametrize("name", NAMES)
def test_every_named_size_is_a_valid_configuration(name):
    cls = ARCHITECTURES.get(name)
    for size in ("tiny", *cls.sizes):
        config = spec(name, size)
        assert type(config) is cls
        assert config.kind == name


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_documented(name):
    for field, info in ARCHITECTURES.get(name).model_fields.items():
        assert info.description, f"{name}.{field}"


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_says_what_it_is_and_has_a_tiny_configuration(name):
    cls = ARCHITECTURES.get(name)
    assert len(cls.__doc__) > 40
    assert cls.tiny
    assert sum(p.numel() for p in spec(name, "tiny").build(23).parameters()) < 200_000


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_survives_json(name):
    config = spec(name, "tiny")
    assert type(config).model_validate_json(config.model_dump_json()) == config


def test_fields_go_on_top_of_a_size():
    assert spec("transformer", "tiny", width=64).width == 64
    assert spec("transformer", "tiny", width=64).depth == spec("transformer", "tiny").depth
    assert spec("transformer").width == 128


def test_an_alias_is_the_main_name():
    assert spec("baseline").kind == "transformer"


def test_mistakes_are_one_sentence():
    with pytest.raises(UserError, match=r"no size 'huge'; sizes: tiny, nano"):
        spec("transformer", "huge")
    with pytest.raises(UserError, match="unknown architecture 'transformers' — did you mean 'transformer'"):
        spec("transformers")
    with pytest.raises(UserError, match="unknown key 'widht' — did you mean 'width'"):
        spec("transformer", widht=3)
    with pytest.raises(UserError, match="width = 0"):
        spec("transformer", width=0)
    with pytest.raises(UserError, match="dropout"):
        spec("transformer", dropout=1.0)


def test_a_configuration_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        spec("transformer").width = 3


def test_hidden_width_is_eight_thirds_rounded_to_eight():
    assert spec("transformer", width=96).hidden_width == 256
    assert spec("transformer", width=100).hidden_width == 264
    assert spec("transformer", width=100, hidden=7).hidden_width == 7


def test_nano_has_the_size_it_is_known_by():
    """6 blocks of 4 d^2 (attention) + 3 d F (SwiGLU, F = 1368) + 2 norms of d, one final norm, without embeddings."""
    model = spec("transformer", "nano", tied=True).build(3)
    d, hidden = 512, 1368
    assert model.cost(1).params == 6 * (4 * d * d + 3 * d * hidden + 2 * d) + d + 3 * d


def test_depth_and_ticks_shape_the_initial_residual_scale():
    shallow, deep = (spec("shared_loop", "tiny", ticks=ticks).build(11) for ticks in (1, 16))
    sizes = [model.core.core.parts[0].part.out.weight.std().item() for model in (shallow, deep)]
    assert sizes[0] / sizes[1] == pytest.approx(4.0, rel=0.1)


def test_a_spec_that_is_not_registered_has_no_kind_and_is_not_in_the_zoo():
    class Mine(ARCHITECTURES.get("transformer")):
        extra: int = Field(1, description="one more")

    assert Mine(extra=2).kind == ""
    assert Mine not in [ARCHITECTURES.get(name) for name in NAMES]
    assert Spec.twins == ()


def test_a_spec_without_build_says_so():
    with pytest.raises(NotImplementedError):
        Spec().build(3)
