"""Plugin files: imported once, and their mistakes told in one sentence."""

import pytest

from stepladder import plugins
from stepladder.core.errors import UserError

ARCHITECTURE = '''
import pathlib
from stepladder.models.zoo import Spec, architecture

with open(pathlib.Path(__file__).with_suffix(".log"), "a") as log:
    log.write("imported ")


@architecture("{name}", tiny={{}})
class Mine(Spec):
    """Of no use."""
'''


def test_a_plugin_is_imported_once_and_names_what_it_registered(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text(ARCHITECTURE.format(name="plugged_once"))
    assert plugins.load([file]) == ["plugged_once"]
    monkeypatch.chdir(tmp_path)
    assert plugins.load(["mine.py", str(file)]) == ["plugged_once"]
    assert (tmp_path / "mine.log").read_text() == "imported "


def test_two_plugins_of_one_file_name_are_two(tmp_path):
    for name in ("plugged_a", "plugged_b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.py").write_text(ARCHITECTURE.format(name=name))
    assert plugins.load(tmp_path / name / "same.py" for name in ("plugged_a", "plugged_b")) == [
        "plugged_a",
        "plugged_b",
    ]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("x = 1\ndef f(:\n", "line 2: SyntaxError"),
        ("\nimport no_such_module\n", "line 2: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def f():\n    return 1 / 0\nf()\n", "line 2: ZeroDivisionError: division by zero"),
        ("\n\nraise ValueError('a\\nb')\n", "line 3: ValueError: a b"),
    ],
)
def test_a_broken_plugin_is_one_sentence_with_file_line_and_error(tmp_path, source, says):
    file = tmp_path / "broken.py"
    file.write_text(source)
    for _ in range(2):  # what failed is not taken for loaded
        with pytest.raises(UserError) as caught:
            plugins.load([file])
        assert says in str(caught.value)
        assert "broken.py" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_is_no_python_file_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    for name in ("absent.py", "notes.txt"):
        with pytest.raises(UserError, match=name):
            plugins.load([tmp_path / name])
    assert plugins.load([]) == []
