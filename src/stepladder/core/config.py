"""Configuration as frozen, typed values: read, override, validate, hash. One sentence for every mistake."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticKnownError, core_schema

from stepladder.core.errors import UserError
from stepladder.core.registry import Registry, did_you_mean
from stepladder.core.trees import canonical, digest, parse_yaml, read_tree

__all__ = [
    "Config",
    "Field",
    "Kinded",
    "canonical",
    "chosen",
    "digest",
    "leaves",
    "override",
    "points",
    "read_tree",
    "register",
    "validate",
]

C = TypeVar("C", bound="Config")
K = TypeVar("K", bound="type[Kinded]")
_Path = tuple[str | int, ...]
_HIDDEN = object()  # a value that the sentence need not repeat


def _integer(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticKnownError("int_type")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return value


def _exact(schema: Any) -> Any:
    """The same validation schema in which booleans and numbers do not pass for each other.

    Pydantic's lax mode is wanted for "3e-4" -> 0.0003 and lists -> tuples, but it also takes ``true`` for 1
    and ``"yes"`` for true; its strict mode forbids all four.
    """
    if isinstance(schema, list | tuple):
        return type(schema)(_exact(entry) for entry in schema)
    if not isinstance(schema, dict):
        return schema
    kind = schema.get("type")
    if not isinstance(kind, str):  # a table of fields, not a schema
        return {name: _exact(entry) for name, entry in schema.items()}
    if kind == "function-before" and schema["function"].get("function") in (_integer, _number):
        return schema
    opaque = ("metadata", "serialization", "default", "config", "cls")
    schema = {name: entry if name in opaque else _exact(entry) for name, entry in schema.items()}
    if kind == "bool":
        return {**schema, "strict": True}
    if kind in ("int", "float"):
        check = _integer if kind == "int" else _number
        return core_schema.no_info_before_validator_function(check, schema)
    return schema


class Config(BaseModel):
    """A frozen value with typed fields: unknown fields, NaN and infinities are refused, defaults are checked.

    Numbers may come as numeric text (``"3e-4"``), lists become tuples where a tuple is declared, and 2.0 is a
    valid integer; ``true`` is no number and ``"yes"`` is no boolean. Prefer tuples to lists: frozen does
    not reach inside a list. A field that declares a base class is serialised with its subclass's fields.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        polymorphic_serialization=True,
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Pydantic's hook for the validation schema: tightened by ``_exact``."""
        return _exact(handler(source))


class Kinded(Config):
    """A Config with a registered name, which is its ``kind``: the first field, filled in by itself."""

    registered: ClassVar[str] = ""
    kind: str = Field("", description="the registered name")

    @field_validator("kind", mode="before")
    @classmethod
    def _own_name(cls, value: Any) -> str:
        name = cls.__dict__.get("registered", "")  # a subclass that is not registered must not pass for its parent
        if value not in ("", name):
            raise ValueError(f"must be '{name}'")
        return name


def register(registry: Registry[Any], name: str, aliases: Iterable[str] = ()) -> Callable[[K], K]:
    """``@register(TASKS, "parity")`` above a Kinded class: registers it and makes ``name`` its kind."""

    def enter(cls: K) -> K:
        registry.add(name, cls, aliases)
        cls.registered = name
        return cls

    return enter


class _Problem(NamedTuple):
    """One mistake: where in the tree, its sort (value, missing, unknown), what is wrong, the value given."""

    path: _Path
    sort: str
    text: str
    value: Any = _HIDDEN

    def sentence(self) -> str:
        path = ".".join(map(str, self.path))
        if self.sort == "unknown":
            return f"unknown key '{path}'{self.text}"
        if self.sort == "missing":
            return f"'{path}' is missing{self.text}"
        shown = _show(self.value)
        place = f"{path} = {shown}" if path and shown else path
        return f"{place}: {self.text}" if place else self.text


class _NodeError(ValueError):
    """Mistakes inside a node that ``chosen`` validated; pydantic adds the path of the node."""

    def __init__(self, problems: list[_Problem], where: str) -> None:
        super().__init__(_summary(problems, where))
        self.problems = problems


def _show(value: Any) -> str:
    if isinstance(value, str):
        text = repr(value)
    elif isinstance(value, int | float | list | tuple) or value is None:
        text = json.dumps(value, default=repr)
    else:
        return ""
    return text if len(text) <= 60 else ""


def _summary(problems: list[_Problem], where: str) -> str:
    others = len(problems) - 1
    more = f" (and {others} more mistake{'s'[: others > 1]})" if others else ""
    return f"{where}: {problems[0].sentence()}{more}"


def validate(cls: type[C], tree: Any, where: str) -> C:
    """``tree`` as a ``cls``; every mistake in it becomes one UserError that starts with ``where`` (the file).

    The sentence names the dotted path, the value and what was expected, or the nearest key to an unknown one.
    """
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise UserError(_summary(_problems(cls, tree, error), where)) from None
    except UserError as error:  # raised by a validator of ours, which cannot know the file
        raise UserError(f"{where}: {error}") from None


def chosen(registry: Registry[Any], where: str) -> Callable[[Any], Any]:
    """A pydantic "before" validator for a node whose ``kind`` names a registered Kinded class.

    ``model: Annotated[Spec, BeforeValidator(chosen(ARCHITECTURES, "model"))]``. A plain text is short for
    ``{kind: text}``, aliases become the main name, an instance passes through. ``where`` names the node in
    the ValidationError of direct construction; ``validate`` knows the full path and uses that.
    """

    def resolve(value: Any) -> Any:
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping):
            return value  # an instance; or something that pydantic refuses, knowing the path
        known = ", ".join(registry.names())
        if "kind" not in value:
            raise _NodeError([_Problem(("kind",), "missing", f"; known: {known}")], where)
        kind = value["kind"]
        if not isinstance(kind, str):
            text = f"must be the name of a registered {registry.noun}; known: {known}"
            raise _NodeError([_Problem(("kind",), "value", text, kind)], where)
        try:
            cls, name = registry.get(kind), registry.name(kind)
        except UserError as error:
            raise _NodeError([_Problem(("kind",), "value", str(error))], where) from None
        try:
            return cls.model_validate({**value, "kind": name})
        except ValidationError as error:
            raise _NodeError(_problems(cls, value, error), where) from None
        except UserError as error:
            raise _NodeError([_Problem((), "value", str(error))], where) from None

    return resolve


def _problems(cls: type[BaseModel], tree: Any, error: ValidationError) -> list[_Problem]:
    """Pydantic's list of errors as ours: one for each place, in pydantic's order."""
    found: dict[_Path, _Problem] = {}
    for entry in error.errors(include_url=False):
        if entry["type"] == "too_short" and len(entry["input"]) >= entry["ctx"]["min_length"]:
            continue  # pydantic counts sound entries only; it has named the flawed ones
        path = _real_path(entry["loc"], tree, entry["type"])
        inner = entry.get("ctx", {}).get("error")
        if isinstance(inner, _NodeError):
            for problem in inner.problems:
                found.setdefault(path + problem.path, problem._replace(path=path + problem.path))
            continue
        problem = _translate(cls, path, dict(entry))
        before = found.get(path)
        if before is None:
            found[path] = problem
        elif problem.sort == before.sort == "value" and problem.text not in before.text:  # a union: any member will do
            found[path] = before._replace(text=f"{before.text} or {problem.text.removeprefix('must be ')}")
    return list(found.values())


def _real_path(loc: _Path, tree: Any, sort: str) -> _Path:
    """``loc`` without the tags that pydantic puts in for the members of a union."""
    path: list[str | int] = []
    for part in loc:
        try:
            tree = tree[part]
        except (LookupError, TypeError):
            if len(loc) > 1 and (sort != "missing" or part != loc[-1]):
                continue
        path.append(part)
    return tuple(path)


# Pydantic's wording -> ours.
_WORDING = (
    (r"^(Value error|Assertion failed), ", ""),
    (r"^(Input|Tuple|List|Dictionary|String|Value|Data) should ", "must "),
    (r", unable to parse string as an? \w+| after validation", ""),
    (r"a valid (?=[aeiou])", "an "),
    (r"a valid ", "a "),
    (r"a (dictionary|mapping).*", "a mapping of keys to values"),
)


def _translate(cls: type[BaseModel], path: _Path, entry: dict[str, Any]) -> _Problem:
    message, sort, value = str(entry["msg"]), entry["type"], entry["input"]
    if sort in ("extra_forbidden", "invalid_key"):
        known = _keys_at(cls, path[:-1])
        return _Problem(path, "unknown", did_you_mean(str(path[-1]), known) or f"; known: {', '.join(known)}")
    if sort == "missing":
        return _Problem(path, "missing", "; give it a value")
    for pattern, replacement in _WORDING:
        message = re.sub(pattern, replacement, message)
    if sort == "tuple_type":  # written as a list in every file
        message = "must be a list" + (f", such as [{value}]" if isinstance(value, str | int | float) else "")
    if sort == "literal_error" and isinstance(value, str):
        message += did_you_mean(value, re.findall(r"'([^']*)'", message))
    return _Problem(path, "value", message, value)


def _keys_at(cls: type[BaseModel], path: _Path) -> list[str]:
    """The fields that a node at ``path`` may have, all members of a union together."""
    classes = [cls]
    for part in path:
        if isinstance(part, str):
            inside = [c.model_fields[part].annotation for c in classes if part in c.model_fields]
            classes = [found for annotation in inside for found in _models_in(annotation)]
    return list(dict.fromkeys(name for c in classes for name in c.model_fields))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for member in get_args(annotation) for found in _models_in(member)]


def override(tree: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """A new tree with ``path=value`` assignments applied; ``data.sources.0.weight=2`` reaches into lists.

    Values are YAML. ``model.kind=other`` replaces the whole node ``model``. Shorter paths are applied first:
    ``model.width=64 model.kind=other`` keeps the width; of two values for one path the last wins. Whether
    a path means anything is for ``validate`` to say.
    """
    changes = []
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        parts = path.strip().split(".")
        if not equals or not all(parts):
            raise UserError(f"'{assignment}' is not an override; write path=value, such as model.width=256")
        changes.append((parts, parse_yaml(value, f"override '{assignment}'")))
    return _assign(tree, changes)


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """The scalars of a plain tree by their dotted paths, ``data.sources.0.weight``; what is empty has none."""
    if not isinstance(tree, dict | list):
        return {path: tree}
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {p: v for name, child in inside for p, v in leaves(child, f"{path}.{name}" if path else str(name)).items()}


def points(tree: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """One tree for every combination of the grid's values (path -> values); the last path varies fastest."""
    for path, values in grid.items():
        if isinstance(values, str | bytes) or not isinstance(values, Sequence) or not values:
            raise UserError(f"grid: '{path}' must have a list of at least one value, such as [64, 128]")
        if not all(path.split(".")):
            raise UserError(f"grid: '{path}' is not a path; write it like model.width")
    paths = [path.split(".") for path in grid]
    return [_assign(tree, list(zip(paths, values, strict=True))) for values in itertools.product(*grid.values())]


def _assign(tree: Mapping[str, Any], changes: list[tuple[list[str], Any]]) -> dict[str, Any]:
    result = copy.deepcopy(dict(tree))

    def depth(
        change: tuple[list[str], Any],
    ) -> int:  # setting a kind makes the node anew: it counts as its node
        return len(change[0]) - (change[0][-1] == "kind")

    for parts, value in sorted(changes, key=depth):
        _put(result, parts, copy.deepcopy(value))
    return result


def _put(tree: dict[str, Any], parts: list[str], value: Any) -> None:
    node: Any = tree
    for at, part in enumerate(parts[:-1]):
        slot = _slot(node, part, parts[: at + 1])
        child = node[slot] if isinstance(node, list) else node.get(slot)
        if not isinstance(child, dict | list):
            # A text here is a node in short form, "parity" for {kind: parity}; whatever else gives way.
            child = node[slot] = {"kind": child} if isinstance(child, str) else {}
        node = child
    slot = _slot(node, parts[-1], parts)
    if slot == "kind" and isinstance(node, dict) and node.get("kind", value) != value:
        node.clear()
    node[slot] = value


def _slot(node: dict[str, Any] | list[Any], part: str, path: list[str]) -> Any:
    if isinstance(node, dict):
        return part
    if not part.isdecimal() or int(part) >= len(node):
        raise UserError(f"'{'.'.join(path)}' does not exist: the list has {len(node)} entries, counted from 0")
    return int(part)
