"""Published corpora: taken from a stand-in of the hub or from files, capped, split, kept, and never half."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from stepladder.cli.data import fetch
from stepladder.core.config import validate
from stepladder.core.errors import UserError
from stepladder.core.files import read_json
from stepladder.data import published
from stepladder.data.corpora import Corpus, normalise
from stepladder.data.published import PLACES, CorpusSource
from stepladder.data.stream import DataConfig, Stream
from stepladder.run import Run
from stepladder.train.session import train

SHARED = Path(__file__).parents[4] / "shared" / "data" / "text"
NEWEST = "1" * 40
STORIES = [f"Once upon a time there was story {i}." for i in range(400)]
HELD = [f"The tale of validation {i}." for i in range(40)]
WITHOUT = [key for key, place in PLACES.items() if place.valid is None]
WIKI = [
    "",
    " = Robin = \n",
    "",
    " A bird ; see \n",
    " = not a title = \n",
    " for more . \n",
    "",
    " = = Song = = \n",
    "",
    " It sings . \n",
    "",
    " = Wren = \n",
    "",
    " Another bird . \n",
]
OWL = ["", " = Owl = \n", "", " A third bird . \n"]
ARTICLES = [
    " = Robin = \n\n A bird ; see \n = not a title = \n for more . \n\n = = Song = = \n\n It sings .",
    " = Wren = \n\n Another bird .",
]


class Hub:
    """A stand-in for ``datasets`` and ``huggingface_hub``. ``rows``: by split; ``read``: how many were asked for."""

    def __init__(self, rows: dict[str, list[Any]]) -> None:
        self.rows, self.newest, self.down = rows, NEWEST, False
        self.calls: list[tuple[Any, ...]] = []
        self.read = dict.fromkeys(rows, 0)
        self.breaks_at = -1

    def load_dataset(self, repo: str, config: str | None, *, split: str, streaming: bool, revision: str) -> Any:
        self.calls.append((repo, config, split, streaming, revision))
        return self._rows(split)

    def _rows(self, split: str) -> Iterator[dict[str, Any]]:
        for row in self.rows[split]:
            if self.read[split] == self.breaks_at:
                raise ConnectionError("connection lost;\n token=hf_abcdefghij")
            self.read[split] += 1
            yield {"text": row, "url": "somewhere"}

    def dataset_info(self, repo: str, revision: str | None = None, timeout: float | None = None) -> Any:
        if self.down:
            raise ConnectionError("no route to host")
        self.calls.append((repo, revision))
        return SimpleNamespace(sha=self.newest if revision is None else "2" * 40)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Its rows are STORIES to train on and HELD for validation."""
    server = Hub({"train": list(STORIES), "validation": list(HELD)})
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=server.load_dataset))
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=lambda: server))
    return server


def source(**fields: Any) -> CorpusSource:
    return validate(CorpusSource, {"key": "tinystories", **fields}, "source")


def texts(corpus: Corpus) -> dict[str, list[str]]:
    return {split: list(corpus.documents(split)) for split in ("train", "valid")}


def jsonl(path: Path, rows: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": row, "id": 1}) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_keys_are_the_places() -> None:
    assert set(PLACES) == set(get_args(CorpusSource.model_fields["key"].annotation))
    assert len(PLACES) == 8


@pytest.mark.parametrize("key", PLACES)
def test_what_is_asked_of_the_hub(hub: Hub, tmp_path: Path, key: str) -> None:
    place = PLACES[key]
    if place.lines:
        hub.rows = {"train": WIKI, "validation": OWL}
    source(key=key).corpus(tmp_path)
    splits = ["train"] if place.valid is None else ["train", place.valid]
    assert hub.calls[0] == (place.repo, None)
    assert sorted(hub.calls[1:]) == [(place.repo, place.config, split, place.streaming, NEWEST) for split in splits]


def test_caps_stop_the_reading(hub: Hub, tmp_path: Path) -> None:
    corpus = source(documents=30, valid_documents=7, streaming=True).corpus(tmp_path)
    assert texts(corpus) == {"train": STORIES[:30], "valid": HELD[:7]}
    assert hub.read == {"train": 30, "validation": 7}
    assert {call[3] for call in hub.calls if len(call) == 5} == {True}


def test_characters_stop_before_the_document_that_would_exceed(hub: Hub, tmp_path: Path) -> None:
    size = len(STORIES[0])
    corpus = source(characters=3 * size + size - 1, valid_characters=2 * len(HELD[0])).corpus(tmp_path)
    assert texts(corpus) == {"train": STORIES[:3], "valid": HELD[:2]}
    corpus = source(characters=3 * size, documents=None).corpus(tmp_path)
    assert texts(corpus)["train"] == STORIES[:3]


def test_short_and_empty_rows_are_left_out_and_counted(hub: Hub, tmp_path: Path) -> None:
    hub.rows["train"] = ["", None, "  \n", "seven c", "eight ch", "bad \0\r\nrow number nine  "]
    corpus = source().corpus(tmp_path)
    assert texts(corpus)["train"] == ["eight ch", "bad \nrow number nine"]
    assert corpus.origin["rules"] == {"carriage_returns": 1, "empty_documents": 3, "nul": 1, "short": 1}


def test_validation_is_in_no_training_text(hub: Hub, tmp_path: Path) -> None:
    hub.rows["train"][3] = HELD[2]
    hub.rows["train"][9] = "  the TALE of\nvalidation 5.\n"
    corpus = source(documents=20).corpus(tmp_path)
    found = texts(corpus)
    assert found["train"] == [s for s in hub.rows["train"][:22] if "alidation" not in s]
    assert corpus.scan.overlap == {"exact": 0, "normalised": 0}
    assert corpus.origin["rules"] == {"of_validation": 2}


@pytest.mark.parametrize("key", WITHOUT)
def test_one_split_is_parted_by_hash_whatever_the_caps(hub: Hub, tmp_path: Path, key: str) -> None:
    hub.rows["train"] += [story.upper() + " " for story in STORIES]  # copies stay together
    found = [
        texts(source(key=key, documents=n, valid_documents=m).corpus(tmp_path))
        for n, m in ((10, 20), (200, 5), (None, None))
    ]
    assert [len(part["train"]) for part in found[:2]] == [10, 200]
    assert [len(part["valid"]) for part in found[:2]] == [20, 5]
    assert len(found[2]["train"]) + len(found[2]["valid"]) == 800
    train, valid = ({normalise(t) for part in found for t in part[split]} for split in ("train", "valid"))
    assert len(train) > 300
    assert len(valid) >= 10
    assert not train & valid


def test_lines_of_wikitext_become_articles(hub: Hub, tmp_path: Path) -> None:
    hub.rows = {"train": WIKI, "validation": OWL}
    corpus = source(key="wikitext2").corpus(tmp_path / "c")
    assert texts(corpus) == {"train": ARTICLES, "valid": [" = Owl = \n\n A third bird ."]}
    lines = {split: "".join(row or " \n" for row in rows) for split, rows in hub.rows.items()}
    train, valid = tmp_path / "train.txt", tmp_path / "valid.txt.gz"
    train.write_text(lines["train"])
    valid.write_bytes(gzip.compress(lines["validation"].encode()))
    assert source(key="wikitext2", path=str(train), valid=str(valid)).corpus(tmp_path / "c").digest == corpus.digest


@pytest.mark.parametrize("key", PLACES)
def test_every_key_reads_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    train, valid = jsonl(tmp_path / "a.jsonl", STORIES), jsonl(tmp_path / "b.jsonl", HELD)
    corpus = source(key=key, path=train, valid=valid, documents=50, valid_documents=9).corpus(tmp_path / "c")
    assert texts(corpus) == {"train": STORIES[:50], "valid": HELD[:9]}
    assert corpus.origin == {
        "key": key,
        "file": "a.jsonl",
        "train": {"documents": 50, "characters": sum(map(len, STORIES[:50]))},
        "valid": {"documents": 9, "characters": sum(map(len, HELD[:9]))},
        "rules": {},
    }
    parted = source(key=key, path=train).corpus(tmp_path / "c")
    assert texts(parted) == texts(Corpus(train)), "the same split as of a plain text source"


def test_a_file_gives_what_the_hub_gives(hub: Hub, tmp_path: Path) -> None:
    data = {"sequence": 32, "sources": [{"kind": "corpus", "key": "tinystories", "documents": 50}]}
    one = Stream(validate(DataConfig, data, "data"), 0, tmp_path / "c")
    path, valid = jsonl(tmp_path / "a.jsonl", STORIES), jsonl(tmp_path / "b.jsonl", HELD)
    data["sources"][0] |= {"path": path, "valid": valid}  # type: ignore[index]
    two = Stream(validate(DataConfig, data, "data"), 0, tmp_path / "c")
    assert one.fingerprint() == two.fingerprint()
    assert one.names == ("tinystories",)
    assert one.origins["tinystories"]["revision"] == NEWEST
    data["sources"][0]["documents"] = 51  # type: ignore[index]
    assert Stream(validate(DataConfig, data, "data"), 0, tmp_path / "c").fingerprint() != one.fingerprint()


def test_what_is_kept_stays_and_needs_no_network(hub: Hub, tmp_path: Path) -> None:
    first = source().corpus(tmp_path)
    hub.newest, hub.down = "3" * 40, True
    hub.rows["train"][0] = "a newer revision has another story"
    again = source(weight=0.5, streaming=True).corpus(tmp_path)
    assert again.digest == first.digest
    assert again.origin["revision"] == NEWEST
    with pytest.raises(UserError, match="no route to host"):
        source(documents=3).corpus(tmp_path)


def test_a_revision_is_another_folder(hub: Hub, tmp_path: Path) -> None:
    named = source(revision="v1").corpus(tmp_path).origin
    pinned = source(revision="4" * 40).corpus(tmp_path).origin
    assert named["revision"] == "2" * 40
    assert pinned["revision"] == "4" * 40
    assert hub.calls[0] == (PLACES["tinystories"].repo, "v1")
    assert sum(len(call) == 2 for call in hub.calls) == 1, "a commit is not asked about"
    assert len(list(tmp_path.iterdir())) == 2


def test_the_same_request_gives_the_same_bytes(hub: Hub, tmp_path: Path) -> None:
    files = []
    for cache in ("a", "b"):
        source(documents=40).corpus(tmp_path / cache)
        (folder,) = (tmp_path / cache).iterdir()
        files.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert files[0] == files[1]
    assert set(files[0]) == {"tinystories.jsonl.gz", "tinystories-valid.jsonl.gz", "source.json", "manifest.json"}


def test_characters_are_brought_to_one_form(hub: Hub, tmp_path: Path) -> None:
    hub.rows["train"] = ["The ﬁrst Story of Ⅳ", "another one altogether"]
    assert texts(source(nfkc=True, lower=True).corpus(tmp_path))["train"][0] == "the first story of iv"
    assert texts(source(nfkc=True).corpus(tmp_path))["train"][0] == "The first Story of IV"
    assert texts(source().corpus(tmp_path))["train"][0] == "The ﬁrst Story of Ⅳ"


def test_a_lost_connection_leaves_nothing_behind(hub: Hub, tmp_path: Path) -> None:
    hub.breaks_at = 25
    with pytest.raises(
        UserError, match=r"'tinystories' cannot be had from the hub .*connection lost; .*try again"
    ) as it:
        source().corpus(tmp_path)
    assert "hf_abcdefghij" not in str(it.value)
    assert "\n" not in str(it.value)
    assert list(tmp_path.iterdir()) == []
    hub.breaks_at = -1
    assert len(texts(source().corpus(tmp_path))["train"]) == 400


def test_a_row_of_another_shape_is_one_sentence(hub: Hub, tmp_path: Path) -> None:
    hub.rows["train"][5] = 7
    with pytest.raises(UserError, match="row 5 of train has no text in 'text'"):
        source().corpus(tmp_path)


@pytest.mark.parametrize("missing", ["datasets", "huggingface_hub"])
def test_what_to_install_and_the_way_without(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        UserError, match=r"pip install 'stepladder\[hf\]'; or give its file, as in path: c4_en.jsonl.gz"
    ):
        source(key="c4_en").corpus(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"key": "tinystory"}, "key.*tinystories"),
        ({"valid": "v.jsonl"}, "give path"),
        ({"path": "a.jsonl", "revision": "main"}, "nothing is read from there"),
        ({"path": "a.jsonl", "streaming": False}, "nothing is read from there"),
        ({"documents": 0}, "documents"),
    ],
)
def test_what_cannot_be_asked_for(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        source(**fields)


def test_nothing_left_for_a_split_is_refused(hub: Hub, tmp_path: Path) -> None:
    for fields, says in (
        ({"shortest": 1000}, r"no document to train on; .*shortest \(440 were left out"),
        ({"characters": 5}, "no document to train on; raise documents and characters"),
        ({"valid_characters": 5}, "no document for validation; raise valid_documents"),
        ({"path": jsonl(tmp_path / "a.jsonl", STORIES[:2])}, "no document for validation"),
        ({"path": str(tmp_path / "nosuch.jsonl")}, "nosuch.jsonl' cannot be read"),
    ):
        with pytest.raises(UserError, match=says):
            source(**fields).corpus(tmp_path / "c")
    assert not any((tmp_path / "c").iterdir())


def test_damage_in_the_cache_is_named(hub: Hub, tmp_path: Path) -> None:
    source().corpus(tmp_path)
    (folder,) = tmp_path.iterdir()
    kept = folder / "tinystories.jsonl.gz"
    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 1
    kept.write_bytes(data)
    with pytest.raises(UserError, match=f"damaged cache: .*tinystories.jsonl.gz.*delete the folder '{folder}'"):
        source().corpus(tmp_path)


def test_a_run_notes_the_revision_and_goes_on_without_a_network(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPLADDER_CACHE", str(tmp_path / "c"))
    tree = {
        "model": {"kind": "transformer", "width": 16, "depth": 1, "heads": 1},
        "data": {"sequence": 16, "sources": [{"kind": "corpus", "key": "tinystories", "documents": 20}]},
        "train": {"steps": 2, "batch": 2, "device": "cpu"},
    }
    home = train(Run.of(tree), tmp_path / "runs", quiet=True)
    about = read_json(home / "data.json")
    assert about["origins"]["tinystories"]["revision"] == NEWEST
    assert about["origins"]["tinystories"]["train"]["documents"] == 20
    assert about["overlap"]["tinystories"] == {"documents": 40, "exact": 0, "normalised": 0}
    hub.down = True
    tree["train"]["steps"] = 4  # type: ignore[index]
    train(Run.of(tree), tmp_path / "runs", quiet=True, extend=True)
    assert read_json(home / "summary.json")["status"] == "complete"


def test_fetching_ahead_is_what_the_run_would_do(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEPLADDER_CACHE", str(tmp_path / "c"))
    fetch("tinystories", ["documents=1_200", "valid_documents=null"])
    assert (
        f"tinystories ({NEWEST}): 400 documents to train on, 40 documents for validation, in" in capsys.readouterr().out
    )
    hub.down = True
    assert texts(source(documents=1200, valid_documents=None).corpus(tmp_path / "c"))["train"] == STORIES
    fetch("tinystories", [f"path={jsonl(tmp_path / 'a.jsonl', STORIES)}"])
    assert "tinystories (a.jsonl): 3" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"'document'.*did you mean 'documents'"):
        fetch("tinystories", ["document=3"])


def test_offline_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="needs the hub's client: pip install 'stepladder[hf]'")
    words = ["train", "data.sources=[{kind: corpus, key: fineweb_edu}]", "--runs", str(tmp_path / "runs")]
    done = subprocess.run(
        [sys.executable, "-m", "stepladder.cli", *words],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "STEPLADDER_CACHE": str(tmp_path / "c")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "corpus 'fineweb_edu' cannot be had from the hub (HuggingFaceFW/fineweb-edu)" in line
    assert "give its file, as in path: fineweb_edu.jsonl.gz" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("streaming", [True, False])
def test_the_library_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    pytest.importorskip("datasets", reason="needs datasets: pip install 'stepladder[hf]'")
    here = tmp_path / "stories"
    here.mkdir()
    jsonl(here / "train.jsonl", STORIES)
    jsonl(here / "validation.jsonl", HELD)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setitem(PLACES, "tinystories", published.Place(str(here)))
    corpus = source(revision="0" * 40, streaming=streaming, documents=50, valid_documents=9).corpus(tmp_path / "c")
    assert texts(corpus) == {"train": STORIES[:50], "valid": HELD[:9]}


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs shared/data/text beside the checkout")
def test_real_files(tmp_path: Path) -> None:
    wiki = source(
        key="wikitext2", path=str(SHARED / "wikitext2_train.txt.gz"), valid=str(SHARED / "wikitext2_valid.txt.gz")
    ).corpus(tmp_path)
    assert wiki.scan.documents == {"train": 600, "valid": 60}, "as many articles as WikiText-2 is published with"
    stories = source(
        path=str(SHARED / "tinystories_train.jsonl.gz"),
        valid=str(SHARED / "tinystories_valid.jsonl.gz"),
        valid_documents=200,
    ).corpus(tmp_path)
    assert stories.scan.documents["valid"] == 200
    assert stories.scan.documents["train"] > 2000
    for corpus in (wiki, stories):
        assert corpus.scan.overlap == {"exact": 0, "normalised": 0}
