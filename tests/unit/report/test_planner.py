"""Planners on the page: means and spreads by hand, an excerpt in colour, nothing without a planner."""

import math

import pytest

from stepladder.report import page, plan_figures, planner, tables
from stepladder.report.evidence import gather


def diagnostics(shift=0.0, plans=3, stderr=0.01):
    """What a run's suite ``planner`` states about one text."""
    pairs = [[0.0 if i == j else 0.2 + 0.1 * (i + j) for j in range(plans)] for i in range(plans)]
    lost = {"more": 0.3 + shift, "stderr": stderr}
    cell = {
        "source": "novels",
        "tokens": 100,
        "chunks": 9,
        "plans": plans,
        "usage": [1 / plans] * plans,
        "utilization": 0.8 + shift,
        "persistence": 0.6,
        "entropy": 0.4,
        "entropy_by_place": [0.4, 0.3],
        "chunk_mi": 0.5,
        "token_mi": {"mean": 0.1, "stderr": 0.01},
        "divergence": {
            "mean": 0.4,
            "least": 0.3 - shift,
            "most": 0.5,
            "by_usage": 0.4,
            "bound": math.log(2),
            "stderr": 0.01,
            "pairs": pairs,
        },
        "forecast": {"nats": 0.5, "nats_of_usage": 0.6, "names": 0.7},
        "nll": 2.0,
        "forced": [2.5] * plans,
        "ablated": {"uniform": lost, "prior": {"more": None, "stderr": None}},
        "words": [["<b>", "a"]] * plans,
        "excerpt": {
            "tokens": ["a", "<i>", "⏎"],
            "credit": [[0.9, 0.1, 0.0][:plans]] * 2 + [[0.2, 0.8, 0.0][:plans]],
            "starts": [0, 1],
            "plans": [[1 / plans] * plans] * 2,
        },
    }
    chain = {"moves": pairs, "dwell": [None, *[2.0] * (plans - 1)]}
    return {"cells": [cell], "chain": chain}


@pytest.fixture
def planned(synthetic, tmp_path):
    def build(seeds=(0, 1), **fields):
        folder = synthetic.ladder(
            tmp_path / "x", {"plain": synthetic.Rung(), "apelr": synthetic.Rung()}, seeds=seeds, items=20
        )
        for seed in seeds:
            stated = diagnostics(shift=0.02 * seed, **fields)
            synthetic.suite(folder / f"apelr-s{seed}", "planner", stated.pop("cells"), **stated)
        return folder

    return build


def test_rows_are_means_over_seeds(planned):
    (row,) = planner.rows(gather(planned()))
    assert (row["rung"], row["source"], row["seeds"]) == ("apelr", "novels", 2)
    assert row["utilization"] == pytest.approx(0.81)
    assert row["divergence"]["least"] == pytest.approx(0.28)
    assert row["lost"]["uniform"] == {"mean": pytest.approx(0.31), "sd": pytest.approx(0.02 / 2**0.5), "stderr": None}
    assert row["lost"]["prior"] == {"mean": None, "sd": None, "stderr": None}
    assert tables.lost(row["lost"]["uniform"]) == "+0.310 ± 0.014"
    assert tables.lost(row["lost"]["prior"]) == "–"


def test_one_seed_shows_the_error_over_its_rows(planned):
    (row,) = planner.rows(gather(planned(seeds=(0,))))
    assert tables.lost(row["lost"]["uniform"]) == "+0.300 ± 0.010"


def test_the_section_has_table_excerpt_cards_and_drawings(planned):
    folder = planned()
    html = page.write(folder).read_text()
    assert html.count("<h2>Planner</h2>") == 1
    for label in ("Belief at the starts of chunks", "Divergence of plans", "Moves"):
        assert html.count(f'aria-label="{label}: apelr, novels"') == 1
    assert "plan 0, 90.0 %" in html
    assert "plan 1, 80.0 %" in html
    assert "<i>" not in html  # tokens are text
    assert "&lt;i&gt;" in html
    assert "Suite: planner" not in html
    assert "| apelr | novels | 81.0 % | 60.0 % | 0.400 |" in (folder / "report.md").read_text()
    before = [(folder / name).read_bytes() for name in ("report.html", "verdict.json")]
    page.write(folder)
    assert [(folder / name).read_bytes() for name in ("report.html", "verdict.json")] == before


def test_many_plans_have_colours_of_their_own():
    for plans in (1, 7, 8, 32):
        assert len(set(plan_figures.palette(plans))) == plans


def test_without_planners_there_is_no_section(synthetic, tmp_path):
    folder = synthetic.ladder(
        tmp_path / "x", {"plain": synthetic.Rung(), "other": synthetic.Rung()}, seeds=(0, 1), items=20
    )
    assert "<h2>Planner</h2>" not in page.write(folder).read_text()
    assert "## Planner" not in (folder / "report.md").read_text()
