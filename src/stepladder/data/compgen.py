"""CompGen as files: programs with a declared complexity, in train, test and three kinds of out-of-distribution splits.

    OUT/train.jsonl test.jsonl   {"task", "complexity", "x", "y", "meta": {"n": size, "i": index}}
    OUT/ood.jsonl                the same, with longer inputs than in train
    OUT/value_ood.jsonl          sizes as in train; of every array, some numbers are beyond the range of train
    OUT/alphabet_ood.jsonl       sizes as in train; other letters than in train, as many
    OUT/meta.json                configuration, sizes, counts, SHA-256 of every file, licence
    OUT/README.md                the same for people: the dataset card

The rows are those of ``Task.batch``: train and test by the hash of the question, so they are disjoint, and from a run
that trains on the same tasks without end, too; the others are disjoint from train by hash and by what they are. No task
has a question twice, in whichever splits. Tasks alternate: every T rows, of T tasks, hold each task once, in a random
order. The folder appears by one rename, and the same command writes the same bytes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import model_validator

from stepladder.core.config import Config, Field, validate
from stepladder.core.errors import UserError
from stepladder.core.files import read_json, write_atomic, write_json
from stepladder.core.keys import key
from stepladder.data.base import Examples, codes
from stepladder.data.card import card
from stepladder.data.programs import ArrayProgram, Program, StringProgram, question_of, record
from stepladder.data.rowfiles import Row, building, reader, sha256, writer
from stepladder.data.tasks import TASKS

LICENCE = "apache-2.0"
FORMAT = 1
_BLOCK = 4096  # rows of each task that are mixed at a time
_DRAW = 4096  # candidates drawn at a time
_PATIENCE = 16  # times in a row that hardly any candidate may be new

Advance = Callable[[int], object]


class CompGen(Config):
    """What is generated. Sizes are lengths of arrays; a task with other inputs has sizes of about as long a text."""

    tasks: tuple[str, ...] = Field(min_length=1, description="tasks, or 'all'")
    dataset_size: int = Field(10_000, ge=2, description="train and test examples of each task together")
    seed: int = Field(1337, ge=0, description="seed of the examples and of their order")
    min_n: int = Field(8, ge=1, description="shortest array in train and test")
    max_n: int = Field(64, ge=1, description="longest array in train and test")
    split_frac: float = Field(0.98, gt=0, lt=1, description="share of dataset_size that is for training")
    ood_n: int = Field(128, ge=0, description="longest array in ood, which has as many examples as test; 0: no ood")
    ood_value: int = Field(
        500, ge=0, le=999_999, description="largest number, up or down, in value_ood, which has arrays only; 0: none"
    )
    ood_shift: int = Field(
        13, ge=0, le=22, description="places that the letters of alphabet_ood, strings only, are moved on by; 0: none"
    )
    fmt: Literal["jsonl", "parquet"] = Field("jsonl", description="format of the files")

    @model_validator(mode="after")
    def _in_order(self) -> CompGen:
        if self.min_n > self.max_n:
            raise ValueError(f"min_n = {self.min_n} is above max_n = {self.max_n}; give the smaller first")
        if 0 < self.ood_n <= self.max_n:
            raise ValueError(f"ood_n = {self.ood_n} must be above max_n = {self.max_n}, or 0 for no ood split")
        return self

    def programs(self) -> list[Program]:
        """The tasks, sorted by name; any that is no program of CompGen is a UserError."""
        return [
            program(name) for name in (names() if "all" in self.tasks else sorted(set(map(TASKS.name, self.tasks))))
        ]

    def splits(self) -> dict[str, tuple[str, int, int, int]]:
        """By the name of its file: the split of ``Task.batch``, examples of each task, shortest and longest array."""
        test = max(1, round(self.dataset_size * (1 - self.split_frac)))
        found = {
            "train": ("train", max(1, self.dataset_size - test), self.min_n, self.max_n),
            "test": ("test", test, self.min_n, self.max_n),
        }
        if self.ood_n:
            found["ood"] = ("test", test, self.max_n + 1, self.ood_n)
        return found | {name: found["test"] for name in ("value_ood", "alphabet_ood") if self.variants(name)}

    def variants(self, name: str) -> list[Program]:
        """The tasks as they are in the split ``name``; there may be none. A flawed value is a UserError."""
        found = [self.variant(name, program) for program in self.programs()]
        return [program for program in found if program is not None]

    def variant(self, name: str, program: Program) -> Program | None:
        """A task as it is in the split ``name``; None if it is not."""
        if name == "value_ood":
            if not self.ood_value or not isinstance(program, ArrayProgram):
                return None
            if self.ood_value <= (least := max(-program.low, program.high)):
                raise UserError(
                    f"ood_value = {self.ood_value} must be above the {least} of train, or 0 for no value_ood"
                )
            return _with(program, low=-self.ood_value, high=self.ood_value)
        if name == "alphabet_ood":
            if not self.ood_shift or not isinstance(program, StringProgram):
                return None
            if self.ood_shift < program.letters:
                raise UserError(
                    f"ood_shift = {self.ood_shift} must be at least {program.letters}, the letters of"
                    f" '{program.kind}', or 0 for no alphabet_ood"
                )
            return _with(program, first=chr(ord(program.first) + self.ood_shift))
        return program


def _with(program: Program, **fields: Any) -> Program:
    """The task with other fields."""
    return validate(type(program), {**program.model_dump(), **fields}, program.kind)


def names() -> list[str]:
    """The programs there are."""
    return [name for name in TASKS.names() if issubclass(TASKS.get(name), Program)]


def program(name: str) -> Program:
    """The program called ``name``, with its default fields; UserError if there is none."""
    cls = TASKS.get(name)
    if not issubclass(cls, Program):
        raise UserError(f"'{name}' is no program of CompGen; there are: {', '.join(names())}")
    return cls.model_validate({})


def generate(tree: dict[str, Any], out: str | Path, advance: Advance = int) -> dict[str, Any]:
    """Write the dataset that ``tree`` (fields of CompGen) describes into the folder ``out``; returns meta.json.

    ``advance`` is told of every number of rows written. If the folder holds this very dataset, nothing is done. One
    that holds anything else, a flawed value, or fewer questions in the world than asked for: UserError.
    """
    config = validate(CompGen, tree, "compgen")
    programs, out = config.programs(), Path(out)
    config = config.model_copy(update={"tasks": tuple(program.kind for program in programs)})
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _same(config, out)
    opened = writer(config.fmt)
    plan = {
        name: [
            _Unique(mine, config, split, _sizes(mine, name, low, high), count, program)
            for program in programs
            if (mine := config.variant(name, program)) is not None
        ]
        for name, (split, count, low, high) in config.splits().items()
    }
    with building(out) as folder:
        splits = {}
        for name, sources in plan.items():
            file, count = folder / f"{name}.{config.fmt}", sources[0].wanted
            with opened(file, programs) as write:
                for rows in _mixed(sources, config.seed, name):
                    write(rows)
                    advance(len(rows))
            splits[name] = {
                "file": file.name,
                "examples": count * len(sources),
                "of_each_task": count,
                "sizes": {source.program.kind: list(source.sizes) for source in sources},
                "inputs": {source.program.kind: source.program.inputs for source in sources if source.program.inputs},
                "bytes": file.stat().st_size,
                "sha256": sha256(file),
            }
        meta = {
            "format": FORMAT,
            "generator": f"stepladder {version('stepladder')}",
            "licence": LICENCE,
            "config": config.model_dump(mode="json"),
            "tasks": {p.kind: {"complexity": p.complexity, "size": p.axis} for p in programs},
            "splits": splits,
        }
        write_json(folder / "meta.json", meta)
        write_atomic(folder / "README.md", card(meta, {p.kind: _example(p) for p in programs}))
    return meta


def verify(folder: str | Path, every: int = 1, advance: Advance = int) -> dict[str, int]:
    """Check a dataset that ``generate`` wrote; returns how many rows each split has. The first flaw is a UserError.

    Files must be those of meta.json (SHA-256); every row in its split by the hash of its question, with a size and with
    numbers or letters of that split; no question may occur twice, in whichever splits; and every ``every``-th answer is
    worked out anew, in plain Python.
    """
    folder = Path(folder)
    meta = _meta(folder)
    config = validate(CompGen, meta["config"], str(folder / "meta.json"))
    hashes: defaultdict[str, list[np.ndarray]] = defaultdict(list)
    found = {}
    for name, about in meta["splits"].items():
        file = folder / about["file"]
        _unchanged(file, about)
        counts: Counter[str] = Counter()
        for start, block in reader(file):
            for task, mine in _by_task(block).items():
                hashes[task].append(_check(config, file, name, about, start, block, mine, every))
                counts[task] += len(mine)
            advance(len(block))
        if counts != dict.fromkeys(about["sizes"], about["of_each_task"]):
            raise UserError(f"{file} has other numbers of rows than meta.json says; generate it again")
        found[name] = counts.total()
    for task, parts in hashes.items():
        joined = np.concatenate(parts)
        if twice := len(joined) - len(np.unique(joined)):
            raise UserError(f"{folder}: {twice} questions of '{task}' occur more than once; generate it again")
    return found


def _check(
    config: CompGen,
    file: Path,
    split: str,
    about: dict[str, Any],
    start: int,
    block: list[Row],
    places: list[int],
    every: int,
) -> np.ndarray:
    """The fingerprints of the rows of one task at ``places`` of a block, before which the file has ``start`` rows."""
    task, mine = program(block[places[0]][0]), [block[place] for place in places]
    pairs = [question_of(x, y) for _, x, y, _, _ in mine]
    for place, (question, answer) in zip(places, pairs, strict=True):
        if (start + place) % every == 0 and (right := task.solve(question)) != answer:
            raise UserError(f"{file}, row {start + place + 1}: the answer to '{question}' is {right}, not {answer}")
    size = np.array([row[3] for row in mine])
    examples = Examples(codes([question for question, _ in pairs]), codes([answer for _, answer in pairs]), size)
    low, high = about["sizes"].get(task.kind, (0, -1))
    variant = config.variant(split, task) or task
    inside = np.array([variant.inside(q) and (variant == task or not task.inside(q)) for q, _ in pairs])
    wrong = ~inside | ~task.admits("train" if split == "train" else "test", examples) | (size < low) | (size > high)
    if wrong.any():
        place = places[int(wrong.argmax())]
        raise UserError(f"{file}, row {start + place + 1}: does not belong to the {split} split")
    return task.fingerprints(examples)


def _by_task(block: list[Row]) -> dict[str, list[int]]:
    """The places of every task in a block."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(block):
        found[row[0]].append(place)
    return found


def _meta(folder: Path) -> dict[str, Any]:
    """meta.json of a dataset."""
    if not (folder / "meta.json").is_file():
        raise UserError(f"{folder} is no dataset of CompGen: it has no meta.json; give the folder that was generated")
    meta = read_json(folder / "meta.json")
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UserError(f"{folder / 'meta.json'} is not of CompGen's format {FORMAT}; generate the dataset again")
    return meta


def _same(config: CompGen, out: Path) -> dict[str, Any]:
    """meta.json of the dataset in ``out``, if it is that of ``config``, with the files it speaks of."""
    meta = _meta(out) if (out / "meta.json").is_file() else {}
    if meta.get("config") != config.model_dump(mode="json"):
        raise UserError(f"{out} exists and holds something else; give another --out-dir, or remove it")
    for about in meta["splits"].values():
        _unchanged(out / about["file"], about)
    return meta


def _unchanged(file: Path, about: dict[str, Any]) -> None:
    if not file.is_file() or sha256(file) != about["sha256"]:
        raise UserError(f"{file} is not what was written (SHA-256 differs, or it is missing); generate it anew")


def _example(program: Program) -> tuple[str, str]:
    """x and y of a short example."""
    drawn = program.batch(0, "train", np.arange(1), program.train[0])
    return record(drawn.questions()[0], drawn.answers()[0])


def count(folder: str | Path) -> int:
    """How many rows a dataset has, as its meta.json says."""
    return sum(split["examples"] for split in _meta(Path(folder))["splits"].values())


def total(tree: dict[str, Any]) -> int:
    """How many rows ``generate`` will write."""
    config = validate(CompGen, tree, "compgen")
    return sum(count * len(config.variants(name)) for name, (_, count, *_) in config.splits().items())


class _Unique:
    """The examples of one task in one split, none of whose questions came before.

    ``trained`` is the task as it is in train: if it is another, questions that are like those of train are left out.
    """

    def __init__(
        self, program: Program, config: CompGen, split: str, sizes: tuple[int, int], wanted: int, trained: Program
    ) -> None:
        self._trained = None if trained == program else trained
        self.program, self.seed, self.split, self.sizes, self.wanted = program, config.seed, split, sizes, wanted
        self._next = self._given = 0
        self._rows: list[Row] = []
        self._old, self._recent = np.empty(0, np.uint64), np.empty(0, np.uint64)  # sorted hashes of what came before

    def take(self, count: int) -> list[Row]:
        """The next ``count`` rows."""
        poor = 0
        while len(self._rows) < count:
            ahead = min(_DRAW, self.wanted - self._given - len(self._rows))
            index = np.arange(self._next, self._next + ahead)
            examples = self.program.batch(self.seed, self.split, index, self.sizes)
            if self._trained is not None:
                beyond = np.array([not self._trained.inside(question) for question in examples.questions()])
                examples, index = examples.take(beyond), index[beyond]
            new = self._new(self.program.fingerprints(examples))
            self._rows += _rows(self.program, examples.take(new), index[new])
            self._next += ahead
            poor = poor + 1 if 64 * len(new) < ahead else 0
            if poor == _PATIENCE:
                raise self._too_few()
        self._given += count
        taken, self._rows = self._rows[:count], self._rows[count:]
        return taken

    def _new(self, hashes: np.ndarray) -> np.ndarray:
        """Which of these did not come before: positions, rising. They are remembered."""
        different, first = np.unique(hashes, return_index=True)
        fresh = ~(_contains(self._old, different) | _contains(self._recent, different))
        self._recent = np.sort(np.concatenate([self._recent, different[fresh]]))
        if len(self._recent) > 16 * _DRAW:  # rarely, since it costs the whole
            self._old = np.sort(np.concatenate([self._old, self._recent]), kind="stable")
            self._recent = np.empty(0, np.uint64)
        return np.sort(first[fresh])

    def _too_few(self) -> UserError:
        low, high = self.sizes
        there = len(self._old) + len(self._recent)
        return UserError(
            f"'{self.program.kind}' has about {there:,} different {self.split} questions with {low} to {high}"
            f" {self.program.axis}, fewer than the {self.wanted:,} asked for; lower --dataset-size or raise --max-n"
        )


def _contains(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which values are in a sorted array."""
    if not len(ordered):
        return np.zeros(len(values), bool)
    place = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return ordered[place] == values


def _rows(program: Program, examples: Examples, index: np.ndarray) -> list[Row]:
    """Examples as (task, x, y, size, index)."""
    if not len(examples):
        return []
    questions, answers = examples.questions(), examples.answers()
    x, y = record(questions[0], answers[0])
    shown, named = len(x) - len(questions[0]), y.removesuffix(answers[0])  # the same in all questions of a task
    columns = zip(questions, answers, examples.size.tolist(), index.tolist(), strict=True)
    return [(program.kind, q[:shown], named + a, n, i) for q, a, n, i in columns]


def _mixed(sources: list[_Unique], seed: int, name: str) -> Iterator[list[Row]]:
    """The rows of all tasks in blocks: in every round one of each task, in an order drawn anew."""
    secret, count = key(seed, "compgen", "order", name), sources[0].wanted
    for start in range(0, count, _BLOCK):
        rounds = min(_BLOCK, count - start)
        taken = [source.take(rounds) for source in sources]
        order = secret.words(np.arange(start, start + rounds), len(sources)).argsort(axis=1).tolist()
        yield [taken[task][place] for place, tasks in enumerate(order) for task in tasks]


def _sizes(program: Program, name: str, low: int, high: int) -> tuple[int, int]:
    """The sizes of a task that stand for arrays of ``low`` to ``high`` numbers."""
    if name != "ood":  # in the other splits sizes are those of train
        return program.sized(low), program.sized(high)
    sizes = program.sized(low - 1) + 1, program.sized(high)
    if sizes[0] > sizes[1]:
        raise UserError(
            f"'{program.kind}' has no {program.axis} between those of arrays of {low - 1} and of {high} numbers;"
            f" raise --ood-n, lower --max-n, or leave it out of --tasks"
        )
    return sizes
