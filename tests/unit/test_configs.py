"""The presets of the house are valid runs under the names of their files."""

from pathlib import Path

import pytest

from stepladder.run import read

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_there_are_presets():
    assert len(CONFIGS) >= 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_preset_is_a_valid_run(path):
    run = read(path, ["seed=3"])
    assert run.name == path.stem
    assert run.seed == 3
