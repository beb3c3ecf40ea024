"""Adaptation: losses against a plain forward, buckets that cover, and a gain that is the text's before the window."""

import numpy as np
import pytest
import torch

from stepladder.eval.adaptation import adaptation, buckets, curve, losses, table
from stepladder.eval.suite import Job

SEQUENCE, LENGTH = 32, 200


@pytest.fixture
def texts(tmp_path):
    letters = np.random.default_rng(0).integers(97, 123, (6, 230)).astype(np.uint8)
    long = [row.tobytes().decode() for row in letters]
    (tmp_path / "long.txt").write_text("\f".join([*long, "too short", "x" * 150]))
    return [{"kind": "text", "path": str(tmp_path / "long.txt"), "valid": str(tmp_path / "long.txt")}]


def job(loaded, **config):
    return Job(loaded.model, loaded.tokenizer, loaded.run, loaded.run.eval.model_copy(update=config))


@pytest.mark.parametrize(("tokens", "edges"), [(1, [1]), (64, [64]), (65, [64, 65]), (300, [64, 128, 256, 300])])
def test_buckets_cover_every_position_once(tokens, edges):
    assert [last for _, last in buckets(tokens)] == edges
    assert sorted(place for first, last in buckets(tokens) for place in range(first, last)) == list(range(tokens))


@pytest.mark.parametrize("model", ["transformer", "titans_lmm", "hope_attention"])
def test_losses_are_those_of_one_forward_and_of_windows(make, texts, model, monkeypatch):
    monkeypatch.setattr("stepladder.eval.adaptation.PIECE", 48)
    network = make(texts, model=model).model.double()
    ids = torch.randint(97, 123, (2, 101), generator=torch.Generator().manual_seed(0))

    def plain(rows):
        with torch.no_grad():
            return network(rows[:, :-1], targets=rows[:, 1:]).nll_BT.numpy()

    np.testing.assert_allclose(losses(network, ids.numpy()), plain(ids), rtol=1e-9)
    windows = [plain(ids[:, first : first + 33]) for first in range(0, 100, 32)]
    np.testing.assert_allclose(losses(network, ids.numpy(), 32), np.concatenate(windows, 1), rtol=1e-9)


def test_documents_that_are_long_enough_are_scored_in_every_bucket(make, texts):
    loaded = make(texts, eval={"samples": 4})
    outcome = adaptation(job(loaded, adapt_tokens=LENGTH))
    assert [record["document"] for record in outcome.records] == [0, 1, 2, 3]
    assert [(cell["from"], cell["to"]) for cell in outcome.body["cells"]] == [(0, 64), (64, 128), (128, 199)]
    assert len(adaptation(job(loaded, adapt_tokens=LENGTH, samples=99)).records) == 6
    assert table(outcome.body).row_count == 3
    again = adaptation(job(loaded, adapt_tokens=LENGTH, batch=1))
    assert list(again.items) == list(outcome.items)
    for one, other in zip(again.records, outcome.records, strict=True):
        np.testing.assert_allclose(one["nll"], other["nll"], rtol=1e-5)


def test_the_gain_is_what_the_text_before_the_window_brings(make, texts, monkeypatch):
    """A model that knows a letter once it has read it 100 tokens before: only a state that was kept can tell."""
    loaded = make(texts)

    def fake(model, ids, restart=None):
        known = np.arange(ids.shape[1] - 1) >= 100
        return np.where(known & (restart is None), 1.0, 3.0) + np.zeros((len(ids), 1))

    monkeypatch.setattr("stepladder.eval.adaptation.losses", fake)
    cells = adaptation(job(loaded, adapt_tokens=LENGTH)).body["cells"]
    assert [cell["gain"] for cell in cells] == pytest.approx([0, 2 * 28 / 64, 2])
    assert [cell["stderr"] for cell in cells] == [0, 0, 0]


def test_within_the_first_window_there_is_nothing_to_gain(make, texts):
    loaded = make(texts, model="titans_lmm", data={"sequence": 64, "sources": texts})
    first, *others = adaptation(job(loaded, adapt_tokens=LENGTH)).body["cells"]
    assert first["gain"] == 0
    assert first["trained"]
    assert all(cell["gain"] != 0 and not cell["trained"] for cell in others)


def test_what_cannot_be_read_is_said(make, texts):
    assert "no validation document has 4096 tokens" in adaptation(job(make(texts))).body["message"]
    short = make(texts, model="nano_absolute", fields={"max_positions": 64})
    assert "64 positions" in adaptation(job(short, adapt_tokens=LENGTH)).body["message"]
    broken = curve("a", 1, 1, np.array([[np.nan]]), np.array([[1.0]]))
    assert broken[0]["gain"] is None
