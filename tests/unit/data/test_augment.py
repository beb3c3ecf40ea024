"""Augmentation: a probability means what it says, ramps are functions of the step, and nothing else has a say."""

import numpy as np
import pytest
from pydantic import ValidationError

from stepladder.core.keys import key
from stepladder.data.augment import Augment, affine

SECRET = key(0, "test")


@pytest.fixture
def changed(bars):
    """Which items are not shown as they were."""

    def compare(augment, items, step):
        pixels = bars(len(items))[0][:, None]
        return (augment(SECRET, items, pixels, step) != pixels).any(axis=(1, 2, 3))

    return compare


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("first", [0, 5000])  # the originals, and variants of them
def test_the_share_of_changed_images_is_the_probability(probability, first, changed):
    items = np.arange(first, first + 2000)
    share = changed(Augment(degrees=30, probability=probability), items, 0).mean()
    assert share == pytest.approx(probability, abs=0.035)
    assert share in (0, 1) or 0 < probability < 1


def test_ramps_at_their_ends_and_between(changed):
    augment = Augment(probability=((50, 0.0), (150, 0.8)), severity=((0, 0.5), (100, 1.0)))
    assert augment.at(0) == (0.0, 0.5)
    assert augment.at(50) == (0.0, 0.75)
    assert augment.at(100) == (pytest.approx(0.4), 1.0)
    assert augment.at(150) == (pytest.approx(0.8), 1.0)
    assert augment.at(10**6) == (pytest.approx(0.8), 1.0)
    items = np.arange(4000)
    shares = [changed(augment, items, step).mean() for step in (0, 50, 100, 150)]
    assert shares == pytest.approx([0, 0, 0.4, 0.8], abs=0.03)
    early, late = (augment.changed(SECRET, items, step) for step in (100, 150))
    assert not (early & ~late).any()


def test_an_image_depends_on_key_item_and_step_alone(bars):
    augment = Augment(degrees=25, severity=((0, 0.1), (10, 1.0)))
    pixels = np.repeat(bars(1)[0][:, None], 6, axis=0)
    items = np.array([3, 11, 3, 40, 11, 5])
    shown = augment(SECRET, items, pixels, 10)
    assert np.array_equal(shown[0], shown[2])
    assert np.array_equal(shown[1], augment(SECRET, items[1:2], pixels[:1], 10)[0])
    assert not np.array_equal(shown[0], shown[1])
    assert not np.array_equal(shown, augment(SECRET, items, pixels, 0))
    assert not np.array_equal(shown, augment(key(1, "test"), items, pixels, 10))
    small, large = (np.abs(augment(SECRET, items, pixels, step).astype(int) - pixels).mean() for step in (0, 10))
    assert small < large


def test_a_turn_and_a_shift_are_what_they_say():
    image = np.zeros((1, 2, 5, 5), np.uint8)
    image[0, 0, 2, 4] = 200  # right of the middle
    image[0, 1, 0, 0] = 100
    turned = affine(image, np.array([np.pi / 2]), np.zeros((1, 2)))
    assert turned[0, 0].argmax() == 2  # row 0, column 2: counter-clockwise, to the top
    assert turned[0, 0].max() == 200
    assert turned[0, 1, 4, 0] == 100
    shifted = affine(image, np.zeros(1), np.array([[1.0, -2.0]]))  # down and to the left
    assert shifted[0, 0, 3, 2] == 200
    assert not shifted[0, 1].any()  # moved out, and black came in
    halved = affine(image, np.zeros(1), np.array([[0.5, 0.0]]))
    assert halved[0, 0, 2:4, 4].tolist() == [100, 100]
    assert np.array_equal(affine(image, np.zeros(1), np.zeros((1, 2))), image)


def test_wrong_ramps_are_refused():
    for wrong in ({"probability": 1.5}, {"probability": [[5, 0.1], [5, 0.2]]}, {"severity": []}, {"degrees": -1}):
        with pytest.raises(ValidationError):
            Augment.model_validate(wrong)
