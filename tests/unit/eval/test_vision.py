"""The vision suite: exact match of what is written about held-out images, with images where they belong."""

import numpy as np
import pytest
import torch

from stepladder.core.files import read_lines
from stepladder.data.images import questions
from stepladder.eval import suite
from stepladder.eval.decode import evaluating, generate
from stepladder.eval.self_test import Scripted
from stepladder.eval.vision import ask, calibration_error, likelihood


@pytest.fixture
def loaded(make, tmp_path, write_idx):
    """A run on little images; ``loaded(levels=..., ...)`` with other fields of the source."""

    def build(**fields):
        write_idx(tmp_path / "bars")
        source = {"kind": "images", "path": str(tmp_path / "bars"), **fields}
        shape = {"side": 8} if "levels" in fields else {}
        encoder = {} if "levels" in fields else {"encoder": {"kind": "conv", "side": 8, "hidden": 4}}
        found = make([{**source, **shape}], eval={"suites": ["vision"], "samples": 30}, **encoder)
        return found

    return build


def job(loaded):
    return suite.Job(loaded.model, loaded.tokenizer, loaded.run, loaded.run.eval)


def test_an_untrained_model_is_scored_and_left_as_it_was(loaded):
    run = loaded()
    before = suite.weights_digest(run.model)
    (results,) = suite.evaluate(run, ["vision"], quiet=True)
    (cell,) = results["cells"]
    assert cell["n"] == results["records"] == 30
    assert cell["accuracy"] < 0.5
    assert cell["chance"] == 0.25
    assert cell["nll"] > 1
    assert sum(count for *_, count in cell["confusions"]) <= 30
    assert suite.weights_digest(run.model) == before
    records = read_lines(run.path.parent.parent / "records" / "vision.jsonl")
    assert {"task", "size", "regime", "index", "question", "answer", "output", "correct", "nll", "confidence"} <= set(
        records[0]
    )
    assert suite.tables([results])[0].row_count == 1


def test_scripted_answers_are_worth_what_they_are(loaded):
    """Pixel tokens tell a scripted model which question it is asked; every third answer is wrong."""
    run = loaded(levels=8)
    ((name, source),) = [("bars", run.run.data.sources[0])]
    asked = questions(source, run.tokenizer, 0, 30)
    script = {}
    for number, question in enumerate(asked):
        told = question.told if number % 3 else (question.told - 48 - 3 + 1) % 4 + 48 + 3
        script[tuple(question.tokens.tolist())] = (*told.tolist(), 2)
    model = Scripted(run.tokenizer.vocab, script)
    records = ask(suite.Job(model, run.tokenizer, run.run, run.run.eval), name, source, asked)
    assert [record["correct"] for record in records] == [bool(number % 3) for number in range(30)]


def test_decoding_images_is_what_the_whole_forward_says(loaded):
    """Cached, uncached, alone and in ragged batches; and the image matters."""
    run = loaded(question="{image}?")
    asked = questions(run.run.data.sources[0], run.tokenizer, 0, 6)
    options = {"max_new": 5, "eos": None}
    prompts = [question.tokens for question in asked]
    cached = generate(run.model, prompts, images=asked, **options)
    uncached = generate(run.model, prompts, images=asked, uncached=True, **options)
    single = generate(run.model, prompts, images=asked, batch=1, **options)
    for a, b, c in zip(cached, uncached, single, strict=True):
        assert np.array_equal(a.tokens, b.tokens)
        assert np.array_equal(a.tokens, c.tokens)
    with torch.no_grad():
        for value in run.model.vision.parameters():
            value *= -3
    other = generate(run.model, prompts, images=asked, **options)
    assert any(not np.array_equal(a.tokens, b.tokens) for a, b in zip(cached, other, strict=True))


def test_the_likelihood_is_that_of_the_model(loaded):
    run = loaded()
    source = run.run.data.sources[0]
    asked = questions(source, run.tokenizer, 0, 5)
    with evaluating(run.model):
        found = likelihood(job(run), source, asked)
        for one, question in zip(found, asked, strict=True):
            (alone,) = likelihood(job(run), source, [question])
            assert alone["nll"] == pytest.approx(one["nll"], rel=1e-4)
            assert 0 < one["confidence"] <= 1
            assert one["first"] in (0.0, 1.0)


def test_calibration_error_on_cases_worked_out_by_hand():
    assert calibration_error(np.array([0.95, 0.95]), np.array([1.0, 0.0])) == pytest.approx(0.45)
    assert calibration_error(np.array([1.0, 1.0, 0.5, 0.5]), np.array([1.0, 1.0, 1.0, 0.0])) == 0
    assert calibration_error(np.array([0.1, 0.9]), np.array([1.0, 0.0])) == pytest.approx(0.9)


def test_a_run_without_images_says_so(make):
    run = make()
    (results,) = suite.evaluate(run, ["vision"], quiet=True)
    assert results["message"] == "nothing to evaluate: no image source"
