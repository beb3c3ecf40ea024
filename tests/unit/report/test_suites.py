"""Other suites and halting reach the page: means and spreads by hand, gaps said, nothing where there is no evidence."""

import numpy as np
import pytest

from stepladder.core.errors import UserError
from stepladder.core.files import Corrupt, append_lines, read_json, write_json
from stepladder.report import figures, halting, page, tables
from stepladder.report.evidence import gather
from stepladder.report.suites import tables as suite_tables
from stepladder.report.verdict import judge


def plain(synthetic, folder, rungs=("plain", "act"), seeds=(0, 1), **options):
    options = {"items": 15, "curve": 6} | options
    return synthetic.ladder(folder, {name: synthetic.Rung() for name in rungs}, seeds=seeds, **options)


# ------------------------------------------------------------------------------------------------ any suite


def test_a_suite_is_a_table_by_its_field(synthetic, tmp_path):
    folder = plain(synthetic, tmp_path / "x")
    for seed in (0, 1):
        synthetic.needles(folder / f"act-s{seed}", shift=0.1 * seed)
    (shown,) = suite_tables(gather(folder))
    assert (shown["suite"], shown["by"], shown["values"]) == ("longctx", "length", [64, 256, 1024, 4096])
    assert list(shown["rungs"]) == ["act"]
    assert shown["over"] == ["depth", "kind"]
    near, _, far, beyond = shown["rungs"]["act"]
    assert near["mean"] == pytest.approx(0.9 - 64 / 2000 + 0.05)
    assert near["sd"] == pytest.approx(np.std([0, 0.1], ddof=1))
    assert (far["cells"], far["of"], far["status"]) == (6, 8, "beyond the model")
    assert (beyond["mean"], beyond["status"]) == (None, "beyond the model")
    assert tables.suite_entry(near) == "91.8 ± 7.1 %"
    assert tables.suite_entry(beyond) == "beyond the model"
    html, markdown = page.write(folder).read_text(), (folder / "report.md").read_text()
    for text in (
        "Suite: longctx",
        "91.8 ± 7.1 %",
        "beyond the model",
        "6 of 8 cells",
        "mean over depth, kind and seeds",
    ):
        assert text in html, text
    assert 'href="act-s1/results_longctx.json"' in html
    assert "| act | 91.8 ± 7.1 % |" in markdown
    assert "length 4096" in markdown
    assert "records/longctx.jsonl" in judge(gather(folder))["runs"][2]["files"]


def test_one_seed_has_no_spread_and_values_that_are_names_keep_their_order(synthetic, tmp_path):
    folder = plain(synthetic, tmp_path / "x", seeds=(0,))
    cells = [{"kind": kind, "accuracy": accuracy} for kind, accuracy in (("z", 0.5), ("a", 0.25), ("z", 1.0))]
    synthetic.suite(folder / "act-s0", "mine", cells, by="kind", note="of the plugin")
    (shown,) = suite_tables(gather(folder))
    assert shown["values"] == ["z", "a"]
    assert [tables.suite_entry(entry) for entry in shown["rungs"]["act"]] == ["75.0 %", "25.0 %"]
    assert "of the plugin." in page.write(folder).read_text()


def test_suites_without_a_field_to_go_by_or_unfinished_ones_are_left_out(synthetic, tmp_path):
    folder = plain(synthetic, tmp_path / "x")
    synthetic.suite(folder / "act-s0", "odd", [{"accuracy": 0.5}])
    write_json(folder / "act-s1" / "results_cut.json", {"suite": "cut", "status": "interrupted", "by": "x"})
    synthetic.needles(folder / "plain-s0")
    results = folder / "plain-s0" / "results_longctx.json"
    write_json(results, read_json(results) | {"cells": []})
    assert suite_tables(gather(folder)) == []
    assert "Suite:" not in page.write(folder).read_text()


def test_runs_that_were_asked_other_items_are_marked(synthetic, tmp_path):
    folder = plain(synthetic, tmp_path / "x")
    for run in ("plain-s0", "act-s0"):
        synthetic.needles(folder / run)
    path = folder / "act-s0" / "results_longctx.json"
    write_json(path, read_json(path) | {"meta": {"items_digest": "other"}})
    assert "not all runs were asked the same items" in page.write(folder).read_text()


def test_P4_records_of_any_suite_must_be_as_written_and_all_there(synthetic, tmp_path):
    folder = plain(synthetic, tmp_path / "x")
    synthetic.needles(folder / "act-s0")
    records = folder / "act-s0" / "records" / "longctx.jsonl"
    kept = records.read_text()
    records.write_text(kept.replace('"index": 1', '"index": 9'))
    with pytest.raises(Corrupt, match=r"longctx\.jsonl: line 2"):
        gather(folder)
    records.write_text("".join(kept.splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=r"is about 3 records but .* has 2; evaluate the run again"):
        gather(folder)


def test_P7_names_of_suites_and_values_stay_text(synthetic, tmp_path):
    folder = plain(synthetic, tmp_path / "x")
    nasty = "<script>alert(1)</script>|x"
    cells = [{"kind": nasty, "accuracy": None, "status": nasty}]
    synthetic.suite(folder / "act-s0", "mine", cells, by="kind", note=nasty)
    html = page.write(folder).read_text()
    assert "<script" not in html
    assert "<script" not in (folder / "report.md").read_text()


# ------------------------------------------------------------------------------------------------ halting


@pytest.fixture(scope="module")
def halted(synthetic, tmp_path_factory):
    rungs = ("plain", "latent", "act", "dead")
    folder = plain(synthetic, tmp_path_factory.mktemp("halting") / "x", rungs)
    for seed in (0, 1):
        synthetic.halting(folder / f"act-s{seed}", shift=0.02 * seed, gain=0.1 * seed)
        synthetic.halting(folder / f"latent-s{seed}", chooses=False)
        synthetic.heads(folder / f"act-s{seed}", [1e-3, 2e-3, 5e-4, 0.0, 1e-4, 3e-3])
        synthetic.heads(folder / f"dead-s{seed}", [0.0] * 6)
    page.write(folder)
    return folder


def test_exits_are_means_over_cells_and_seeds(halted):
    (row,) = halting.exits(gather(halted))
    assert (row["rung"], row["task"], row["seeds"]) == ("act", "parity", 2)
    assert row["accuracy"] == pytest.approx(0.81)
    assert row["mean_ticks"] == pytest.approx((0.5 + 0.6 + 0.8 + 0.5 + 3) / 2)
    assert row["gain"] == {"mean": pytest.approx(0.05), "sd": pytest.approx(0.1 / 2**0.5), "stderr": None}
    assert row["error"] == {"iid": pytest.approx(0.03), "ood": pytest.approx(0.2)}
    assert row["ticks_and_size"] == pytest.approx(0.4)


def test_one_seed_shows_the_standard_error_over_its_items(synthetic, tmp_path):
    folder = plain(synthetic, tmp_path / "x", seeds=(0,))
    synthetic.halting(folder / "act-s0")
    (row,) = halting.exits(gather(folder))
    assert row["gain"] == {"mean": pytest.approx(0.1), "sd": None, "stderr": pytest.approx(0.02 / 2**0.5)}
    assert tables.gain(row["gain"]) == "+10.0 ± 1.4"


def test_rungs_that_decide_are_held_against_fixed_ticks_at_equal_ticks(synthetic, tmp_path):
    """Control at 4 ticks 0.7, another rung of fixed ticks at 2 with 0.5, so 0.6 at 3, seed by seed."""
    rungs = {name: synthetic.Rung() for name in ("plain", "fewer", "other", "act")}
    folder = synthetic.ladder(tmp_path / "x", rungs, seeds=(0, 1))
    path = folder / "ladder.json"
    ladder = read_json(path)
    factors = {"plain": "control", "fewer": "model.ticks: 4 → 2", "other": "model.kind: a → b", "act": "model.policy"}
    for name, factor in factors.items():
        ladder["rungs"][name]["factor"] = factor
    write_json(path, ladder)
    for seed in (0, 1):
        for name, ticks, accuracy in (("plain", 4, 0.7), ("fewer", 2, 0.5), ("other", 3, 0.0), ("act", 3, 0.8)):
            run = folder / f"{name}-s{seed}"
            synthetic.halting(run, chooses=name == "act")
            results = read_json(run / "results_halting.json")
            for cell in results["cells"]:
                cell |= {"mean_ticks": ticks, "accuracy": accuracy + (0.1 * seed if name == "act" else 0)}
            write_json(run / "results_halting.json", results)
    (row,) = halting.exits(gather(folder))
    assert row["over_trained"] == {
        "mean": pytest.approx(0.25), "sd": pytest.approx(0.1 / 2**0.5), "stderr": None
    }  # fmt: skip
    html = page.write(folder).read_text()
    assert 'aria-label="Accuracy over executed ticks, all rungs: parity"' in html
    assert "+25.0 ± 7.1" in html
    ladder["rungs"]["fewer"]["factor"] = "model.kind: a → c"  # the control alone: nothing at 3 ticks to hold it against
    write_json(path, ladder)
    assert halting.exits(gather(folder))[0]["over_trained"] is None


def test_the_histogram_is_a_mean_of_shares_by_regime(halted):
    shares = halting.histogram(gather(halted).of("act"), "parity")
    assert shares["iid"] == pytest.approx({1: 0.5, 2: 0.3, 4: 0.2})
    assert shares["ood"] == pytest.approx({2: 0.25, 4: 0.75})
    style = figures.styles(["plain", "act"])["act"]
    bars = figures.tick_bars(shares, 4, style, "b", "Executed ticks")
    assert bars.count(f"fill: {style.colour}") == 2 * 4
    assert bars.count("opacity: 0.35") == 4  # beyond the training sizes


def test_executed_flops_stand_beside_the_declared_ones(halted):
    costs = {rung: about["cost"] for rung, about in judge(gather(halted))["rungs"].items()}
    assert costs["act"]["flops_per_token"] == 2e5
    assert (costs["act"]["flops"], costs["act"]["flops_batch"]) == (1.6e5, 1.9e5)
    assert costs["latent"]["flops"] is None  # it takes all its ticks: there is nothing else to say
    html = (halted / "report.html").read_text()
    assert "160 k executed" in html
    assert "190 k batched" in html


def test_a_dead_head_is_called_by_its_name(halted):
    heads = halting.heads(gather(halted))
    assert {rung: about["dead"] for rung, about in heads.items()} == {"act": False, "dead": True}
    assert heads["act"]["median"] == pytest.approx(7.5e-4)
    html = (halted / "report.html").read_text()
    assert html.count("no gradient reaches its head") == 1
    assert "Gradient norm of the halting heads over training" in html


def test_heads_that_are_all_dead_are_drawn_too(synthetic, tmp_path):
    folder = plain(synthetic, tmp_path / "x")
    synthetic.heads(folder / "act-s0", [0.0] * 6)
    assert "no gradient reaches its head" in page.write(folder).read_text()


def test_the_section_has_its_figures_and_its_table(halted):
    html, markdown = (halted / "report.html").read_text(), (halted / "report.md").read_text()
    for label in ("Executed ticks: act, parity", "Accuracy over executed ticks: act, parity"):
        assert f'aria-label="{label}"' in html
    assert html.count("<h2>Halting</h2>") == 1
    assert "learned − random" in html
    assert "| act | parity | 2.70 | 81.0 % |" in markdown
    assert "| latent | parity" not in markdown


def test_without_halting_there_is_no_section(synthetic, tmp_path):
    folder = plain(synthetic, tmp_path / "x")
    for run in ("plain-s0", "plain-s1"):
        synthetic.halting(folder / run, chooses=False)
    html = page.write(folder).read_text()
    assert "<h2>Halting</h2>" not in html
    assert "halting heads" not in html
    assert "## Halting" not in (folder / "report.md").read_text()


def test_the_same_files_give_the_same_bytes(halted):
    before = [(halted / name).read_bytes() for name in ("verdict.json", "report.html", "report.md")]
    page.write(halted)
    assert [(halted / name).read_bytes() for name in ("verdict.json", "report.html", "report.md")] == before


def test_metric_lines_without_a_norm_are_no_points(synthetic, tmp_path):
    folder = plain(synthetic, tmp_path / "x")
    synthetic.heads(folder / "act-s0", [1.0, None, 2.0, 1.0, 1.0, 1.0])
    append_lines(folder / "act-s0" / "metrics.jsonl", [{"step": 7, "event": "spike"}])
    assert gather(folder).runs["act", 0].head[:, 0].tolist() == [1, 3, 4, 5, 6]
