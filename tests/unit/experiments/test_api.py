"""The Python surface of a climb: plugins, the command on the page, and failures."""

import inspect

import pytest

from stepladder import api
from stepladder.core.errors import UserError
from stepladder.experiments import climb as climbing


@pytest.fixture
def climb(tmp_path, monkeypatch):
    """api.climb on the first ladder with nothing trained: what the climber was given, and what was said."""
    given, said = {}, []

    def pretend(ladder, rungs, root, **options):
        given.update(options, root=root)
        return root / ladder.name, given.get("failed", [])

    monkeypatch.setattr(climbing, "climb", pretend)
    monkeypatch.setattr(api.page, "write", lambda home: home / "report.html")
    monkeypatch.setenv("STEPLADDER_CACHE", str(tmp_path / "cache"))

    def go(*overrides, failed=(), **options):
        given["failed"] = list(failed)
        return api.climb("ladders/first.yaml", *overrides, say=said.append, **options)

    go.given, go.said = given, said
    return go


def test_the_command_says_all_that_is_not_default(climb, tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text("SEEN = True\n")
    climb("seeds=[0]", runs=tmp_path / "elsewhere", plugins=[plugin])
    start = "stepladder climb ladders/first.yaml 'seeds=[0]'"
    assert climb.given["command"] == f"{start} --runs {tmp_path}/elsewhere --plugin {plugin}"
    assert climb.given["plugins"] == (str(plugin),)
    climb("seeds=[0]")
    assert climb.given["command"] == start


def test_plugins_are_imported_before_the_ladder_is_read(climb, tmp_path):
    with pytest.raises(UserError, match="is not a file"):
        climb(plugins=("absent.py",))
    with pytest.raises(UserError, match="is not a file"):
        api.load(tmp_path, plugins=("absent.py",))
    assert "plugins" in inspect.signature(api.load).parameters


def test_failed_runs_end_in_status_1_after_the_page(climb):
    with pytest.raises(climbing.Failed) as ended:
        climb(failed=["loop-s0", "loop-s1"])
    assert ended.value.code == 1
    assert climb.said[-1].startswith("2 runs have no result (loop-s0, loop-s1)")
    assert climb.said[-1].endswith("report.html")
