"""Exact match: what counts as right, the bound on outputs, and the numbers of a cell."""

import dataclasses

import numpy as np
import pytest

from stepladder.core.stats import wilson
from stepladder.data.tokenizers import BOS, EOS, PAD, ByteTokenizer
from stepladder.eval.exact import algorithmic, ask, cells, sheets, table, tasks, written
from stepladder.eval.self_test import Scripted
from stepladder.eval.suite import Job

BYTES = ByteTokenizer()


def job(loaded, **config):
    return Job(loaded.model, loaded.tokenizer, loaded.run, loaded.run.eval.model_copy(update=config))


def answering(loaded, sheet, reply):
    """A model whose reply to a question is reply(answer), in ids."""
    questions, answers = sheet.examples.questions(), sheet.examples.answers()
    pairs = zip(questions, answers, strict=True)
    return Scripted(BYTES.vocab, {(BOS, *BYTES.encode(q).tolist()): reply(BYTES.encode(a).tolist()) for q, a in pairs})


@pytest.mark.parametrize(
    ("reply", "right", "stop"),
    [
        (lambda answer: (*answer, EOS), True, "eos"),
        (lambda answer: (*answer, *answer[-1:], EOS), False, "eos"),
        (lambda answer: (*answer[:-1], EOS), False, "eos"),
        (lambda answer: (*answer, *BYTES.encode(" ").tolist(), EOS), False, "eos"),
        (lambda answer: (PAD, *answer, EOS), False, "eos"),
        (lambda answer: (*answer, BOS, EOS), False, "eos"),
        (lambda answer: (*answer, *[answer[-1]] * 9, EOS), False, "length"),
    ],
)
def test_an_answer_is_all_of_the_output_and_then_the_end(make, reply, right, stop):
    loaded = make()
    for sheet in sheets(loaded.run, 1, 6):
        records = ask(answering(loaded, sheet, reply), BYTES, sheet, loaded.run.eval)
        assert {(r["correct"], r["stop"]) for r in records} == {(right, stop)}


def test_outputs_are_bounded_by_the_longest_answer_of_the_size(make):
    loaded = make()
    babble = Scripted(BYTES.vocab, {})
    babble.script = type("Babble", (dict,), {"get": lambda *_: 70})()
    for sheet in sheets(loaded.run, 1, 10):
        longest = {s: max(len(i[4]) for i in sheet.items() if i[1] == s) for s in sheet.task.iid + sheet.task.ood}
        records = ask(babble, BYTES, sheet, loaded.run.eval)
        assert all(len(r["output"]) == longest[r["size"]] + 2 and r["stop"] == "length" for r in records)
        bounded = ask(babble, BYTES, sheet, loaded.run.eval.model_copy(update={"max_new_tokens": 5}))
        assert {len(r["output"]) for r in bounded} == {5}


def test_special_tokens_are_shown_not_dropped():
    assert written(np.array([PAD, *BYTES.encode("1é"), BOS, BOS, *BYTES.encode("2")]), BYTES) == "<pad>1é<bos><bos>2"
    assert written(np.array([], dtype=np.int64), BYTES) == ""


def test_items_are_test_items_at_every_size(make):
    loaded = make()
    parity, addition = sheets(loaded.run, 7, 5)
    assert parity.examples.size.tolist() == [8] * 5 + [16] * 5 + [20] * 5
    assert addition.examples.size.tolist() == [4] * 5 + [6] * 5
    assert parity.task.admits("test", parity.examples).all()
    assert [sheet.name for sheet in (parity, addition)] == [name for name, _ in tasks(loaded.run)]


def test_the_numbers_of_a_cell(make):
    loaded = make()
    task = dict(tasks(loaded.run))["parity"]
    base = {"task": "parity", "size": 8, "regime": "iid", "question": "q", "answer": "1", "output": "1"}
    base |= {"correct": True, "lenient": True, "stop": "eos", "ticks": 2.0, "index": 0}
    wrong = {"correct": False, "stop": "length", "ticks": 4.0, "question": "p"}
    (cell,) = cells([base, base, base, {**base, **wrong}], {"parity": task})
    assert (cell["n"], cell["accuracy"], cell["chance"], cell["unique"], cell["ticks"]) == (4, 0.75, 0.5, 2, 2.5)
    assert cell["stderr"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert (cell["low"], cell["high"]) == pytest.approx(wilson(3, 4))
    assert (cell["lenient"], cell["stops"]) == (1.0, {"eos": 3, "length": 1})


def test_the_suite_counts_ticks_and_prints(make):
    loaded = make(model="shared_loop", fields={"ticks": 3})
    outcome = algorithmic(job(loaded))
    assert {record["ticks"] for record in outcome.records} == {3.0}
    assert table(outcome.body).row_count == 5
    assert {record["regime"] for record in outcome.records if record["size"] in (6, 20)} == {"ood"}
    assert {record["regime"] for record in outcome.records if record["size"] in (4, 8, 16)} == {"iid"}


def test_progress_reaches_one(make):
    shares = []
    algorithmic(dataclasses.replace(job(make(), batch=30), advance=shares.append))
    assert sum(shares) == pytest.approx(1.0)
    assert len(shares) == 4
