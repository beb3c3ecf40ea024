"""The needle suite: models of known score get it, every length has a word, and items are everybody's."""

import dataclasses
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from stepladder.core.errors import UserError
from stepladder.core.files import read_lines
from stepladder.data.tokenizers import EOS, SPECIALS, CharTokenizer
from stepladder.eval import longctx as module
from stepladder.eval.decode import generate
from stepladder.eval.haystack import KINDS, Documents, items
from stepladder.eval.longctx import DEPTHS, answer, area, documents, longctx, reach, table
from stepladder.eval.suite import Job, evaluate, tables
from stepladder.models.base import Output
from stepladder.models.lm import LanguageModel
from stepladder.models.zoo import ARCHITECTURES, spec

TEXT = [{"kind": "text", "path": "pydoc"}]
NEEDLE = [{"kind": "task", "task": {"kind": "needle", "train": [1, 1]}}]
SHORT = {"samples": 3, "lengths": [256, 400]}


def job(loaded, **config):
    return Job(loaded.model, loaded.tokenizer, loaded.run, loaded.run.eval.model_copy(update=config))


def drawn(loaded, kind="multi_key", length=256, indices=range(3)):
    source = documents(job(loaded))
    return [item for index in indices for item in items(source, 1234, kind, length, DEPTHS, index)]


class Fake(LanguageModel):
    """A model whose logits are ``says(text so far)``, a row of (V,)."""

    def __init__(self, vocab):
        nn.Module.__init__(self)
        self.vocab = vocab
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, tokens_BT, state=None, *, key=None, logits_at=None):
        said = tokens_BT if state is None else torch.cat((state, tokens_BT), 1)
        length, new = said.shape[1], 1 if logits_at == "last" else tokens_BT.shape[1]
        rows = [[self.says(row[:end]) for end in range(length - new + 1, length + 1)] for row in said.tolist()]
        return Output(torch.tensor(rows), None, said, {}, {})


class Copier(Fake):
    """Goes on as the text went on after the last place that looked like its end: all that a needle asks for."""

    def says(self, text):
        told = "".join(map(chr, text))
        places = (told.rfind(told[-n:], 0, len(told) - 1) + n for n in range(24, 0, -1) if told[-n:] in told[:-1])
        logits = [-9.0] * self.vocab
        logits[text[next(places, 0)]] = 0.0
        return logits


class Uniform(Fake):
    def says(self, text):
        return [0.0] * self.vocab


class Broken(Fake):
    def says(self, text):
        return [float("nan")] * self.vocab


class Stubborn(Fake):
    """Says the same whatever the text: it has likes, but cannot look."""

    def says(self, text):
        return [float((7 * token) % 13) for token in range(self.vocab)]


def with_model(loaded, model):
    return dataclasses.replace(loaded, model=model(loaded.tokenizer.vocab))


def test_a_model_that_copies_the_needle_has_100_in_every_cell(make):
    loaded = with_model(make(TEXT, eval=SHORT), Copier)
    outcome = longctx(job(loaded))
    cells = outcome.body["cells"]
    assert [(c["kind"], c["length"], c["depth"]) for c in cells] == list(itertools.product(KINDS, (256, 400), DEPTHS))
    for cell in cells:
        assert (cell["n"], cell["accuracy"], cell["prefix"], cell["choice"]) == (3, 1.0, 1.0, 1.0)
        assert cell["status"] == "complete"
    assert [curve["area"] for curve in outcome.body["curves"]] == [1.0] * 6
    assert all(record["output"] == record["answer"] for record in outcome.records)


@pytest.mark.parametrize("model", [Uniform, Stubborn])
def test_a_model_that_does_not_look_is_at_chance(make, model):
    loaded = with_model(make(TEXT, eval={"samples": 20, "lengths": [256]}), model)
    for cell in longctx(job(loaded)).body["cells"]:
        assert cell["accuracy"] == cell["prefix"] == 0
        assert 0 < cell["chance"] <= 1 / 60_000
        assert cell["choice_chance"] == 0.25
        # 20 items: within 4 standard errors; without preferences exactly
        assert cell["choice"] == pytest.approx(0.25, abs=1e-9 if model is Uniform else 0.39)
    if model is Stubborn:
        choices = [cell["choice"] for cell in longctx(job(loaded)).body["cells"] if cell["depth"] == 0]
        assert np.mean(choices) == pytest.approx(0.25, abs=0.2)


def test_numbers_that_are_none_are_never_right(make):
    loaded = with_model(make(TEXT, eval={"samples": 2, "lengths": [256]}), Broken)
    outcome = longctx(job(loaded))
    assert {(c["accuracy"], c["prefix"], c["choice"]) for c in outcome.body["cells"]} == {(0.0, 0.0, 0.0)}
    assert not any(record["usable"] for record in outcome.records)


@pytest.mark.parametrize(("end", "ended"), [(".", True), ("<eos>", True), ("7", False), (" ", False)])
def test_an_answer_counts_only_if_it_ends(make, end, ended):
    loaded = make(TEXT)
    after = EOS if end == "<eos>" else int(loaded.tokenizer.encode(end)[0])

    class Ending(Copier):
        def says(self, text):
            logits = super().says(text)
            if max(logits) == logits[int(loaded.tokenizer.encode(".")[0])]:
                logits[after] = 1.0
            return logits

    batch = drawn(loaded)
    records = answer(Ending(loaded.tokenizer.vocab), batch, loaded.tokenizer, 0)
    assert {(r["correct"], r["prefix"]) for r in records} == {(ended, True)}
    assert {r["output"] for r in records} == {b.choices[0] + ("" if ended else end) for b in batch}


@pytest.mark.parametrize("model", ARCHITECTURES.names())
def test_what_is_scored_is_what_greedy_decoding_writes(make, model, monkeypatch):
    # Noise aside: one keys it by item, the other by prompt.
    monkeypatch.setattr("stepladder.models.lm.row_keys", lambda key, batch, device: torch.zeros(batch).long())
    loaded = make(TEXT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        loaded = dataclasses.replace(loaded, model=spec(model, "tiny").build(loaded.tokenizer.vocab).eval())
    batch = [item for item in drawn(loaded, "passkey", 200, range(2)) if item.depth in (0.0, 0.5)]
    greedy = [g.tokens for g in generate(loaded.model, [i.prompt for i in batch], max_new=6, eos=None)]
    records = answer(loaded.model, batch, loaded.tokenizer, 0)
    for item, record, tokens in zip(batch, records, greedy, strict=True):
        same = int((tokens[:5] == item.options[0]).argmin())
        assert record["output"] == module.written(tokens[: same + 1], loaded.tokenizer)
    # The same with the model's own words as the right answer.
    own = [
        dataclasses.replace(i, options=np.concatenate((g[None, :5], i.options[1:])))
        for i, g in zip(batch, greedy, strict=True)
    ]
    for record, tokens in zip(answer(loaded.model, own, loaded.tokenizer, 0), greedy, strict=True):
        assert record["prefix"]
        assert record["correct"] == (tokens[5] in (EOS, loaded.tokenizer.encode(".")[0]))
        assert record["choice"] in (0.0, 1.0)


def test_batches_do_not_matter(make, monkeypatch):
    loaded = make(TEXT, eval=SHORT)
    together = longctx(job(loaded))
    monkeypatch.setattr(module, "TOKENS", 300)
    alone = longctx(job(loaded, batch=1))
    for one, other in zip(together.records, alone.records, strict=True):
        assert one == other
    assert together.body == alone.body
    seen = []
    loaded.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    monkeypatch.setattr(module, "TOKENS", 1000)
    longctx(job(loaded))
    assert max(seen) <= 1000


def test_a_length_beyond_the_learned_positions_says_so(make):
    text = longctx(job(make(TEXT, eval={"samples": 2, "lengths": [256, 301, 302, 512]})))
    fields = {"max_positions": 300}
    loaded = make(TEXT, model="nano_absolute", fields=fields, eval={"samples": 2, "lengths": [256, 301, 302, 512]})
    assert reach(loaded.model) == 300
    assert reach(make(TEXT).model) is None
    outcome = longctx(job(loaded))
    assert {(c["length"], c["status"]) for c in outcome.body["cells"]} == {
        (256, "complete"),
        (301, "complete"),  # 300 tokens are fed: the end of sequence is only asked for
        (302, "beyond the model"),
        (512, "beyond the model"),
    }
    beyond = [cell for cell in outcome.body["cells"] if cell["length"] > 301]
    assert len(beyond) == 2 * len(KINDS) * len(DEPTHS)
    for cell in beyond:
        assert cell["n"] == 0
        assert all(cell[name] is None for name in ("accuracy", "choice", "prefix", "low", "high", "stderr"))
        assert cell["reason"] == "300 learned positions"
    assert {record["length"] for record in outcome.records} == {256, 301}
    assert list(outcome.items) == list(text.items), "what is asked does not depend on who can answer"
    shown = table(outcome.body)
    assert shown.row_count == len(KINDS) * 4
    assert list(shown.columns[-1].cells).count("beyond the model") == 2 * len(KINDS)


def test_a_model_that_refuses_a_length_is_quoted_unless_it_was_trained_at_it(make):
    class Short(Uniform):
        def forward(self, tokens_BT, state=None, **options):
            if tokens_BT.shape[1] > 300:
                raise UserError("my tape is too short")
            return super().forward(tokens_BT, state, **options)

    loaded = with_model(make(TEXT, eval=SHORT), Short)
    cells = longctx(job(loaded)).body["cells"]
    assert {(c["length"], c["status"], c.get("reason")) for c in cells} == {
        (256, "complete", None),
        (400, "beyond the model", "my tape is too short"),
    }
    trained = loaded.run.model_copy(update={"data": loaded.run.data.model_copy(update={"sequence": 400})})
    with pytest.raises(UserError, match="my tape is too short"):
        longctx(dataclasses.replace(job(loaded), run=trained))


def test_lengths_beyond_training_are_marked_and_too_short_ones_have_no_numbers(make):
    loaded = make(TEXT, eval={"samples": 1, "lengths": [512, 64, 256, 256]}, data={"sequence": 256, "sources": TEXT})
    outcome = longctx(job(loaded))
    found = {(c["length"], c["trained"], c["status"]) for c in outcome.body["cells"]}
    assert found == {(64, True, "too short"), (256, True, "complete"), (512, False, "complete")}
    assert {c["accuracy"] for c in outcome.body["cells"] if c["length"] == 64} == {None}
    assert set(table(outcome.body).columns[-1].cells) == {"", "too short", "untrained"}
    assert outcome.body["by"] == "length"


def test_samples_are_at_most_twenty(make):
    for samples, expected in ((2, 2), (50, 20)):
        loaded = with_model(make(TEXT, eval={"samples": samples, "lengths": [256]}), Uniform)
        assert {cell["n"] for cell in longctx(job(loaded)).body["cells"]} == {expected}


def test_records_and_results_agree_and_progress_reaches_one(make):
    loaded = make(TEXT, eval=SHORT)
    (results,) = evaluate(loaded, ["longctx"], quiet=True)
    records = read_lines(loaded.path.parent.parent / "records" / "longctx.jsonl")
    assert results["records"] == len(records) == len(KINDS) * 2 * len(DEPTHS) * 3
    for cell in results["cells"]:
        own = [r for r in records if all(r[name] == cell[name] for name in ("kind", "length", "depth"))]
        assert [r["index"] for r in own] == [0, 1, 2]
        assert cell["accuracy"] == np.mean([r["correct"] for r in own])
        assert cell["choice"] == pytest.approx(np.mean([r["choice"] for r in own]))
    assert tables([results])[0].row_count == len(KINDS) * 2
    shares = []
    longctx(dataclasses.replace(job(loaded), advance=shares.append))
    assert sum(shares) == pytest.approx(1.0)


def test_items_are_those_of_every_model_and_run_seed(make):
    runs = [
        make(TEXT, eval=SHORT),
        make(TEXT, model="identity", seed=9, name="other", eval=SHORT),
        make(TEXT, eval={**SHORT, "seed": 3}),
        make(TEXT, eval={**SHORT, "lengths": [256]}),
    ]
    digests = [evaluate(loaded, ["longctx"], quiet=True)[0]["meta"]["items_digest"] for loaded in runs]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


_DIGEST = """
import hashlib, sys
from pathlib import Path
from stepladder.data.corpora import Corpus
from stepladder.data.shards import prepare
from stepladder.data.tokenizers import ByteTokenizer
from stepladder.eval.haystack import Documents, KINDS, items
source = Documents([prepare(Corpus("pydoc"), ByteTokenizer(), Path(sys.argv[1])).valid], ByteTokenizer())
digest = hashlib.sha256()
for kind in KINDS:
    for item in items(source, 7, kind, 300, (0.0, 0.4, 1.0), 5):
        digest.update(item.prompt.tobytes() + item.options.tobytes() + str(item.start).encode())
print(digest.hexdigest())
"""


def test_items_do_not_depend_on_the_process(tmp_path):
    digests = {
        subprocess.run(
            [sys.executable, "-c", _DIGEST, str(tmp_path / salt)],
            env={**os.environ, "PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("0", "1")
    }
    assert len(digests) == 1


def test_the_text_is_that_held_out_by_the_run(make, tmp_path):
    (tmp_path / "seen.txt").write_text("Trained on, all of it. " * 400)
    (tmp_path / "held.txt").write_text("HELD OUT, ALL OF IT! " * 20 + "\f" + "ANOTHER ONE! " * 9)
    source = {"kind": "text", "path": str(tmp_path / "seen.txt"), "valid": str(tmp_path / "held.txt")}
    loaded = make([source], eval=SHORT)
    prompts = []
    loaded.model.register_forward_pre_hook(lambda _, inputs: prompts.extend(inputs[0].tolist()))
    (results,) = evaluate(loaded, ["longctx"], quiet=True)
    texts = [loaded.tokenizer.decode(row) for row in prompts if len(row) > 100]
    assert len(texts) == len(KINDS) * 2 * len(DEPTHS) * 3
    assert not any("Trained" in text or "all of it" in text for text in texts)
    assert all("ALL OF IT" in text or "ANOTHER" in text for text in texts)
    assert results["haystack"] == {"documents": 2, "tokens": 20 * 21 - 1 + 9 * 13 - 1}
    assert "note" not in results
    longer = evaluate(loaded, ["longctx"], None, loaded.run.eval.model_copy(update={"lengths": (600,)}), quiet=True)
    assert "535 tokens: longer haystacks repeat it" in longer[0]["note"]
    assert tables(longer)[0].caption == longer[0]["note"]


def test_without_a_text_the_built_in_one_serves(make, tmp_path):
    loaded = make(NEEDLE, eval={"samples": 1, "lengths": [256]})
    assert isinstance(documents(job(loaded)), Documents)
    assert longctx(job(loaded)).body["haystack"]["tokens"] > 5000


@pytest.mark.parametrize(
    ("alphabet", "unknown", "what"),
    [
        ("0123456789+^=", False, "the needles"),
        ("0123456789+^=", True, "the needles"),
        ("abcdefghijklmnopqrstuvwxyz0123456789 .=", False, "a text, and the run has no text source"),
        ("abcdefghijklmnopqrstuvwxyz0123456789 .=", True, "a text, and the run has no text source"),
    ],
)
def test_a_tokenizer_that_cannot_spell_it_gets_a_sentence(make, alphabet, unknown, what):
    parts = {"data": {"sequence": 64, "sources": NEEDLE}} if "a" in alphabet else {}
    loaded = make(eval={"samples": 1}, **parts)
    loaded = dataclasses.replace(loaded, tokenizer=CharTokenizer(alphabet, unknown))
    (results,) = evaluate(loaded, ["longctx"], quiet=True)
    assert (results["status"], results["records"]) == ("complete", 0)
    assert results["message"].startswith("nothing to evaluate: the run's tokenizer 'char' does not have all characters")
    assert what in results["message"]
    assert "cells" not in results
    assert tables([results])[0].row_count == 1


def test_the_suite_checks_its_own_items(make, monkeypatch):
    """Two broken miniatures: a builder that ignores the depth, and one that cuts the text from the front."""
    loaded = with_model(make(TEXT, eval={"samples": 1, "lengths": [256]}), Copier)

    def shallow(source, seed, kind, length, depths, index):
        made = items(source, seed, kind, length, (0.0,) * len(depths), index)
        return [dataclasses.replace(item, depth=depth) for item, depth in zip(made, depths, strict=True)]

    def truncated(source, seed, kind, length, depths, index):
        made = items(source, seed, kind, length + 60, depths, index)
        prompts = [np.concatenate((item.prompt[:1], item.prompt[61:])) for item in made]
        return [
            dataclasses.replace(item, length=length, prompt=prompt) for item, prompt in zip(made, prompts, strict=True)
        ]

    for builder, problem in (
        (shallow, "at depth 0.000 instead of 0.25"),
        (truncated, "depth 0.0, 0: its fact stands in the text 0 times"),
    ):
        monkeypatch.setattr(module, "items", builder)
        with pytest.raises(RuntimeError, match=problem):
            longctx(job(loaded))


def test_the_area_is_a_trapezoid_not_a_mean():
    assert area((0, 0.25, 0.5, 0.75, 1), (0, 1, 1, 1, 0)) == pytest.approx(0.75)
    assert area((0, 0.25, 0.5, 0.75, 1), (1, 1, 1, 1, 1)) == pytest.approx(1.0)
    assert area((0.5, 1.0), (0.2, 0.4)) == pytest.approx(0.3)


def test_ids_of_the_fake_models_are_text():
    assert SPECIALS == 3, "the fakes above read ids as characters"
