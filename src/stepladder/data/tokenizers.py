"""Text to ids and back, with exact byte counts: bytes, characters of an alphabet, or learned byte pairs.

In every tokenizer PAD=0, BOS=1, EOS=2 and symbols start at 3; no text can ever encode to a special id. Every id stands
for a known number of bytes of UTF-8 text (none for specials), so bits per byte compare across tokenizers.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import tokenizers as rust

from stepladder.core.config import Field, Kinded, canonical, register
from stepladder.core.errors import UserError
from stepladder.core.registry import Registry

PAD, BOS, EOS = 0, 1, 2
SPECIALS = 3
IGNORE = -100
"""The target of a position that is not supervised."""

_UNKNOWN = b"\xff"  # one byte that no UTF-8 text has; it decodes to U+FFFD


class Tokenizer(ABC):
    """A frozen map between text and ids in ``range(vocab)``; ``pieces`` holds the bytes behind every id."""

    kind: ClassVar[str]

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = [b""] * SPECIALS + list(pieces)
        self.vocab = len(self.pieces)
        self._sizes = np.array([len(piece) for piece in self.pieces], dtype=np.int64)

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The int32 ids of a text, without BOS and EOS; a lone surrogate is read as "?"."""

    @abstractmethod
    def encode_many(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of ASCII codes, uint8 ``[n, L]`` right-padded with 0, to (int32 ids padded with PAD, int64 lengths)."""

    @abstractmethod
    def to_json(self) -> str:
        """All there is to know about the tokenizer, as canonical JSON; ``from_json`` reads it."""

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """``encode`` of every text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text behind ids: specials are dropped, bytes that are no UTF-8 become U+FFFD."""
        table = self.pieces
        numbers = self._checked(ids)
        return b"".join([table[i] for i in numbers.tolist()]).decode("utf-8", errors="replace")

    def byte_counts(self, ids: Iterable[int] | np.ndarray) -> np.ndarray:
        """How many bytes of UTF-8 text each id stands for: int64 of the same shape, 0 for specials."""
        return self._sizes[self._checked(ids)]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON: equal fingerprints mean equal ids for every text."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def _checked(self, ids: Iterable[int] | np.ndarray) -> np.ndarray:
        numbers = ids if isinstance(ids, np.ndarray) else np.array(list(ids), dtype=np.int64)
        if numbers.size and (int(numbers.min()) < 0 or int(numbers.max()) >= self.vocab):
            raise ValueError(f"ids must lie in 0..{self.vocab - 1}, got {numbers.min()}..{numbers.max()}")
        return numbers


class ByteTokenizer(Tokenizer):
    """One id per byte of UTF-8: byte b is id b + 3; vocabulary 259; encodes everything."""

    kind = "byte"

    def __init__(self) -> None:
        super().__init__([bytes([byte]) for byte in range(256)])

    def encode(self, text: str) -> np.ndarray:
        """The UTF-8 bytes plus 3."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8).astype(np.int32) + SPECIALS

    def encode_many(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See Tokenizer.encode_many; one addition for the whole matrix."""
        full = texts != 0
        return np.where(full, texts.astype(np.int32) + SPECIALS, PAD), full.sum(axis=1, dtype=np.int64)

    def to_json(self) -> str:
        """``{"kind":"byte"}``."""
        return canonical({"kind": "byte"})


class CharTokenizer(Tokenizer):
    """One id per character of an explicit alphabet, in the alphabet's order.

    With ``unknown`` a foreign character becomes one UNK (id 3, the alphabet then starts at 4) for each byte of its
    UTF-8, so byte counts stay exact; without it a foreign character is a UserError that names it.
    """

    kind = "char"
    unknown_id = SPECIALS

    def __init__(self, alphabet: str, unknown: bool = False) -> None:
        if not alphabet or len(set(alphabet)) != len(alphabet):
            raise UserError("a tokenizer's alphabet must have at least one character and none twice")
        self.alphabet, self.unknown = alphabet, unknown
        super().__init__([_UNKNOWN] * unknown + [character.encode() for character in alphabet])
        codes = np.array([ord(character) for character in alphabet])
        self._ids = np.full(max(256, int(codes.max()) + 2), -1, dtype=np.int32)  # the last entry is never a symbol
        self._ids[codes] = np.arange(len(codes)) + SPECIALS + unknown

    def encode(self, text: str) -> np.ndarray:
        """The ids of the characters; see the class for foreign ones."""
        codes = np.frombuffer(text.encode("utf-32-le", errors="replace"), dtype="<u4")
        ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
        foreign = ids < 0
        if not foreign.any():
            return ids
        self._refuse_unless_unknown(chr(int(codes[foreign][0])))
        sizes = np.where(foreign, 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF), 1)
        return np.repeat(np.where(foreign, self.unknown_id, ids), sizes)

    def encode_many(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See Tokenizer.encode_many; one table look-up for the whole matrix."""
        full = texts != 0
        ids = self._ids[texts]
        foreign = full & (ids < 0)
        if foreign.any():
            self._refuse_unless_unknown(chr(int(texts[foreign][0])))
            ids = np.where(foreign, self.unknown_id, ids)
        return np.where(full, ids, PAD), full.sum(axis=1, dtype=np.int64)

    def to_json(self) -> str:
        """The alphabet and whether there is an UNK."""
        return canonical({"kind": "char", "alphabet": self.alphabet, "unknown": self.unknown})

    def _refuse_unless_unknown(self, character: str) -> None:
        if not self.unknown:
            known = self.alphabet if len(self.alphabet) <= 100 else self.alphabet[:100] + "..."
            raise UserError(
                f"the tokenizer's alphabet has no character {character!r} (it has {known!r});"
                " use tokenizer kind 'byte', 'char' or 'bpe'"
            )


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding (Sennrich et al., 2016; bytes as in GPT-2), run by the ``tokenizers`` library.

    Differs from GPT-2 in: every digit is a token of its own, so numbers have one spelling; specials are ids outside
    the learned vocabulary, so the text "<bos>" is only text.
    """

    kind = "bpe"

    def __init__(self, tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> None:
        alphabet = _byte_alphabet()
        try:
            super().__init__([bytes(alphabet[mark] for mark in token) for token in tokens])
        except KeyError as error:
            raise UserError(f"a bpe token has the character {error}, which stands for no byte") from error
        if missing := set(alphabet) - set(tokens):
            raise UserError(f"a bpe tokenizer needs all 256 byte tokens; {len(missing)} are missing")
        self.tokens, self.merges = list(tokens), list(merges)
        numbered = {token: i for i, token in enumerate(tokens)}
        self._model = rust.Tokenizer(rust.models.BPE(vocab=numbered, merges=self.merges))
        self._model.pre_tokenizer = _pre_tokenizer()

    @classmethod
    def train(cls, texts: Iterable[str], vocab: int) -> BPETokenizer:
        """Learn at most ``vocab`` ids (specials included) from the texts; the same texts give the same tokenizer."""
        model = rust.Tokenizer(rust.models.BPE())
        model.pre_tokenizer = _pre_tokenizer()
        trainer = rust.trainers.BpeTrainer(
            vocab_size=vocab - SPECIALS,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=rust.pre_tokenizers.ByteLevel.alphabet(),
        )
        model.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
        learned = json.loads(model.to_str())["model"]
        return cls(sorted(learned["vocab"], key=learned["vocab"].get), [tuple(pair) for pair in learned["merges"]])

    def encode(self, text: str) -> np.ndarray:
        """The ids of the byte pairs."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """``encode`` of every text, on all cores."""
        pieces = [_pieces(text) for text in texts]
        done = iter(self._model.encode_batch_fast([piece for group in pieces for piece in group]))
        rows = [[next(done).ids for _ in group] for group in pieces]
        return [np.concatenate([np.array(ids, dtype=np.int32) for ids in row]) + SPECIALS for row in rows]

    def encode_many(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See Tokenizer.encode_many; equal rows are encoded once."""
        rows, places = np.unique(texts, axis=0, return_inverse=True)
        encoded = self.encode_all([bytes(row).rstrip(b"\0").decode("ascii") for row in rows])
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
        out = np.full((len(rows), int(lengths.max(initial=0))), PAD, dtype=np.int32)
        for row, ids in zip(out, encoded, strict=True):
            row[: len(ids)] = ids
        return out[places.reshape(-1)], lengths[places.reshape(-1)]

    def to_json(self) -> str:
        """Tokens in id order and merges in order of rank."""
        return canonical({"kind": "bpe", "tokens": self.tokens, "merges": [list(pair) for pair in self.merges]})


def from_json(text: str) -> Tokenizer:
    """The tokenizer that ``to_json`` wrote; anything else is a UserError."""
    try:
        tree: dict[str, Any] = json.loads(text)
        kind = tree.pop("kind")
        if kind == "bpe":
            return BPETokenizer(tree["tokens"], [(left, right) for left, right in tree["merges"]])
        return {"byte": ByteTokenizer, "char": CharTokenizer}[kind](**tree)
    except UserError:
        raise
    except Exception as error:  # whatever is wrong in the file, the library's Rust side included, is one sentence
        raise UserError(
            f"not a tokenizer written by Stepladder: {error!r}; restore the run's tokenizer.json"
        ) from error


def _byte_alphabet() -> dict[str, int]:
    """The 256 printable marks that stand for bytes in byte-level BPE (GPT-2): the byte itself where it prints,
    otherwise the next free code point from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in sorted(printable)} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _pre_tokenizer() -> Any:
    digits = rust.pre_tokenizers.Digits(individual_digits=True)
    return rust.pre_tokenizers.Sequence([digits, rust.pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _pieces(text: str, limit: int = 1 << 16) -> list[str]:
    """Cuts a long text so that the library's memory stays bounded, where a space follows a word: there the
    pre-tokenizer cuts anyway, so the ids stay the same. Only a run of ``limit`` characters without such a place
    is cut hard."""
    text = text.encode("utf-8", errors="replace").decode() if not text.isascii() else text
    pieces, start = [], 0
    while len(text) - start > limit:
        end = next(
            (found.end() for found in _WORD_END.finditer(text, start + limit // 2, start + limit)), start + limit
        )
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


_WORD_END = re.compile(r"[^\s](?=[ \n])")


class TokenizerConfig(Kinded):
    """How a run's tokenizer comes about; the kinds are below."""

    def reads(self) -> tuple[float, float]:
        """How many characters, and how many documents, of training text ``build`` wants at most; (0, 0): none."""
        return 0, 0

    @abstractmethod
    def build(self, alphabet: str, texts: Iterable[str]) -> Tokenizer:
        """The tokenizer, given every character of the tasks and the training text."""


TOKENIZERS: Registry[type[TokenizerConfig]] = Registry("tokenizer")


@register(TOKENIZERS, "byte")
class ByteConfig(TokenizerConfig):
    """One id per byte; vocabulary 259."""

    def build(self, alphabet: str, texts: Iterable[str]) -> Tokenizer:
        """A ByteTokenizer."""
        return ByteTokenizer()


@register(TOKENIZERS, "alphabet")
class AlphabetConfig(TokenizerConfig):
    """One id per character that the configured tasks can write: the smallest vocabulary, for runs without text."""

    def build(self, alphabet: str, texts: Iterable[str]) -> Tokenizer:
        """A CharTokenizer without UNK."""
        return CharTokenizer("".join(sorted(set(alphabet))))


class Learned(TokenizerConfig):
    """What is learned from training documents, evenly spread over all there are; never from validation."""

    sample: int | None = Field(None, ge=1, description="characters of training text to learn from, at most [all]")
    documents: int | None = Field(None, ge=1, description="training documents to learn from, at most [all]")

    def reads(self) -> tuple[float, float]:
        """The bounds."""
        return self.sample or math.inf, self.documents or math.inf


@register(TOKENIZERS, "char")
class CharConfig(Learned):
    """One id per character of the training text and of the tasks; any other becomes UNK, one for each of its bytes."""

    def build(self, alphabet: str, texts: Iterable[str]) -> Tokenizer:
        """A CharTokenizer with UNK."""
        characters = set(alphabet)
        for text in texts:
            characters.update(text)
        return CharTokenizer("".join(sorted(characters)), unknown=True)


@register(TOKENIZERS, "bpe")
class BPEConfig(Learned):
    """Byte pairs learned from a sample of the training text; every text can be written in them."""

    vocab: int = Field(1024, ge=260, le=1 << 20, description="most ids to learn, specials and bytes included")
    sample: int | None = Field(
        20_000_000, ge=1, description="characters of training text to learn from, at most; null: all"
    )

    def build(self, alphabet: str, texts: Iterable[str]) -> Tokenizer:
        """A BPETokenizer trained on the texts."""
        return BPETokenizer.train(texts, self.vocab)
