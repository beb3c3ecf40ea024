"""CLRS-Text: 30 algorithms of the textbook as questions and answers, made here by the package dm-clrs.

The package's text generator and samplers run on NumPy and attrs. For what else they import (JAX, TensorFlow, chex,
absl) there are small stand-ins while they are imported, and only then: whoever has the real ones keeps them.

A text is a function of (seed, algorithm, length, index). Source: Markeeva et al. 2024, "The CLRS-Text algorithmic
reasoning language benchmark", dm-clrs 2.0.3 (Apache-2.0). Differs from it in: a sampler for every index, since one seed
for all gives algorithms of like inputs the same ones; no question twice; a bound on the length of a text.
"""

from __future__ import annotations

import gzip
import importlib
import itertools
import json
import os
import secrets
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
from pydantic import field_validator

from stepladder.core.config import Config, Field, validate
from stepladder.core.errors import UserError
from stepladder.core.keys import hash64, key
from stepladder.core.registry import did_you_mean
from stepladder.data.corpora import read_rows

VERSION = "2.0.3"
_PATIENCE = 300  # texts of a cell in a row that are not new, after which it counts as exhausted

_SHORT, _LONG = (4, 5, 10), (4, 5, 10, 11, 12, 15, 19, 23, 28, 31)
# Algorithm -> lengths in training, longest length in evaluation (all from 4 on): the published grids.
_GRIDS: dict[str, tuple[tuple[int, ...], int]] = {
    "activity_selector": (_LONG, 40),
    "articulation_points": (_LONG[:7], 19),
    "bellman_ford": (_LONG, 32),
    "bfs": (_LONG, 41),
    "binary_search": (_LONG, 64),
    "bridges": (_SHORT[:2], 7),
    "bubble_sort": (_SHORT, 11),
    "dag_shortest_paths": (_LONG[:7], 19),
    "dfs": (_LONG[:8], 20),
    "dijkstra": (_LONG[:9], 25),
    "find_maximum_subarray_kadane": (_LONG, 64),
    "floyd_warshall": (_SHORT, 11),
    "graham_scan": (_LONG, 31),
    "heapsort": (_SHORT, 11),
    "insertion_sort": (_LONG, 25),
    "jarvis_march": (_LONG[:5], 13),
    "kmp_matcher": (_LONG, 64),
    "lcs_length": (_SHORT, 12),
    "matrix_chain_order": (_SHORT, 12),
    "minimum": (_LONG, 64),
    "mst_kruskal": (_SHORT, 10),
    "mst_prim": (_LONG[:9], 26),
    "naive_string_matcher": (_LONG, 64),
    "optimal_bst": (_SHORT, 10),
    "quickselect": (_LONG, 64),
    "quicksort": (_SHORT, 12),
    "segments_intersect": (_LONG, 64),
    "strongly_connected_components": (_LONG[:6], 16),
    "task_scheduling": (_LONG, 41),
    "topological_sort": (_LONG[:8], 21),
}
ALGORITHMS = tuple(_GRIDS)
TRAIN_LENGTHS = {name: lengths for name, (lengths, _) in _GRIDS.items()}
EVAL_LENGTHS = {name: tuple(range(4, longest + 1)) for name, (_, longest) in _GRIDS.items()}


class ClrsText(Config):
    """What is generated: ``per_cell`` texts of every algorithm at every length."""

    algorithms: tuple[str, ...] = Field(min_length=1, description="algorithms, or 'all'")
    lengths: Literal["train", "eval"] | tuple[int, ...] = Field("train", description="published lengths, or some")
    per_cell: int = Field(100, ge=1, description="texts of each algorithm and length")
    seed: int = Field(0, ge=0, description="seed of the inputs")
    hints: bool = Field(False, description="ask for the states on the way, too")
    max_chars: int = Field(8192, ge=64, description="characters of question and answer together, at most")

    @field_validator("algorithms")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in (*ALGORITHMS, "all"):
                raise ValueError(f"unknown algorithm '{name}'{did_you_mean(name, ALGORITHMS)}")
        return names

    @field_validator("lengths")
    @classmethod
    def _long_enough(cls, lengths: str | tuple[int, ...]) -> str | tuple[int, ...]:
        if not isinstance(lengths, str) and (not lengths or min(lengths) < 4 or max(lengths) > 256):
            raise ValueError("must be 'train', 'eval', or lengths from 4 to 256")
        return lengths

    def cells(self) -> list[tuple[str, int]]:
        """Every (algorithm, length)."""
        names = ALGORITHMS if "all" in self.algorithms else tuple(dict.fromkeys(self.algorithms))
        if isinstance(self.lengths, tuple):
            return [(name, length) for name in names for length in dict.fromkeys(self.lengths)]
        grid = TRAIN_LENGTHS if self.lengths == "train" else EVAL_LENGTHS
        return [(name, length) for name in names for length in grid[name]]


def example(algorithm: str, length: int, seed: int, index: int, hints: bool = False) -> tuple[str, str]:
    """Question and answer as dm-clrs writes them; UserError if it is not installed."""
    samplers, utils = _package()
    number = key(seed, "data", "clrs", algorithm, length, index).seed() & 0xFFFF_FFFF
    options = {"truncate_decimals": 3, "track_max_steps": False, "length": length}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of NumPy 2: cross products of flat vectors
        sampler, _ = samplers.build_sampler(algorithm, -1, seed=number, **options)
        return cast("tuple[str, str]", utils.format_clrs_example(algorithm, sampler.next(1), use_hints=hints))


def generate(
    tree: dict[str, Any],
    out: str | Path,
    exclude: Iterable[str | Path] = (),
    advance: Callable[[int], object] = int,
) -> dict[str, Any]:
    """Write the texts that ``tree`` (fields of ClrsText) describes to ``out`` (.jsonl or .jsonl.gz), all or nothing.

    One text a line: question, answer, algo_name, length; the cells take turns. No question is written twice, nor one of
    the files ``exclude``; small inputs run out, so a cell may have fewer than asked for. Returns ``rows``, the number
    ``by_cell``, and how many texts were left out as ``repeated`` or ``too_long``. A cell without any is a UserError.
    """
    config, out = validate(ClrsText, tree, "clrs"), Path(out)
    if not out.name.removesuffix(".gz").endswith(".jsonl"):
        raise UserError(f"'{out}' must end in .jsonl or .jsonl.gz")
    _package()
    seen = {hash64(question) for file in exclude for question in _questions(str(file))}
    counts = dict.fromkeys(config.cells(), 0)
    left_out = {"repeated": 0, "too_long": 0}
    with _replacing(out) as file:
        for name, length, question, answer in _texts(config, seen, left_out):
            row = {"question": question, "answer": answer, "algo_name": name, "length": length}
            file.write(json.dumps(row).encode() + b"\n")
            counts[name, length] += 1
            advance(1)
        for (name, length), count in counts.items():
            if not count:
                raise UserError(
                    f"'{name}' at length {length} has no text that is new and has at most {config.max_chars:,}"
                    f" characters; leave it out, or raise --max-chars"
                )
    return {"rows": sum(counts.values()), "by_cell": counts, **left_out}


def told(made: dict[str, Any], per_cell: int) -> str:
    """What ``generate`` returned, in a line."""
    short = {cell: count for cell, count in made["by_cell"].items() if count < per_cell}
    line = f"{made['rows']:,} texts of {len(made['by_cell'])} cells; left out: {made['repeated']:,} repeated,"
    line += f" {made['too_long']:,} too long"
    if short:
        shown = [f"{name} at {length}: {count}" for (name, length), count in itertools.islice(short.items(), 5)]
        more = f" and {len(short) - 5} more" if len(short) > 5 else ""
        line += f"; fewer than {per_cell}: {', '.join(shown)}{more}"
    return line


def total(tree: dict[str, Any]) -> int:
    """How many rows are asked for."""
    config = validate(ClrsText, tree, "clrs")
    return len(config.cells()) * config.per_cell


def _texts(config: ClrsText, seen: set[int], left_out: dict[str, int]) -> Iterator[tuple[str, int, str, str]]:
    """(algorithm, length, question, answer), a text of every cell in turn."""

    def fresh(name: str, length: int) -> Iterator[tuple[str, int, str, str]]:
        poor = 0
        for index in itertools.count():
            question, answer = example(name, length, config.seed, index, config.hints)
            if len(question) + len(answer) > config.max_chars:
                left_out["too_long"] += 1
            elif (number := hash64(question)) in seen:
                left_out["repeated"] += 1
            else:
                seen.add(number)
                yield name, length, question, answer
                poor = 0
                continue
            poor += 1
            if poor == _PATIENCE:
                return

    cells = [itertools.islice(fresh(*cell), config.per_cell) for cell in config.cells()]
    while cells:
        found = [next(cell, None) for cell in cells]
        yield from (text for text in found if text is not None)
        cells = [cell for cell, text in zip(cells, found, strict=True) if text is not None]


def _questions(file: str) -> Iterator[str]:
    for number, row in read_rows(file):
        if not isinstance(row.get("question"), str):
            raise UserError(f"'{file}', line {number}: must have a 'question' that is a string")
        yield row["question"]


@contextmanager
def _replacing(out: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of ``out`` when all went well, and else is removed."""
    temporary = out.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as raw:
                if out.suffix == ".gz":  # without a name and a time in it: the same bytes again
                    with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
                        yield cast("IO[bytes]", packed)
                else:
                    yield raw
                raw.flush()
                os.fsync(raw.fileno())
            os.replace(temporary, out)
        finally:
            with suppress(OSError):
                temporary.unlink()
    except OSError as error:
        raise UserError(f"'{out}' cannot be written: {error.strerror or error}; give another file") from error


# The package, and what stands in for what it imports ------------------------------------------------------------------


@cache
def _package() -> tuple[Any, Any]:
    """dm-clrs' modules ``samplers`` and ``clrs_text.clrs_utils``."""
    way = f"pip install attrs, then pip install --no-deps dm-clrs=={VERSION} (else it brings TensorFlow and JAX along)"
    home = _home()
    if home is None:
        raise UserError(f"CLRS-Text needs dm-clrs: {way}")
    if (found := metadata.version("dm-clrs")) != VERSION:
        raise UserError(f"CLRS-Text is that of dm-clrs {VERSION}, and {found} is installed: {way}")
    try:
        with _confined(home):
            modules = ("clrs._src.samplers", "clrs._src.clrs_text.clrs_utils")
            samplers, utils = map(importlib.import_module, modules)
    except ImportError as error:
        raise UserError(f"CLRS-Text cannot import dm-clrs ({error}): {way}") from error
    return samplers, utils


def _home() -> str | None:
    """Where dm-clrs is installed; None if it is not."""
    with suppress(metadata.PackageNotFoundError):
        metadata.version("dm-clrs")
        spec = PathFinder.find_spec("clrs")  # whatever is in sys.modules under that name
        if spec and spec.submodule_search_locations:
            return next(iter(spec.submodule_search_locations))
    return None


@contextmanager
def _confined(home: str) -> Iterator[None]:
    """For as long as it lasts, the stand-ins and dm-clrs' packages, whose ``__init__`` files do not run.

    Afterwards ``sys.modules`` holds, of all these names, exactly what it held before.
    """
    ours = {
        "clrs": _empty("clrs", home),
        "clrs._src": _empty("clrs._src", f"{home}/_src"),
        "clrs._src.clrs_text": _empty("clrs._src.clrs_text", f"{home}/_src/clrs_text"),
        **_stand_ins(),
    }

    def concerned() -> list[str]:
        roots = {name.split(".")[0] for name in ours}
        return [name for name in sys.modules if name.split(".")[0] in roots]

    before = {name: sys.modules.pop(name) for name in concerned()}
    sys.modules.update(ours)
    try:
        yield
    finally:
        for name in concerned():
            del sys.modules[name]
        sys.modules.update(before)


def _empty(name: str, path: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__path__ = [path]
    return module


def _stand_ins() -> dict[str, types.ModuleType]:
    def module(name: str, **members: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        vars(made).update(members)
        return made

    tree = module("jax.tree_util", tree_map=_tree_map, register_pytree_node_class=lambda cls: cls)
    networks = module("jax.nn", one_hot=lambda x, n: (np.asarray(x)[..., None] == np.arange(n)).astype(np.float32))
    names = {"tree_util": tree, "nn": networks, "numpy": np, "Array": type("Array", (), {})}
    silence = dict.fromkeys(("info", "warning", "log_first_n"), lambda *_, **__: None)
    logging = module("absl.logging", WARNING=1, **silence)
    return {
        "jax": module("jax", **names),
        "jax.numpy": np,
        "jax.tree_util": tree,
        "jax.nn": networks,
        "chex": module("chex", assert_rank=_assert_rank),
        "tensorflow": module("tensorflow", Tensor=type("Tensor", (), {})),
        "absl": module("absl", logging=logging),
        "absl.logging": logging,
    }


def _tree_map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """jax.tree_util.tree_map for lists of what has ``tree_flatten``: data points, whose one leaf is an array."""
    if isinstance(tree, list):
        return [_tree_map(function, *parts) for parts in zip(tree, *others, strict=True)]
    leaves, about = zip(*(point.tree_flatten() for point in (tree, *others)), strict=True)
    return tree.tree_unflatten(about[0], [function(*parts) for parts in zip(*leaves, strict=True)])


def _assert_rank(arrays: Any, rank: int) -> None:
    for array in arrays if isinstance(arrays, list) else [arrays]:
        if np.ndim(array) != rank:
            raise ValueError(f"an array has {np.ndim(array)} dimensions, not {rank}")
