"""Statistics: known answers, consistency, and calibration by simulation."""

import math

import numpy as np
import pytest

from stepladder.core import stats
from stepladder.core.keys import key


def crossed(rng, seeds, items, seed_sd, item_sd, noise_sd, cells=1):
    """Cells of differences whose true mean is 0, with the three components of variance."""
    seed = rng.normal(0, seed_sd, (seeds, 1))
    shape = (seeds, items)
    return [seed + rng.normal(0, item_sd, (1, items)) + rng.normal(0, noise_sd, shape) for _ in range(cells)]


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(
    "sds", [(0, 0, 0.7), (0.02, 0, 0.7), (0.05, 0, 0.7), (0.05, 0.3, 0.3), (0.1, 0.3, 0.1), (0, 0.5, 0.5)]
)
def test_interval_covers_and_test_has_its_level(seeds, sds):
    rng = key(3, "coverage", seeds, str(sds)).generator()
    draws = [stats.paired_difference(crossed(rng, seeds, 100, *sds)) for _ in range(800)]
    covered = np.mean([low <= 0 <= high for low, high in (d.interval() for d in draws)])
    false_positives = np.mean([d.p() < 0.05 for d in draws])
    assert 0.925 <= covered <= 0.993
    assert false_positives == pytest.approx(1 - covered)  # p < .05 exactly when the interval excludes 0


@pytest.mark.parametrize("seeds", [3, 5])
def test_coverage_of_right_and_wrong_answers_over_cells(seeds):
    """Binary outcomes of unequal cells, rates that depend on the seed: what accuracy really looks like."""
    rng = key(5, "binary", seeds).generator()
    hits = 0
    for _ in range(600):
        cells = []
        effect = rng.normal(0, 0.04, (2, seeds, 1))
        for items, rate in ((100, 0.5), (60, 0.8), (140, 0.2)):
            answers = rng.random((2, seeds, items)) < rate + effect
            cells.append(answers[0].astype(float) - answers[1])
        low, high = stats.paired_difference(cells).interval()
        hits += low <= 0 <= high
    assert 0.925 <= hits / 600 <= 0.985


def test_percentile_bootstrap_would_not_have_been_calibrated():
    """Why we do not use it: with three seeds its 95 % interval covers far less."""
    rng = key(7, "percentile").generator()
    hits = 0
    for _ in range(300):
        means = rng.normal(0, 1, 3)
        replicates = means[rng.integers(3, size=(400, 3))].mean(axis=1)
        low, high = np.quantile(replicates, [0.025, 0.975])
        hits += low <= 0 <= high
    assert hits / 300 < 0.85


def test_variances_are_those_of_the_drawn_hierarchical_bootstrap():
    rng = key(11, "bootstrap").generator()
    seeds = 5
    cells = [
        *crossed(rng, seeds, 40, 0.1, 0.5, 0.4),
        *crossed(rng, seeds, 25, 0.1, 0.2, 0.9),
    ]
    seed_draws = rng.integers(seeds, size=(20_000, seeds))
    by_seed = np.mean([c.mean(axis=1) for c in cells], axis=0)[seed_draws].mean(axis=1)
    by_item = np.mean(
        [c.mean(axis=0)[rng.integers(c.shape[1], size=(20_000, c.shape[1]))].mean(axis=1) for c in cells],
        axis=0,
    )
    d = stats.paired_difference(cells)
    assert by_seed.var() * seeds / (seeds - 1) == pytest.approx(d.seed_variance, rel=0.04)
    interaction = sum(
        np.square(c - c.mean(0) - c.mean(1, keepdims=True) + c.mean()).sum() / ((seeds - 1) * (c.shape[1] - 1) * c.size)
        for c in cells
    )
    assert by_item.var() - interaction / len(cells) ** 2 == pytest.approx(d.item_variance, rel=0.08)


def test_seed_noise_alone_gives_the_plain_t_test():
    cells = [np.array([[0.1, 0.1], [0.3, 0.3], [0.2, 0.2]])]
    d = stats.paired_difference(cells)
    assert d.mean == pytest.approx(0.2)
    assert d.dof == 2
    assert d.stderr == pytest.approx(0.1 / math.sqrt(3))
    low, high = d.interval()
    assert high - d.mean == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert low == pytest.approx(2 * d.mean - high)


def test_degrees_of_freedom_grow_when_items_dominate():
    rng = key(13).generator()
    noisy_items = stats.paired_difference(crossed(rng, 3, 50, 0.0, 1.0, 0.001))
    noisy_seeds = stats.paired_difference(crossed(rng, 3, 50, 1.0, 0.001, 0.001))
    assert noisy_items.dof > 100
    assert noisy_seeds.dof == pytest.approx(2, abs=1e-3)


def test_cells_weigh_equally_whatever_their_size():
    d = stats.paired_difference([np.ones((3, 10)), np.zeros((3, 1000))])
    assert d.mean == pytest.approx(0.5)
    assert (d.seeds, d.items) == (3, 1010)


def test_one_seed_has_no_interval():
    d = stats.paired_difference([np.array([[1.0, 0.0, 1.0]])])
    assert d.mean == pytest.approx(2 / 3)
    assert all(math.isnan(x) for x in (*d.interval(), d.p(), d.p_equivalent(0.1)))
    assert math.isnan(stats.minimum_detectable_effect(d.stderr, d.dof))


def test_seeds_that_agree_exactly_are_not_infinitely_certain():
    d = stats.paired_difference([np.ones((3, 100))])
    assert 0 < d.p() < 1e-3
    same = stats.paired_difference([np.zeros((3, 100))])
    assert same.p() == 1
    assert same.p_equivalent(0.02) < 0.05 < same.p_equivalent(0.001)


def test_identical_measurements_without_resolution():
    d = stats.paired_difference([np.full((3, 4), 0.5)])
    assert (d.p(), d.p_equivalent(0.1), d.p_equivalent(0.9)) == (0.0, 1.0, 0.0)
    assert stats.paired_difference([np.full((3, 4), 1e-300)]).p() == 1


@pytest.mark.parametrize(
    "cells",
    [[], [np.ones((2, 0))], [np.ones((2, 3)), np.ones((3, 3))], [np.ones(3)], [np.array([[np.nan], [1]])]],
)
def test_malformed_cells_are_refused(cells):
    with pytest.raises(ValueError, match="must be"):
        stats.paired_difference(cells)


def test_equivalence_needs_a_tight_estimate_inside_the_margin():
    tight = stats.paired_difference([np.array([[0.001], [0.002], [0.0], [0.001]])])
    loose = stats.paired_difference([np.array([[0.05], [-0.05], [0.02], [-0.02]])])
    outside = stats.paired_difference([np.array([[0.101], [0.102], [0.1], [0.101]])])
    assert tight.p_equivalent(0.02) < 0.01
    assert loose.p_equivalent(0.02) > 0.05
    assert outside.p_equivalent(0.02) > 0.99
    low, high = tight.interval(0.1)  # two one-sided tests at 5 % = the 90 % interval inside the margin
    assert -0.02 < low < high < 0.02


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.6, 0.7]) == [1.0, 1.0]
    assert stats.holm([]) == []
    with pytest.raises(ValueError, match="nan"):
        stats.holm([0.1, math.nan])


def test_holm_holds_the_family_wise_error():
    rng = key(17, "holm").generator()
    p = rng.random((4000, 10))
    false_wins = np.mean([min(stats.holm(row)) < 0.05 for row in p])
    assert false_wins == pytest.approx(0.05, abs=0.012)
    assert np.mean(p.min(axis=1) < 0.05) > 0.35  # what no correction would have done


def test_minimum_detectable_effect_is_detected_as_often_as_it_says():
    rng = key(19, "power").generator()
    stderr, seeds = 1 / math.sqrt(3), 3
    effect = stats.minimum_detectable_effect(stderr, seeds - 1)
    samples = effect + rng.normal(0, 1, (6000, seeds))
    t = samples.mean(axis=1) / samples.std(axis=1, ddof=1) * math.sqrt(seeds)
    assert np.mean(t > 4.302653) == pytest.approx(0.8, abs=0.02)
    assert stats.minimum_detectable_effect(1.0, 1e6) == pytest.approx(2.8016, abs=1e-3)
    severe = stats.minimum_detectable_effect(1.0, 1, alpha=1e-4)
    assert severe == pytest.approx(2 / (math.pi * 1e-4) * 1.2816, rel=1e-3)


def test_seeds_needed_falls_with_the_effect_and_is_enough():
    def difference(mean):
        return stats.mean_difference([mean - 0.03, mean, mean + 0.03])

    few, more = (stats.seeds_needed(difference(mean), margin=0.01) for mean in (0.06, 0.03))
    assert few is not None
    assert more is not None
    assert 3 <= few < more
    rng = key(23, "needed").generator()
    samples = 0.03 + rng.normal(0, 0.03, (2000, more))
    found = np.mean([stats.mean_difference(row).p() < 0.05 for row in samples])
    assert found > 0.77


def test_seeds_needed_may_settle_equivalence():
    d = stats.mean_difference([-0.02, 0.0, 0.02])
    needed = stats.seeds_needed(d, margin=0.02)
    assert needed is not None
    rng = key(29, "equivalent").generator()
    samples = rng.normal(0, 0.02, (1000, needed))
    shown = np.mean([stats.mean_difference(row).p_equivalent(0.02) < 0.05 for row in samples])
    assert shown > 0.77


def test_seeds_cannot_settle_what_items_leave_open():
    rng = key(31, "items").generator()
    d = stats.paired_difference(crossed(rng, 4, 20, 0.001, 1.0, 0.01))
    assert stats.seeds_needed(d, margin=0.02) is None


def test_wilson_by_hand_and_at_the_ends():
    low, high = stats.wilson(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert stats.wilson(0, 50)[0] == 0.0
    assert stats.wilson(0, 50)[1] == pytest.approx(0.0713, abs=1e-4)
    assert stats.wilson(50, 50)[1] == 1.0
    assert stats.wilson(0, 0) == (0.0, 1.0)


def test_standard_errors():
    assert stats.proportion_stderr(50, 100) == pytest.approx(0.05)
    assert math.isnan(stats.ratio_stderr(np.ones(1), np.ones(1)))
    rng = key(37, "ratio").generator()
    bytes_ = rng.integers(10, 100, (2000, 200)).astype(float)
    nats = bytes_ * 0.7 + rng.normal(0, 5, bytes_.shape)
    ratios = nats.sum(axis=1) / bytes_.sum(axis=1)
    assert stats.ratio_stderr(nats[0], bytes_[0]) == pytest.approx(ratios.std(), rel=0.2)
