"""Faults of generated data: overlap of train and test (D8), salted hashes (T10), lenient answers (E4)."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest

from stepladder.data.base import Dice, Examples, overlap
from stepladder.data.symbols import text
from stepladder.data.tasks import TASKS
from stepladder.data.tasks.addition import Addition
from stepladder.data.tasks.parity import Parity


@pytest.mark.parametrize("name", TASKS.names())
def test_D8_no_question_is_in_train_and_test(name):
    task = TASKS.get(name)()
    for splits in (("train", "test"), ("train", "valid"), ("valid", "test")):
        shared = overlap(task, 0, 4000, splits=splits)
        assert shared["exact"] == shared["normalised"] == shared["canonical"] == 0
        assert shared[splits[1]] > 100


def test_D8_splits_are_disjoint_across_seeds():
    train = set(Parity().batch(1, "train", np.arange(5000), (4, 10)).questions())
    test = set(Parity().batch(2, "test", np.arange(5000), (4, 10)).questions())
    assert not train & test


class Unsplit(Parity):
    """The fault of the ancestors: evaluation drawn from the training distribution, nothing left out."""

    def admits(self, split: str, examples: Examples) -> np.ndarray:
        return np.ones(len(examples), bool)


class OneOrder(Addition):
    """Split by the exact question: 1+2= may be in train and 2+1= in test."""

    def canonical(self, examples: Examples) -> np.ndarray:
        return examples.question


class Spaced(Parity):
    """Writes the same question with and without a space."""

    alphabet: ClassVar[str] = "01^= "

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        drawn = super().draw(dice, size)
        space = np.where(dice.below(2) == 1, ord(" "), 0)[:, None]
        return Examples(text(space, drawn.question), drawn.answer, drawn.size)


def test_D8_the_measurement_sees_exact_overlap():
    shared = overlap(Unsplit(), 0, 4000, size=(4, 12))
    assert shared["exact"] > 0.2 * shared["test"]


@pytest.mark.parametrize("task", [OneOrder(), Spaced()], ids=["order", "space"])
def test_D8_the_measurement_sees_normalised_overlap(task):
    shared = overlap(task, 0, 4000, size=(2, 2) if isinstance(task, Addition) else (4, 12))
    assert shared["exact"] == 0
    assert shared["normalised"] > 0.05 * shared["test"]


_DIGEST = """
import hashlib, numpy as np
from stepladder.data.tasks import TASKS
digest = hashlib.sha256()
for name in TASKS.names():
    task = TASKS.get(name)()
    drawn = task.batch(11, "valid", np.arange(40), task.train)
    digest.update(drawn.question.tobytes() + drawn.answer.tobytes())
print(digest.hexdigest())
"""


def test_T10_items_do_not_depend_on_the_hash_seed_or_the_process():
    digests = {
        subprocess.run(
            [sys.executable, "-c", _DIGEST],
            env={**os.environ, "PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("0", "1", "random")
    }
    assert len(digests) == 1


GOLDEN = {
    "addition": "83+4956=",
    "binary_search": "key=25; arr=-33,-15,11,12,13,25,42,46; at=",
    "bracket_depth": "s=(()())(()(())())()(((((; depth=",
    "chain": "191424974>2>6>5=",
    "compare": "811?411=",
    "copy": "c:11852772=",
    "dp_table_stripe": "s=daaaaaccbcabccbb; t=dbddbdadaacbaaaa; dist=",
    "dyck": "d:([())(()(()())())()()]=",
    "freivalds": "a=0,5,5/8,9,9/5,1,1; b=6,8,4/6,5,6/0,4,9; c=30,45,75/102,145,167/36,49,35; equal=",
    "gcd": "a=75744; b=35442; gcd=",
    "listops": "(x75(n051)5)=",
    "longest_increasing": "arr=-39,-32,21,48,-37; lis=",
    "majority": "arr=15,15,15,15,15,15,15,15,45,15,15,-28,15,44,-1; majority=",
    "miller_rabin": "n=94873721; prime=",
    "mod_add": "517+280%556=",
    "multiplication": "6*1=",
    "needle": (
        " the silver left the cotton. the word of eagle=vugob. the word of ginger=segov. the word of spider=fupob. "
        "the word of temple=lefad. the word of ribbon=renul. the maple held the hammer. the word of spider="
    ),
    "nested_loop_count": "target=-36; arr=-22,-19,-20,-24,-23,-18,-19,-21,-27,-23=",
    "parity": "100110111^=",
    "prefix_sums": "arr=-34,37,-25,-19,43,-50,-24,23,34,-12; prefix=",
    "recall": "k:h5m2q0n1t4?mtqh=",
    "repeat_copy": "p:29x1=",
    "reverse": "r:492953563=",
    "scan_reduce": "op=xor; arr=28,-50,-42,1,-32,-49=",
    "sort": "o:82=",
    "sort_then_scan": "arr=-16,-11,-14,-14,15,-42,-31,-49,-14,-25,15,32,15,-16; rle=",
    "state_tracking": "3:aebccabfeec=",
    "substring_count": "s=ababaaababab; p=bb; count=",
    "successor": "s:7931=",
}


@pytest.mark.parametrize("name", TASKS.names())
def test_T10_items_are_those_of_the_first_release(name):
    """Every run's data changes with these; then say why in the CHANGELOG."""
    task = TASKS.get(name)()
    assert task.batch(0, "test", np.array([1]), task.train).questions() == [GOLDEN[name]]


@pytest.mark.parametrize(
    "output",
    [
        "12. Actually 13",
        "12.",
        " 12",
        "12 ",
        "12\n",
        "012",
        "+12",
        "1,2",
        "\uff11\uff12",
        "```12```",
        "123",
        "1",
        "",
        "−0",
        "12.0",
    ],
)
def test_E4_only_the_very_answer_counts(output):
    assert Addition().verify("5+7=", "12")
    assert not Addition().verify("5+7=", output)
    assert not Addition().verify("0+0=", "-0")
