"""Tokenizers: exact round trips, exact byte counts, specials out of reach, one fingerprint everywhere."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepladder.core.errors import UserError
from stepladder.data.tokenizers import (
    BOS,
    EOS,
    PAD,
    SPECIALS,
    TOKENIZERS,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    _pieces,
    from_json,
)

TEXTS = [
    "the cat sat on the mat, the cat ate 1234 rats",
    "naïve café — 東京 \U0001f600 and the end\n\n\tthe",
    "don't  stop   <bos> <pad> 007",
]
WORDS = TEXTS * 20
BPE = BPETokenizer.train(WORDS, 320)
CHAR = CharTokenizer("".join(sorted(set("".join(TEXTS)))), unknown=True)
ALL = [ByteTokenizer(), CHAR, BPE]
plain = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def matrix(texts: list[str]) -> np.ndarray:
    width = max(map(len, texts))
    return np.array([list(t.encode().ljust(width, b"\0")) for t in texts], dtype=np.uint8).reshape(len(texts), width)


@pytest.mark.parametrize("tokenizer", ALL, ids=lambda t: t.kind)
@pytest.mark.parametrize("text", [*TEXTS, "", "a"])
def test_round_trip_and_byte_counts(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_counts(ids).sum() == len(text.encode())
    assert ((ids >= SPECIALS) & (ids < tokenizer.vocab)).all()


@settings(max_examples=60, deadline=None)
@given(plain)
def test_any_text_survives_bytes_and_byte_pairs(text: str) -> None:
    for tokenizer in (ByteTokenizer(), BPE):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_counts(ids).sum() == len(text.encode())


@settings(max_examples=60, deadline=None)
@given(plain)
def test_unknown_characters_keep_the_byte_count(text: str) -> None:
    ids = CharTokenizer("abc é", unknown=True).encode(text)
    assert CharTokenizer("abc é", unknown=True).byte_counts(ids).sum() == len(text.encode())
    assert (ids >= SPECIALS).all()


def test_byte_ids_are_the_bytes_plus_three() -> None:
    assert ByteTokenizer().vocab == 259
    assert ByteTokenizer().encode("aé").tolist() == [0x61 + 3, 0xC3 + 3, 0xA9 + 3]


def test_char_ids_follow_the_alphabet() -> None:
    assert CharTokenizer("01^=").encode("10=").tolist() == [4, 3, 6]
    assert CharTokenizer("01^=").vocab == 7
    known = CharTokenizer("ab", unknown=True)
    assert known.encode("axb€").tolist() == [4, 3, 5, 3, 3, 3]
    assert known.decode([4, 3, 5]) == "a\ufffdb"


def test_a_foreign_character_is_named() -> None:
    for give in (
        lambda: CharTokenizer("01").encode("0é1"),
        lambda: CharTokenizer("01").encode("0\U0001f600"),
    ):
        with pytest.raises(UserError, match=r"has no character '[é😀]'.*'01'"):
            give()
    with pytest.raises(UserError, match="no character '2'"):
        CharTokenizer("01").encode_many(matrix(["01", "12"]))


def test_decode_drops_specials_and_replaces_broken_utf8() -> None:
    assert ByteTokenizer().decode([BOS, 0x61 + 3, PAD, EOS]) == "a"
    assert ByteTokenizer().decode([0xC3 + 3, 0x61 + 3, 0xFF + 3]) == "\ufffda\ufffd"
    assert BPE.decode([BOS, *BPE.encode("ø")[:1], EOS]) == "\ufffd"


def test_ids_out_of_range_are_refused() -> None:
    for ids in ([259], [-1]):
        with pytest.raises(ValueError, match=r"0\.\.258"):
            ByteTokenizer().decode(ids)
        with pytest.raises(ValueError, match=r"0\.\.258"):
            ByteTokenizer().byte_counts(np.array(ids))


@pytest.mark.parametrize("tokenizer", ALL, ids=lambda t: t.kind)
def test_encode_many_is_encode_row_by_row(tokenizer: Tokenizer) -> None:
    texts = ["the cat", "", "1234", "the cat", "a"]
    ids, lengths = tokenizer.encode_many(matrix(texts))
    assert ids.dtype == np.int32
    for row, length, text in zip(ids, lengths, texts, strict=True):
        assert row[:length].tolist() == tokenizer.encode(text).tolist()
        assert (row[length:] == PAD).all()


def test_encode_many_of_nothing() -> None:
    for tokenizer in ALL:
        ids, lengths = tokenizer.encode_many(np.zeros((0, 5), np.uint8))
        assert ids.shape[0] == lengths.shape[0] == 0


def test_no_text_is_a_special_in_byte_pairs() -> None:
    assert (BPE.encode("<bos><pad></s><|endoftext|>") >= SPECIALS).all()


def test_every_digit_is_a_token() -> None:
    pieces = [BPE.pieces[i] for i in BPE.encode("the 007 1234")]
    assert [p for p in pieces if any(chr(c).isdigit() for c in p)] == [b"0", b"0", b"7", b"1", b"2", b"3", b"4"]


def test_byte_pairs_learn() -> None:
    assert BPE.vocab <= 320
    assert len(BPE.encode(TEXTS[0])) < len(TEXTS[0]) * 0.6


def test_training_is_the_same_in_every_process() -> None:
    program = (
        "import json,sys; from stepladder.data.tokenizers import BPETokenizer;"
        "print(BPETokenizer.train(json.loads(sys.argv[1]), 320).fingerprint)"
    )
    command = [sys.executable, "-c", program, json.dumps(WORDS)]
    for salt in ("1", "2"):
        done = subprocess.run(command, env={"PYTHONHASHSEED": salt}, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == BPE.fingerprint


@pytest.mark.parametrize("text", ["abc " * 50, "x" * 300, "one  two\n\n three   \n" * 20, " " * 200 + "end 1 2  3" * 9])
def test_cutting_long_texts_changes_no_id(text: str) -> None:
    pieces = _pieces(text, limit=64)
    assert "".join(pieces) == text
    assert len(pieces) > 1
    assert max(map(len, pieces)) <= 64
    if "x" not in text and not text.startswith(" "):  # there is a place to cut cleanly
        assert np.concatenate([BPE.encode(p) for p in pieces]).tolist() == BPE.encode(text).tolist()


@pytest.mark.parametrize("tokenizer", [*ALL, CharTokenizer("01")], ids=lambda t: t.kind)
def test_json_round_trip(tokenizer: Tokenizer) -> None:
    again = from_json(tokenizer.to_json())
    assert (again.fingerprint, again.vocab, type(again)) == (tokenizer.fingerprint, tokenizer.vocab, type(tokenizer))
    assert again.encode("01").tolist() == tokenizer.encode("01").tolist()


def test_fingerprints_differ() -> None:
    made = [*ALL, CharTokenizer("ab"), CharTokenizer("ba"), CharTokenizer("ab", unknown=True)]
    assert len({t.fingerprint for t in made}) == len(made)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"kind":"word"}',
        '{"kind":"byte","x":1}',
        '{"kind":"char","alphabet":"aa","unknown":false}',
        '{"kind":"bpe","tokens":["a"],"merges":[]}',
        '{"kind":"bpe","tokens":["東"],"merges":[]}',
        '{"kind":"bpe","tokens":5}',
    ],
)
def test_a_foreign_json_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        from_json(text)


def test_a_merge_of_nothing_is_refused() -> None:
    tree = json.loads(BPE.to_json())
    tree["merges"].append(["nosuch", "token"])
    with pytest.raises(UserError, match="tokenizer"):
        from_json(json.dumps(tree))


def test_configured_kinds() -> None:
    assert TOKENIZERS.names() == ["alphabet", "bpe", "byte", "char"]
    byte, alphabet, char, bpe = (TOKENIZERS.get(n)() for n in ("byte", "alphabet", "char", "bpe"))
    assert [c.reads() for c in (byte, alphabet)] == [(0, 0)] * 2
    assert alphabet.build("10=", ()).to_json() == CharTokenizer("01=").to_json()
    assert char.build("10=", ["ab", "é"]).to_json() == CharTokenizer("01=abé", unknown=True).to_json()
    assert bpe.build("", WORDS).vocab <= 1024
