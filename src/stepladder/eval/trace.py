"""What a model did on one text: every diagnostic of one forward, in files that ``report.trace`` draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stepladder.core.errors import UserError
from stepladder.core.files import write_json
from stepladder.data.tokenizers import BOS, EOS, PAD, Tokenizer
from stepladder.eval.decode import evaluating
from stepladder.models.base import IGNORE
from stepladder.models.weights import save_tensors
from stepladder.run import Loaded

SCHEMA = 1
"""Version of trace.json."""


def record(loaded: Loaded, text: str, home: str | Path, *, ticks: int | None = None, key: int = 0) -> Path:
    """Run a text through a model with a trace and write ``trace.safetensors`` and ``trace.json`` into ``home``.

    Arrays have the tokens (BOS, then the text's, T in all) as their first axis: what the model's parts noted, "token"
    (the ids) and "nll" (nats of the next token given those up to here; NaN at the last). key: of stochastic parts.
    Returns ``home``.
    """
    ids = np.concatenate(([BOS], loaded.tokenizer.encode(text))).astype(np.int64)
    if len(ids) < 2:
        raise UserError('there is nothing to trace: give a text, as in --text "3+4="')
    device = next((p.device for p in loaded.model.parameters()), torch.device("cpu"))
    tokens = torch.from_numpy(ids).to(device)[None]
    targets = torch.cat((tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORE)), dim=1)
    with evaluating(loaded.model):
        out = loaded.model(tokens, targets=targets, ticks=ticks, key=key, trace=True)
    assert out.nll_BT is not None
    arrays = {"token": tokens[0], "nll": out.nll_BT[0].masked_fill(targets[0] == IGNORE, torch.nan)}
    arrays |= {name: value[0] for name, value in out.trace.items()}
    home = Path(home)
    home.mkdir(parents=True, exist_ok=True)
    save_tensors({name: _plain(value) for name, value in arrays.items()}, home / "trace.safetensors")
    about = {
        "schema": SCHEMA,
        "run": loaded.run.name,
        "architecture": loaded.run.model.kind,
        "step": loaded.step,
        "text": text,
        "tokens": [label(loaded.tokenizer, token) for token in ids.tolist()],
        "ticks": ticks,
        "key": key,
    }
    write_json(home / "trace.json", about)
    return home


def _plain(value: Tensor) -> Tensor:
    """In a type that NumPy knows."""
    return value.float() if value.is_floating_point() and value.dtype != torch.float64 else value


def label(tokenizer: Tokenizer, token: int) -> str:
    """A token as it can be seen."""
    if token in (PAD, BOS, EOS):
        return {PAD: "⟨pad⟩", BOS: "⟨bos⟩", EOS: "⟨eos⟩"}[token]
    piece = tokenizer.pieces[token]
    try:
        seen = piece.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in piece)
    return seen.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
