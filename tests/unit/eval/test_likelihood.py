"""Likelihood: totals against a plain computation, the limit on tokens, and windows that are not numbers."""

import json
import math
import re

import numpy as np
import pytest

from stepladder.data.stream import Stream
from stepladder.data.tokenizers import IGNORE
from stepladder.eval.likelihood import brief, likelihood, summary, table
from stepladder.eval.suite import Job
from stepladder.run import cache_folder

TEXT = "\f".join(f"Document {n} says: é{'ab' * (n % 7)}." for n in range(30))


@pytest.fixture
def loaded(make, tmp_path):
    (tmp_path / "words.txt").write_text(TEXT, encoding="utf-8")
    return make([{"kind": "text", "path": str(tmp_path / "words.txt"), "valid": str(tmp_path / "words.txt")}])


def job(loaded, **config):
    return Job(loaded.model, loaded.tokenizer, loaded.run, loaded.run.eval.model_copy(update=config))


def test_totals_are_those_of_the_whole_text(loaded):
    outcome = likelihood(job(loaded))
    (found,) = outcome.body["likelihood"]
    text_bytes = len(TEXT.replace("\f", "").encode())
    assert found["bytes"] == text_bytes
    assert found["tokens"] == text_bytes + 30, "a byte tokenizer: one token a byte, and one end a document"
    assert found["windows"] == len(outcome.records) == math.ceil((text_bytes + 60 - 1) / 32)
    nll = sum(record["nll"] for record in outcome.records)
    assert found["nll"] == pytest.approx(nll)
    assert found["perplexity"] == pytest.approx(math.exp(nll / found["tokens"]))
    assert found["bits_per_byte"] == pytest.approx(nll / math.log(2) / text_bytes)
    assert 0 < found["stderr"] < 1
    assert table(outcome.body).row_count == 1


@pytest.mark.parametrize("limit", [1, 33, 200])
def test_the_limit_ends_at_a_window_whatever_the_batch(loaded, limit):
    outcomes = [likelihood(job(loaded, text_tokens=limit, batch=batch)) for batch in (1, 3, 64)]
    counts = [[record["tokens"] for record in outcome.records] for outcome in outcomes]
    assert counts[0] == counts[1] == counts[2]
    assert sum(counts[0][:-1]) < limit <= sum(counts[0])
    assert list(outcomes[0].items) == list(outcomes[2].items)


def test_items_name_the_text(loaded, make, tmp_path):
    (tmp_path / "words.txt").write_text(TEXT.replace("says", "said"), encoding="utf-8")
    changed = likelihood(job(make([loaded.run.data.sources[0].model_dump()]))).items
    (tmp_path / "words.txt").write_text(TEXT, encoding="utf-8")
    assert list(likelihood(job(loaded)).items) != list(changed)


def test_a_window_that_is_no_number_counts_as_a_guess():
    records = [{"nll": None, "tokens": 9, "bytes": 10}, {"nll": 20 * math.log(2), "tokens": 9, "bytes": 10}]
    found = summary("a", records)
    assert found["not_finite"] == 1
    assert found["bits_per_byte"] == pytest.approx((80 + 20) / 20)


def test_one_window_has_no_standard_error():
    assert summary("a", [{"nll": 1.0, "tokens": 9, "bytes": 10}])["stderr"] is None


def test_the_brief_form_looks_at_a_few_windows(loaded):
    seen = []
    loaded.model.register_forward_pre_hook(
        lambda _, inputs, options: seen.append((options["targets"] != IGNORE).sum().item()), with_kwargs=True
    )
    run = loaded.run.model_copy(update={"train": loaded.run.train.model_copy(update={"eval_samples": 2})})
    scores = brief(Job(loaded.model, loaded.tokenizer, run, run.eval))
    assert list(scores) == ["bits_per_byte/words"]
    assert sum(seen) < 4 * 32


def test_only_documents_held_out_of_training_are_scored(make, tmp_path):
    lines = [json.dumps({"text": f"<{number}> " * (2 + number % 9)}) for number in range(200)]
    (tmp_path / "numbered.jsonl").write_text("\n".join(lines))
    loaded = make([{"kind": "text", "path": str(tmp_path / "numbered.jsonl")}])
    scored = set()
    loaded.model.register_forward_pre_hook(
        lambda _, inputs: scored.update(
            n for row in inputs[0] for n in documents(loaded.tokenizer.decode(row.tolist()))
        )
    )
    likelihood(job(loaded))
    stream = Stream(loaded.run.data, loaded.run.seed, cache_folder())
    rows = stream.texts["numbered"].train.windows(32)
    trained = {
        n for row in stream.batch(0, np.arange(rows), rows).tokens for n in documents(stream.tokenizer.decode(row))
    }
    assert len(scored) > 5
    assert scored.isdisjoint(trained)
    assert scored | trained == {str(number) for number in range(200)}


def documents(text):
    return re.findall(r"<(\d+)>", text)
