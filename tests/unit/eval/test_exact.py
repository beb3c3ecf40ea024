"""Exact match: what counts as right, the bound on outputs, and the numbers of a cell."""

import dataclasses
import json

import numpy as np
import pytest

from stepladder.core.stats import wilson
from stepladder.data.tokenizers import BOS, EOS, PAD, ByteTokenizer
from stepladder.eval.exact import algorithmic, ask, brief, cells, sheets, table, tasks, written
from stepladder.eval.self_test import Scripted, self_test
from stepladder.eval.suite import SUITES, Job

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


@pytest.fixture
def pairs(tmp_path):
    """A source of pairs in two groups, one of them with sizes beyond those trained on."""

    def row(group, size, n):
        return {"question": f"{group}? {'é' * size}{n}: ", "answer": f"«{size}{n}»\n", "kind": group, "n": size}

    train = [row("up", size, n) for size in (2, 4) for n in range(30)] + [row("down", 3, n) for n in range(30)]
    held = [row("up", size, n) for size in (2, 3, 6) for n in range(40, 49)] + [
        row("down", 3, n) for n in range(25, 35)
    ]
    for name, rows in (("train", train), ("held", held)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    files = {"path": str(tmp_path / "train.jsonl"), "valid": str(tmp_path / "held.jsonl")}
    return [{"kind": "pairs", **files, "group": "{kind}", "size": "{n}"}]


def test_groups_of_pairs_are_asked_as_tasks_are(make, pairs):
    loaded = make(pairs)
    assert [name for name, _ in tasks(loaded.run)] == ["train/down", "train/up"]
    down, up = sheets(loaded.run, 7, 8)
    assert (down.examples.size.tolist(), up.examples.size.tolist()) == ([3] * 8, [2] * 8 + [3] * 8 + [6] * 8)
    assert up.index.tolist() == [*range(8)] * 3
    whole = sheets(loaded.run, 7, 1000)
    assert [len(sheet.examples) for sheet in whole] == [10, 27], "no pair is asked twice"


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        (lambda answer: (*answer, EOS), True),
        (lambda answer: (*answer, *BYTES.encode("\n").tolist(), EOS), False),
        (lambda answer: (*answer[:-1], EOS), False),
    ],
)
def test_answers_of_pairs_are_matched_exactly(make, pairs, reply, right):
    loaded = make(pairs)
    for sheet in sheets(loaded.run, 1, 6):
        records = ask(answering(loaded, sheet, reply), BYTES, sheet, loaded.run.eval)
        assert {record["correct"] for record in records} == {right}
        assert {(r["size"], r["regime"]) for r in records} <= {(2, "iid"), (3, "iid"), (6, "ood")}
        assert all(record["answer"] == record["answer"].strip() for record in records)


def test_suites_of_tasks_run_on_pairs(make, pairs):
    loaded = make(pairs)
    for name in ("algorithmic", "depth", "self_test"):
        assert not SUITES.get(name).missing(loaded.run)
    outcome = algorithmic(job(loaded))
    assert [(c["task"], c["size"], c["regime"], c["n"]) for c in outcome.body["cells"]] == [
        ("train/down", 3, "iid", 10),
        ("train/up", 2, "iid", 9),
        ("train/up", 3, "iid", 9),
        ("train/up", 6, "ood", 9),
    ]
    assert brief(job(loaded)) == {"algorithmic/train/down": 0.0, "algorithmic/train/up": 0.0}
    checks = self_test(job(loaded)).body["checks"]
    assert all(check["passed"] for check in checks), checks


def test_pairs_beside_tasks_and_texts_alone(make, pairs, tmp_path):
    beside = make([*pairs, {"kind": "task", "task": "parity"}])
    assert [name for name, _ in tasks(beside.run)] == ["train/down", "train/up", "parity"]
    (tmp_path / "a.txt").write_text("some text\n\n" * 30)
    texts = make([{"kind": "text", "path": str(tmp_path / "a.txt")}])
    assert SUITES.get("algorithmic").missing(texts.run)
    assert SUITES.get("likelihood").missing(make(pairs).run)


def test_a_cell_tells_false_accepts_from_false_rejects(make):
    loaded = make([{"kind": "task", "task": {"kind": "freivalds", "train": [2, 2], "iid": [2], "ood": []}}])
    (sheet,) = sheets(loaded.run, 1, 40)
    wrong = [answer == "n" for answer in sheet.examples.answers()]
    assert 8 < sum(wrong) < 32
    for said, marks in (("y", [1.0, 0.0]), ("n", [0.0, 1.0]), ("x", [0.0, 0.0])):
        records = ask(
            answering(loaded, sheet, lambda _, said=said: (*BYTES.encode(said), EOS)), BYTES, sheet, loaded.run.eval
        )
        (cell,) = cells(records, dict(tasks(loaded.run)))
        assert cell["marks"] == dict(zip(("false_accept", "false_reject"), marks))
        assert cell["accuracy"] == pytest.approx({"y": 1 - sum(wrong) / 40, "n": sum(wrong) / 40, "x": 0}[said])


def test_marks_stand_beside_exact_match(make):
    loaded = make([{"kind": "task", "task": {"kind": "prefix_sums", "train": [4, 4], "iid": [4], "ood": []}}])
    (sheet,) = sheets(loaded.run, 1, 6)
    spoiled = answering(loaded, sheet, lambda answer: (*answer[:-1], BYTES.encode("x")[0], EOS))
    records = ask(spoiled, BYTES, sheet, loaded.run.eval)
    assert {(record["correct"], record["marks"]["elements"]) for record in records} == {(False, 0.75)}
    (cell,) = cells(records, dict(tasks(loaded.run)))
    assert (cell["accuracy"], cell["marks"]) == (0.0, {"elements": 0.75})
    plain = make()
    assert all("marks" not in record for record in algorithmic(job(plain, samples=2)).records)
