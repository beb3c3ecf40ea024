"""The recipes work as they are written: the architecture passes every law, the task is sound, the suite runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stepladder import plugins
from stepladder.data.base import overlap
from stepladder.data.tasks import TASKS

RECIPES = Path(__file__).parents[2] / "CONTRIBUTING.md"


def recipe(heading):
    """The Python of the section under ``heading``."""
    return re.search(rf"## {heading}.*?```python\n(.*?)```", RECIPES.read_text(), re.DOTALL).group(1)


def stepladder(folder, *words):
    command = [sys.executable, "-m", "stepladder.cli", *map(str, words)]
    environment = {**os.environ, "COLUMNS": "160", "STEPLADDER_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def test_the_architecture_of_the_recipe_is_admitted(tmp_path):
    (tmp_path / "my_shift.py").write_text(recipe("An architecture"))
    done = stepladder(tmp_path, "check", "my_shift.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^  \w+ +yes ", done.stdout, re.MULTILINE)) == 12


def test_the_task_of_the_recipe_is_sound(tmp_path):
    (tmp_path / "greatest.py").write_text(recipe("A task"))
    plugins.load([tmp_path / "greatest.py"])
    task = TASKS.get("greatest")()
    for split in ("train", "valid", "test"):
        asked = task.batch(0, split, np.arange(50), (2, 40))
        assert [task.solve(question) for question in asked.questions()] == asked.answers()
        assert all(question.endswith("=") for question in asked.questions())
        assert set("".join(asked.questions() + asked.answers())) <= set(task.alphabet)
        assert max(map(len, asked.answers())) == task.max_answer(40)
    for pair in (("train", "test"), ("train", "valid"), ("valid", "test")):
        shared = overlap(task, 0, 200, splits=pair)
        assert shared["exact"] == shared["normalised"] == shared["canonical"] == 0


def test_the_suite_of_the_recipe_runs_on_a_run_of_the_recipes_task(tmp_path):
    (tmp_path / "greatest.py").write_text(recipe("A task"))
    (tmp_path / "first_token.py").write_text(recipe("A suite"))
    small = ["--steps", "2", "model.width=16", "model.depth=1", "--no-evaluate", "--name", "one", "--quiet"]
    done = stepladder(tmp_path, "train", "--plugin", "greatest.py", "--tasks", "greatest", *small)
    assert done.returncode == 0, done.stderr
    words = ["eval", "runs/one", "--suite", "first_token", "--plugin", "first_token.py"]
    unknown = stepladder(tmp_path, "eval", "runs/one")
    assert unknown.returncode == 2
    assert "if a plugin registers it, give --plugin FILE" in unknown.stderr
    done = stepladder(tmp_path, *words, "--plugin", "greatest.py")
    assert done.returncode == 0, done.stderr
    assert "entropy in nats" in done.stdout
    assert (tmp_path / "runs" / "one" / "results_first_token.json").is_file()


@pytest.mark.parametrize("path", ["data/tasks/addition.py", "ladders/first.yaml", "tests/laws/broken.py"])
def test_the_files_that_the_recipes_name_exist(path):
    assert path in RECIPES.read_text()
    assert (RECIPES.parent / path).is_file() or (RECIPES.parent / "src" / "stepladder" / path).is_file()
