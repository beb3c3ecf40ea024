"""Published text corpora by key: documents taken from the Hugging Face hub or from files, and kept.

What is taken is written once, with revision and counts, into a folder of the cache, and all that follows reads only
that: every rung of a ladder, every seed, and a run that is resumed without a network. The folder's name is the digest
of what was asked for, so other caps or another revision are another folder.

- Where the hub has a validation split (or a ``valid`` file is given), that is taken first, and a training document
  that is one of it but for case and white space is left out. Where it has none, documents go by the rule of
  ``corpora.Corpus``, one in sixteen by hash: whatever the caps, no document that is for validation in one run is
  trained on in another.
- A document is cleaned and trimmed as those of ``corpora`` are. Rows of WikiText are lines; they are put together to
  articles. Rows of wiki40b keep their marks, such as ``_START_PARAGRAPH_``.
"""

from __future__ import annotations

import gzip
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from pydantic import model_validator

from stepladder.core.config import Field, digest, register
from stepladder.core.errors import UserError
from stepladder.core.files import read_json, verify_manifest, write_json
from stepladder.core.keys import hash64
from stepladder.core.redact import redact
from stepladder.data.corpora import HELD_OUT, Corpus, clean, content, normalise, read_documents, read_lines, trimmed
from stepladder.data.shards import build_once, whole
from stepladder.data.sources import SOURCES, Texts

_RULES = 1  # raise with every change of what is taken: folders of the cache then go out of use
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Place:
    """Where a corpus lies on the hub. ``valid``: its split for validation; None: it has none."""

    repo: str
    config: str | None = None
    valid: str | None = "validation"
    streaming: bool = True
    lines: bool = False  # a row is a line, not a document


PLACES = {
    "tinystories": Place("roneneldan/TinyStories", streaming=False),
    "wikitext103": Place("Salesforce/wikitext", "wikitext-103-raw-v1", streaming=False, lines=True),
    "wikitext2": Place("Salesforce/wikitext", "wikitext-2-raw-v1", streaming=False, lines=True),
    "fineweb_edu": Place("HuggingFaceFW/fineweb-edu", "sample-10BT", valid=None),
    "fineweb": Place("HuggingFaceFW/fineweb", "sample-10BT", valid=None),
    "c4_en": Place("allenai/c4", "en"),
    "wiki40b_en": Place("google/wiki40b", "en"),
    "cc_news": Place("vblagoje/cc_news", valid=None, streaming=False),
}
"""The corpora by key. All have their text in the column "text"."""
USES = {"train": "to train on", "valid": "for validation"}
"""What the splits are for, in words."""


@register(SOURCES, "corpus")
class CorpusSource(Texts):
    """The first documents of a published corpus, or of a file in its place."""

    key: Literal[
        "tinystories", "wikitext103", "wikitext2", "fineweb_edu", "fineweb", "c4_en", "wiki40b_en", "cc_news"
    ] = Field(description="the corpus")
    path: str | None = Field(None, description="file .txt or .jsonl, also .gz, to read in place of the hub")
    valid: str | None = Field(None, description="validation file, beside path [1/16 of the documents, by hash]")
    documents: int | None = Field(50_000, ge=1, description="training documents, at most; null: all")
    valid_documents: int | None = Field(1_000, ge=1, description="validation documents, at most; null: all")
    characters: int | None = Field(None, ge=1, description="characters of training documents, at most [no bound]")
    valid_characters: int | None = Field(None, ge=1, description="the same of validation documents [no bound]")
    shortest: int = Field(8, ge=1, description="documents of fewer characters are left out")
    nfkc: bool = Field(False, description="bring characters to Unicode's form NFKC")
    lower: bool = Field(False, description="make all letters small")
    revision: str | None = Field(None, description="commit, branch or tag on the hub [the newest when first read]")
    streaming: bool | None = Field(
        None, description="read rows from the hub as they come, or download the files first [by corpus]"
    )

    @model_validator(mode="after")
    def _either(self) -> CorpusSource:
        if self.valid and not self.path:
            raise ValueError(
                f"valid: a validation file needs a training file beside it; give path, not only {self.valid}"
            )
        if self.path and (self.revision or self.streaming is not None):
            raise ValueError("revision and streaming are of the hub, and with a path nothing is read from there")
        return self

    @property
    def label(self) -> str:
        """The key."""
        return self.key

    def corpus(self, cache: Path, advance: Callable[[int], None] = lambda count: None) -> Corpus:
        """The documents, taken and kept in the cache if they are not there yet; ``advance`` is told of each."""
        place = PLACES[self.key]
        asked = {"rules": _RULES, **self.model_dump(exclude={"weight", "path", "valid", "streaming"})}
        if self.path:
            asked |= {"train": content(self.path), "valid": self.valid and content(self.valid)}
        else:
            asked |= {"repo": place.repo, "config": place.config}
        folder = cache / f"corpus-{self.key}-{digest(asked)[:32]}"
        build_once(folder, lambda temporary: self._take(temporary, advance))
        with whole(folder):
            verify_manifest(folder)
            about = read_json(folder / "source.json")
            return Corpus(str(folder / self._file("train")), str(folder / self._file("valid")), about)

    def _file(self, split: str) -> str:
        return f"{self.key}{'' if split == 'train' else '-valid'}.jsonl.gz"

    def _bounds(self) -> dict[str, dict[str, int | None]]:
        return {
            "train": {"documents": self.documents, "characters": self.characters},
            "valid": {"documents": self.valid_documents, "characters": self.valid_characters},
        }

    def _take(self, folder: Path, advance: Callable[[int], None]) -> None:
        """Write both splits and source.json."""
        place, counts = PLACES[self.key], Counter[str]()
        if self.path:
            about: dict[str, Any] = {"file": Path(self.path).name}
            train: Iterable[str] = _read(self.path, place, counts)
            valid = _read(self.valid, place, counts) if self.valid else None
        else:
            streaming = place.streaming if self.streaming is None else self.streaming
            commit = _commit(self.key, self.revision)
            about = {"repo": place.repo, "config": place.config, "revision": commit}
            train = _fetched(self.key, "train", commit, streaming, counts)
            valid = None if place.valid is None else _fetched(self.key, place.valid, commit, streaming, counts)
        with ExitStack() as stack:
            shelves = {
                split: _Shelf(stack.enter_context(_packed(folder / self._file(split))), advance, **bounds)
                for split, bounds in self._bounds().items()
            }
            if valid is not None:
                _fill_apart(shelves, self._wanted(train, counts), self._wanted(valid, counts), counts)
            else:
                _fill_by_hash(shelves, self._wanted(train, counts))
        for split, shelf in shelves.items():
            if not shelf.documents:
                raise UserError(
                    f"corpus '{self.key}' as asked for has no document {USES[split]}; raise"
                    f" {_CAPS[split]}, lower shortest ({counts['short']} were left out for it), or give other files"
                )
            about[split] = {"documents": shelf.documents, "characters": shelf.characters}
        write_json(folder / "source.json", {"key": self.key, **about, "rules": dict(sorted(counts.items()))})

    def _wanted(self, texts: Iterable[str], counts: Counter[str]) -> Iterator[str]:
        for text in texts:
            if self.nfkc:
                text = unicodedata.normalize("NFKC", text)
            if self.lower:
                text = text.lower()
            if len(text) >= self.shortest:
                yield text
            else:
                counts["short"] += 1


_CAPS = {"train": "documents and characters", "valid": "valid_documents and valid_characters"}


class _Shelf:
    """The documents of a split, written up to the first that would exceed a bound; then it is ``full``."""

    def __init__(
        self, out: IO[bytes], advance: Callable[[int], None], documents: int | None, characters: int | None
    ) -> None:
        self.out, self.advance, self.most, self.widest = out, advance, documents, characters
        self.documents = self.characters = 0
        self.full = False

    def put(self, text: str) -> None:
        self.full = self.full or (self.widest is not None and self.characters + len(text) > self.widest)
        if self.full:
            return
        self.out.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
        self.documents += 1
        self.characters += len(text)
        self.advance(1)
        self.full = self.documents == self.most  # known now, so that no row is fetched in vain


def _fill_apart(shelves: dict[str, _Shelf], train: Iterable[str], valid: Iterable[str], counts: Counter[str]) -> None:
    """Validation first; of the training documents those that are none of it."""
    held = set()
    for text in valid:
        held.add(hash64(normalise(text)))
        shelves["valid"].put(text)
        if shelves["valid"].full:
            break
    for text in train:
        if hash64(normalise(text)) in held:
            counts["of_validation"] += 1
            continue
        shelves["train"].put(text)
        if shelves["train"].full:
            break


def _fill_by_hash(shelves: dict[str, _Shelf], texts: Iterable[str]) -> None:
    for text in texts:
        shelves["train" if hash64(normalise(text)) % HELD_OUT else "valid"].put(text)
        if all(shelf.full for shelf in shelves.values()):
            break


@contextmanager
def _packed(path: Path) -> Iterator[IO[bytes]]:
    """A gzip file whose bytes are told by its content alone."""
    with path.open("wb") as out, gzip.GzipFile("", "wb", compresslevel=6, fileobj=out, mtime=0) as packed:
        yield cast("IO[bytes]", packed)


def _read(path: str, place: Place, counts: Counter[str]) -> Iterator[str]:
    if place.lines and path.removesuffix(".gz").endswith(".txt"):
        return trimmed(_articles(read_lines(path, counts)), counts)
    return read_documents(path, counts)


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """The articles of WikiText: each begins with a line `` = Title = `` between blank lines."""
    held: list[str] = []
    for line in lines:
        held.append(line.rstrip("\n") if line.strip() else "")
        if held[-1] == "" and len(held) > 1 and _TITLE.fullmatch(held[-2]) and (len(held) == 2 or held[-3] == ""):
            if any(held[:-2]):
                yield "\n".join(held[:-2])
            held = held[-2:]
    if any(held):
        yield "\n".join(held)


_TITLE = re.compile(" = [^=].* = ")


def _commit(key: str, revision: str | None) -> str:
    """The commit that a revision of a corpus is on the hub; None: the newest."""
    if revision and _COMMIT.fullmatch(revision):
        return revision
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise _without(key) from error
    try:
        return str(HfApi().dataset_info(PLACES[key].repo, revision=revision, timeout=10).sha)
    except Exception as error:  # the client's many kinds and its HTTP library's: all in the way, none ours
        raise _unreachable(key, error) from error


def _fetched(key: str, split: str, commit: str, streaming: bool, counts: Counter[str]) -> Iterator[str]:
    """The documents of a split on the hub."""
    rows = (clean(text, counts) for text in _rows(key, split, commit, streaming))
    return trimmed(_articles(rows) if PLACES[key].lines else rows, counts)


def _rows(key: str, split: str, commit: str, streaming: bool) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise _without(key) from error
    place = PLACES[key]
    try:
        rows = load_dataset(place.repo, place.config, split=split, streaming=streaming, revision=commit)
        for number, row in enumerate(rows):
            text = row.get("text", 0)
            if not isinstance(text, str | None):
                raise UserError(f"corpus '{key}': row {number} of {split} has no text in 'text'; give another revision")
            yield text or ""
    except UserError:
        raise
    except Exception as error:  # as above, and what the rows are stored in
        raise _unreachable(key, error) from error


def _without(key: str) -> UserError:
    return UserError(
        f"corpus '{key}' needs datasets: pip install 'stepladder[hf]'; or give its file, as in path: {key}.jsonl.gz"
    )


def _unreachable(key: str, error: Exception) -> UserError:
    reason = " ".join(str(redact(str(error))).split()) or type(error).__name__
    return UserError(
        f"corpus '{key}' cannot be had from the hub ({PLACES[key].repo}): {reason};"
        f" try again, or without a network give its file, as in path: {key}.jsonl.gz"
    )
