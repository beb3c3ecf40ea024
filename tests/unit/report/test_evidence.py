"""Files are believed only when they hold together."""

import json

import numpy as np
import pytest

from stepladder.core.errors import UserError
from stepladder.core.files import Corrupt, append_lines, read_json, read_lines, write_json
from stepladder.report.evidence import Cell, gather


@pytest.fixture
def folder(synthetic, tmp_path):
    rungs = {"plain": synthetic.Rung(), "loop": synthetic.Rung(iid=0.9)}
    return synthetic.ladder(tmp_path / "small", rungs, seeds=(0, 1), items=20, curve=5)


def rewrite(path, change):
    """Records changed with a chain that holds: what a careful forger would leave."""
    lines = [change(dict(line)) for line in read_lines(path)]
    path.unlink()
    append_lines(path, [line for line in lines if line is not None])


def test_outcomes_are_those_of_the_records(folder):
    evidence = gather(folder)
    assert evidence.rungs == ["plain", "loop"]
    assert evidence.sources == ["pydoc"]
    cell = Cell("parity", 16, "ood")
    assert cell in evidence.cells
    assert len(evidence.cells) == 8
    assert evidence.trained == {"parity": (1, 8), "addition": (1, 3)}
    lines = read_lines(folder / "loop-s1" / "records" / "algorithmic.jsonl")
    right = [r["correct"] for r in lines if (r["task"], r["size"]) == ("parity", 16)]
    np.testing.assert_array_equal(evidence.accuracy("loop", [0, 1], cell)[1], np.array(right, dtype=float))
    stated = read_json(folder / "loop-s1" / "results_likelihood.json")["likelihood"][0]["bits_per_byte"]
    assert evidence.bits("loop", [0, 1], "pydoc")[1].mean() == pytest.approx(stated)
    assert evidence.runs["loop", 1].ticks == 2.0
    assert len(evidence.runs["loop", 1].files["records/algorithmic.jsonl"]) == 64


def test_order_of_the_records_does_not_matter(folder):
    before = gather(folder).accuracy("loop", [0], Cell("parity", 4, "iid"))
    path = folder / "loop-s0" / "records" / "algorithmic.jsonl"
    lines = read_lines(path)
    path.unlink()
    append_lines(path, lines[::-1])
    np.testing.assert_array_equal(gather(folder).accuracy("loop", [0], Cell("parity", 4, "iid")), before)


def test_failed_runs_score_worst_and_pending_runs_do_not_count(synthetic, tmp_path):
    rungs = {
        "plain": synthetic.Rung(),
        "a": synthetic.Rung(status={0: "diverged", 1: "failed"}),
        "b": synthetic.Rung(status={0: "missing", 1: "started", 2: "interrupted"}),
    }
    evidence = gather(synthetic.ladder(tmp_path / "x", rungs, items=10, curve=5))
    assert evidence.seeds_decided("a") == [0, 1, 2]
    assert evidence.seeds_decided("b") == []
    outcomes = evidence.accuracy("a", [0, 1, 2], Cell("parity", 4, "iid"))
    assert outcomes[:2].sum() == 0
    assert outcomes[2].sum() > 0
    np.testing.assert_allclose(evidence.bits("a", [0, 2], "pydoc").mean(axis=1), [8.0, 2.0], atol=0.1)
    assert [evidence.runs["b", s].status for s in (0, 1, 2)] == ["missing", "unfinished", "interrupted"]


def test_trained_but_not_evaluated_is_pending(folder):
    (folder / "loop-s0" / "results_likelihood.json").unlink()
    results = read_json(folder / "loop-s1" / "results_algorithmic.json")
    write_json(folder / "loop-s1" / "results_algorithmic.json", results | {"status": "interrupted"})
    runs = gather(folder).runs
    assert runs["loop", 0].status == runs["loop", 1].status == "not evaluated"
    assert runs["loop", 0].pending
    assert "interrupted" in runs["loop", 1].reason


def test_infinite_loss_of_an_item_counts_as_worst(folder):
    for run in ("plain-s0", "plain-s1", "loop-s0", "loop-s1"):
        path = folder / run / "records" / "likelihood.jsonl"
        rewrite(path, lambda line: line | {"nll": None})
        results = read_json(folder / run / "results_likelihood.json")
        results["likelihood"][0]["bits_per_byte"] = 8.0
        write_json(folder / run / "results_likelihood.json", results)
    assert gather(folder).bits("loop", [0], "pydoc").mean() == pytest.approx(8)


def test_a_changed_record_breaks_the_chain(folder):
    path = folder / "loop-s0" / "records" / "algorithmic.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    number = next(n for n, line in enumerate(lines) if '"correct": false' in line)
    lines[number] = lines[number].replace('"correct": false', '"correct": true')
    path.write_text("".join(lines))
    with pytest.raises(Corrupt, match=rf"algorithmic\.jsonl: line {number + 1}"):
        gather(folder)


def test_records_and_stated_results_must_agree(folder):
    rewrite(folder / "loop-s0" / "records" / "algorithmic.jsonl", lambda line: line | {"correct": True})
    with pytest.raises(UserError, match=r"results_algorithmic\.json: accuracy of addition, 2, iid .* edited"):
        gather(folder)


def test_records_missing_at_the_end_are_noticed(folder):
    path = folder / "loop-s0" / "records" / "algorithmic.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))
    with pytest.raises(UserError, match=r"\(n = 20\) but its records give .* \(n = 17\)"):
        gather(folder)


def test_results_without_records_are_refused(folder):
    (folder / "loop-s0" / "records" / "algorithmic.jsonl").unlink()
    with pytest.raises(UserError, match="no records beside it"):
        gather(folder)


@pytest.mark.parametrize("name", ["items_digest", "grid_version", "decoding"])
def test_runs_under_other_conditions_are_not_compared(folder, name):
    path = folder / "loop-s1" / "results_algorithmic.json"
    results = read_json(path)
    results["meta"][name] = "other"
    write_json(path, results)
    with pytest.raises(UserError, match=r"plain-s0 and loop-s1 were evaluated on .* nothing can be compared"):
        gather(folder)


def test_other_items_are_noticed_without_a_digest(folder):
    rewrite(
        folder / "loop-s0" / "records" / "algorithmic.jsonl", lambda line: line | {"question": "x" + line["question"]}
    )
    with pytest.raises(UserError, match=r"different items \(parity, 4, iid\)"):
        gather(folder)


def test_a_record_of_another_format_is_refused(folder):
    rewrite(folder / "loop-s0" / "records" / "algorithmic.jsonl", lambda line: {"task": line["task"]})
    with pytest.raises(UserError, match="loop-s0: a record or result has no 'size'"):
        gather(folder)


def test_not_a_ladder(tmp_path):
    with pytest.raises(UserError, match=r"has no ladder\.json"):
        gather(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"control": "plan"}, "'plan' is not one of the rungs — did you mean 'plain'"),
        ({"seeds": []}, "at least one"),
        ({"seeds": [1, 1]}, "different numbers"),
        ({"rungs": []}, "'rungs' is missing or not a dict"),
    ],
)
def test_a_malformed_ladder_is_one_sentence(folder, change, words):
    ladder = read_json(folder / "ladder.json")
    (folder / "ladder.json").write_text(json.dumps(ladder | change))
    with pytest.raises(UserError, match=r"ladder\.json") as caught:
        gather(folder)
    assert words in str(caught.value)


def test_a_run_that_is_not_the_declared_one_is_pending(folder):
    ladder = read_json(folder / "ladder.json")
    summaries = {rung: read_json(folder / f"{rung}-s0" / "summary.json")["hash"] for rung in ("plain", "loop")}
    write_json(folder / "ladder.json", {**ladder, "hashes": {"plain": {"0": summaries["plain"]}, "loop": {"0": "x"}}})
    evidence = gather(folder)
    assert evidence.runs["plain", 0].complete
    other = evidence.runs["loop", 0]
    assert (other.status, other.reason, other.pending) == ("missing", "holds another run", True)
    assert other.summary == {}
    assert evidence.runs["loop", 1].complete  # nothing is declared about it
    assert evidence.seeds_decided("loop") == [1]


def test_what_is_said_of_images_is_compared_like_answers(folder):
    before = gather(folder)
    for run in folder.glob("*-s*"):
        for name in ("results_{}.json", "records/{}.jsonl"):
            (run / name.format("algorithmic")).rename(run / name.format("vision"))
    after = gather(folder)
    assert after.cells == before.cells
    assert after.runs["loop", 1].meta.keys() == {"vision", "likelihood"}
    for cell in before.cells:
        assert (after.runs["loop", 1].correct[cell] == before.runs["loop", 1].correct[cell]).all()
    rewrite(folder / "loop-s0" / "records" / "vision.jsonl", lambda line: line | {"correct": True})
    with pytest.raises(UserError, match=r"results_vision\.json: accuracy of addition, 2, iid .* edited"):
        gather(folder)
