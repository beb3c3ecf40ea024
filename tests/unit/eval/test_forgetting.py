"""Forgetting: the matrix of real checkpoints, the figures drawn from it, and the page."""

import numpy as np
import pytest

from stepladder.core.errors import UserError
from stepladder.core.files import read_json, read_lines
from stepladder.eval import forgetting as module
from stepladder.eval.forgetting import forgetting, learners, read_segments, transfer
from stepladder.eval.likelihood import likelihood
from stepladder.eval.suite import Job
from stepladder.report.forgetting import write


def words(seed):
    letters = np.random.default_rng(seed).integers(97, 99 + seed, (5, 90)).astype(np.uint8)
    return "\f".join(row.tobytes().decode() for row in letters)


@pytest.fixture
def yaml(tmp_path):
    for seed, name in enumerate(("novels", "law", "speeches")):
        (tmp_path / f"{name}.txt").write_text(words(seed))
    lines = [f"  - {{name: {name}, path: {name}.txt}}" for name in ("novels", "law", "speeches")]
    (tmp_path / "segments.yaml").write_text("segments:\n" + "\n".join(lines))
    return tmp_path / "segments.yaml"


def test_what_is_lost_is_measured_from_the_best_and_transfer_from_the_learner():
    matrix = [[1.0, 3.0, 3.0], [1.5, 2.0, 2.5], [2.0, 1.5, 1.0]]
    found = transfer(matrix, [0, 1, 2])
    assert found["forgetting"] == [1.0, 0.0, 0.0]
    assert found["mean_forgetting"] == pytest.approx(1 / 3)
    assert found["backward_transfer"] == pytest.approx(((1 - 2) + (2 - 1.5)) / 2)
    assert transfer(matrix, [None, None, 2])["backward_transfer"] is None


def test_the_matrix_is_that_of_the_likelihood_suite(make, yaml, tmp_path, monkeypatch):
    """Two checkpoints, which differ in their weights: every cell is what the suite says of that text."""
    segment_paths = [str(tmp_path / f"{name}.txt") for name in ("novels", "law", "speeches")]
    sources = [{"kind": "text", "path": path, "valid": path} for path in segment_paths]
    one, two = make(sources), make(sources, model="titans_lmm")
    places = {str(tmp_path / "a"): one, str(tmp_path / "b"): two}
    for place in places:
        (tmp_path / place).mkdir()
    monkeypatch.setattr(module, "opened", lambda place, device: places[str(place)])
    results = forgetting(list(places), yaml, tmp_path / "out")
    for loaded, row in zip(places.values(), results["matrix"], strict=True):
        known = likelihood(Job(loaded.model, loaded.tokenizer, loaded.run, loaded.run.eval)).body["likelihood"]
        assert row == pytest.approx([entry["bits_per_byte"] for entry in known])
    assert results["matrix"][0] != results["matrix"][1]
    assert results["same_items"]
    assert read_json(tmp_path / "out" / "results_forgetting.json") == results
    assert len(read_lines(tmp_path / "out" / "records" / "forgetting.jsonl")) == results["records"]
    page = write(tmp_path / "out").read_text()
    assert all(name in page for name in ("novels", "law", "speeches", f"{results['matrix'][1][2]:.3f}"))
    assert page.count("<svg") == 1
    assert write(tmp_path / "out").read_text() == page


def test_checkpoints_are_opened_by_run_or_by_folder(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "load", lambda *args, **options: seen.append((*map(str, args), options)))
    module.opened("runs/a")
    module.opened("runs/a/checkpoints/step-00000009")
    assert [each[0] for each in seen] == ["runs/a", "runs/a"]
    assert seen[1][1] == "runs/a/checkpoints/step-00000009"


def test_mistakes_are_told_before_anything_is_scored(yaml, tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint .*nowhere"):
        forgetting([tmp_path / "nowhere"], yaml, tmp_path)
    with pytest.raises(UserError, match="no checkpoint to score"):
        forgetting([], yaml, tmp_path)
    (tmp_path / "law.txt").unlink()
    with pytest.raises(UserError, match="'law': there is no file"):
        forgetting([tmp_path], yaml, tmp_path)
    yaml.write_text("segments:\n  - {name: a, path: x.txt}\n  - {name: a, path: y.txt}")
    with pytest.raises(UserError, match="same name"):
        read_segments(yaml)
    yaml.write_text("segments:\n  - {name: a, path: x.txt, learned: 2}")
    with pytest.raises(UserError, match="learned: 2, but there are 2 checkpoints"):
        learners(read_segments(yaml), 2)
    assert learners(read_segments(yaml), 3) == [2]
    with pytest.raises(UserError, match="no results_forgetting"):
        write(tmp_path)
