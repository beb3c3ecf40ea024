"""Packing: a row is its examples in order, each a document, whatever else is packed with it."""

from __future__ import annotations

import numpy as np
import pytest

from stepladder.core.errors import UserError
from stepladder.data.packing import encode, pack, probe, stride
from stepladder.data.tasks import TASKS
from stepladder.data.tokenizers import BOS, EOS, IGNORE, PAD, BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer

PARITY, ADDITION = TASKS.get("parity")(), TASKS.get("addition")()
BYTE = ByteTokenizer()
CHAR = CharTokenizer("".join(sorted({*PARITY.alphabet, *ADDITION.alphabet})))
BPE = BPETokenizer.train(["0110^= 12+34="] * 10, 280)
ROWS = np.array([5, 0, 1_000_003, 6, 2])


def unpack(
    tokens: np.ndarray, targets: np.ndarray, documents: np.ndarray, tokenizer: Tokenizer
) -> list[tuple[str, str]]:
    """The (question, answer) pairs of one row, told apart by what is supervised."""
    pairs = []
    for document in range(int(documents[-1]) + 1):
        here = documents == document
        ids, wanted = tokens[here], targets[here]
        if ids[0] == PAD:
            assert (ids == PAD).all()
            assert (wanted == IGNORE).all()
            continue
        assert (ids[0], ids[-1]) == (BOS, EOS)
        asked = np.flatnonzero(wanted != IGNORE)
        assert asked.tolist() == list(range(asked[0], len(ids) - 1))
        assert wanted[asked].tolist() == ids[asked + 1].tolist()
        pairs.append((tokenizer.decode(ids[: asked[0] + 1]), tokenizer.decode(ids[asked + 1])))
    return pairs


@pytest.mark.parametrize("tokenizer", [BYTE, CHAR, BPE], ids=lambda t: t.kind)
@pytest.mark.parametrize("task", [PARITY, ADDITION], ids=lambda t: t.kind)
@pytest.mark.parametrize("length", [64, 100])
def test_rows_hold_their_examples_in_order(task, tokenizer: Tokenizer, length: int) -> None:
    packed = pack(task, 3, ROWS, task.train, tokenizer, length)
    for i, row in enumerate(ROWS):
        tokens, targets, documents = (array[i] for array in packed)
        assert len(tokens) == length
        assert (np.diff(documents) >= 0).all()
        assert documents[0] == 0
        pairs = unpack(tokens, targets, documents, tokenizer)
        expected = task.batch(3, "train", row * stride(length) + np.arange(len(pairs) + 1), task.train)
        assert pairs == list(zip(expected.questions(), expected.answers(), strict=True))[:-1]
        assert pairs
        used = encode(expected, tokenizer).total
        assert used[:-1].sum() == (tokens != PAD).sum()
        assert used.sum() > length  # the next one did not fit


def test_a_row_does_not_depend_on_the_others_or_the_hint() -> None:
    together = pack(ADDITION, 0, ROWS, (1, 4), BYTE, 96)
    for typical in (4.0, 11.0, 96.0):
        alone = [pack(ADDITION, 0, ROWS[i : i + 1], (1, 4), BYTE, 96, typical) for i in range(len(ROWS))]
        for part in range(3):
            assert np.concatenate([one[part] for one in alone]).tolist() == together[part].tolist()


def test_rows_differ_and_follow_the_seed() -> None:
    one, two = (pack(PARITY, seed, np.arange(4), (4, 16), BYTE, 64)[0] for seed in (0, 1))
    assert len({row.tobytes() for row in np.concatenate([one, two])}) == 8


def test_no_example_is_in_two_rows() -> None:
    task = TASKS.get("copy")(train=(9, 10))
    packed = pack(task, 0, np.arange(50), task.train, BYTE, 80)
    pairs = [p for i in range(50) for p in unpack(*(array[i] for array in packed), BYTE)]
    assert len(set(pairs)) == len(pairs) > 100


def test_full_rows_have_no_padding_document() -> None:
    task = TASKS.get("copy")(train=(4, 4))
    total = int(encode(task.batch(0, "train", np.arange(3), 4), BYTE).total[0])
    tokens, _, documents = pack(task, 0, np.arange(3), (4, 4), BYTE, 5 * total)
    assert (tokens != PAD).all()
    assert (documents[:, -1] == 4).all()


def test_the_smallest_row() -> None:
    total = int(encode(PARITY.batch(0, "train", np.arange(3), 4), BYTE).total[0])
    tokens, targets, documents = pack(PARITY, 0, np.arange(3), (4, 4), BYTE, total)
    assert (targets != IGNORE).sum(axis=1).tolist() == [2, 2, 2]
    assert (documents == 0).all()
    assert (tokens[:, -1] == EOS).all()


def test_no_rows() -> None:
    assert [a.shape for a in pack(PARITY, 0, np.arange(0), (4, 16), BYTE, 32)] == [(0, 32)] * 3


def test_too_long_examples_are_named_before_training() -> None:
    assert 9 <= probe(PARITY, BYTE, 21) <= 21
    with pytest.raises(
        UserError, match=r"'parity' with 16 bits has 21 tokens.*rows of 20.*data.sequence to at least 21"
    ):
        probe(PARITY, BYTE, 20)


def test_too_long_examples_are_never_skipped() -> None:
    with pytest.raises(UserError, match=r"'parity' with 1[3-6] bits has (18|19|20|21) tokens"):
        pack(PARITY, 0, np.arange(20), (4, 16), BYTE, 17)
