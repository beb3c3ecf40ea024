"""Counter-based randomness: purity, independence, uniformity."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from stepladder.core.keys import Key, below, key, permute, unit

GOLDEN_KEY = (4721314923715172825, 3810495902217282953)
GOLDEN_WORDS = [
    [13115270427605013348, 17671229940965484169, 17514485601627216723],
    [9084297659258973373, 10297303349891576335, 11264494089038366820],
]
GOLDEN_PERMUTATION = [9, 8, 5, 0, 1, 6, 7, 4, 2, 3]


def test_paths_name_different_keys() -> None:
    paths = [(0,), (1,), (-1,), (0, "a"), (0, "b"), (0, "a", "b"), (0, "ab"), (0, 3), (0, "3"), (0, "a", 0)]
    assert len({key(*path) for path in paths}) == len(paths)
    assert key(0, "a", "b") == key(0, "a") / "b" == key(0) / "a" / "b"


def test_values_stay_what_they_are() -> None:
    """Stored results depend on these numbers: a change of them changes every data set."""
    root = key(7, "data")
    assert (root.high, root.low) == GOLDEN_KEY
    assert root.words(np.array([0, 5]), 3).tolist() == GOLDEN_WORDS
    assert permute(root, 10, np.arange(10)).tolist() == GOLDEN_PERMUTATION


def test_words_do_not_depend_on_what_is_asked_beside_them() -> None:
    root = key(1)
    table = root.words(np.arange(3000), 6)
    assert table.dtype == np.uint64
    assert np.array_equal(root.words(np.arange(1000, 1100), 6), table[1000:1100])  # one sweep
    scattered = np.array([2999, 0, 17, 17])
    assert np.array_equal(root.words(scattered, 6), table[scattered])
    far = np.array([5, 10**12, 5])  # a sweep each
    assert np.array_equal(root.words(far, 6)[0], table[5])
    assert np.array_equal(root.words(far, 6)[1], root.words(np.array([10**12]), 6)[0])
    assert np.array_equal(root.words(np.array([2**62]), 9), root.words(np.array([2**62, 2**62 + 1]), 9)[:1])


def test_words_are_all_different() -> None:
    a, b = key(1), key(2)
    both = np.concatenate([k.words(np.arange(2000), 5).ravel() for k in (a, b)])
    assert len(np.unique(both)) == both.size


def test_no_indices_and_bad_indices() -> None:
    assert key(1).words(np.array([], dtype=np.int64), 3).shape == (0, 3)
    with pytest.raises(ValueError, match="negative"):
        key(1).words(np.array([-1]), 3)


def test_generators_are_pure_and_apart() -> None:
    root = key(3)
    draws = [root.generator(i).integers(0, 2**63, 100) for i in (0, 1, 2, 10**15)]
    assert len(np.unique(np.concatenate(draws))) == 400
    assert np.array_equal(draws[1], root.generator(1).integers(0, 2**63, 100))
    words = root.words(np.arange(100), 4).ravel()
    raw = np.concatenate([root.generator(i).bit_generator.random_raw(100) for i in range(3)])
    assert not np.isin(raw, words).any()


def test_seed_fits_torch() -> None:
    assert all(0 <= key(n).seed() < 2**63 for n in range(50))
    assert Key(0, 2**64 - 1).seed() == 2**63 - 1


def test_nothing_depends_on_the_hash_seed() -> None:
    code = "from stepladder.core.keys import *; print(key(5, 'a').words(np.arange(3), 2).tolist())"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "1")
    }
    assert outputs == {f"{key(5, 'a').words(np.arange(3), 2).tolist()}\n".encode()}


def test_unit_and_below_are_uniform() -> None:
    words = key(11).words(np.arange(20_000), 2)
    u = unit(words[:, 0])
    assert 0 <= u.min() < u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    counts = np.bincount(below(words[:, 1], 7), minlength=7)
    assert counts.size == 7
    assert stats.chisquare(counts).pvalue > 1e-3
    assert abs(np.corrcoef(u, unit(words[:, 1]))[0, 1]) < 0.03


def test_below_keeps_its_bounds() -> None:
    extremes = np.array([0, 2**64 - 1], dtype=np.uint64)
    for bound in (1, 2, 10, 2**31, 2**32):
        assert below(extremes, bound).tolist() == [0, bound - 1]
    assert below(extremes, np.array([3, 5])).tolist() == [0, 4]
    assert unit(extremes).max() < 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 10**6))
def test_permute_is_a_permutation(size: int, seed: int) -> None:
    assert sorted(permute(key(seed), size, np.arange(size)).tolist()) == list(range(size))


def test_permute_moves_things_and_works_far_out() -> None:
    size = 10_000
    order = permute(key(0), size, np.arange(size))
    assert (order != permute(key(1), size, np.arange(size))).mean() > 0.99
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.05
    assert np.array_equal(permute(key(0), size, np.array([77, 3])), order[[77, 3]])
    huge = 10**15
    positions = np.concatenate([np.arange(500), huge - 1 - np.arange(500)])
    values = permute(key(0), huge, positions)
    assert len(np.unique(values)) == 1000
    assert values.min() >= 0
    assert values.max() < huge
    assert abs(values.mean() / huge - 0.5) < 0.05


def test_permute_refuses_what_is_outside() -> None:
    with pytest.raises(ValueError, match="below 10"):
        permute(key(0), 10, np.array([10]))
    with pytest.raises(ValueError, match="at least one"):
        permute(key(0), 0, np.array([]))
    assert permute(key(0), 5, np.array([], dtype=np.int64)).size == 0
