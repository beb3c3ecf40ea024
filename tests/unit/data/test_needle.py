"""The needle task: what is asked for lies anywhere, no habit finds it, and its form is that of the suite's needles."""

import re
from collections import Counter

import numpy as np
import pytest

from stepladder.data.base import Examples
from stepladder.data.tasks.needle import CHARACTERS, FACTS, KEYS, Needle, answers, possible


def draw(size, n=1500):
    return Needle().batch(3, "train", np.arange(n), size)


def sentences(question):
    *told, asked = question.split(".")
    assert all(sentence.startswith(" the ") for sentence in (*told, asked)), "as in the suite's haystacks"
    return [sentence.strip() for sentence in told], asked.strip()


def test_keys_are_different_words():
    assert len(set(KEYS)) == len(KEYS) == Needle.largest
    assert all(re.fullmatch("[a-z]{4,8}", name) for name in KEYS)


def test_facts_have_the_form_that_is_asked_for():
    forms = [re.escape(form.strip()).replace(r"\{\}", f"({'|'.join(KEYS)})") for form in FACTS.values()]
    fact = re.compile(f"({'|'.join(forms)})")
    idle = re.compile(rf"the ({'|'.join(KEYS)}) [a-z]+ the ({'|'.join(KEYS)})")
    for question, answer in zip(draw(8).questions(), draw(8).answers(), strict=True):
        told, asked = sentences(question)
        assert fact.fullmatch(asked)
        assert f"{asked}{answer}" in told
        for sentence in told:
            assert idle.fullmatch(sentence) or (fact.match(sentence) and len(sentence.split("=")[1]) == CHARACTERS)
        begins = [sentence.split("=")[0] for sentence in told if "=" in sentence]
        assert len(set(begins)) == len(begins), "a key has one fact"


def test_the_fact_asked_for_is_of_every_sort_and_at_every_place():
    sorts, places = Counter(), Counter()
    for question in draw(6, 3000).questions():
        told, asked = sentences(question)
        sorts[asked.split(" ")[1].rstrip("=")] += 1
        places[next(i for i, sentence in enumerate(told) if sentence.startswith(asked))] += 1
    assert set(sorts) == {"passkey", "code", "word"}
    assert all(900 < count < 1100 for count in sorts.values())
    assert sorted(places) == list(range(6))
    assert all(400 < count < 600 for count in places.values())


@pytest.mark.parametrize("pick", [0, -1], ids=["first", "last"])
def test_taking_the_first_or_the_last_fact_of_the_right_sort_is_often_wrong(pick):
    drawn = draw(8)
    found = []
    for question, answer in zip(drawn.questions(), drawn.answers(), strict=True):
        told, asked = sentences(question)
        sort = " ".join(asked.split(" ")[:2])
        found.append([s for s in told if s.startswith(sort)][pick].endswith(answer))
    assert np.mean(found) < 0.7  # the passkey is always alone: that third is easy
    assert np.mean(found) > 1 / 3


def test_answers_are_spread_over_all_that_are_possible():
    words = np.random.default_rng(0).integers(0, 2**64, (20_000, CHARACTERS), dtype=np.uint64)
    for fact, alphabet in (("code", "0123456789"), ("word", "bdfgklmnprstvzaeiou")):
        drawn = answers(fact, words)
        assert set(drawn.reshape(-1).tobytes().decode()) == set(alphabet)
        different = len({row.tobytes() for row in drawn})
        count = possible(fact)
        assert different == pytest.approx(count * (1 - (1 - 1 / count) ** 20_000), rel=0.01)
    assert Needle().chance(3) == 1 / (possible("code") + possible("word"))


def test_the_order_of_the_sentences_makes_no_new_question():
    def example(question):
        return Examples(np.frombuffer(question, np.uint8)[None], np.frombuffer(b"48213", np.uint8)[None], np.array([2]))

    one = example(b" the code of amber=48213. the heron met the linen. the code of amber=")
    two = example(b" the heron met the linen. the code of amber=48213. the code of amber=")
    other = example(b" the heron met the linen. the code of amber=48213. the code of heron=")
    same = [Needle().canonical(e).tobytes() for e in (one, two, other)]
    assert same[0] == same[1] != same[2]
