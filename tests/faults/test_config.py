"""Faults C1 to C6 (C7: unit/report/test_verdict, C8: test_training): refused by name, and nothing is executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import model_validator

from stepladder.core.config import Config, Field, override, read_tree, validate
from stepladder.core.errors import UserError
from stepladder.core.files import safe_name
from stepladder.run import read


class Model(Config):
    width: int = Field(64, ge=8)
    heads: int = Field(4, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Model:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")
        return self


class Settings(Config):
    model: Model = Model()
    lr: float = Field(1e-3, gt=0)
    batch: int = Field(32, ge=1)
    steps: int = Field(100, ge=0)
    compile: bool = False


def load(folder: Path, text: str | bytes, name: str = "run.yaml", overrides: tuple[str, ...] = ()) -> Settings:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return validate(Settings, override(read_tree(path), overrides), name)


def refusal(folder: Path, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, *args, **kwargs)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert [path.name for path in folder.iterdir()] in (["run.yaml"], ["run.json"])  # nothing else was made
    return sentence


def test_C1_unknown_key_is_refused_with_the_nearest(tmp_path: Path) -> None:
    assert refusal(tmp_path, "model: {widht: 3}") == "run.yaml: unknown key 'model.widht' — did you mean 'width'?"
    assert refusal(tmp_path, "{}", overrides=("bacth=3",)) == "run.yaml: unknown key 'bacth' — did you mean 'batch'?"


@pytest.mark.parametrize("text", ["lr: 3e-4", "lr: '3e-4'", "lr: 3.0e-4", "lr: 0.0003"])
def test_C2_documented_numerics_are_numbers(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text).lr == 0.0003
    assert load(tmp_path, '{"lr": "3e-4"}', "run.json").lr == 0.0003
    assert load(tmp_path, "{}", overrides=("lr=3e-4", "steps=1e3")).steps == 1000


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("batch: 0", "batch = 0: must be greater than or equal to 1"),
        ("batch: many", "batch = 'many': must be an integer"),
        ("batch: 2.5", "batch = 2.5: must be an integer, got a number with a fractional part"),
        ("batch: true", "batch = true: must be an integer"),
        ("batch: [1]", "batch = [1]: must be an integer"),
        ("batch: ", "batch = null: must be an integer"),
        ("steps: -1", "steps = -1: must be greater than or equal to 0"),
        ("lr: fast", "lr = 'fast': must be a number"),
        ("lr: false", "lr = false: must be a number"),
        ("lr: 'nan'", "lr = 'nan': must be a finite number"),
        ("compile: yes", "compile = 'yes': must be a boolean"),
        ("compile: 1", "compile = 1: must be a boolean"),
        ("model: {heads: 3}", "model: heads=3 does not divide width=64"),
        ("model: [1]", "model = [1]: must be a mapping of keys to values"),
    ],
)
def test_C2_wrong_type_or_range_is_refused_with_path_and_bound(tmp_path: Path, text: str, sentence: str) -> None:
    assert refusal(tmp_path, text) == f"run.yaml: {sentence}"


@pytest.mark.parametrize(
    "payload",
    [
        "!!python/object/apply:os.system ['touch {canary}']",
        "!!python/object/apply:subprocess.check_output [['touch', '{canary}']]",
        "!!python/object/new:os.system ['touch {canary}']",
        "!!python/object/apply:builtins.eval [\"open('{canary}', 'w')\"]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch {canary}']",
    ],
)
def test_C3_yaml_cannot_run_code(tmp_path: Path, payload: str) -> None:
    canary, folder = tmp_path / "canary", tmp_path / "config"
    folder.mkdir()
    sentence = refusal(folder, f"lr: 1.0\nmodel: {payload.format(canary=canary)}\n")
    assert "line 2: the tag !!python/" in sentence
    with pytest.raises(UserError, match="the tag !!python/"):
        override({}, [f"model={payload.format(canary=canary)}"])
    assert not canary.exists()


@pytest.mark.parametrize(
    "name",
    ["../../x", "/etc/passwd", "a/b", "a\\b", "nul\0byte", "x" * 300, "CON", "con.txt", "LPT1", "🪜", "", ".", "..",
     ".hidden", "-rf", "dot.", "a b", "a\n", "é", "a:b", "~"],
)  # fmt: skip
def test_C5_unsafe_run_names_are_refused_with_a_safe_one(name: str) -> None:
    with pytest.raises(UserError) as caught:
        safe_name(name)
    sentence = str(caught.value)
    proposal = sentence.split("for example ")[1].strip("'")
    assert safe_name(proposal) == proposal
    assert sentence.isprintable()
    assert len(sentence) < 300


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("run.yaml", "lr: 1\nbatch: 2\nlr: 3\n", "line 3: duplicate key 'lr'"),
        ("run.json", '{"lr": 1,\n"batch": 2,\n"lr": 3}', "line 3: duplicate key 'lr'"),
        ("run.yaml", "model:\n  width: 8\n  width: 16\n", "line 3: duplicate key 'width'"),
        ("run.json", '{"model": {\n"width": 8, "width": 16}}', "line 2: duplicate key 'width'"),
        ("run.yaml", "batch: 1\nlr: .nan\n", "line 2: .nan is not a finite number"),
        ("run.yaml", "batch: 1\nlr: -.Inf\n", "line 2: -.Inf is not a finite number"),
        ("run.yaml", "lr: 1e999\n", "line 1: 1e999 is not a finite number"),
        ("run.json", '{\n"lr": NaN}', "line 2: NaN is not a finite number"),
        ("run.json", '{"batch": 1,\n\n"lr": -Infinity}', "line 3: -Infinity is not a finite number"),
        ("run.yaml", b"\xef\xbb\xbflr: 1\n", "line 1: the file starts with a byte-order mark"),
        ("run.json", b'\xef\xbb\xbf{"lr": 1}', "line 1: the file starts with a byte-order mark"),
        ("run.json", '{"lr": 1}'.encode("utf-16"), "line 1: the file starts with a byte-order mark"),
        ("run.json", '{"lr": 1,\n}', "line 2: not valid JSON"),
        ("run.json", '{"model": {"width": 8,},\n"lr": 1}', "line 1: not valid JSON"),
    ],
)
def test_C6_ambiguous_files_are_refused_with_the_line(
    tmp_path: Path, name: str, text: str | bytes, sentence: str
) -> None:
    assert sentence in refusal(tmp_path, text, name)


def test_C4_a_run_file_and_plain_flags_together_are_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: transformer\n")
    with pytest.raises(UserError, match=r"not both; with a file, write model\.kind="):
        read(path, [], {"model": "transformer", "steps": None})
