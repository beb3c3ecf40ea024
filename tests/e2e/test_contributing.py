"""The recipes work as they are written: the architecture of CONTRIBUTING.md passes every law."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "CONTRIBUTING.md"


def test_the_architecture_of_the_recipe_is_admitted(tmp_path):
    file = tmp_path / "my_shift.py"
    file.write_text(re.search(r"```python\n(.*?)```", RECIPES.read_text(), re.DOTALL).group(1))
    command = [sys.executable, "-m", "stepladder.cli", "check", str(file)]
    done = subprocess.run(command, env={**os.environ, "COLUMNS": "160"}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("│ yes") == 12


@pytest.mark.parametrize("path", ["data/tasks/parity.py", "ladders/first.yaml", "tests/laws/broken.py"])
def test_the_files_that_the_recipes_name_exist(path):
    assert path in RECIPES.read_text()
    assert (RECIPES.parent / path).is_file() or (RECIPES.parent / "src" / "stepladder" / path).is_file()
