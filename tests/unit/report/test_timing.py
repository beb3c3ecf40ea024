"""Times side by side: ratios round by round, the criterion that follows, and files that do not hold together."""

import math

import pytest

from stepladder.core.errors import UserError
from stepladder.core.files import read_json, write_json
from stepladder.report import page
from stepladder.report.evidence import gather
from stepladder.report.timing import read
from stepladder.report.verdict import judge


@pytest.fixture
def folder(synthetic, tmp_path):
    rungs = {"plain": synthetic.Rung(), "slow": synthetic.Rung(seconds=500), "fat": synthetic.Rung(residual=0.5)}
    return synthetic.ladder(tmp_path / "x", rungs, items=20, curve=5)


def time_of(folder, rung):
    return judge(gather(folder))["rungs"][rung]["criteria"][2]


def test_without_a_file_the_runs_seconds_stand_and_it_is_said(folder):
    found = time_of(folder, "slow")
    assert found["value"] == pytest.approx(5, abs=0.2)
    assert found["note"] == "the runs were not timed side by side"
    assert gather(folder).timing is None
    assert "which were not timed side by side" in page.write(folder).read_text()


def test_ratios_are_taken_within_rounds(synthetic, folder):
    """A machine twice as slow in one round changes no ratio; the runs' own seconds no longer count."""
    synthetic.timing(folder, {"plain": [0.1, 0.2, 0.1, 0.1], "slow": [0.15, 0.3, 0.16, 0.14]})
    found = time_of(folder, "slow")
    assert found["value"] == pytest.approx(math.exp((2 * math.log(1.5) + math.log(1.6) + math.log(1.4)) / 4))
    assert found["low"] < found["value"] < found["high"] < 2
    assert (found["word"], found["rounds"], found["note"]) == ("met", 4, "4 interleaved rounds on H100")
    verdict = judge(gather(folder))
    assert verdict["rungs"]["plain"]["cost"]["tokens_per_s"] == pytest.approx(2048 / 0.1 / 2**0.25)
    assert verdict["rungs"]["fat"]["cost"]["tokens_per_s"] is None  # it was not among them, and nothing else compares
    text = page.write(folder).read_text()
    assert "in 4 interleaved rounds of 8 steps on H100" in text
    assert "4 interleaved rounds on H100" in text
    assert "not timed side by side" in time_of(folder, "fat")["note"]
    assert read_json(folder / "verdict.json")["timing"]["seconds"]["slow"][1] == 0.3


@pytest.mark.parametrize(
    ("times", "word"),
    [([0.30, 0.31, 0.32], "not met"), ([0.10, 0.31, 0.19], "unclear"), ([0.1, 0.1], "no claim"), ([0.1], "no claim")],
)
def test_words_follow_the_interval_over_rounds(synthetic, folder, times, word):
    synthetic.timing(folder, {"plain": [0.1] * len(times), "slow": times})
    assert time_of(folder, "slow")["word"] == word


def test_an_unmatched_rung_stays_unmatched_and_an_unfinished_one_has_its_time(synthetic, tmp_path, folder):
    synthetic.timing(folder, {"plain": [0.1, 0.1, 0.1], "fat": [0.1, 0.11, 0.1]})
    assert time_of(folder, "fat")["word"] == "not matched"
    rungs = {"plain": synthetic.Rung(), "slow": synthetic.Rung(status={1: "missing"})}
    half = synthetic.ladder(tmp_path / "half", rungs, items=20, curve=5)
    synthetic.timing(half, {"plain": [0.1, 0.1, 0.1], "slow": [0.1, 0.11, 0.1]})
    words = [c["word"] for c in judge(gather(half))["rungs"]["slow"]["criteria"]]
    assert words[:3] == ["no claim", "no claim", "met"]


def test_what_could_not_be_timed_says_why(synthetic, folder):
    synthetic.timing(folder, {"plain": [0.1] * 3, "slow": []}, errors={"slow": "out of memory"})
    found = time_of(folder, "slow")
    assert (found["rounds"], found["note"]) == (0, "the runs were not timed side by side (out of memory)")
    assert "slow could not be timed (out of memory)" in page.write(folder).read_text()
    write_json(folder / "timing.json", {"device": None, "rounds": 5, "steps": 1, "tokens": None, "seconds": {}})
    assert gather(folder).timing.seconds == {}
    assert "not timed side by side" in page.write(folder).read_text()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seconds": None}, "'seconds' .* is missing or not a mapping"),
        ({"seconds": {"plain": [0.1, 0.2]}}, "the seconds of 'plain' are not 3 numbers above 0"),
        ({"seconds": {"plain": [0.1, 0.2, 0.0]}}, "the seconds of 'plain' are not 3 numbers above 0"),
        ({"seconds": {"plain": [0.1, 0.2, "fast"]}}, "the seconds of 'plain' are not 3 numbers above 0"),
        ({"seconds": {"plan": [0.1, 0.2, 0.3]}}, "'plan' is not one of the rungs — did you mean 'plain'"),
        ({"device": ""}, "'device' is missing"),
        ({"rounds": 2.5}, "'rounds' is missing or not a whole number above 0"),
        ({"steps": 0}, "'steps' is missing or not a whole number above 0"),
        ({"tokens": True}, "'tokens' is missing or not a whole number above 0"),
        ({"errors": ["x"]}, "'seconds' .* is missing or not a mapping"),
    ],
)
def test_a_malformed_file_is_refused_with_the_way_out(synthetic, folder, change, sentence):
    synthetic.timing(folder, {"plain": [0.1, 0.2, 0.3]}, **{})
    write_json(folder / "timing.json", {**read_json(folder / "timing.json"), **change})
    with pytest.raises(UserError, match=rf"timing\.json: {sentence}.*; delete it, and climb the ladder again"):
        gather(folder)


def test_a_list_is_no_timing(tmp_path):
    (tmp_path / "timing.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="it is no mapping"):
        read(tmp_path / "timing.json", ["plain"])
