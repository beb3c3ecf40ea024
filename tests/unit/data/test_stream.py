"""The stream: pure in (configuration, seed, step, row); mixtures, ramps and validation text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepladder.core.config import validate
from stepladder.core.errors import UserError
from stepladder.data.stream import Batch, DataConfig, Stream, TaskSource
from stepladder.data.tokenizers import BOS, IGNORE, PAD, ByteTokenizer

ROWS = np.arange(16)
MIXED: dict[str, Any] = {
    "tokenizer": "byte",
    "sequence": 64,
    "sources": [
        {"kind": "task", "task": "parity"},
        {"kind": "task", "task": {"kind": "addition", "train": [1, 4]}, "weight": "0.5", "ramp": 30},
        {"kind": "text", "path": "pydoc", "weight": [[0, 0], [100, 2]]},
    ],
}


def config(**changes: Any) -> DataConfig:
    return validate(DataConfig, {**MIXED, **changes}, "test.yaml")


def same(one: Batch, two: Batch) -> bool:
    return all((getattr(one, f) == getattr(two, f)).all() for f in ("tokens", "targets", "documents", "source"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def stream(cache: Path) -> Stream:
    return Stream(config(), 7, cache)


@pytest.fixture
def texts(tmp_path: Path) -> str:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"number {i} " * (1 + i % 9)}) + "\n" for i in range(120)))
    return str(path)


def text_only(path: str, **changes: Any) -> DataConfig:
    return config(**{"sources": [{"kind": "text", "path": path}], **changes})


def test_shapes_and_types(stream: Stream) -> None:
    batch = stream.batch(50, ROWS, 16)
    for array in (batch.tokens, batch.targets, batch.documents):
        assert (array.shape, array.dtype) == ((16, 64), np.int64)
    assert batch.source.shape == (16,)
    assert set(batch.source) == {0, 1, 2}
    assert (batch.documents[:, 0] == 0).all()
    assert stream.names == ("parity", "addition", "pydoc")


def test_targets_stay_inside_documents(stream: Stream) -> None:
    batch = stream.batch(80, np.arange(64), 64)
    asked = batch.targets[:, :-1] != IGNORE
    assert (batch.targets[:, :-1][asked] == batch.tokens[:, 1:][asked]).all()
    assert (batch.documents[:, :-1][asked] == batch.documents[:, 1:][asked]).all()
    text = batch.source == 2
    inside = (batch.documents[:, 1:] == batch.documents[:, :-1]) & (batch.tokens[:, 1:] != PAD)
    assert (asked == inside)[text].all()  # in text every next token of the document is asked for
    assert (asked.mean(axis=1)[~text] < 0.6).all()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_division_among_ranks_is_the_same_batch(stream: Stream, ranks: int) -> None:
    whole = stream.batch(60, ROWS, 16)
    for rank in range(ranks):
        mine = ROWS[rank::ranks]
        part = stream.batch(60, mine, 16)
        assert same(part, Batch(whole.tokens[mine], whole.targets[mine], whole.documents[mine], whole.source[mine]))
    shuffled = np.random.default_rng(0).permutation(16)
    assert (stream.batch(60, shuffled, 16).tokens == whole.tokens[shuffled]).all()


def test_resuming_is_asking_for_a_step(stream: Stream, cache: Path) -> None:
    straight = [stream.batch(step, ROWS, 16) for step in range(45)]
    resumed = Stream(config(), 7, cache)
    for step in (44, 20, 0):
        assert same(straight[step], resumed.batch(step, ROWS, 16))
    assert len({batch.tokens.tobytes() for batch in straight}) == 45


def test_the_seed_changes_everything(stream: Stream, cache: Path) -> None:
    one, two = stream.batch(60, ROWS, 16), Stream(config(), 8, cache).batch(60, ROWS, 16)
    assert not (one.source == two.source).all()
    assert not (one.tokens == two.tokens).all(axis=1).any()


def test_no_dependence_on_the_hash_salt(stream: Stream, cache: Path) -> None:
    program = (
        "import hashlib,sys,json,numpy as np; from pathlib import Path;"
        "from stepladder.core.config import validate; from stepladder.data.stream import *;"
        "s=Stream(validate(DataConfig,json.loads(sys.argv[1]),'x'),7,Path(sys.argv[2]));"
        "print(hashlib.sha256(s.batch(60,np.arange(16),16).tokens.tobytes()).hexdigest(), s.fingerprint())"
    )
    command = [sys.executable, "-c", program, json.dumps(MIXED), str(cache)]
    outputs = {
        subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": salt}, capture_output=True, text=True, check=True
        ).stdout
        for salt in ("1", "2")
    }
    assert len(outputs) == 1
    assert outputs.pop().split()[1] == stream.fingerprint()


def test_rows_out_of_range_are_an_error(stream: Stream) -> None:
    for step, rows in ((0, [16]), (0, [-1]), (-1, [0])):
        with pytest.raises(ValueError, match="rows must lie in"):
            stream.batch(step, np.array(rows), 16)


def test_weights_are_followed(stream: Stream) -> None:
    assert stream.describe(0)["weights"] == pytest.approx({"parity": 1 / 1.5, "addition": 0.5 / 1.5, "pydoc": 0})
    assert stream.describe(50)["weights"] == pytest.approx({"parity": 0.4, "addition": 0.2, "pydoc": 0.4})
    assert stream.describe(10**6)["weights"] == stream.describe(100)["weights"]
    for step in (0, 50, 200):
        expected = np.array(list(stream.describe(step)["weights"].values()))
        drawn = np.bincount(stream.batch(step, np.arange(600), 600).source, minlength=3) / 600
        assert np.abs(drawn - expected).max() < 0.07
    assert 2 not in stream.batch(0, np.arange(600), 600).source


def test_ramps_widen_the_range(stream: Stream) -> None:
    source = stream.config.sources[1]
    assert isinstance(source, TaskSource)
    assert [source.sizes(step) for step in (0, 9, 10, 29, 30, 10**9)] == [
        (1, 1), (1, 1), (1, 2), (1, 3), (1, 4), (1, 4),
    ]  # fmt: skip
    assert stream.describe(10)["sizes"] == {"parity": [4, 16], "addition": [1, 2]}
    tokenizer = stream.tokenizer
    for step, longest in ((0, 1), (10, 2), (40, 4)):
        batch = stream.batch(step, np.arange(64), 64)
        text = "".join(tokenizer.decode(row) for row in batch.tokens[batch.source == 1])
        operands = [len(n) for part in text.split("=") for n in part.split("+")[1:]]
        assert max(operands) == longest


def test_a_pass_shows_every_window_once(texts: str, cache: Path) -> None:
    stream = Stream(text_only(texts, sequence=32), 0, cache)
    shard = stream.texts["texts"].train
    windows = shard.windows(32)
    everything = sorted(row.tobytes() for row in shard.rows(np.arange(windows), 32)[0])
    passes = [
        [row.tobytes() for row in stream.batch(number, np.arange(windows), windows).tokens] for number in range(3)
    ]
    assert all(sorted(rows) == everything for rows in passes)
    assert passes[0] != passes[1] != passes[2]
    assert passes[0] != [row.tobytes() for row in shard.rows(np.arange(windows), 32)[0]]
    across = stream.batch(0, np.arange(windows - 5, windows + 5), 2 * windows).tokens
    assert [r.tobytes() for r in across] == passes[0][-5:] + passes[1][:5]


def test_a_text_of_one_window(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "tiny.jsonl"
    path.write_text('{"text": "ab"}\n{"text": "cd"}\n')
    batch = Stream(text_only(str(path)), 0, cache).batch(3, np.arange(2), 2)
    assert (batch.tokens[:, 0] == BOS).all()
    assert (batch.targets != IGNORE).sum(axis=1).tolist() == [3, 3]


@pytest.mark.parametrize("tokenizer", ["byte", "char", {"kind": "bpe", "vocab": 300}])
def test_validation_covers_all_tokens_and_bytes(texts: str, cache: Path, tokenizer: Any) -> None:
    stream = Stream(text_only(texts, sequence=50, tokenizer=tokenizer), 0, cache)
    batches = list(stream.valid_text(rows=3)["texts"])
    shard = stream.texts["texts"].valid
    targets = np.concatenate([batch.targets.reshape(-1) for batch in batches])
    assert targets[targets != IGNORE].tolist() == shard.tokens[shard.tokens != BOS].tolist()
    assert np.concatenate([b.index for b in batches]).tolist() == list(range(shard.windows(50)))
    total = sum(int(b.bytes.sum()) for b in batches)
    assert total == stream.texts["texts"].about["splits"]["valid"]["bytes"]
    assert total == sum(len(stream.tokenizer.decode(t).encode()) for t in np.split(shard.tokens, shard.starts[1:-1]))
    assert all((b.bytes[b.targets == IGNORE] == 0).all() for b in batches)


def test_tasks_alone_need_no_disk(tmp_path: Path) -> None:
    made = config(tokenizer="alphabet", sources=MIXED["sources"][:2])
    stream = Stream(made, 0, tmp_path / "cache")
    assert stream.tokenizer.vocab == 3 + len(set("01^=") | set("0123456789+="))
    assert stream.valid_text() == {}
    assert not (tmp_path / "cache").exists()


def test_a_given_tokenizer_is_used(texts: str, cache: Path) -> None:
    stream = Stream(text_only(texts, tokenizer="char"), 0, cache, tokenizer=ByteTokenizer())
    assert stream.tokenizer.kind == "byte"
    assert stream.batch(0, ROWS, 16).tokens.max() > 100


def test_repeated_sources_get_names_of_their_own(texts: str) -> None:
    made = config(sources=[MIXED["sources"][0]] * 3 + [{"kind": "text", "path": texts}])
    assert made.names() == ("parity", "parity#2", "parity#3", "texts")


def test_the_configuration_survives_json(stream: Stream) -> None:
    dumped = json.loads(stream.config.model_dump_json())
    assert dumped["sources"][1]["task"]["train"] == [1, 4]
    assert validate(DataConfig, dumped, "again") == stream.config


def test_fingerprints(stream: Stream, cache: Path, texts: str, tmp_path: Path) -> None:
    assert Stream(config(), 99, cache).fingerprint() == stream.fingerprint()
    moved = tmp_path / "elsewhere" / "texts.jsonl"
    moved.parent.mkdir()
    moved.write_bytes(Path(texts).read_bytes())
    one = Stream(text_only(texts), 0, cache).fingerprint()
    assert one == Stream(text_only(str(moved)), 0, cache).fingerprint()
    moved.write_text(moved.read_text().replace("number 5", "number 6", 1))
    others = [
        Stream(text_only(str(moved)), 0, cache),
        Stream(text_only(texts, sequence=65), 0, cache),
        Stream(text_only(texts, tokenizer="char"), 0, cache),
        Stream(config(sources=[{"kind": "task", "task": "parity", "ramp": 3}]), 0, cache),
        Stream(config(sources=[{"kind": "task", "task": "parity"}]), 0, cache),
    ]
    assert len({one, stream.fingerprint(), *(other.fingerprint() for other in others)}) == 7


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sources": []}, "sources.*at least 1"),
        ({"sources": [{"kind": "task", "task": "parityy"}]}, "sources.0.task.*did you mean 'parity'"),
        ({"sources": [{"kind": "tasks", "task": "parity"}]}, "sources.0.*did you mean 'task'"),
        ({"sources": [{"kind": "text", "path": "pydoc", "weight": -1}]}, "sources.0.weight"),
        ({"sources": [{"kind": "text", "path": "pydoc", "weight": [[5, 1], [5, 2]]}]}, "rising steps"),
        ({"sources": [{"kind": "text", "path": "pydoc", "weight": []}]}, "rising steps"),
        ({"sources": [{"kind": "text", "path": "pydoc", "weight": [[0, 1], [9, 0]]}]}, "all weights are 0 at step 9"),
        ({"sources": [{"kind": "text", "path": "pydoc", "weight": 0}]}, "all weights are 0 at step 0"),
        ({"tokenizer": "alphabet"}, "'alphabet' knows the tasks' characters only, not those of 'pydoc'"),
        ({"tokenizer": "bpe", "sources": MIXED["sources"][:2]}, "'bpe' learns from text"),
        ({"tokenizer": {"kind": "bpe", "vocab": 259}}, "tokenizer.vocab = 259.*260"),
        ({"sequence": 3}, "sequence = 3"),
        ({"sequnce": 32}, "unknown key 'sequnce'.*did you mean 'sequence'"),
    ],
)
def test_mistakes_are_one_sentence(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=f"^test.yaml: .*{match}"):
        config(**changes)


def test_rows_too_short_for_a_task_are_refused_at_once(cache: Path) -> None:
    with pytest.raises(UserError, match=r"'parity' with 16 bits has 21 tokens.*rows of 20"):
        Stream(config(sequence=20), 0, cache)
