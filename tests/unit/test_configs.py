"""The presets of the house are valid runs under the names of their files."""

from pathlib import Path

import pytest

from stepladder.data.curriculum import curriculum
from stepladder.data.stream import DataConfig
from stepladder.run import read

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_there_are_presets():
    assert len(CONFIGS) >= 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_preset_is_a_valid_run(path):
    run = read(path, ["seed=3"])
    assert run.name == path.stem
    assert run.seed == 3


def test_the_curriculum_is_what_its_budgets_make():
    run = read(Path(__file__).parents[2] / "configs" / "curriculum.yaml", [])
    *tasks, text = run.data.sources
    per_step = run.train.batch * run.data.sequence
    plan = curriculum([source.task for source in tasks], text.path, run.train.tokens / 2, run.train.tokens, per_step)
    assert DataConfig(sources=plan).sources == run.data.sources
    assert all(source.sizes(run.train.tokens // per_step // 4) == source.task.train for source in tasks)
