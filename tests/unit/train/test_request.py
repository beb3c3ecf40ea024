"""What a request means for a directory that exists."""

from __future__ import annotations

import pytest

from stepladder.core.errors import UserError
from stepladder.core.files import write_json, write_manifest
from stepladder.train.request import agree, finished


@pytest.fixture
def held(tmp_path, tiny):
    """A directory that holds the run ``tiny()``."""
    write_json(tmp_path / "config.json", tiny().tree())
    return tmp_path


def test_an_empty_place_takes_any_run(tmp_path, tiny):
    asked = agree(tiny(), tmp_path / "nowhere", resume=True, extend=False)
    assert asked.base == tiny()
    assert asked.extended is None
    assert asked.hash() == tiny().hash()


def test_the_name_does_not_matter_but_everything_else_does(held, tiny):
    assert agree(tiny("renamed"), held, resume=True, extend=False).base == tiny()
    with pytest.raises(UserError) as refusal:
        agree(tiny(lr=0.5, clip=2.0, model={"width": 64, "depth": 3}), held, resume=True, extend=False)
    told = str(refusal.value)
    assert "model.width is 32 there and 64 here, model.depth is 2 there and 3 here" in told
    assert "and 1 more differ" in told
    assert "give another name" in told
    assert "--extend" not in told


def test_another_architecture_is_told_by_its_kind(held, tiny):
    with pytest.raises(UserError, match=r"model.kind is 'transformer' there and 'identity' here"):
        agree(tiny(kind="identity"), held, resume=True, extend=False)


def test_without_resume_an_existing_directory_is_refused(held, tiny):
    with pytest.raises(UserError, match="exists; give the run another name, or let it resume"):
        agree(tiny(), held, resume=False, extend=False)


def test_only_a_grown_budget_of_the_same_unit_can_be_extended(held, tiny):
    assert agree(tiny(steps=9), held, resume=True, extend=True).extended == {"steps": 9}
    for other in (tiny(steps=5), tiny(tokens=10**9), tiny(steps=9, lr=0.5)):
        with pytest.raises(UserError, match="holds another run"):
            agree(other, held, resume=True, extend=True)


@pytest.mark.parametrize(
    ("status", "done"), [("complete", True), ("diverged", True), ("interrupted", False), ("failed", False)]
)
def test_complete_and_diverged_runs_are_done(held, tiny, status, done):
    asked = agree(tiny(), held, resume=True, extend=False)
    assert not finished(held, asked)
    write_json(held / "summary.json", {"status": status, "hash": tiny().hash(), "steps": 6})
    assert not finished(held, asked)  # there is no checkpoint
    folder = held / "checkpoints/step-00000006"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("sound")
    write_manifest(folder)
    assert finished(held, asked) is done
    assert not finished(held, agree(tiny(steps=9), held, resume=True, extend=True))


def test_what_decides_nothing_may_change(held, tiny):
    other = tiny("renamed", eval_samples=7, eval_every=3, save_every=2, keep=5, log_every=1)
    other = other.model_copy(update={"eval": other.eval.model_copy(update={"samples": 9})})
    assert other.hash() == tiny().hash()
    asked = agree(other, held, resume=True, extend=False)
    assert (asked.base, asked.extended) == (other.model_copy(update={"name": "run"}), None)
    assert agree(tiny(steps=9, eval_every=3), held, resume=True, extend=True).extended == {"steps": 9}


@pytest.mark.parametrize("summary", [{}, [], {"status": "complete"}])
def test_a_summary_that_says_nothing_is_unfinished(held, tiny, summary):
    write_json(held / "summary.json", summary)
    assert not finished(held, agree(tiny(), held, resume=True, extend=False))
