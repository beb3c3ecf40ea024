"""Prompts of one's own: read from a file, each with its own options, and continued with a trained model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stepladder.core.config import Config, Field, validate
from stepladder.core.errors import UserError
from stepladder.core.trees import parse_json, read_text
from stepladder.data.tokenizers import BOS, EOS
from stepladder.eval.decode import generate
from stepladder.eval.trace import label
from stepladder.run import Loaded


class Request(Config):
    """A prompt and how to continue it; what the options mean is said by ``eval.decode.generate``."""

    prompt: str = Field(description="text to continue")
    max_new: int = Field(64, ge=1, description="longest continuation in tokens")
    temperature: float = Field(0.0, ge=0, description="0 = greedy")
    top_k: int | None = Field(None, ge=1, description="sample among the k likeliest")
    top_p: float = Field(1.0, ge=0, le=1, description="sample within this mass")
    ticks: int | None = Field(None, ge=1, description="tick budget of a loop; default: the architecture's own")
    seed: int = Field(0, description="key of the sampling")


def read(texts: Sequence[str], file: Path | None, options: dict[str, Any]) -> list[Request]:
    """A request for every text, then for every line of a file, all with ``options``.

    file: .jsonl with an object a line, a "prompt" and whatever options it has of its own; any other file, but for
    .json, has a prompt a line. Empty lines are left out. No prompt at all, and a line that is not as it should be, is
    a UserError.
    """
    found = [validate(Request, {**options, "prompt": text}, "prompt") for text in texts]
    if file is not None:
        if file.suffix == ".json":
            raise UserError(f"{file}: write an object a line, and call the file .jsonl")
        for number, line in enumerate(read_text(file).split("\n"), start=1):
            where = f"{file}: line {number}"
            line = line.removesuffix("\r")
            if not line.strip():
                continue
            # Behind as many empty lines a flaw has its own number.
            own = parse_json("\n" * (number - 1) + line, str(file)) if file.suffix == ".jsonl" else {"prompt": line}
            if not isinstance(own, dict):
                raise UserError(f'{where}: write an object, such as {{"prompt": "3+4=", "temperature": 0.5}}')
            found.append(validate(Request, {**options, **own}, where))
    if not found:
        raise UserError(
            f"there is nothing to continue{f' in {file}' if file else ''}: give a prompt, or --prompts FILE"
        )
    return found


def answers(loaded: Loaded, requests: Sequence[Request]) -> list[dict[str, Any]]:
    """What a model continues the prompts with: plain data, one entry a request, as ``sample --out`` writes them.

    Beside the request itself (its tick budget as ``budget``): text, the continuation without special tokens. stop: see
    ``Generation``. tokens: what was read and written, as it can be seen, from the prompt's first token on;
    ``prompt_tokens`` of them are the prompt's. ticks: how many were executed to predict each of them, those of the
    prompt included; None if the model reports none. Equal options and prompts in the same place of the list give the
    same texts, whatever the other entries are.
    """
    ids = [np.concatenate(([BOS], loaded.tokenizer.encode(request.prompt))) for request in requests]
    found: list[dict[str, Any]] = [{} for _ in requests]
    for group in _alike(requests):
        first = requests[group[0]]
        done = generate(
            loaded.model,
            [ids[place] for place in group],
            max_new=[requests[place].max_new for place in group],
            rows=group,
            key=first.seed,
            **first.model_dump(include=set(_SHARED)),
        )
        for place, one in zip(group, done, strict=True):
            seen = [*ids[place][1:].tolist(), *one.tokens.tolist(), *[EOS] * (one.stop == "eos")]
            found[place] = {
                **requests[place].model_dump(exclude={"ticks"}),
                "budget": requests[place].ticks,
                "text": loaded.tokenizer.decode(one.tokens),
                "stop": one.stop,
                "prompt_tokens": len(ids[place]) - 1,
                "tokens": [label(loaded.tokenizer, token) for token in seen],
                "ticks": None if one.spent is None else one.spent[: len(seen)].tolist(),
            }
    return found


_SHARED = ("temperature", "top_k", "top_p", "ticks")
"""Options that all prompts of one call of the decoder share, as they do the seed."""


def _alike(requests: Sequence[Request]) -> Iterable[list[int]]:
    """Places of the requests that one call can answer together."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(tuple(getattr(request, name) for name in (*_SHARED, "seed")), []).append(place)
    return groups.values()
