"""The words, on effects of known size."""

import pytest

from stepladder.core.files import read_json, write_json
from stepladder.report.evidence import gather
from stepladder.report.verdict import judge


@pytest.fixture(scope="module")
def verdict(synthetic, tmp_path_factory):
    r = synthetic.Rung
    rungs = {
        "plain": r(),
        "winner": r(iid=0.85, ood=0.6, bits=1.8, seconds=150),
        "loser": r(iid=0.5, ood=0.2, bits=2.5, seconds=300),
        "noisy": r(spread=0.08),
        "fat": r(iid=0.95, residual=0.04, params=104_000),
        "lstm": r(iid=0.2, floor=True),
        "deep": r(flops=2.2e5),
    }
    folder = synthetic.ladder(
        tmp_path_factory.mktemp("verdict") / "words", rungs, seeds=(0, 1, 2, 3), items=150, curve=5
    )
    return judge(gather(folder))


def words(verdict, rung):
    return {c["metric"]: c["word"] for c in verdict["rungs"][rung]["primary"]}


def test_large_effects_are_told(verdict):
    assert words(verdict, "winner") == {
        "accuracy_iid": "better",
        "accuracy_ood": "better",
        "bits_per_byte:pydoc": "better",
    }
    assert set(words(verdict, "loser").values()) == {"worse"}


def test_a_difference_is_rung_minus_control(verdict):
    iid, _, bits = verdict["rungs"]["winner"]["primary"]
    assert iid["difference"] == pytest.approx(0.15, abs=0.04)
    assert iid["difference"] == pytest.approx(iid["rung"] - iid["control"])
    assert iid["low"] < iid["difference"] < iid["high"]
    assert bits["difference"] == pytest.approx(-0.2, abs=0.01)
    assert not bits["higher_is_better"]


def test_no_difference_is_equivalent_or_open_with_a_number_of_seeds(verdict):
    found = words(verdict, "noisy")
    assert found["bits_per_byte:pydoc"] == "equivalent"
    assert found["accuracy_iid"] == "inconclusive"
    iid = verdict["rungs"]["noisy"]["primary"][0]
    assert iid["needs"] >= 1
    assert iid["detectable"] > abs(iid["difference"])


def test_the_family_is_all_judged_rungs_times_primary_measures(verdict):
    assert verdict["family"] == 4 * 3  # winner, loser, noisy, deep; not fat (not matched), not lstm (a floor)
    for rung in ("winner", "noisy"):
        for c in verdict["rungs"][rung]["primary"]:
            assert c["p_holm"] >= c["p"]


def test_C7_unequal_cost_refuses_the_verdict_and_shows_the_numbers(verdict):
    assert set(words(verdict, "fat").values()) == {"not matched"}
    fat = verdict["rungs"]["fat"]
    assert fat["residual"] == pytest.approx(0.04)
    assert fat["primary"][0]["difference"] > 0.15
    assert fat["marks"] == ["not parameter-matched (+4.0 % parameters)"]
    assert "no verdict" in fat["answer"]


def test_other_flops_per_token_are_marked_but_judged(verdict):
    assert verdict["rungs"]["deep"]["marks"] == ["not FLOP-matched (+10.0 % FLOPs per token)"]
    assert "not matched" not in words(verdict, "deep").values()


def test_a_floor_is_shown_and_not_judged(verdict):
    floor = verdict["rungs"]["lstm"]
    assert floor["role"] == "floor"
    assert set(words(verdict, "lstm").values()) == {"not judged"}
    assert floor["criteria"] == []
    assert floor["primary"][0]["difference"] < -0.3


def test_criteria(verdict):
    names = ["at least 5 points", "better beyond", "at most twice", "perplexity at most 1.1"]
    winner, loser = ([c["word"] for c in verdict["rungs"][r]["criteria"]] for r in ("winner", "loser"))
    assert winner == ["met", "met", "met", "met"]
    assert loser == ["not met", "not met", "not met", "not met"]
    for criterion, name in zip(verdict["rungs"]["winner"]["criteria"], names, strict=True):
        assert criterion["name"].startswith(name)
    time = verdict["rungs"]["winner"]["criteria"][2]
    assert time["value"] == pytest.approx(1.5, abs=0.01)
    perplexity = verdict["rungs"]["loser"]["criteria"][3]
    assert perplexity["value"] == pytest.approx(2**0.5, rel=0.02)  # half a bit per byte more, a token is a byte


def test_answers_say_the_word_and_the_number(verdict):
    answer = verdict["rungs"]["winner"]["answer"]
    assert answer.startswith("Better in accuracy at training sizes (+1")
    assert "95 % interval" in answer
    assert "1 is better than the control" in verdict["headline"]
    assert "needs" in verdict["rungs"]["noisy"]["answer"]


def test_tasks_are_a_family_of_their_own(verdict):
    tasks = verdict["rungs"]["winner"]["tasks"]
    assert [c["metric"] for c in tasks] == [
        f"accuracy_{regime}:{task}" for regime in ("iid", "ood") for task in ("addition", "parity")
    ]
    assert all(c["word"] for c in tasks)


def test_verdict_is_plain_json(verdict, tmp_path):
    write_json(tmp_path / "verdict.json", verdict)
    assert read_json(tmp_path / "verdict.json") == verdict


def small(synthetic, folder, rungs, **options):
    options = {"items": 40, "curve": 5, "seeds": (0, 1, 2)} | options
    return synthetic.ladder(folder, rungs, **options)


def test_an_unfinished_ladder_claims_nothing_and_says_what_is_missing(synthetic, tmp_path):
    rungs = {
        "plain": synthetic.Rung(),
        "done": synthetic.Rung(iid=0.95),
        "half": synthetic.Rung(iid=0.95, status={2: "missing"}),
        "none": synthetic.Rung(status=dict.fromkeys((0, 1, 2), "missing")),
    }
    verdict = judge(gather(small(synthetic, tmp_path / "x", rungs)))
    assert words(verdict, "done")["accuracy_iid"] == "better"
    assert set(words(verdict, "half").values()) == {"no claim"}
    assert verdict["rungs"]["half"]["primary"][0]["seeds"] == [0, 1]
    assert "seed 2 has no result" in verdict["rungs"]["half"]["answer"]
    assert verdict["rungs"]["none"]["primary"][0]["difference"] is None
    assert "4 of 12 runs have no result" in verdict["headline"]


def test_a_missing_control_claims_nothing_about_anybody(synthetic, tmp_path):
    rungs = {"plain": synthetic.Rung(status={1: "started"}), "loop": synthetic.Rung(iid=0.95)}
    verdict = judge(gather(small(synthetic, tmp_path / "x", rungs)))
    assert set(words(verdict, "loop").values()) == {"no claim"}


def test_nothing_has_run(synthetic, tmp_path):
    status = dict.fromkeys((0, 1, 2), "missing")
    rungs = {"plain": synthetic.Rung(status=status), "loop": synthetic.Rung(status=status)}
    verdict = judge(gather(small(synthetic, tmp_path / "x", rungs)))
    assert verdict["headline"] == "Nothing can be said yet: 6 of 6 runs have no result."


def test_a_failed_control_seed_counts_for_the_rung_and_is_said(synthetic, tmp_path):
    rungs = {"plain": synthetic.Rung(status={0: "diverged"}), "loop": synthetic.Rung()}
    c = judge(gather(small(synthetic, tmp_path / "x", rungs)))["rungs"]["loop"]["primary"][0]
    assert c["control_by_seed"][0] == 0
    assert any("plain: seed 0 failed" in note for note in c["notes"])


def test_items_found_in_training_block_claims_on_their_measure(synthetic, tmp_path):
    rungs = {"plain": synthetic.Rung(), "loop": synthetic.Rung(iid=0.95, bits=1.5, overlap=3)}
    loop = judge(gather(small(synthetic, tmp_path / "x", rungs)))["rungs"]["loop"]
    assert [c["word"] for c in loop["primary"]] == ["better", "inconclusive", "no claim"]
    assert "No claim in bits per byte on pydoc (−0.5" in loop["answer"]
    assert "3 of the evaluation items occur in the training data" in loop["answer"]
    assert [c["word"] for c in loop["criteria"]] == ["met", "unclear", "met", "no claim"]


def test_another_tokenizer_compares_by_the_whole_text(synthetic, tmp_path):
    rungs = {"plain": synthetic.Rung(), "bpe": synthetic.Rung(bits=1.8, tokenizer="bpe-512")}
    verdict = judge(gather(small(synthetic, tmp_path / "x", rungs)))
    bits = verdict["rungs"]["bpe"]["primary"][2]
    assert (bits["word"], bits["items"]) == ("better", 1)
    assert bits["difference"] == pytest.approx(-0.2, abs=0.01)


def test_another_stretch_of_text_supports_no_claim(synthetic, tmp_path):
    rungs = {"plain": synthetic.Rung(), "cut": synthetic.Rung(bits=1.8, tokenizer="short")}
    bits = judge(gather(small(synthetic, tmp_path / "x", rungs)))["rungs"]["cut"]["primary"][2]
    assert bits["word"] == "no claim"
    assert "other stretches of the text" in bits["refusal"]


def test_a_ladder_that_matches_nothing_is_judged_and_marked(synthetic, tmp_path):
    rungs = {"plain": synthetic.Rung(), "big": synthetic.Rung(iid=0.95, params=200_000, residual=1.0)}
    verdict = judge(gather(small(synthetic, tmp_path / "x", rungs, match="none")))
    assert words(verdict, "big")["accuracy_iid"] == "better"
    assert verdict["rungs"]["big"]["marks"] == ["not parameter-matched (+100.0 % parameters)"]


def test_a_match_is_measured_not_believed(synthetic, tmp_path):
    rungs = {"plain": synthetic.Rung(), "loop": synthetic.Rung(params=103_000)}  # says residual 0
    verdict = judge(gather(small(synthetic, tmp_path / "x", rungs)))
    assert verdict["rungs"]["loop"]["residual"] == pytest.approx(0.03)
    assert set(words(verdict, "loop").values()) == {"not matched"}


def test_undeclared_match_is_refused(synthetic, tmp_path):
    rungs = {"plain": synthetic.Rung(), "loop": synthetic.Rung(extra={"residual": None, "matched": None})}
    verdict = judge(gather(small(synthetic, tmp_path / "x", rungs, match="state")))
    assert set(words(verdict, "loop").values()) == {"not matched"}


def test_notes_on_chance_ceiling_and_disagreeing_seeds(synthetic, tmp_path):
    rungs = {
        "plain": synthetic.Rung(iid=1.0, ood=0.0, spread=0),
        "loop": synthetic.Rung(iid=1.0, ood=0.0, spread=0),
        "grokker": synthetic.Rung(iid=0.6, spread=0.4),
    }
    rungs = judge(gather(small(synthetic, tmp_path / "x", rungs)))["rungs"]
    iid, ood, _ = rungs["loop"]["primary"]
    assert "both near 100 %: too easy to tell them apart" in iid["notes"]
    assert "both at chance: neither learnt it" in ood["notes"]
    assert any("seeds disagree" in note for note in rungs["grokker"]["primary"][0]["notes"])


def test_a_real_but_small_difference_is_equivalent_with_a_note(synthetic, tmp_path):
    rungs = {"plain": synthetic.Rung(), "loop": synthetic.Rung(bits=1.97)}
    folder = small(synthetic, tmp_path / "x", rungs, margin_bits=0.1)
    bits = judge(gather(folder))["rungs"]["loop"]["primary"][2]
    assert bits["p_holm"] < 0.05
    assert bits["word"] == "equivalent"
    assert "a real difference, smaller than the margin" in bits["notes"]


def test_training_on_another_device_is_not_timed(synthetic, tmp_path):
    rungs = {"plain": synthetic.Rung(), "loop": synthetic.Rung()}
    folder = small(synthetic, tmp_path / "x", rungs)
    for seed in range(3):
        write_json(folder / f"loop-s{seed}" / "provenance.json", {"sessions": [{"device": "H100"}]})
    time = judge(gather(folder))["rungs"]["loop"]["criteria"][2]
    assert (time["word"], time["value"]) == ("not measured", None)
    assert "different devices: H100, cpu" in time["note"]


def test_without_text_or_tasks(synthetic, tmp_path):
    rungs = {"plain": synthetic.Rung(), "loop": synthetic.Rung()}
    verdict = judge(gather(small(synthetic, tmp_path / "x", rungs, text=False)))
    assert set(words(verdict, "loop")) == {"accuracy_iid", "accuracy_ood"}
    assert verdict["rungs"]["loop"]["criteria"][3]["word"] == "not measured"
    verdict = judge(gather(small(synthetic, tmp_path / "y", rungs, grid={})))
    assert set(words(verdict, "loop")) == {"bits_per_byte:pydoc"}
