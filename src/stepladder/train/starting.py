"""How a run takes up the weights, and the tokenizer, of the run that it starts from."""

from __future__ import annotations

from pathlib import Path

import torch

from stepladder.core.errors import UserError
from stepladder.core.keys import key
from stepladder.data.tokenizers import Tokenizer, from_json
from stepladder.models.adapters import add_adapters
from stepladder.models.lm import LanguageModel
from stepladder.models.weights import weights_digest
from stepladder.run import Loaded, Run, load


def base_of(run: Run, begun: bool = False) -> Loaded | None:
    """The base of a run that is about to begin; None if it has none, or has ``begun`` already and needs it no more.

    A base that is gone, or is another than it was, is a UserError.
    """
    if run.start is None or begun:
        return None
    try:
        base = load(run.start.run, device="cpu")
    except UserError as error:
        raise UserError(f"the run that {run.name} starts from cannot be loaded: {error}") from None
    if (found := weights_digest(base.model)) != run.start.weights:
        raise UserError(
            f"{run.start.run} has other weights than {run.name} was to start from (SHA-256 {found[:12]}..., not "
            f"{run.start.weights[:12]}...); bring those back, or begin a new run from what is there"
        )
    fits(run, base, run.start.run)
    return base


def fits(run: Run, base: Loaded, place: str | Path) -> None:
    """Raise a UserError if ``run`` has another model or tokenizer than ``base``, which lies at ``place``."""
    if base.run.model != run.model:
        raise UserError(f"{place} is another model than {run.name}; a run has the model of what it starts from")
    if base.run.data.tokenizer != run.data.tokenizer:
        raise UserError(
            f"data.tokenizer is {run.data.tokenizer.kind!r} as configured, but {place} has learnt with its own "
            f"{base.run.data.tokenizer.kind!r}; leave data.tokenizer out, or give it as there"
        )


def tokenizer_of(run: Run, run_dir: Path, base: Loaded | None) -> Tokenizer | None:
    """The tokenizer that a run with a start goes on with; None for a run that makes its own."""
    if run.start is None:
        return None
    return base.tokenizer if base else from_json((run_dir / "tokenizer.json").read_text(encoding="utf-8"))


def set_out(model: LanguageModel, run: Run, base: Loaded | None) -> None:
    """Give a fresh ``model`` the weights of ``base``, if it is given, and the adapters that ``run`` asks for.

    The adapters' initial weights are a function of the run's seed; torch's generator is left alone.
    """
    if base is not None:
        model.load_state_dict(base.model.state_dict(), strict=True)
    if adapters := run.start and run.start.adapters:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(run.seed, "adapters").seed())
            add_adapters(model, adapters.rank, adapters.scale, adapters.vocabulary)
