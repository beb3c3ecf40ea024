"""Config values: types, nodes chosen by kind, overrides, grids."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
import pytest
from pydantic import BeforeValidator, model_validator

from stepladder.core.config import (
    Config,
    Field,
    Kinded,
    canonical,
    chosen,
    digest,
    override,
    points,
    register,
    validate,
)
from stepladder.core.errors import UserError
from stepladder.core.registry import Registry

MODELS: Registry[type[Model]] = Registry("architecture")


class Model(Kinded):
    width: int = Field(32, ge=8)


@register(MODELS, "dense", aliases=("gpt",))
class Dense(Model):
    heads: int = 4

    @model_validator(mode="after")
    def _check(self) -> Dense:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")
        if self.heads == 13:
            raise UserError("13 heads bring bad luck")
        return self


@register(MODELS, "loop")
class Loop(Dense):
    ticks: int = Field(4, ge=1)


class Part(Config):
    weight: float | list[float] = 1.0
    model: Annotated[Model, BeforeValidator(chosen(MODELS, "model"))] = Dense()


class Train(Config):
    lr: float = Field(1e-3, gt=0)
    batch: int = Field(32, ge=1)
    mode: Literal["cosine", "constant"] = "cosine"


class Settings(Config):
    name: str = "run"
    model: Annotated[Model, BeforeValidator(chosen(MODELS, "model"))]
    parts: tuple[Part, ...] = ()
    train: Train = Train()
    span: tuple[int, int] = (1, 8)
    fast: bool = False
    limit: int | None = None
    losses: dict[str, float] = Field({})


def settings(tree: Any) -> Settings:
    return validate(Settings, tree, "run.yaml")


def refusal(tree: Any) -> str:
    with pytest.raises(UserError) as caught:
        settings(tree)
    return str(caught.value)


def test_a_full_tree_and_back() -> None:
    tree = {
        "model": {"kind": "loop", "width": 64},
        "parts": [{"weight": 2, "model": "gpt"}, {"weight": [1, 2]}],
        "train": {"lr": "3e-4", "batch": 64.0},
        "span": [2, 9],
        "losses": {"ponder": 0.01},
    }
    value = settings(tree)
    assert type(value.model) is Loop
    assert (value.train.lr, value.train.batch, value.span) == (0.0003, 64, (2, 9))
    assert type(value.train.batch) is int
    assert type(value.parts[0].model) is Dense
    assert type(value.parts[0].weight) is float
    for mode in ("python", "json"):
        assert settings(value.model_dump(mode=mode)) == value
    assert digest(settings(value.model_dump(mode="json"))) == digest(value)


def test_dumps_have_the_kind_first_and_every_field_of_the_subclass() -> None:
    dump = settings({"model": "loop"}).model_dump()
    assert list(dump["model"].items()) == [("kind", "loop"), ("width", 32), ("heads", 4), ("ticks", 4)]


def test_kind_is_filled_in_and_cannot_be_another() -> None:
    assert Loop().kind == "loop"
    assert Loop(kind="loop") == Loop()
    with pytest.raises(pydantic.ValidationError, match="must be 'loop'"):
        Loop(kind="dense")

    class Unregistered(Loop):
        pass

    assert Unregistered().kind == ""  # or it would come back as its parent


def test_aliases_and_short_forms_are_one_value() -> None:
    one, two, three = (settings({"model": m}) for m in ("gpt", "dense", {"kind": "gpt", "width": 32}))
    assert one == two == three
    assert canonical(one) == canonical(two) == canonical(three)


def test_instances_pass_through() -> None:
    model = Loop(ticks=2)
    assert Settings(model=model).model is model
    assert "model" in refusal({"model": Train()})


def test_values_are_frozen() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Loop().ticks = 3


def test_defaults_are_checked() -> None:
    class Wrong(Config):
        width: int = Field(3, ge=8)

    with pytest.raises(UserError, match=r"^x: width = 3: must be greater than or equal to 8$"):
        validate(Wrong, {}, "x")


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"model": {"kind": "dense", "width": -3}}, "model.width = -3: must be greater than or equal to 8"),
        ({"model": {"kind": "dense", "widht": 3}}, "unknown key 'model.widht' — did you mean 'width'?"),
        ({"model": {"kind": "dense", "q": 3}}, "unknown key 'model.q'; known: kind, width, heads"),
        ({"model": "dence"}, "model.kind: unknown architecture 'dence' — did you mean 'dense'?"),
        ({"model": {"width": 8}}, "'model.kind' is missing; known: dense, loop"),
        ({"model": {"kind": ["dense"]}},
         'model.kind = ["dense"]: must be the name of a registered architecture; known: dense, loop'),
        ({"model": 3}, "model = 3: must be a mapping of keys to values"),
        ({"model": None}, "model = null: must be a mapping of keys to values"),
        ({"model": {"kind": "dense", "heads": 5}}, "model: heads=5 does not divide width=32"),
        ({"model": {"kind": "dense", "heads": 13, "width": 26}}, "model: 13 heads bring bad luck"),
        ({}, "'model' is missing; give it a value"),
        ([], "must be a mapping of keys to values"),
        ({"model": "dense", "parts": [{}, {"model": {"kind": "loop", "ticks": "x"}}]},
         "parts.1.model.ticks = 'x': must be an integer"),
        ({"model": "dense", "parts": [{"wieght": 1}]}, "unknown key 'parts.0.wieght' — did you mean 'weight'?"),
        ({"model": "dense", "parts": [{"weight": "z"}]}, "parts.0.weight = 'z': must be a number or a list"),
        ({"model": "dense", "parts": [{"weight": [1, True]}]},
         "parts.0.weight = [1, true]: must be a number (and 1 more mistake)"),
        ({"model": "dense", "parts": 7}, "parts = 7: must be a list, such as [7]"),
        ({"model": "dense", "train": {"lr": 0, "batch": "many", "mode": "cosin"}},
         "train.lr = 0: must be greater than 0 (and 2 more mistakes)"),
        ({"model": "dense", "train": {"mode": "cosin"}},
         "train.mode = 'cosin': must be 'cosine' or 'constant' — did you mean 'cosine'?"),
        ({"model": "dense", "train": []}, "train = []: must be a mapping of keys to values"),
        ({"model": "dense", "span": [1]}, "'span.1' is missing; give it a value"),
        ({"model": "dense", "span": [1, 2, 3]}, "span = [1, 2, 3]: must have at most 2 items, not 3"),
        ({"model": "dense", "limit": 2.5}, "limit = 2.5: must be an integer, got a number with a fractional part"),
        ({"model": "dense", "losses": {"a": "b"}}, "losses.a = 'b': must be a number"),
        ({"model": "dense", "name": 7}, "name = 7: must be a string"),
        ({"model": "dense", 7: 7}, "unknown key '7'; known: name, model, parts, train, span, fast, limit, losses"),
    ],
)  # fmt: skip
def test_every_mistake_is_one_sentence(tree: Any, sentence: str) -> None:
    assert refusal(tree) == f"run.yaml: {sentence}"


def test_long_values_are_not_repeated() -> None:
    assert refusal({"model": "dense", "limit": "x" * 500}) == "run.yaml: limit: must be an integer"


def test_user_errors_of_validators_get_the_file() -> None:
    class Grumpy(Config):
        @model_validator(mode="after")
        def _check(self) -> Grumpy:
            raise UserError("not today")

    with pytest.raises(UserError, match=r"^a\.yaml: not today$"):
        validate(Grumpy, {}, "a.yaml")


def test_direct_construction_raises_pydantic_errors_that_name_the_node() -> None:
    with pytest.raises(pydantic.ValidationError, match="model: 'kind' is missing"):
        Settings(model={})


def test_register_refuses_a_taken_name() -> None:
    with pytest.raises(UserError, match="architecture 'gpt' is already taken"):

        @register(MODELS, "gpt")
        class Other(Model):
            pass


# --- overrides


def test_overrides_reach_everywhere_and_leave_the_original_alone() -> None:
    tree = {"model": {"kind": "loop", "width": 8}, "parts": [{"weight": 1}, {"weight": 2}]}
    before = canonical(tree)
    changed = override(
        tree, ["model.width=256", "parts.1.weight=[1, 2e-1]", "train.lr=3e-4", "fast=true", "name='007'", "limit="]
    )
    assert changed == {
        "model": {"kind": "loop", "width": 256},
        "parts": [{"weight": 1}, {"weight": [1, 0.2]}],
        "train": {"lr": 0.0003},
        "fast": True,
        "name": "007",
        "limit": None,
    }
    assert canonical(tree) == before
    changed["parts"][0]["weight"] = 9
    assert canonical(tree) == before


def test_a_value_may_hold_equals_signs() -> None:
    assert override({}, ["name=a=b"]) == {"name": "a=b"}


def test_another_kind_replaces_the_node_and_the_same_kind_does_not() -> None:
    tree = {"model": {"kind": "loop", "ticks": 9}}
    assert override(tree, ["model.kind=dense"]) == {"model": {"kind": "dense"}}
    assert override(tree, ["model.kind=loop"]) == tree
    assert override({"model": {"width": 9}}, ["model.kind=loop"]) == {"model": {"kind": "loop", "width": 9}}
    assert override({"model": "loop"}, ["model.kind=dense"]) == {"model": {"kind": "dense"}}


def test_a_kind_does_not_wipe_what_is_set_beside_it() -> None:
    expected = {"model": {"kind": "dense", "width": 64}}
    tree = {"model": {"kind": "loop", "ticks": 9}}
    assert override(tree, ["model.width=64", "model.kind=dense"]) == expected
    assert override(tree, ["model.kind=dense", "model.width=64"]) == expected
    assert override(tree, ["model.width=64", "model={kind: dense}"]) == expected


def test_short_forms_are_opened() -> None:
    assert override({"model": "loop"}, ["model.ticks=2"]) == {"model": {"kind": "loop", "ticks": 2}}
    assert settings(override({"model": "loop"}, ["model.ticks=2"])).model == Loop(ticks=2)


def test_the_last_of_two_values_wins() -> None:
    assert override({}, ["a.b=1", "a.b=2"]) == {"a": {"b": 2}}


@pytest.mark.parametrize("bad", ["model.width", "=3", "", "a..b=1", ".a=1", "a.=1"])
def test_malformed_overrides_show_how(bad: str) -> None:
    with pytest.raises(UserError, match=r"is not an override; write path=value, such as model\.width=256"):
        override({}, [bad])


@pytest.mark.parametrize("path", ["parts.5.weight", "parts.2", "parts.x", "parts.-1"])
def test_overrides_outside_a_list_are_refused(path: str) -> None:
    with pytest.raises(UserError, match="the list has 2 entries, counted from 0"):
        override({"parts": [{}, {}]}, [f"{path}=1"])


@pytest.mark.parametrize("bad", ["a=[1, 2", "a=!!python/name:os.system x", "a={b: 1, b: 2}", "a=.nan"])
def test_overrides_are_read_as_strictly_as_files(bad: str) -> None:
    with pytest.raises(UserError, match=r"^override 'a="):
        override({}, [bad])


def test_an_unknown_path_is_left_to_validate() -> None:
    tree = override({"model": "dense"}, ["train.bacth=3"])
    assert refusal(tree) == "run.yaml: unknown key 'train.bacth' — did you mean 'batch'?"
    tree = override({"model": "dense", "train": {"lr": 1}}, ["train.lr.x=3"])
    assert refusal(tree) == "run.yaml: train.lr: must be a number"


# --- grids


def test_points_are_the_product_in_order_and_independent() -> None:
    tree = {"model": {"kind": "loop", "ticks": 1}, "shared": [1]}
    grid = {"model.kind": ["loop", "dense"], "model.width": (8, 16), "span": [[1, 2]]}
    trees = points(tree, grid)
    assert [t["model"] for t in trees] == [
        {"kind": "loop", "ticks": 1, "width": 8},
        {"kind": "loop", "ticks": 1, "width": 16},
        {"kind": "dense", "width": 8},
        {"kind": "dense", "width": 16},
    ]
    trees[0]["shared"].append(2)
    trees[0]["span"].append(3)
    assert (trees[1]["shared"], trees[1]["span"], tree["shared"]) == ([1], [1, 2], [1])
    assert points(tree, {}) == [tree]


@pytest.mark.parametrize("grid", [{"a": []}, {"a": "abc"}, {"a": 3}, {"a..b": [1]}, {"": [1]}])
def test_bad_grids_are_refused(grid: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^grid: "):
        points({}, grid)
