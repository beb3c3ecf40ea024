"""Figures are well-formed, deterministic, unique in their ids, and in the colours of the page."""

import re
from xml.etree import ElementTree

import pytest

from stepladder.report import figures, halting
from stepladder.report.evidence import gather
from stepladder.report.verdict import judge


@pytest.fixture(scope="module")
def evidence(synthetic, tmp_path_factory):
    nasty = '<b id="x">$x^{ --> & "quoted"\nnew line that is very long \N{ROCKET}'
    rungs = {
        "plain": synthetic.Rung(),
        nasty: synthetic.Rung(status={1: "diverged"}),
        "half": synthetic.Rung(status={1: "missing"}),
    }
    folder = synthetic.ladder(tmp_path_factory.mktemp("figures") / "f", rungs, seeds=(0, 1), items=15, curve=12)
    for seed in (0, 1):
        synthetic.depth(folder / f"plain-s{seed}", shift=0.1 * seed)
        synthetic.halting(folder / f"plain-s{seed}")
        synthetic.heads(folder / f"plain-s{seed}", [0.0, *(10.0**-k for k in range(11))])
    return gather(folder)


def draw(evidence):
    look = figures.styles(evidence.rungs)
    verdict, runs = judge(evidence), halting.choosers(evidence)["plain"]
    (row,) = verdict["halting"]["exits"]
    return {
        "learning": figures.learning_curves(evidence, look, "learning"),
        "size": figures.accuracy_by_size(evidence, "parity", look, "size"),
        "heat": figures.heat_map(evidence, "parity", "heat"),
        "forest": figures.forest(verdict, "accuracy_ood", look, "forest"),
        "depth": figures.depth_map(evidence.of("plain"), "parity", "depth"),
        "heads": figures.head_gradients(evidence, look, "heads"),
        "ticks": figures.tick_bars(halting.histogram(runs, "parity"), 4, look["plain"], "ticks", "Executed ticks"),
        "standings": figures.standings(halting.standings(evidence, "parity"), [row], look, "standings", "All rungs"),
        "exits": figures.exit_curve(row, halting.fixed(runs, "parity"), look["plain"], "exits", "Exits"),
    }


@pytest.fixture(scope="module")
def drawings(evidence):
    return draw(evidence)


def test_every_figure_is_one_well_formed_element(drawings):
    for name, svg in drawings.items():
        root = ElementTree.fromstring(svg)
        assert root.tag == "svg", name
        assert root.get("viewBox"), name
        assert root.get("aria-label"), name
        assert not [e for e in root.iter() if e.tag in ("script", "image", "metadata")], name


def test_ids_are_unique_over_a_page_and_every_reference_is_kept(drawings):
    page = "".join(drawings.values())
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    references = re.findall(r'href="#([^"]+)"', page) + re.findall(r"url\(#([^)]+)\)", page)
    assert references
    assert set(references) <= set(ids)


def test_the_same_data_give_the_same_bytes(evidence, drawings):
    assert draw(evidence) == drawings


def test_text_is_text_and_colours_follow_the_page(drawings):
    for name, svg in drawings.items():
        words = ElementTree.fromstring(svg).findall(".//text") or re.findall("<text", svg)
        assert words, name
        assert not re.search(r"#101112|#717273|#d1d2d3|#fefdfc", svg), name
    assert "var(--ink)" in drawings["heat"]


def test_nothing_outside_the_page_and_no_date(drawings):
    for svg in drawings.values():
        assert "http" not in svg
        assert not re.search(r"20\d\d-\d\d", svg)


def test_the_training_sizes_are_shaded_and_chance_is_drawn(drawings):
    assert "trained" in drawings["size"]
    assert "stroke-dasharray" in drawings["size"]


def test_depth_is_the_mean_over_seeds(drawings):
    texts = [e.text for e in ElementTree.fromstring(drawings["depth"]).iter() if e.tag.endswith("text")]
    assert "80" in texts  # size 4, one tick: 0.5 + 0.25, with shifts of 0 and 0.1
    assert {"size 4", "size 32", "16"} <= set(texts)


def test_a_gradient_of_zero_has_a_place_on_the_logarithmic_axis(drawings):
    texts = [e.text for e in ElementTree.fromstring(drawings["heads"]).iter() if e.tag.endswith("text")]
    assert {"0", "1", "1e−10"} <= set(texts)


def test_a_failed_rung_does_not_flatten_a_forest():
    limit = figures._limit([0.004, 0.005, 0.006, 4.6], margin=0.01)
    assert 0.006 < limit < 0.05
    assert figures._limit([0.1, 0.2], margin=0.02) == pytest.approx(0.22)


def test_styles_are_stable_and_distinct():
    rungs = [f"rung{n}" for n in range(15)]
    look = figures.styles(rungs)
    assert look["rung0"].css == "var(--ink)"
    assert len({(s.colour, s.line) for s in look.values()}) == 15
    assert figures.styles(rungs[:3])["rung2"] == look["rung2"]
