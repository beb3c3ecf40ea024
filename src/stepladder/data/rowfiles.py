"""The files of a generated dataset: rows written and read in blocks, as JSON lines or Parquet, in a folder that
appears at once."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from stepladder.core.errors import UserError
from stepladder.core.files import publish_dir
from stepladder.data.programs import Program

Row = tuple[str, str, str, int, int]  # task, x, y, size, index
Write = Callable[[list[Row]], None]
_BLOCK = 8192  # rows read at a time


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """A new folder beside ``out`` that takes its place when all went well, and else is removed.

    A full or read-only disk, and somebody else who was faster, is a UserError.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.parent / f".building-{secrets.token_hex(8)}"
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.iterdir():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            if not publish_dir(temporary, out):
                raise UserError(f"{out} was made by somebody else in the meantime; give another folder")
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(f"'{out}' cannot be written: {error.strerror or error}; give another folder") from error


def writer(fmt: str) -> Callable[[Path, list[Program]], AbstractContextManager[Write]]:
    """For "jsonl" or "parquet": a context, made of a file and its tasks, that gives a function which writes rows."""
    if fmt == "parquet":
        _pyarrow()  # before anything is made
        return _parquet
    return _jsonl


@contextmanager
def _jsonl(file: Path, programs: list[Program]) -> Iterator[Write]:
    # No task has a character that JSON would escape, and json.dumps would take as long as everything else.
    assert all(json.dumps(program.alphabet)[1:-1] == program.alphabet for program in programs)
    heads = {p.kind: f'{{"task": "{p.kind}", "complexity": {json.dumps(p.complexity)}, "x": "' for p in programs}
    with open(file, "w", encoding="ascii", newline="\n") as out:

        def write(rows: list[Row]) -> None:
            lines = [f'{heads[task]}{x}", "y": "{y}", "meta": {{"n": {n}, "i": {i}}}}}\n' for task, x, y, n, i in rows]
            out.write("".join(lines))

        yield write


@contextmanager
def _parquet(file: Path, programs: list[Program]) -> Iterator[Write]:
    arrow, parquet = _pyarrow()
    complexity = {program.kind: program.complexity for program in programs}
    meta = arrow.struct([("n", arrow.int64()), ("i", arrow.int64())])
    schema = arrow.schema([*((name, arrow.string()) for name in ("task", "complexity", "x", "y")), ("meta", meta)])
    with parquet.ParquetWriter(file, schema, compression="zstd") as out:

        def write(rows: list[Row]) -> None:
            task, x, y, n, i = map(list, zip(*rows, strict=True))
            numbers = [{"n": size, "i": index} for size, index in zip(n, i, strict=True)]
            columns = [task, [complexity[name] for name in task], x, y, numbers]
            arrays = [arrow.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            out.write_table(arrow.Table.from_arrays(arrays, schema=schema))

        yield write


def reader(file: Path) -> Iterator[tuple[int, list[Row]]]:
    """The rows of a file in blocks, each with the number of rows before it; one that is no row is a UserError."""
    start = 0
    try:
        for block in _parquet_blocks(file) if file.suffix == ".parquet" else _jsonl_blocks(file):
            rows = [(r["task"], r["x"], r["y"], r["meta"]["n"], r["meta"]["i"]) for r in block]
            yield start, rows
            start += len(rows)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not all rows are of CompGen ({error!r}); generate it anew") from error


def _jsonl_blocks(file: Path) -> Iterator[list[Any]]:
    with file.open(encoding="ascii") as lines:
        block: list[Any] = []
        for line in lines:
            block.append(json.loads(line))
            if len(block) == _BLOCK:
                yield block
                block = []
    if block:
        yield block


def _parquet_blocks(file: Path) -> Iterator[list[Any]]:
    _, parquet = _pyarrow()
    for batch in parquet.ParquetFile(file).iter_batches(_BLOCK):
        yield batch.to_pylist()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("parquet needs pyarrow: pip install 'stepladder[hf]', or use --fmt jsonl") from error
    return pyarrow, pyarrow.parquet


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
