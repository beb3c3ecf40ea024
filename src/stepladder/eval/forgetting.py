"""Continual learning: what checkpoints, oldest first, know of texts, in the order in which these were learned.

A YAML file names the segments, in order:

    segments:
      - {name: novels, path: novels_test.jsonl.gz}
      - {name: law, path: law_test.jsonl.gz, learned: 1}

Every document of ``path`` is scored by every checkpoint, up to ``eval.text_tokens`` tokens, as the suite ``likelihood``
does it. ``learned`` is the number, from 0, of the checkpoint that has just been trained on the segment; where it is
left out for all of as many segments as checkpoints, number i has learned segment i. With R[c][s] the bits per byte,

    forgetting[s] = R[last][s] - min_c R[c][s]                what was once known better, >= 0
    backward      = mean of R[learned(s)][s] - R[last][s]     over segments learned before the last checkpoint

so backward transfer is negative where later learning cost what was learned (Lopez-Paz & Ranzato, 2017, in bits instead
of accuracies: less is better, hence the signs). report.forgetting draws the matrix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stepladder.core.config import Config, Field, canonical, validate
from stepladder.core.errors import UserError
from stepladder.core.files import append_lines, safe_name, write_json
from stepladder.core.trees import read_tree
from stepladder.data.sources import TextSource
from stepladder.data.stream import Stream
from stepladder.eval.decode import evaluating
from stepladder.eval.likelihood import measure
from stepladder.run import EvalConfig, Loaded, cache_folder, load

RESULTS, SCHEMA = "results_forgetting.json", 1
"""The file of the results, and its version."""


class Segment(Config):
    """One text of the sequence that was learned."""

    name: str = Field(description="what it is called")
    path: str = Field(description="a file .txt or .jsonl, also .gz, all of whose documents are scored")
    learned: int | None = Field(None, ge=0, description="number of the checkpoint that has just learned it")


class Segments(Config):
    """The segments, in the order in which they were learned."""

    segments: tuple[Segment, ...] = Field(min_length=1, description="texts, in the order in which they were learned")


def read_segments(path: str | Path) -> tuple[Segment, ...]:
    """The segments of a YAML file; paths are taken from its folder. Raises UserError for whatever is wrong with it."""
    found = validate(Segments, read_tree(path), str(path)).segments
    names = [safe_name(segment.name) for segment in found]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two segments have the same name; give each its own")
    home = Path(path).parent
    return tuple(segment.model_copy(update={"path": str(home / segment.path)}) for segment in found)


def learners(segments: Sequence[Segment], checkpoints: int) -> list[int | None]:
    """For every segment the number of the checkpoint that learned it, None where nothing tells."""
    told = [segment.learned for segment in segments]
    for segment in segments:
        if segment.learned is not None and segment.learned >= checkpoints:
            raise UserError(
                f"segment '{segment.name}' says learned: {segment.learned}, but there are {checkpoints} checkpoints,"
                " numbered from 0"
            )
    return list(range(checkpoints)) if told == [None] * checkpoints else told


def transfer(matrix: Sequence[Sequence[float]], learned: Sequence[int | None]) -> dict[str, Any]:
    """From R[checkpoint][segment]: forgetting by segment, its mean, and backward transfer; None if none counts."""
    last = matrix[-1]
    lost = [last[s] - min(row[s] for row in matrix) for s in range(len(last))]
    back = [matrix[c][s] - last[s] for s, c in enumerate(learned) if c is not None and c < len(matrix) - 1]
    return {
        "forgetting": lost,
        "mean_forgetting": sum(lost) / len(lost),
        "backward_transfer": sum(back) / len(back) if back else None,
    }


def opened(place: str | Path, device: str = "auto") -> Loaded:
    """The checkpoint at a place: a run's folder, for its newest one, or a checkpoint's folder in it."""
    path = Path(place)
    return load(path.parent.parent, path, device) if path.parent.name == "checkpoints" else load(path, device=device)


def forgetting(
    checkpoints: Sequence[str | Path],
    segments: str | Path,
    out: str | Path,
    config: EvalConfig | None = None,
    *,
    device: str = "auto",
    advance: Callable[[float], object] = float,
) -> dict[str, Any]:
    """Score all segments by all checkpoints; returns what ``results_forgetting.json`` in ``out`` then holds.

    config: of which text_tokens and batch matter; default: that of the first checkpoint. The records, one a window, are
    in ``records/forgetting.jsonl``. A missing checkpoint or text is a UserError before anything is scored.
    """
    asked, home = read_segments(segments), Path(out)
    if not checkpoints:
        raise UserError("there is no checkpoint to score; give them oldest first, as in runs/NAME/checkpoints/*")
    learned = learners(asked, len(checkpoints))
    for segment in asked:
        if not Path(segment.path).is_file():
            raise UserError(f"segment '{segment.name}': there is no file {segment.path}; mend its path in {segments}")
    for place in checkpoints:
        if not Path(place).is_dir():
            raise UserError(
                f"there is no checkpoint {place}; give folders as in runs/NAME or runs/NAME/checkpoints/STEP"
            )
    (home / RESULTS).unlink(missing_ok=True)  # until the last line there are no numbers, rather than an older list's
    matrix: list[list[float]] = []
    tested: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    digests: list[str] = []
    for place in checkpoints:
        loaded = opened(place, device)
        config = config or loaded.run.eval
        row: list[float] = []
        digest = hashlib.sha256()
        with evaluating(loaded.model):
            for segment in asked:
                found, scored, items = _score(loaded, segment, config)
                row.append(found["bits_per_byte"])
                records += [{"checkpoint": len(matrix), "segment": segment.name, **record} for record in scored]
                for item in items:
                    digest.update(canonical(item).encode() + b"\n")
                advance(1 / len(asked) / len(checkpoints))
        digests.append(digest.hexdigest())
        tested.append({"run": loaded.run.name, "step": loaded.step, "model": loaded.run.model.kind, "path": str(place)})
        matrix.append(row)
    home.mkdir(parents=True, exist_ok=True)
    path = home / "records" / "forgetting.jsonl"
    path.unlink(missing_ok=True)
    append_lines(path, records, durable=True)
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "measure": "bits_per_byte",
        "checkpoints": tested,
        "segments": [s.model_dump() | {"learned": c} for s, c in zip(asked, learned, strict=True)],
        "matrix": matrix,
        **transfer(matrix, learned),
        "text_tokens": (config or EvalConfig()).text_tokens,
        "same_items": len(set(digests)) == 1,
        "records": len(records),
    }
    write_json(home / RESULTS, results)
    return results


def _score(
    loaded: Loaded, segment: Segment, config: EvalConfig
) -> tuple[dict[str, Any], list[dict[str, Any]], list[tuple[str, int, str]]]:
    """The likelihood of one segment's text: its summary, records, and what was asked."""
    source = TextSource(path=segment.path, valid=segment.path)
    data = loaded.run.data.model_copy(update={"sources": (source,)})
    stream = Stream(data, loaded.run.seed, cache_folder(), loaded.tokenizer)
    (found,), records, items = measure(loaded.model, stream.valid_text(config.batch), config.text_tokens)
    return found, records, items
