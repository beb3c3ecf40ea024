"""Faults at the seam of question and answer: tokens that merge across it (E5), and answered examples before it (E7)."""

import numpy as np
import pytest

from stepladder.core.config import override, validate
from stepladder.core.errors import UserError
from stepladder.data.base import Examples
from stepladder.data.packing import encode, pack
from stepladder.data.tasks.copy import Copy
from stepladder.data.tokenizers import BOS, EOS, IGNORE, BPETokenizer, ByteTokenizer
from stepladder.eval import exact, halting
from stepladder.eval.exact import Sheet, ask, sheets
from stepladder.eval.self_test import scripted
from stepladder.eval.suite import Job
from stepladder.models.zoo import spec
from stepladder.run import EvalConfig, Run

TREE = {
    "model": {"kind": "transformer", "width": 16, "depth": 1, "heads": 2},
    "data": {"sequence": 64, "sources": [{"kind": "task", "task": {"kind": "parity", "train": [4, 8]}}]},
    "train": {"steps": 1},
    "eval": {"samples": 5},
}


class Merged(Copy):
    """Questions whose last letters and the answer's first are one token where they are written together."""

    def draw(self, dice, size):
        rows = [(f"say {'ab'[i % 2]}", "cdcd"[: 2 + 2 * (i % 2)]) for i in range(len(size))]
        texts = [np.frombuffer(b"".join(row[k].encode().ljust(6, b"\0") for row in rows), np.uint8) for k in (0, 1)]
        return Examples(*(text.reshape(-1, 6) for text in texts), size)

    def verify(self, question, output):
        return output == ("cd" if question.endswith("a") else "cdcd")


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(["say acd say bcdcd " * 200], 300)


def test_E5_no_token_spans_question_and_answer(tokenizer):
    """What is supervised in training is what is asked for in evaluation, id for id, where byte pairs would merge."""
    examples = Merged(train=(1, 4)).draw(None, np.full(8, 3))
    sheet = Sheet("merged", Merged(train=(1, 4)), examples, np.arange(8))
    joined = [tokenizer.encode(q + a).tolist() for q, a in zip(examples.questions(), examples.answers(), strict=True)]
    apart = [
        [*tokenizer.encode(q).tolist(), *tokenizer.encode(a).tolist()]
        for q, a in zip(examples.questions(), examples.answers(), strict=True)
    ]
    assert joined != apart  # or there would be nothing to see
    encoded = encode(examples, tokenizer)
    for row, ids in enumerate(apart):
        asked, said = encoded.question_tokens[row], encoded.answer_tokens[row]
        assert [*encoded.question[row, :asked], *encoded.answer[row, :said]] == ids
    model = scripted(sheet, examples.answers(), tokenizer)  # replies with the answer's own tokens, as trained
    assert all(record["correct"] for record in ask(model, tokenizer, sheet, EvalConfig()))
    merged = scripted(sheet, [a[1:] for a in examples.answers()], tokenizer)  # what is left after a merged token
    assert not any(record["correct"] for record in ask(merged, tokenizer, sheet, EvalConfig()))


def test_E5_training_rows_cut_at_the_same_place(tokenizer):
    run = validate(Run, TREE, "test")
    task = run.data.sources[0].task
    tokens, targets, documents = pack(task, 0, np.arange(2), task.train, tokenizer, 64)
    for row in range(2):
        for document in range(documents[row].max()):
            here = documents[row] == document
            ids, goals = tokens[row][here], targets[row][here]
            first = int((goals != IGNORE).argmax())
            question = tokenizer.decode(ids[1 : first + 1])
            assert ids[0] == BOS
            np.testing.assert_array_equal(ids[1 : first + 1], tokenizer.encode(question))
            np.testing.assert_array_equal(goals[first:-1], [*tokenizer.encode(task.solve(question)), EOS])


@pytest.mark.parametrize("evaluate", [exact.algorithmic, halting.halting])
def test_E7_prompts_hold_the_question_and_nothing_before_it(monkeypatch, evaluate):
    """No suite of tasks shows solved examples, so none can be taken from the test items."""
    run, tokenizer, seen = validate(Run, TREE, "test"), ByteTokenizer(), []

    def asked(model, prompts, generate=exact.generate, **options):
        seen.extend(prompts)
        return generate(model, prompts, **options)

    def forced(encoded, rows, texts=halting.texts):
        tokens, scored = texts(encoded, rows)
        seen.extend(row[: int(marks.argmax())] for row, marks in zip(tokens, scored, strict=True))
        return tokens, scored

    monkeypatch.setattr(exact, "generate", asked)
    monkeypatch.setattr(halting, "texts", forced)
    model = spec("transformer", width=16, depth=1, heads=2).build(tokenizer.vocab).eval()
    evaluate(Job(model, tokenizer, run, run.eval))
    (sheet,) = sheets(run, run.eval.seed, run.eval.samples)
    expected = [[BOS, *tokenizer.encode(question)] for question in sheet.examples.questions()]
    assert [list(map(int, prompt)) for prompt in seen] == expected


def test_E7_shots_are_no_option():
    with pytest.raises(UserError, match=r"eval\.shots"):
        validate(Run, override(TREE, ["eval.shots=5"]), "test")


def test_E7_an_item_of_the_test_split_is_not_admitted_to_any_other():
    """Whoever adds examples to a prompt must draw them from another split, and the splits refuse each other's items."""
    task = validate(Run, TREE, "test").data.sources[0].task
    items = task.batch(3, "test", np.arange(50), task.train)
    assert task.admits("test", items).all()
    assert not task.admits("train", items).any()
    assert not task.admits("valid", items).any()
