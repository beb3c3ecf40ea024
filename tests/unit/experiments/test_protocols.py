"""The protocols of the house are valid ladders once their data are there, and the second starts from the first."""

import json
from pathlib import Path

import pytest

from stepladder.data.compgen import generate
from stepladder.eval.suite import check
from stepladder.experiments.climb import planned
from stepladder.experiments.ladder import expand, read

LADDERS = Path(__file__).parents[3] / "ladders"
RUNGS = {"transformer", "lstm", "ntm", "dnc", "vectur", "vecstur", "identity"}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A few lines of what the files' comments generate."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    tree = {"tasks": ("majority", "prefix_sums"), "dataset_size": 60, "seed": 0, "min_n": 4, "max_n": 8, "ood_n": 16}
    generate({**tree, "split_frac": 0.9}, Path("data/compgen"))
    for name, lengths in (("train", (4, 5)), ("eval", (4, 5, 7))):
        rows = [
            {"question": f"minimum:\nkey: {[i] * n}\nmin:\n", "answer": f"{i}\n\n", "algo_name": "minimum", "length": n}
            for n in lengths
            for i in range(5)
        ]
        Path(f"data/clrs_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("name", ["protocol_language", "protocol_clrs", "protocol_compgen"])
def test_a_protocol_can_be_climbed(data, name):
    ladder = read(LADDERS / f"{name}.yaml", [])
    rungs = expand(ladder, data / "cache")
    assert ladder.name == name
    assert set(rungs) == RUNGS
    assert all(rung.matched for rung in rungs.values())
    assert len(ladder.seeds) >= 3
    check(planned(rungs["lstm"], "lstm", 0))  # what is asked exists and is not what it is trained on


def test_fine_tuning_starts_from_the_same_models(data):
    first, later = (read(LADDERS / f"protocol_{name}.yaml", []) for name in ("clrs", "finetune"))
    assert later.start.ladder == first.name
    for shared in ("control", "rungs", "floors", "match", "seeds"):
        assert getattr(later, shared) == getattr(first, shared)
    assert later.run["model"] == first.run["model"]
    assert later.run["data"]["tokenizer"] == first.run["data"]["tokenizer"]
    fresh = later.model_copy(update={"start": None})
    check(planned(expand(fresh, data / "cache")["transformer"], "transformer", 0))
