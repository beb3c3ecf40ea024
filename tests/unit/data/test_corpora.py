"""Corpora: what a document is, and that training and validation never share one."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepladder.core.errors import UserError
from stepladder.data.corpora import Corpus, _paragraphs, normalise, read_documents, source_name


def jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": t, "id": 1}) + "\n" for t in texts), encoding="utf-8")
    return str(path)


def documents(path: str) -> list[str]:
    return list(read_documents(path, Counter()))


def test_jsonl_documents_are_the_texts(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ["one", "  two\n\nparagraphs \n", "three"])
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text() + "\n   \n")
    assert documents(path) == ["one", "  two\n\nparagraphs", "three"]


def test_gz_is_read_like_the_plain_file(tmp_path: Path) -> None:
    plain = jsonl(tmp_path / "a.jsonl", ["one", "two"])
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(plain).read_bytes()))
    assert documents(str(packed)) == documents(plain)
    assert Corpus(str(packed)).digest == Corpus(plain).digest


def test_txt_short_paragraphs_are_gathered(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    paragraphs = [f"paragraph {i} " + "x" * 3000 for i in range(7)]
    path.write_text("\n\n".join(paragraphs))
    assert documents(str(path)) == ["\n\n".join(paragraphs[i : i + 3]) for i in (0, 3, 6)]


def test_txt_form_feed_ends_a_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n\fthree\ffour\f\f")
    assert documents(str(path)) == ["one\n\ntwo", "three", "four"]


def test_txt_long_paragraphs_are_cut_at_lines_then_spaces_then_hard(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(["a" * 6000, "b" * 6000]) + "\n\n" + "word " * 4000 + "\n\n" + "c" * 25_000)
    found = documents(str(path))
    assert [len(d) for d in found] == [6000, 6000, 9999, 9999, 10_000, 10_000, 5000]
    assert {d[-4:] for d in found[2:4]} == {"word"}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from(["a\n", "\n", " \n", "b" * 4000 + "\n", "c d " * 3000 + "\n", "e\ff\n", "\f", "g" * 21_000])
    )
)
def test_no_paragraph_text_is_lost(lines: list[str]) -> None:
    found = list(_paragraphs(lines))
    assert "".join("".join(found).split()) == "".join("".join(lines).split())
    assert all(len(d) <= 10_000 for d in found)


def test_pydoc_is_the_sorted_help_topics() -> None:
    found = documents("pydoc")
    assert len(found) > 50
    assert sum(map(len, found)) > 300_000
    assert all(d.strip() for d in found)
    corpus = Corpus("pydoc")
    train, valid = (set(corpus.documents(s)) for s in ("train", "valid"))
    assert train
    assert valid
    assert train | valid == set(found)


def test_hash_split_shares_nothing_and_is_about_a_sixteenth(tmp_path: Path) -> None:
    texts = [f"Document number {i}" for i in range(800)]
    copies = [t.upper().replace(" ", "\n  ") for t in texts]
    corpus = Corpus(jsonl(tmp_path / "a.jsonl", texts + copies + texts[:100]))
    train, valid = (list(corpus.documents(s)) for s in ("train", "valid"))
    assert len(train) + len(valid) == 1700
    assert not {normalise(t) for t in train} & {normalise(t) for t in valid}
    assert 0.03 < len(valid) / 1700 < 0.1
    assert corpus.scan.overlap == {"exact": 0, "normalised": 0}
    assert corpus.scan.documents == {"train": len(train), "valid": len(valid)}
    assert corpus.scan.duplicates == len(train) - len({normalise(t) for t in train})


def test_split_depends_on_the_document_only(tmp_path: Path) -> None:
    texts = [f"Document number {i}" for i in range(200)]
    one = set(Corpus(jsonl(tmp_path / "a.jsonl", texts)).documents("valid"))
    two = set(Corpus(jsonl(tmp_path / "b.jsonl", [*texts[::-1], "another"])).documents("valid"))
    assert one == two - {"another"}


@pytest.mark.parametrize("n", [2, 3, 5])
def test_small_corpora_have_both_splits(tmp_path: Path, n: int) -> None:
    for salt in range(20):
        corpus = Corpus(jsonl(tmp_path / f"{salt}.jsonl", [f"{salt} text {i}" for i in range(n)]))
        train, valid = (list(corpus.documents(s)) for s in ("train", "valid"))
        assert train
        assert valid
        assert len(train) + len(valid) == n


def test_given_validation_file_is_taken_whole(tmp_path: Path) -> None:
    train, valid = jsonl(tmp_path / "t.jsonl", ["a", "b", "b"]), jsonl(tmp_path / "v.jsonl", ["c", "B ", "b"])
    corpus = Corpus(train, valid)
    assert list(corpus.documents("train")) == ["a", "b", "b"]
    assert list(corpus.documents("valid")) == ["c", "B", "b"]
    assert corpus.scan.overlap == {"exact": 1, "normalised": 2}
    assert corpus.scan.duplicates == 1
    assert corpus.digest != Corpus(train).digest != Corpus(valid).digest


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2.*'text'"),
        ("a.jsonl", b'{"text": "a"}\n\n["text"]\n', "line 3.*'text'"),
        ("a.jsonl", b'{"text": "a"\n', "line 1: not JSON"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-20], "cannot be read"),
        ("a.csv", b"a,b", "must be 'pydoc' or end in"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.*{match}"):
        _ = Corpus(str(tmp_path / name)).scan


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nosuch.txt' cannot be read: No such file"):
        Corpus(str(tmp_path / "nosuch.txt"))
    (tmp_path / "dir.txt").mkdir()
    with pytest.raises(UserError, match=r"dir.txt' cannot be read: Is a directory"):
        Corpus(str(tmp_path / "dir.txt"))


def test_source_names() -> None:
    assert [source_name(p) for p in ("pydoc", "/a/b.c.txt.gz", "x.jsonl")] == ["pydoc", "b.c", "x"]
