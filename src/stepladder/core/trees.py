"""Plain trees (mappings, lists, scalars) as text: strict YAML and JSON readers, and a canonical form to hash.

Both readers refuse what is legal somewhere but ambiguous or dangerous here (duplicate keys, NaN, tags that
build objects, byte-order marks), each time with the line. Nothing that is read can run code.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, DuplicateKeyError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError

from stepladder.core.errors import UserError

MAX_BYTES = 4 << 20  # a configuration is kilobytes; a larger file is a mix-up, and the YAML reader is slow
MAX_NODES = 200_000  # after aliases are expanded, so that nine lines of YAML cannot become a billion entries
MAX_DEPTH = 64

_JSON_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|[{}\[\]]|-?Infinity|NaN|-?\d[-+.\deE]*')


def read_tree(path: str | Path) -> dict[str, Any]:
    """The mapping in a ``.yaml``, ``.yml`` or ``.json`` file.

    YAML is version 1.2: ``yes`` is a string, ``3e-4`` a number, dates are strings. Any flaw is a UserError
    that names the file and, where there is one, the line.
    """
    path = Path(path)
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise UserError(f"{path}: a configuration is a .yaml, .yml or .json file")
    text = read_text(path, MAX_BYTES)
    parse = parse_json if path.suffix.lower() == ".json" else parse_yaml
    if not text.strip():
        raise UserError(f"{path}: the file is empty; give at least one 'key: value'")
    tree = parse(text, str(path))
    if tree is None:
        raise UserError(f"{path}: the file is empty; give at least one 'key: value'")
    if not isinstance(tree, dict):
        raise UserError(f"{path}: the top level must be a mapping of keys to values, not {_sort(tree)}")
    return tree


def read_text(path: Path, limit: int | None = None) -> str:
    """The UTF-8 text of a file of at most ``limit`` bytes; anything unreadable is a UserError."""
    try:
        if limit is not None and path.is_file() and path.stat().st_size > limit:
            raise UserError(f"{path}: {path.stat().st_size} bytes is too large for a configuration (limit {limit})")
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a file; give the path of a file")
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}: line 1: the file starts with a byte-order mark; save it as UTF-8 without BOM")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: line {line}: not UTF-8 text; save the file as UTF-8") from None


def parse_json(text: str, where: str) -> Any:
    """Strict JSON (no duplicate keys, NaN, trailing comma); a flaw is a UserError with ``where`` and line."""
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: line {error.lineno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise UserError(f"{where}: not valid JSON: {str(error).split(';')[0]}") from None
    flaw = _json_flaw(text)
    if flaw:
        offset, problem = flaw
        raise UserError(f"{where}: line {text.count(chr(10), 0, offset) + 1}: {problem}")
    return tree


def _json_flaw(text: str) -> tuple[int, str] | None:
    """The offset of the first thing in *valid* JSON that Python's reader lets pass and we do not."""
    open_keys: list[set[str]] = []
    for token in _JSON_TOKEN.finditer(text):
        word = token[0]
        if word in "{[":
            open_keys.append(set())
        elif word in "}]":
            open_keys.pop()
        elif token[2]:  # a string before a colon is a key
            name = json.loads(token[1])
            if name in open_keys[-1]:
                return token.start(), f"duplicate key '{name}'; keep one of the two"
            open_keys[-1].add(name)
        elif not word.startswith('"') and not math.isfinite(float(word)):
            return token.start(), f"{word} is not a finite number"
    return None


class _PlainConstructor(SafeConstructor):
    """Builds mappings, lists, strings, numbers, booleans and null, and nothing else."""

    def construct_finite(self, node: Any) -> float:
        value = self.construct_yaml_float(node)
        if not math.isfinite(value):
            raise ConstructorError(None, None, f"{node.value} is not a finite number", node.start_mark)
        return value

    def construct_plain_mapping(self, node: Any) -> Any:
        for key_node, _ in node.value:
            sort = key_node.tag.removeprefix("tag:yaml.org,2002:")
            if sort == "merge":  # not in YAML 1.2, and a few lines of it can demand billions of entries
                problem = "merge keys (<<) are not read; write the keys out"
                raise ConstructorError(None, None, problem, key_node.start_mark)
            if sort not in ("str", "int", "timestamp"):
                problem = "a key must be a plain word or an integer; quote it if it is a name"
                raise ConstructorError(None, None, problem, key_node.start_mark)
        return self.construct_yaml_map(node)

    def construct_refused(self, node: Any) -> None:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise ConstructorError(None, None, f"the tag {tag} is refused: only plain values are read", node.start_mark)


_SAFE = SafeConstructor
_PlainConstructor.yaml_constructors = {
    "tag:yaml.org,2002:null": _SAFE.construct_yaml_null,
    "tag:yaml.org,2002:bool": _SAFE.construct_yaml_bool,
    "tag:yaml.org,2002:int": _SAFE.construct_yaml_int,
    "tag:yaml.org,2002:float": _PlainConstructor.construct_finite,
    "tag:yaml.org,2002:str": _SAFE.construct_yaml_str,
    "tag:yaml.org,2002:timestamp": _SAFE.construct_yaml_str,  # YAML 1.2 has no dates: 2024-01-01 is a name
    "tag:yaml.org,2002:seq": _SAFE.construct_yaml_seq,
    "tag:yaml.org,2002:map": _PlainConstructor.construct_plain_mapping,
    None: _PlainConstructor.construct_refused,
}


def parse_yaml(text: str, where: str) -> Any:
    """Plain YAML 1.2, one document, aliases expanded; a flaw is a UserError with ``where`` and line."""
    directive = re.search(r"^%YAML\s", text, re.MULTILINE)
    if directive:  # "%YAML 1.1" would turn yes and no into booleans again
        line = text.count("\n", 0, directive.start()) + 1
        raise UserError(f"{where}: line {line}: leave out the %YAML directive; files are read as YAML 1.2")
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _PlainConstructor
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an anchor name used twice is legal and the last one counts
            return _expand(yaml.load(text), where)
    except DuplicateKeyError as error:
        found = re.search(r'found duplicate key "(.*?)" with', str(error.problem), re.DOTALL)
        name = f" '{found[1]}'" if found else ""
        raise UserError(f"{where}:{_line(error)} duplicate key{name}; keep one of the two") from None
    except MarkedYAMLError as error:
        raise UserError(f"{where}:{_line(error)} {error.problem or 'not valid YAML'}") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{where}: line {line}: a control character that YAML does not allow") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None
    except (YAMLError, ValueError) as error:
        raise UserError(f"{where}: not valid YAML: {str(error).splitlines()[0]}") from None


def _line(error: MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return f" line {mark.line + 1}:" if mark else ""


def _expand(tree: Any, where: str) -> Any:
    """A copy without shared nodes (YAML aliases), so that later code cannot loop or blow up on it."""
    budget = MAX_NODES

    def copy(node: Any, depth: int) -> Any:
        nonlocal budget
        budget -= 1
        if budget < 0 or depth > MAX_DEPTH:
            raise UserError(f"{where}: too many or too deeply nested entries (an alias that contains itself?)")
        if isinstance(node, dict):
            return {key: copy(value, depth + 1) for key, value in node.items()}
        if isinstance(node, list):
            return [copy(value, depth + 1) for value in node]
        return node

    return copy(tree, 0)


def _sort(value: Any) -> str:
    return {list: "a list", str: "a text", bool: "true or false"}.get(type(value), "a number")


def canonical(value: Any) -> str:
    """One text for one value: keys sorted, no spaces, tuples as lists, floats by ``repr``, -0.0 as 0.0.

    Accepts what JSON has, tuples, paths, NumPy scalars and pydantic models. ``1`` and ``1.0`` stay different.
    NaN and infinities raise ValueError; anything else that is not plain raises TypeError.
    """
    return json.dumps(_normal(value), separators=(",", ":"), sort_keys=True)


def digest(value: Any) -> str:
    """SHA-256 of the canonical form, in hex."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def _normal(value: Any) -> Any:
    sort = type(value)
    if sort is str or sort is int or sort is bool or value is None:
        return value
    if sort is float:
        if not math.isfinite(value):
            raise ValueError(f"{value} has no canonical form; only finite numbers do")
        return value + 0.0  # -0.0 + 0.0 is 0.0
    if isinstance(value, Mapping):
        normal = {_key(key): _normal(entry) for key, entry in value.items()}
        if len(normal) != len(value):
            raise ValueError("two keys have one text, such as 1 and '1'")
        return normal
    if isinstance(value, list | tuple):
        return [_normal(entry) for entry in value]
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, PurePath):
        return value.as_posix()
    if hasattr(value, "model_dump"):
        return _normal(value.model_dump())
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a NumPy scalar
        return _normal(value.item())
    raise TypeError(f"{sort.__name__} has no canonical form")


def _key(key: Any) -> str:
    if isinstance(key, str):
        return str.__str__(key)
    if isinstance(key, int) and not isinstance(key, bool):
        return str(key)
    raise TypeError(f"a key must be a text or an integer, not {type(key).__name__}")
