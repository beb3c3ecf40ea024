"""Faults of the group "Data" of the reliability list, as far as text, packing and the stream go."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from stepladder.core.config import validate
from stepladder.core.errors import UserError
from stepladder.core.files import write_manifest
from stepladder.core.keys import key
from stepladder.data.corpora import Corpus
from stepladder.data.packing import pack, stride
from stepladder.data.shards import Shard, Shards, open_shards, prepare, shard_folder
from stepladder.data.stream import DataConfig, Stream, _TextRows
from stepladder.data.tasks import TASKS
from stepladder.data.tokenizers import BOS, IGNORE, BPETokenizer, ByteTokenizer, CharTokenizer

BYTE = ByteTokenizer()


def jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(path)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(50)]))


@pytest.fixture
def folder(corpus: Corpus, tmp_path: Path) -> Path:
    prepare(corpus, BYTE, tmp_path / "cache")
    return shard_folder(corpus, BYTE, tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b""),
        ("a.txt", b" \n\n\t\r\n \f \0"),
        ("a.jsonl", b""),
        ("a.jsonl", b'{"text": ""}\n{"text": " \\n"}\n'),
    ],
)
def test_D1_files_without_text_are_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    full = jsonl(tmp_path / "full.jsonl", ["some text"])
    for path, valid in ((str(tmp_path / name), None), (full, str(tmp_path / name))):
        with pytest.raises(UserError, match=f"{name}' has no document with any text"):
            prepare(Corpus(path, valid), BYTE, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("texts", [["only one"], ["one", "ONE", " one \n"]])
def test_D1_a_split_that_would_be_empty_is_refused_by_name(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(UserError, match=r"one.jsonl' has a single document.*'valid'"):
        prepare(Corpus(jsonl(tmp_path / "one.jsonl", texts)), BYTE, tmp_path / "cache")


@pytest.mark.parametrize("name", ["train.tokens.bin", "valid.documents.bin", "shard.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "empty"])
def test_D2_damaged_shards_are_refused_with_a_way_out(
    folder: Path, corpus: Corpus, tmp_path: Path, name: str, harm: str
) -> None:
    path = folder / name
    data = bytearray(path.read_bytes())
    if harm == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 0 if harm != "flip" else 4
        path.write_bytes({"truncate": data[:-2], "flip": data, "empty": b""}[harm])
    with pytest.raises(UserError, match=f"damaged cache: .*; delete the folder '{folder}', it is built anew"):
        prepare(corpus, BYTE, tmp_path / "cache")
    shutil.rmtree(folder)  # the way out works
    prepare(corpus, BYTE, tmp_path / "cache")


def test_D2_every_single_bit_of_the_tokens_is_watched(folder: Path) -> None:
    path = folder / "valid.tokens.bin"
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 37):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"valid.tokens.bin: the content is not what was written"):
            open_shards(folder, BYTE)


@pytest.mark.parametrize("verify", [True, False])
def test_D3_ids_beyond_the_vocabulary_are_found_at_opening(folder: Path, verify: bool) -> None:
    about = json.loads((folder / "shard.json").read_text())
    if verify:  # written so by another program, which then made a right manifest
        tokens = np.fromfile(folder / "train.tokens.bin", "<u2")
        tokens[7] = 0xFFFF  # -1
        tokens.tofile(folder / "train.tokens.bin")
    else:
        about["splits"]["train"]["largest"] = 0xFFFF
        (folder / "shard.json").write_text(json.dumps(about))
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    with pytest.raises(UserError, match=r"train.tokens.bin: id 65535 is outside the vocabulary of 259"):
        open_shards(folder, BYTE, verify=verify)


def test_D4_tokens_of_another_tokenizer_are_refused(folder: Path) -> None:
    other = CharTokenizer("document 0123456789")
    with pytest.raises(UserError, match=r"were made by tokenizer .*not by this run's char tokenizer"):
        open_shards(folder, other)
    open_shards(folder, BYTE)


def test_D5_broken_text_is_mended_by_rule_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "broken.txt"
    lines = [
        b"\xef\xbb\xbffirst\r\n",  # a byte-order mark, CRLF
        b"caf\xc3\xa9 \xff\xfe bad \xe2\x82\n",  # two stray bytes, one cut character
        b"nul\0\0 in the middle\n",
        b"\xed\xa0\x80 a surrogate in UTF-8\n",  # three bytes that UTF-8 forbids
        b"\xef\xbf\xbd was replaced before us\n",
        b"old mac\rline\n\f",
        b"\f  \n\f",
        b"second document",
    ]
    path.write_bytes(b"".join(lines))
    shards = prepare(Corpus(str(path)), BYTE, tmp_path / "cache")
    assert shards.about["rules"] == {
        "byte_order_marks": 1,
        "carriage_returns": 2,
        "invalid_utf8": 6,
        "nul": 2,
    }
    found = {
        BYTE.decode(ids) for shard in (shards.train, shards.valid) for ids in np.split(shard.tokens, shard.starts[1:-1])
    }
    assert found == {
        "first\ncafé \ufffd\ufffd bad \ufffd\nnul in the middle\n\ufffd\ufffd\ufffd a surrogate in UTF-8\n"
        "\ufffd was replaced before us\nold mac\nline",
        "second document",
    }


def test_D5_surrogates_and_nul_in_json_escapes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        r'{"text": "a\ud800b \ud83d\ude00 \u0000\r\n c"}' + "\n" + r'{"text": "two"}' + "\n" + r'{"text": "\u0000\t"}'
    )
    corpus = Corpus(str(path))
    assert {*corpus.documents("train"), *corpus.documents("valid")} == {"a\ufffdb \U0001f600 \n c", "two"}
    assert corpus.scan.counts == {"carriage_returns": 1, "empty_documents": 1, "nul": 2, "surrogates": 1}


def test_D5_one_line_of_50_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    size = 50 << 20
    path.write_bytes(np.random.default_rng(0).integers(97, 123, size, dtype=np.uint8).tobytes())
    start = time.perf_counter()
    shards = prepare(Corpus(str(path)), BYTE, tmp_path / "cache")
    assert time.perf_counter() - start < 60
    counts = shards.about["splits"]
    assert counts["train"]["bytes"] + counts["valid"]["bytes"] == size
    assert counts["train"]["documents"] + counts["valid"]["documents"] == -(-size // 10_000)


def test_D5_a_long_line_in_byte_pairs() -> None:
    tokenizer = BPETokenizer.train(["word after word"], 280)
    text = "word after word " * 40_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


MIXED = {
    "sequence": 32,
    "sources": [
        {"kind": "task", "task": "parity", "ramp": 9},
        {"kind": "text", "path": "pydoc", "weight": [[0, 1], [9, 3]]},
    ],
}


def test_D6_every_world_size_gives_one_global_order(tmp_path: Path) -> None:
    orders = set()
    for world in (1, 2, 4, 8):
        streams = [Stream(validate(DataConfig, MIXED, "x"), 0, tmp_path) for _ in range(min(world, 2))]
        order = np.zeros((12, 16, 32), np.int64)
        for step in range(12):
            for rank in range(world):
                mine = np.arange(rank, 16, world)
                order[step, mine] = streams[rank % len(streams)].batch(step, mine, 16).tokens
        orders.add(order.tobytes())
    assert len(orders) == 1


def test_D7_resuming_at_a_step_gives_the_next_rows(tmp_path: Path) -> None:
    made = [Stream(validate(DataConfig, MIXED, "x"), 0, tmp_path) for _ in range(2)]
    straight = [made[0].batch(step, np.arange(8), 8) for step in range(12)]
    for step in (7, 8, 11):
        for field in ("tokens", "targets", "documents", "source"):
            assert (getattr(made[1].batch(step, np.arange(8), 8), field) == getattr(straight[step], field)).all()


def test_D7_seeking_in_a_billion_tokens_takes_no_time(tmp_path: Path) -> None:
    with open(tmp_path / "tokens.bin", "wb") as out:
        out.truncate(2 * 10**9)  # a hole: takes no space on disk
    tokens = np.asarray(np.memmap(tmp_path / "tokens.bin", dtype="<u2", mode="r"))
    rows = _TextRows(Shards(Shard(tokens, np.array([0, 10**9])), Shard(tokens, np.array([0, 10**9])), {}), key(0), 1024)
    start = time.perf_counter()
    for step in (0, 7, 10**6, 10**9):
        rows.rows(step, np.arange(32) + 32 * step)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("valid", "exact", "normalised"),
    [(["new"], 0, 0), (["document 3", "new"], 1, 1), (["DOCUMENT\n  3", "document 4", "new"], 1, 2)],
)
def test_D8_text_overlap_is_measured_and_reported(
    corpus: Corpus, tmp_path: Path, valid: list[str], exact: int, normalised: int
) -> None:
    source = {"kind": "text", "path": corpus.path, "valid": jsonl(tmp_path / "v.jsonl", valid)}
    stream = Stream(validate(DataConfig, {"sources": [source]}, "x"), 0, tmp_path / "cache")
    expected = {"documents": len(valid), "exact": exact, "normalised": normalised}
    assert stream.overlap() == {"a": expected}
    again = Stream(stream.config, 0, tmp_path / "cache")  # from the cache
    assert again.overlap() == {"a": expected}


@pytest.mark.parametrize(
    ("held", "exact", "normalised"), [(["8?"], 0, 0), (["3?", "8?"], 1, 1), (["3 ?\n", "4?", "8?"], 1, 1)]
)
def test_D8_held_out_pairs_that_were_trained_on_are_reported(
    tmp_path: Path, held: list[str], exact: int, normalised: int
) -> None:
    for name, questions in (("train", [f"{n}?" for n in range(6)] + ["A 3 ?"]), ("held", [*held, "a  3 ?"])):
        rows = [json.dumps({"question": question, "answer": "x"}) + "\n" for question in questions]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    source = {"kind": "pairs", "path": str(tmp_path / "train.jsonl"), "valid": str(tmp_path / "held.jsonl")}
    stream = Stream(validate(DataConfig, {"sources": [source]}, "x"), 0, tmp_path / "cache")
    expected = {"questions": len(held) + 1, "exact": exact, "normalised": normalised + 1}
    assert stream.overlap() == {"train": expected}


def test_D8_a_split_by_hash_has_no_overlap(tmp_path: Path) -> None:
    texts = [f"Document {i}" for i in range(300)]
    path = jsonl(tmp_path / "a.jsonl", texts + [t.lower() + " " for t in texts] + texts)
    stream = Stream(validate(DataConfig, {"sources": [{"kind": "text", "path": path}]}, "x"), 0, tmp_path / "c")
    assert stream.overlap() == {"a": {"documents": pytest.approx(900 / 16, abs=40), "exact": 0, "normalised": 0}}


def test_D9_a_packed_neighbour_changes_nothing_else() -> None:
    """The data half: documents are told apart, and no target reaches across."""
    task = TASKS.get("addition")()
    tokens, targets, documents = pack(task, 0, np.arange(8), (1, 4), BYTE, 96)
    for row in range(8):
        begins = np.flatnonzero(tokens[row] == BOS)
        changes = 1 + np.flatnonzero(np.diff(documents[row]))
        assert changes[: len(begins) - 1].tolist() == begins[1:].tolist()
        asked = np.flatnonzero(targets[row] != IGNORE)
        assert (documents[row, asked] == documents[row, asked + 1]).all()
        examples = task.batch(0, "train", row * stride(96) + np.arange(len(begins)), (1, 4))
        for document, question in enumerate(examples.questions()):
            ids = tokens[row, documents[row] == document]
            assert BYTE.decode(ids).startswith(question)


def test_D10_two_builders_one_winner(corpus: Corpus, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    program = (
        "import sys,time,stepladder.data.shards as s; from pathlib import Path;"
        "from stepladder.data.corpora import Corpus; from stepladder.data.tokenizers import ByteTokenizer;"
        "build=s._build; gate=Path(sys.argv[2]).parent;"
        # Both are held after building and before publishing, until both have built.
        "s._build=lambda *a:(build(*a),(gate/sys.argv[3]).touch(),"
        "[time.sleep(.01) for _ in range(2000) if len(list(gate.glob('ready*')))<2]);"
        "print(s.prepare(Corpus(sys.argv[1]),ByteTokenizer(),Path(sys.argv[2])).train.tokens.sum())"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, corpus.path, str(cache), f"ready{i}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    results = [(*process.communicate(timeout=60), process.returncode) for process in running]
    assert [code for _, _, code in results] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert [path.name for path in cache.iterdir()] == [shard_folder(corpus, BYTE, cache).name]


def test_D10_what_a_killed_builder_left_is_in_nobodys_way(corpus: Corpus, tmp_path: Path) -> None:
    left = tmp_path / "cache" / ".building-dead"
    left.mkdir(parents=True)
    (left / "train.tokens.bin").write_bytes(b"half")
    assert len(prepare(corpus, BYTE, tmp_path / "cache").train.tokens) > 0
