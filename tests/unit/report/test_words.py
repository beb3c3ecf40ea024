"""Numbers as readers see them."""

import pytest

from stepladder.report import words


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (words.percent(0.61349), "61.3 %"),
        (words.signed(-0.0523, "accuracy"), "−5.2"),
        (words.signed(0.0523, "bits_per_byte"), "+0.052"),
        (words.interval(-0.01, 0.02, "accuracy"), "−1.0 to +2.0"),
        (words.interval(None, None, "accuracy"), "–"),
        (words.probability(0.00001), "< 0.001"),
        (words.probability(0.0412), "0.041"),
        (words.quantity(1_234_567), "1.23 M"),
        (words.quantity(4096, "B"), "4.1 kB"),
        (words.quantity(3e21), "3e+03 E"),
        (words.quantity(12), "12"),
        (words.quantity(999_600), "1 M"),
        (words.quantity(None), "–"),
        (words.duration(61), "61 s"),
        (words.duration(100), "1.7 min"),
        (words.duration(2 * 86400), "48 h"),
        (words.residual(-0.0049), "−0.49 %"),
        (words.confidence(0.05), "95 %"),
        (words.confidence(0.001), "99.9 %"),
    ],
)
def test_formats(shown, expected):
    assert shown == expected


@pytest.mark.parametrize(
    ("word", "needs", "text"),
    [
        ("better", None, "better"),
        ("inconclusive", 1, "inconclusive (needs 1 more seed)"),
        ("inconclusive", 4, "inconclusive (needs 4 more seeds)"),
        ("inconclusive", None, "inconclusive (needs more items, not seeds)"),
    ],
)
def test_verdicts_say_what_they_need(word, needs, text):
    assert words.verdict_text({"word": word, "needs": needs}) == text


@pytest.mark.parametrize(
    ("pending", "text"),
    [
        (4, "Nothing can be said yet: 4 of 4 runs have no result."),
        (1, "Nothing can be said yet: 1 of 4 runs has no result."),
        (0, "Nothing can be said: every run came to an end, but nothing of them can be compared."),
    ],
)
def test_the_headline_counts_the_runs_without_a_result(pending, text):
    runs = [{"pending": number < pending} for number in range(4)]
    assert words.headline({"runs": runs, "rungs": {}, "seeds": [0, 1], "control": "plain"}) == text


def test_what_rounds_to_nothing_has_no_sign():
    assert words.signed(-0.0004, "accuracy") == "+0.0"
    assert words.signed(-0.0004, "bits_per_byte") == "+0.000"
    assert words.signed(-0.0006, "accuracy") == f"{words.MINUS}0.1"
