"""Dice, splits, grids and the purity of Task.batch, on two small tasks and on numbers alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepladder.core.config import Kinded, validate
from stepladder.core.errors import UserError
from stepladder.core.keys import key
from stepladder.data.base import SPLITS, TASKS, Dice, Examples, overlap, strings, task, tightened
from stepladder.data.symbols import add, carry, digits_of, number, numeral, sorted_operands, text, until, within
from stepladder.data.tasks.addition import Addition
from stepladder.data.tasks.parity import Parity


def dice(n: int, seed: int = 0) -> Dice:
    return Dice(key(seed, "test").words(np.arange(n), 4))


def codes(*rows: str) -> np.ndarray:
    return text(np.array([list(row.ljust(max(map(len, rows)), "\0").encode()) for row in rows], np.uint8))


class TestDice:
    def test_column_does_not_depend_on_the_number_of_columns(self):
        assert (dice(50).below(10, 3) == dice(50).below(10, 40)[:, :3]).all()

    def test_row_does_not_depend_on_the_other_rows(self):
        words = key(1).words(np.arange(100), 4)
        assert (Dice(words).words(7)[40:50] == Dice(words[40:50]).words(7)).all()

    def test_throws_are_fresh_beyond_the_words_given(self):
        thrower = dice(1000)
        throws = np.stack([thrower.below(2**32) for _ in range(13)])
        correlation = np.corrcoef(throws) - np.eye(13)
        assert len(np.unique(throws)) > 12_990
        assert np.abs(correlation).max() < 0.15  # 78 pairs, standard error 0.03

    def test_uniform(self):
        counts = np.bincount(dice(20_000).below(10, 5).ravel(), minlength=10)
        assert ((counts - 10_000) ** 2 / 10_000).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001

    def test_bound_by_row(self):
        bounds = np.tile([1, 2, 1000], 300)
        drawn = dice(900).below(bounds, 4)
        assert (drawn < bounds[:, None]).all()
        assert drawn[2::3].max() > 900
        assert (dice(900).below(bounds) < bounds).all()


class TestSymbols:
    def test_text_squeezes_absent_symbols(self):
        middle = np.array([[0, ord("1"), 0], [ord("2"), 0, ord("3")]], np.uint8)
        assert strings(text("a", middle, "=")) == ["a1=", "a23="]

    def test_numbers(self):
        digits = np.array([1, 2, 5, 12] * 200)
        numbers = [int(text) for text in strings(text(numeral(number(dice(800), digits, 12))))]
        assert [len(str(n)) for n in numbers] == digits.tolist()
        assert 0 in numbers

    def test_digits_add_and_carry(self):
        a, b = np.array([0, 999, 12345]), np.array([0, 1, 99999])
        assert strings(text(numeral(add(digits_of(a), digits_of(b))))) == ["0", "1000", "112344"]
        assert strings(text(numeral(carry(np.array([[81, 81, 0, 0]]))))) == ["891"]

    def test_within(self):
        assert within(np.array([2, 0, 1])).tolist() == [[True, True], [False, False], [True, False]]

    def test_until(self):
        assert strings(text(until(codes("12>3>4=", "1>22="), ">"))) == ["12", "1"]

    def test_sorted_operands(self):
        pairs = ["12+7=", "7+12=", "7+7=", "123+12=", "12+123="]
        one, other, same, long, gnol = strings(sorted_operands(codes(*pairs), "+"))
        assert one == other in ("12+7=", "7+12=")
        assert same == "7+7="
        assert long == gnol in ("123+12=", "12+123=")
        assert strings(sorted_operands(codes("9+3%17=", "3+9%17="), "+", end="%")) == ["3+9%17="] * 2


class TestExamples:
    def test_join_take_and_text(self):
        one = Examples(codes("1=", "22="), codes("1", "2"), np.array([1, 2]))
        two = Examples(codes("4444="), codes("44"), np.array([4]))
        both = Examples.join([one, two])
        assert both.questions() == ["1=", "22=", "4444="]
        assert both.answers() == ["1", "2", "44"]
        assert len(both) == 3
        assert both.take(np.array([2, 0])).questions() == ["4444=", "1="]

    def test_nothing(self):
        empty = Parity().batch(0, "train", np.array([], int), (4, 16))
        assert len(empty) == 0
        assert empty.questions() == []


class TestBatch:
    whole = Addition().batch(5, "test", np.arange(300), (1, 9))

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.integers(0, 299), min_size=1, max_size=40))
    def test_item_does_not_depend_on_the_batch(self, indices):
        part = Addition().batch(5, "test", np.array(indices), (1, 9))
        expected = self.whole.take(np.array(indices))
        assert part.questions() == expected.questions()
        assert part.answers() == expected.answers()
        assert (part.size == expected.size).all()

    def test_item_does_not_depend_on_sizes_beside_it_or_on_how_its_size_was_given(self):
        by_range = Addition().batch(5, "train", np.arange(60), (1, 9))
        sizes = by_range.size.copy()
        sizes[::2] = 40
        beside = Addition().batch(5, "train", np.arange(60), sizes)
        assert beside.questions()[1::2] == by_range.questions()[1::2]
        one = Addition().batch(5, "train", np.array([7]), int(by_range.size[7]))
        assert one.questions() == [by_range.questions()[7]]

    def test_item_does_not_depend_on_the_chunking(self, monkeypatch):
        monkeypatch.setattr("stepladder.data.base._CHUNK", 17)
        monkeypatch.setattr("stepladder.data.base._SLICE", 7)
        assert Addition().batch(5, "test", np.arange(300), (1, 9)).questions() == self.whole.questions()

    def test_far_apart_indices(self):
        far = np.array([0, 10**12, 5])
        apart = Parity().batch(0, "train", far, 16)
        assert apart.questions()[1:] == [Parity().batch(0, "train", far[[i]], 16).questions()[0] for i in (1, 2)]

    @pytest.mark.parametrize("other", [(6, "test"), (5, "valid")])
    def test_seed_and_split_matter(self, other):
        assert Addition().batch(other[0], other[1], np.arange(300), (1, 9)).questions() != self.whole.questions()

    def test_sizes_are_uniform_over_the_range(self):
        size = Parity().batch(0, "train", np.arange(6000), (4, 9)).size
        counts = np.bincount(size)[4:]
        assert len(counts) == 6
        assert ((counts - 1000) ** 2 / 1000).sum() < 20.5  # 5 degrees of freedom, p = 0.001

    def test_padding_is_no_wider_than_the_longest(self):
        assert self.whole.question.any(axis=0).all()
        assert self.whole.answer.any(axis=0).all()
        assert self.whole.question.dtype == np.uint8

    @pytest.mark.parametrize(("size", "message"), [(0, "no size 0"), ((4, 2000), "no size 2000"), ((9, 4), "empty")])
    def test_refuses_sizes_that_the_task_does_not_have(self, size, message):
        with pytest.raises(UserError, match=message):
            Parity().batch(0, "train", np.arange(3), size)

    def test_refuses_a_cell_without_items_and_says_where_to_go(self):
        with pytest.raises(UserError, match="parity at size 1 has no test items; use a size of at least 2"):
            Parity().batch(0, "test", np.arange(3000), 1)

    def test_unknown_split(self):
        with pytest.raises(KeyError):
            Parity().batch(0, "dev", np.arange(3), 8)


class TestSplits:
    def test_shares(self):
        drawn = Parity().draw(dice(8000), np.full(8000, 40))
        share = {split: Parity().admits(split, drawn).mean() for split in SPLITS}
        assert share["test"] == pytest.approx(1 / 8, abs=0.015)
        assert share["valid"] == pytest.approx(1 / 8, abs=0.015)
        assert sum(share.values()) == 1

    def test_hash_does_not_depend_on_the_padding(self):
        drawn = Parity().draw(dice(500), np.full(500, 12))
        wide = Examples(np.pad(drawn.question, ((0, 0), (0, 21))), drawn.answer, drawn.size)
        assert (Parity().admits("train", drawn) == Parity().admits("train", wide)).all()

    def test_both_orders_of_a_sum_are_in_one_split(self):
        one, other = codes("12+345=", "7+8="), codes("345+12=", "8+7=")
        sizes = np.array([3, 1])
        for split in SPLITS:
            admitted = [Addition().admits(split, Examples(q, codes("1", "1"), sizes)) for q in (one, other)]
            assert (admitted[0] == admitted[1]).all()

    def test_tightened(self):
        assert tightened(" 12 + 7 =") == tightened("7+12=") == "12+7="
        assert tightened("K:A1?A=") == "k:a1?a="

    def test_overlap_counts_what_is_shared(self):
        shared = overlap(Parity(), 0, 400, size=8, splits=("test", "test"))
        assert shared["exact"] == shared["normalised"] == shared["canonical"] == shared["test"] > 20


class TestGrids:
    def test_follow_the_training_range(self):
        assert (Parity().train, Parity().iid, Parity().ood) == ((4, 16), (7, 10, 13, 16), (20, 24, 32, 64, 128))
        small = validate(Parity, {"train": ["2", 8.0]}, "here")
        assert (small.train, small.iid, small.ood) == ((2, 8), (4, 5, 7, 8), (10, 12, 16, 32, 64))

    def test_can_be_given(self):
        given = Parity(train=(2, 8), iid=(8,), ood=())
        assert (given.iid, given.ood) == ((8,), ())

    def test_stop_at_the_largest_size(self):
        assert max(Parity(train=(4, 800)).ood) == 1000

    @pytest.mark.parametrize(
        ("tree", "message"),
        [
            ({"train": [0, 8]}, "train = 0..8: bits go from 1 to 1024"),
            ({"train": [8, 4]}, "smaller end first"),
            ({"train": "48"}, "train"),
            ({"train": [4, float("inf")]}, "train"),
            ({"iid": [20]}, "iid = 20 is outside the training range 4..16; move it to ood"),
            ({"ood": [16]}, "ood = 16 must be beyond the training range, 17..1024"),
            ({"ood": [20, 20]}, "ood names a size twice"),
            ({"lenght": 3}, "unknown key 'lenght'"),
        ],
    )
    def test_mistakes_are_one_sentence(self, tree, message):
        with pytest.raises(UserError) as caught:
            validate(Parity, tree, "run.yaml")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_survive_the_way_through_a_file(self):
        before = Addition(reversed=True, train=(2, 5))
        tree = before.model_dump(mode="json")
        assert tree["kind"] == "addition"
        assert validate(Addition, tree, "file") == before


def test_a_task_is_a_class_under_a_name():
    assert TASKS.get("parity") is Parity
    assert issubclass(Parity, Kinded)
    with pytest.raises(UserError, match="already taken"):
        task("parity")(Addition)
