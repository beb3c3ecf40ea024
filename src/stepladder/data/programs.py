"""What the tasks of CompGen have in common: small programs, each with a declared complexity, on integers or strings.

Every question is the program's input in a surface form of its own, ``op=sum; arr=3,-1,4=`` or ``arr=3,1,3; rle=``, so
it says which program is meant; the answer follows the last "=". As a record of CompGen, input and output are the texts
``x`` and ``y``: the name in front of the last "=", where there is one, belongs to ``y`` (``rle=1:1,3:2``).
"""

from __future__ import annotations

import re
from abc import abstractmethod
from operator import eq
from typing import ClassVar

import numpy as np
from pydantic import model_validator

from stepladder.core.config import Field
from stepladder.data.base import Dice, Task
from stepladder.data.symbols import within

_NAME = re.compile(r"; ([a-z]+)=$")
_ARRAY = re.compile(r"arr=([0-9,-]+)")


class Program(Task):
    """A task of CompGen. Size is the length of the input: what the declared complexity is in."""

    complexity: ClassVar[str]

    def sized(self, length: int) -> int:
        """The size of this task for which other tasks read an array of ``length`` numbers."""
        return length

    @property
    def inputs(self) -> str:
        """The numbers or letters that the inputs are drawn from, "-50 to 50"; "" where they are of neither."""
        return ""

    def inside(self, question: str) -> bool:
        """Whether the input of a question is of these numbers or letters."""
        return True


class ArrayProgram(Program):
    """A program on an array of integers."""

    axis: ClassVar[str] = "numbers"
    alphabet: ClassVar[str] = "0123456789-,;= "

    low: int = Field(-50, ge=-999_999, le=999_999, description="smallest number in the array")
    high: int = Field(50, ge=-999_999, le=999_999, description="largest number in the array")

    def numbers(self, dice: Dice, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Arrays of uniform numbers: int64 [n, m], and which cells are filled, bool [n, m]; the others are 0."""
        filled = within(size)
        return np.where(filled, self.low + dice.below(self.high - self.low + 1, filled.shape[1]), 0), filled

    @property
    def inputs(self) -> str:
        return f"{self.low} to {self.high}"

    def inside(self, question: str) -> bool:
        """Whether all numbers of the array are in the range of this task."""
        numbers = array(_ARRAY.search(question)[1])  # type: ignore[index]
        return self.low <= min(numbers) and max(numbers) <= self.high

    def digits(self, times: int = 1) -> int:
        """Characters of the longest number that is ``times`` a number of the array."""
        return max(len(str(self.low * times)), len(str(self.high * times)))

    @model_validator(mode="after")
    def _in_order(self) -> ArrayProgram:
        if self.low >= self.high:
            raise ValueError(f"low = {self.low} must be below high = {self.high}")
        return self


class ListProgram(ArrayProgram):
    """A program on an array whose answer is a list, too."""

    def marks(self, question: str, output: str) -> dict[str, float]:
        """``elements``: the share of places at which the answer's and the output's elements are the same; places that
        only one of the two has count as wrong."""
        wanted, given = self.solve(question).split(","), output.split(",")
        return {"elements": sum(map(eq, wanted, given)) / max(len(wanted), len(given))}


class StringProgram(Program):
    """A program on strings of letters."""

    axis: ClassVar[str] = "letters"
    alphabet: ClassVar[str] = "0123456789;= abcdefghijklmnopqrstuvwxyz"

    letters: int
    first: str = Field("a", pattern="^[a-z]$", description="the first of the letters")

    def word(self, dice: Dice, columns: int) -> np.ndarray:
        """Uniform letters: ASCII codes, uint8 [n, columns]."""
        return (dice.below(self.letters, columns) + ord(self.first)).astype(np.uint8)

    @property
    def inputs(self) -> str:
        return f"{self.first} to {chr(ord(self.first) + self.letters - 1)}"

    def inside(self, question: str) -> bool:
        """Whether all letters of the strings are those of this task."""
        words = "".join(part.split("=")[1] for part in question.split("; ")[:2])
        return self.first <= min(words) and ord(max(words)) < ord(self.first) + self.letters

    @model_validator(mode="after")
    def _to_z(self) -> StringProgram:
        if ord(self.first) + self.letters - 1 > ord("z"):
            raise ValueError(f"first = {self.first} leaves fewer than letters = {self.letters} letters up to z")
        return self


class Claim(Program):
    """A program that says whether a claim is right: y or n, each in half of the items.

    Source: VecTur's randomised suite. Some claims are checked faster with random numbers than without, at the price of
    one-sided errors: a right claim is never rejected, a wrong one now and then accepted, the more rarely the more
    random numbers are used. ``solve`` computes exactly. Differs from it in: a model may be given the random numbers
    (``rounds``), so that it need not make its own; they do not change the answer, and they make no new question.
    """

    rounds: int = Field(0, ge=0, le=16, description="rounds of the randomised check that the question has symbols for")

    @abstractmethod
    def accepts(self, question: str) -> bool:
        """What the randomised check says with the random symbols in the question; without any it accepts."""

    def marks(self, question: str, output: str) -> dict[str, float]:
        """``false_accept`` of a wrong claim: whether the output is y. ``false_reject`` of a right one: whether it is n.

        So their means are rates among the wrong and among the right claims; any other output is neither."""
        if self.solve(question) == "n":
            return {"false_accept": float(output == "y")}
        return {"false_reject": float(output == "n")}

    def chance(self, size: int) -> float:
        return 1 / 2

    def max_answer(self, size: int) -> int:
        return 1


def record(question: str, answer: str) -> tuple[str, str]:
    """A question and its answer as the texts x and y of CompGen."""
    name = _NAME.search(question)
    if name:
        return question[: name.start()], f"{name[1]}={answer}"
    return question.removesuffix("="), answer


def question_of(x: str, y: str) -> tuple[str, str]:
    """The question and the answer behind x and y: undoes ``record``."""
    name = re.match(r"[a-z]+=", y)
    if name:
        return f"{x}; {name[0]}", y[name.end() :]
    return f"{x}=", y


def array(text: str) -> list[int]:
    """The numbers of ``arr=3,-1,4`` (for solvers)."""
    return [int(number) for number in text.removeprefix("arr=").split(",")]
