"""Readers of YAML and JSON, and the canonical form."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepladder.core.config import Config
from stepladder.core.errors import UserError
from stepladder.core.trees import canonical, digest, parse_json, parse_yaml, read_tree

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_tree(path)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    return sentence.replace(str(path), "FILE")


def test_yaml_scalars_are_those_of_version_1_2() -> None:
    text = "{a: 3e-4, b: yes, c: 0o17, d: 2024-01-01, e: true, f: ~, g: 12:30:00, h: '1', i: 1e6, j: no, k: 017}"
    assert parse_yaml(text, "t") == {
        "a": 0.0003, "b": "yes", "c": 15, "d": "2024-01-01", "e": True, "f": None,
        "g": "12:30:00", "h": "1", "i": 1e6, "j": "no", "k": 17,
    }  # fmt: skip


def test_yaml_and_json_files_give_the_same_tree(tmp_path: Path) -> None:
    tree = {"model": {"kind": "loop", "width": 64}, "sizes": [1, 2.5, "x"], "on": True, "none": None}
    as_json = write(tmp_path, "a.json", json.dumps(tree))
    as_yaml = write(tmp_path, "a.yml", "model: {kind: loop, width: 64}\nsizes: [1, 2.5, x]\non: true\nnone:\n")
    assert read_tree(as_json) == read_tree(as_yaml) == read_tree(str(as_json)) == tree


def test_aliases_become_copies() -> None:
    tree = parse_yaml("a: &x {n: 1}\nb: *x\n", "t")
    tree["a"]["n"] = 2
    assert tree["b"] == {"n": 1}


def test_a_reused_anchor_is_no_warning() -> None:
    assert parse_yaml("a: &x 1\nb: &x 2\nc: *x", "t") == {"a": 1, "b": 2, "c": 2}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.yaml", "", "the file is empty"),
        ("a.yaml", "# only a comment\n", "the file is empty"),
        ("a.json", " \n", "the file is empty"),
        ("a.yaml", "- 1\n- 2\n", "must be a mapping of keys to values, not a list"),
        ("a.json", "[1]", "must be a mapping of keys to values, not a list"),
        ("a.yaml", "just words", "not a text"),
        ("a.json", "3", "not a number"),
        ("a.yaml", "a: 1\nb: [1, 2\nc: 3\n", "line 3:"),
        ("a.yaml", "a: 1\n\tb: 2\n", "line 2:"),
        ("a.json", '{"a": 1,\n "b": }', "line 2: not valid JSON"),
        ("a.json", "{'a': 1}", "line 1: not valid JSON"),
        ("a.yaml", b"a: 1\nb: \xff\n", "line 2: not UTF-8 text"),
        ("a.yaml", b"a: 1\nb: \x00\n", "line 2: a control character"),
        ("a.yaml", "a: 1\n---\nb: 2\n", "line"),
        ("a.yaml", "a: 1\nb: !!binary aGVsbG8=\n", "line 2: the tag !!binary is refused"),
        ("a.yaml", "a: !thing {b: 1}\n", "line 1: the tag !thing is refused"),
        ("a.yaml", "a: 1\n? [1, 2]\n: 3\n", "line 2: a key must be a plain word"),
        ("a.yaml", "true: 3\n", "line 1: a key must be a plain word"),
        ("a.yaml", "a: &a {b: 1}\nc:\n  <<: *a\n", "line 3: merge keys"),
        ("a.yaml", "%YAML 1.1\n---\na: yes\n", "line 1: leave out the %YAML directive"),
        ("a.yaml", "a: &x [*x]\n", "too many or too deeply nested"),
        ("a.yaml", "[" * 1500, "nested too deeply"),
        ("a.json", "[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("a.json", '{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ("a.txt", "a: 1", "a configuration is a .yaml, .yml or .json file"),
        ("a.yaml", "# " + "x" * (5 << 20), "too large for a configuration"),
    ],
)  # fmt: skip
def test_refusals_name_file_and_line(tmp_path: Path, name: str, content: str | bytes, expected: str) -> None:
    assert expected in refusal(write(tmp_path, name, content))


def test_a_few_lines_of_aliases_cannot_become_a_billion_entries(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    assert "too many" in refusal(write(tmp_path, "bomb.yaml", "\n".join(lines)))


def test_missing_file_folder_and_unreadable_path(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.yaml") == "FILE: no such file"
    (tmp_path / "folder.yaml").mkdir()
    assert "not a file" in refusal(tmp_path / "folder.yaml")
    with pytest.raises(UserError, match="name"):
        read_tree(tmp_path / ("long-name" * 60 + ".yaml"))
    with pytest.raises(UserError, match="cannot be read"):
        read_tree("a\0b.yaml")


def test_json_flaws_are_found_in_the_right_object_and_line() -> None:
    fine = '{"a": {"x": 1, "y": "a: {x"}, "b": [{"x": 1}, {"x": 2}], "\\u0061b": "NaN Infinity 1e999"}'
    assert parse_json(fine, "t")["b"] == [{"x": 1}, {"x": 2}]
    with pytest.raises(UserError, match=r"^t: line 3: duplicate key 'ab'"):
        parse_json('{"ab": {"c": 1},\n "d": 2,\n "\\u0061b": 3}', "t")
    with pytest.raises(UserError, match=r"^t: line 2: 1e999 is not a finite number"):
        parse_json('{"a": 1,\n "b": 1e999}', "t")


@settings(max_examples=60, deadline=None)
@given(plain)
def test_canonical_text_survives_the_round_trip(value: Any) -> None:
    text = canonical(value)
    assert canonical(json.loads(text)) == text
    assert text.isascii()


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(), plain, max_size=5), st.randoms())
def test_canonical_ignores_the_order_of_keys(tree: dict[str, Any], random: Any) -> None:
    names = list(tree)
    random.shuffle(names)
    assert canonical({name: tree[name] for name in names}) == canonical(tree)


def test_canonical_form() -> None:
    assert canonical({"b": (1, 2), "a": 0.1, "c": "é"}) == '{"a":0.1,"b":[1,2],"c":"\\u00e9"}'
    assert canonical([1, 1.0, True, None]) == "[1,1.0,true,null]"
    assert canonical(-0.0) == canonical(0.0) == "0.0"
    assert canonical({10: 1, 9: 2}) == canonical({"9": 2, "10": 1})
    assert canonical([np.float64(0.5), np.int64(3), np.bool_(True), np.float32(0.5)]) == "[0.5,3,true,0.5]"
    assert canonical(Path("a/b")) == '"a/b"'


def test_canonical_takes_a_config_by_its_values() -> None:
    class Point(Config):
        x: float = 0.0
        y: tuple[int, ...] = ()

    assert canonical(Point(x=1, y=(2,))) == '{"x":1.0,"y":[2]}'
    assert digest(Point(x=-0.0)) == digest({"y": [], "x": 0.0})


@pytest.mark.parametrize("value", [math.nan, math.inf, [-math.inf], {"a": np.float64("nan")}])
def test_canonical_refuses_what_is_not_finite(value: Any) -> None:
    with pytest.raises(ValueError, match="finite"):
        canonical(value)


@pytest.mark.parametrize("value", [{1, 2}, b"x", object(), {1.5: 1}, {True: 1}, np.zeros(2)])
def test_canonical_refuses_what_is_not_plain(value: Any) -> None:
    with pytest.raises(TypeError):
        canonical(value)


def test_canonical_refuses_keys_that_would_merge() -> None:
    with pytest.raises(ValueError, match="two keys"):
        canonical({1: "a", "1": "b"})


def test_digest_is_sha256_in_hex_and_stays_what_it_is() -> None:
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert digest({"a": 1}) != digest({"a": 1.0})
