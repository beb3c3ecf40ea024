"""Shards: windows cover every token once, and what is cached is what would be built."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stepladder.core.errors import UserError
from stepladder.core.files import read_json
from stepladder.data.corpora import Corpus
from stepladder.data.shards import Shard, Shards, build_once, learn, open_shards, prepare, shard_folder
from stepladder.data.tokenizers import (
    BOS,
    EOS,
    IGNORE,
    PAD,
    BPEConfig,
    ByteConfig,
    ByteTokenizer,
    CharConfig,
    CharTokenizer,
)

TEXTS = [f"Text number {i}: " + "lorem ipsum " * (i % 7) for i in range(60)]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return Corpus(str(path))


@pytest.fixture
def shards(corpus: Corpus, tmp_path: Path) -> Shards:
    return prepare(corpus, ByteTokenizer(), tmp_path / "cache")


def test_documents_stand_between_bos_and_eos(shards: Shards, corpus: Corpus) -> None:
    for shard, split in ((shards.train, "train"), (shards.valid, "valid")):
        texts = list(corpus.documents(split))
        assert shard.tokens.dtype == np.uint16
        assert len(shard.starts) == len(texts) + 1
        for start, end, text in zip(shard.starts, shard.starts[1:], texts, strict=False):
            ids = shard.tokens[start:end]
            assert (ids[0], ids[-1]) == (BOS, EOS)
            assert ids[1:-1].tolist() == ByteTokenizer().encode(text).tolist()


def test_about_counts(shards: Shards, corpus: Corpus) -> None:
    valid = list(corpus.documents("valid"))
    counts = shards.about["splits"]["valid"]
    size = sum(len(t.encode()) for t in valid)
    assert counts == {
        "documents": len(valid),
        "tokens": size + 2 * len(valid),
        "bytes": size,
        "largest": max(max(t.encode()) for t in valid) + 3,
        "unknown": 0,
    }
    assert (shards.about["source"], shards.about["tokenizer"]) == ("a", ByteTokenizer().fingerprint)


def test_windows_by_hand() -> None:
    shard = Shard(np.array([BOS, 10, 11, EOS, BOS, 12, EOS, BOS, 13, EOS], np.uint16), np.array([0, 4, 7, 10]))
    assert shard.windows(4) == 3
    tokens, targets, documents = shard.rows(np.array([2, 0, 1]), 4)
    assert tokens.tolist() == [[13, EOS, PAD, PAD], [BOS, 10, 11, EOS], [BOS, 12, EOS, BOS]]
    assert targets.tolist() == [
        [EOS, IGNORE, IGNORE, IGNORE],
        [10, 11, EOS, IGNORE],
        [12, EOS, IGNORE, 13],
    ]
    assert documents.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert tokens.dtype == targets.dtype == documents.dtype == np.int64


@pytest.mark.parametrize("length", [1, 2, 7, 64, 10_000])
def test_windows_predict_every_token_but_bos_once(shards: Shards, length: int) -> None:
    shard = shards.train
    _, targets, _ = shard.rows(np.arange(shard.windows(length)), length)
    assert targets[targets != IGNORE].tolist() == shard.tokens[shard.tokens != BOS].tolist()


def test_wide_vocabularies_take_four_bytes(corpus: Corpus, tmp_path: Path) -> None:
    alphabet = "".join(chr(c) for c in range(32, 0x11000) if not 0xD800 <= c < 0xE000)
    tokenizer = CharTokenizer(alphabet)
    assert tokenizer.vocab > 1 << 16
    shard = prepare(corpus, tokenizer, tmp_path / "c").train
    assert shard.tokens.dtype == np.uint32
    assert tokenizer.decode(shard.tokens[: shard.starts[1]]) == next(corpus.documents("train"))


def test_the_second_opening_builds_nothing(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(corpus, ByteTokenizer(), tmp_path / "c")
    monkeypatch.setattr("stepladder.data.shards._build", lambda *_: pytest.fail("built again"))
    again = prepare(Corpus(corpus.path), ByteTokenizer(), tmp_path / "c")
    assert again.train.tokens.tolist() == first.train.tokens.tolist()
    assert [p.name for p in (tmp_path / "c").iterdir()] == [shard_folder(corpus, ByteTokenizer(), tmp_path).name]


def test_text_and_tokenizer_choose_the_folder(corpus: Corpus, tmp_path: Path) -> None:
    other = Corpus("pydoc")
    made = {shard_folder(c, t, tmp_path) for c in (corpus, other) for t in (ByteTokenizer(), CharTokenizer("ab"))}
    assert len(made) == 4


def test_text_changed_during_the_build_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    _ = corpus.scan
    Path(corpus.path).write_text("".join(json.dumps({"text": t + "!"}) + "\n" for t in TEXTS))
    with pytest.raises(UserError, match="was changed while"):
        prepare(corpus, ByteTokenizer(), tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []


def test_build_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"No space left on device.*another cache"):
        build_once(tmp_path / "c" / "x", fail)
    assert list((tmp_path / "c").iterdir()) == []


def test_learned_tokenizers_are_kept(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = BPEConfig(vocab=300)
    first = learn(config, "01", [corpus], tmp_path / "c")
    assert 259 < first.vocab <= 300
    monkeypatch.setattr(BPEConfig, "build", lambda *_: pytest.fail("learned again"))
    assert learn(config, "01", [corpus], tmp_path / "c").fingerprint == first.fingerprint


def test_learning_reads_training_text_only(corpus: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ["abc", "bcd"]))
    valid = tmp_path / "v.jsonl"
    valid.write_text(json.dumps({"text": "xyz€"}) + "\n")
    tokenizer = learn(CharConfig(), "01", [Corpus(str(path), str(valid))], tmp_path / "c")
    assert isinstance(tokenizer, CharTokenizer)
    assert tokenizer.alphabet == "01abcd"
    shards = prepare(Corpus(str(path), str(valid)), tokenizer, tmp_path / "c")
    assert shards.about["splits"]["valid"] == {
        "documents": 1, "tokens": 8, "bytes": 6, "largest": 3, "unknown": 6,
    }  # fmt: skip


def test_learning_samples_evenly(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def build(self: BPEConfig, alphabet: str, texts: list[str]) -> ByteTokenizer:
        seen.extend(texts)
        return ByteTokenizer()

    monkeypatch.setattr(BPEConfig, "build", build)
    learn(BPEConfig(sample=corpus.scan.characters["train"] // 3), "", [corpus], tmp_path / "c")
    everything = list(corpus.documents("train"))
    assert seen == everything[::4]  # a quarter: the first whole step under a third


@pytest.mark.parametrize("config", [CharConfig, BPEConfig])
def test_learning_keeps_to_its_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: type[CharConfig | BPEConfig]
) -> None:
    path, valid = tmp_path / "b.jsonl", tmp_path / "v.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i:02}" + "!" * (i % 7)}) + "\n" for i in range(90)))
    valid.write_text(json.dumps({"text": "held out"}) + "\n")
    corpus = Corpus(str(path), str(valid))
    everything, seen = list(corpus.documents("train")), []

    def build(self: CharConfig, alphabet: str, texts: list[str]) -> ByteTokenizer:
        seen[:] = list(texts)
        return ByteTokenizer()

    monkeypatch.setattr(config, "build", build)
    for number, (fields, want) in enumerate(
        [
            ({"sample": None}, everything),
            ({"documents": 30, "sample": None}, everything[::3]),
            ({"documents": 31, "sample": None}, everything[::3]),
            ({"documents": 30, "sample": 10**6}, everything[::3]),
            ({"documents": 1}, everything[:1]),
        ]
    ):
        learn(config(**fields), "", [corpus], tmp_path / f"c{number}")
        assert seen == want
    for most in (5, 11, 100, 333):
        learn(config(sample=most), "", [corpus], tmp_path / f"m{most}")
        assert most / 2 < sum(map(len, seen)) <= most
        assert all(any(text.startswith(part) for text in everything) for part in seen)


def test_another_bound_is_another_tokenizer_and_another_tokenizer_is_another_folder(
    corpus: Corpus, tmp_path: Path
) -> None:
    for config in (CharConfig(), CharConfig(documents=1), CharConfig(sample=1)):
        tokenizer = learn(config, "", [corpus], tmp_path)
        prepare(corpus, tokenizer, tmp_path)
    assert len(list(tmp_path.glob("tokenizer-*"))) == 3
    kept = [read_json(path)["tokenizer"] for path in tmp_path.glob("*/shard.json")]
    assert len(set(kept)) == len(kept) == 3


def test_tokenizers_that_learn_nothing_touch_no_disk(tmp_path: Path) -> None:
    assert learn(ByteConfig(), "", [], tmp_path / "c").kind == "byte"
    assert not (tmp_path / "c").exists()


def test_unverified_opening_still_checks_sizes(shards: Shards, corpus: Corpus, tmp_path: Path) -> None:
    folder = shard_folder(corpus, ByteTokenizer(), tmp_path / "cache")
    with open(folder / "train.tokens.bin", "ab") as out:
        out.write(b"\0\0")
    with pytest.raises(UserError, match=r"train.tokens.bin: has .* bytes"):
        open_shards(folder, ByteTokenizer(), verify=False)
