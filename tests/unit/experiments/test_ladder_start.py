"""Ladders that start from a climbed one: every run from its own counterpart, or one sentence that says what to do."""

import json

import pytest

from stepladder.core.errors import UserError
from stepladder.core.files import read_json, write_json
from stepladder.experiments.climb import describe, planned
from stepladder.experiments.ladder import expand, read
from stepladder.models.weights import weights_digest
from stepladder.run import load
from stepladder.train.session import train

LADDER = {
    "name": "first",
    "control": "plain",
    "seeds": [0, 1],
    "run": {
        "model": {"kind": "transformer", "width": 16, "depth": 1, "heads": 2},
        "data": {
            "sequence": 32,
            "tokenizer": "alphabet",
            "sources": [{"kind": "task", "task": {"kind": "parity", "train": [2, 8]}}],
        },
        "train": {"steps": 2, "batch": 4, "device": "cpu"},
    },
    "rungs": {"plain": {}, "floor": {"model.kind": "identity"}},
}
SECOND = {**LADDER, "name": "second", "start": {"ladder": "first"}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of runs in which the first ladder has been climbed."""
    root = tmp_path_factory.mktemp("runs")
    (root / "ladder.json").write_text(json.dumps(LADDER))
    ladder = read(root / "ladder.json", [])
    rungs = expand(ladder, root / "cache")
    for name, rung in rungs.items():
        for seed in ladder.seeds:
            train(planned(rung, name, seed), root / "first", quiet=True)
    write_json(root / "first" / "ladder.json", describe(ladder, rungs))
    (root / "ladder.json").unlink()
    return root


@pytest.fixture
def grow(runs, tmp_path):
    """Expand the second ladder, which starts from the first."""

    def build(*overrides, root=runs, **changes):
        path = tmp_path / "second.json"
        path.write_text(json.dumps({**SECOND, **changes}))
        return expand(read(path, list(overrides)), tmp_path / "cache", root)

    return build


def test_every_run_starts_from_its_counterpart(grow, runs, tmp_path):
    later = {"sources": [{"kind": "task", "task": {"kind": "parity", "train": [2, 4]}}]}
    rungs = grow(
        run={**LADDER["run"], "data": {**LADDER["run"]["data"], **later}},
        start={"ladder": "first", "adapters": {"rank": 2}},
    )
    digests = set()
    for name, rung in rungs.items():
        for seed in (0, 1):
            run, base = planned(rung, name, seed), runs / "first" / f"{name}-s{seed}"
            assert run.start.run == str(base)
            assert run.start.weights == weights_digest(load(base).model)
            assert run.start.adapters.rank == 2
            assert (run.seed, run.model) == (seed, load(base).run.model)
            digests.add(run.start.weights)
    assert len(digests) == 4
    home = train(planned(rungs["floor"], "floor", 1), tmp_path, quiet=True)
    # "0", "1" and what else the first ladder's alphabet has, whatever the second one's would be.
    assert load(home).tokenizer.fingerprint == load(runs / "first" / "floor-s1").tokenizer.fingerprint
    assert read_json(home / "summary.json")["steps"] == 2


def test_a_directory_does_as_well_as_a_name(grow, runs, tmp_path):
    assert grow("start.ladder=" + str(runs / "first"), root=tmp_path)["plain"].starts == grow()["plain"].starts


REFUSED = [
    (["start.ladder=absent"], "second starts from 'absent', and .*absent is no ladder; climb that first"),
    (["seeds=[0, 2]"], "has no rung 'plain' with seed 2; climb that with it first"),
    (["rungs.loop={model.kind: shared_loop}"], "has no rung 'loop' with seed 0"),
    (["run.model.width=24"], r"rung 'plain' has model.width = 24, and in the ladder 'first', .* 16; give the same"),
    (["run.data.tokenizer=byte"], "data.tokenizer is 'byte' as configured, but .* 'alphabet'"),
    (["start.adapters.rank=16"], "rung 'plain': adapters of rank 16 would be no smaller"),
    (["start.adapter.rank=2"], "did you mean 'adapters'"),
]


@pytest.mark.parametrize(("overrides", "says"), REFUSED)
def test_what_cannot_start_is_refused_in_a_sentence(grow, overrides, says):
    with pytest.raises(UserError, match=says) as caught:
        grow(*overrides)
    assert "\n" not in str(caught.value)


def test_a_run_that_was_not_trained_to_its_end_is_refused(grow, runs, tmp_path):
    summary = runs / "first" / "floor-s1" / "summary.json"
    before = read_json(summary)
    try:
        for change in ({"status": "interrupted"}, {"hash": "0"}):
            write_json(summary, {**before, **change})
            with pytest.raises(UserError, match="floor-s1 has not been trained to its end"):
                grow()
    finally:
        write_json(summary, before)
