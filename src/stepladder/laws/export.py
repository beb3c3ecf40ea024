"""A model survives as plain files: weights and a JSON configuration, nothing else."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from stepladder.core.config import validate
from stepladder.core.files import read_json, write_json
from stepladder.eval.decode import generate
from stepladder.laws.law import Subject, Violation, law
from stepladder.laws.measure import Meter, observe
from stepladder.models.lm import LanguageModel
from stepladder.models.spec import Spec
from stepladder.models.weights import load_weights, save_weights
from stepladder.models.zoo import ARCHITECTURES

NEW = 10


def _write(subject: Subject, model: LanguageModel, folder: Path) -> None:
    save_weights(model, folder / "model.safetensors")
    write_json(folder / "config.json", {"vocab": model.vocab, "model": subject.spec.model_dump(mode="json")})


def _read(cls: type[Spec], folder: Path, dtype: torch.dtype) -> LanguageModel:
    """A model from the folder alone; ``cls`` is for architectures that are not registered by name."""
    config = read_json(folder / "config.json")
    kind = config["model"]["kind"]
    spec = validate(ARCHITECTURES.get(kind) if kind else cls, config["model"], "config.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(999)
        model = spec.build(config["vocab"]).to(dtype)
    load_weights(model, folder / "model.safetensors")
    return model.eval()


@law("export", says="a model rebuilt from its files has equal logits, and generates what ours generates")
def export(subject: Subject) -> str:
    """The folder is a safetensors file and JSON. Greedy: loaded = ours, cached = recomputed, batched = alone.

    The transformers wrapper reads the same folder; that it gives these logits is for its own tests.
    """
    meter = Meter()
    model = subject.build(stir=0.1)
    tokens = subject.tokens(3, 17, "export")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(subject, model, folder)
        loaded = _read(type(subject.spec), folder, torch.float64)
    meter.equal(observe(loaded, tokens, tokens).named, observe(model, tokens, tokens).named, "rebuilt from its files")
    prompts = [subject.tokens(1, length, "export", length)[0].numpy() for length in (6, 1, 4)]
    ours = [one.tokens for one in generate(model, prompts, max_new=NEW, eos=None)]
    others = {
        "the rebuilt model": generate(loaded, prompts, max_new=NEW, eos=None),
        "recomputing every prefix": generate(model, prompts, max_new=NEW, eos=None, uncached=True),
        "one prompt at a time": generate(model, prompts, max_new=NEW, eos=None, batch=1),
    }
    for how, generations in others.items():
        for row, (one, want) in enumerate(zip(generations, ours, strict=True)):
            if not np.array_equal(one.tokens, want):
                raise Violation(f"{how} generates {one.tokens.tolist()} for prompt {row}, not {want.tolist()}")
    return (
        f"{meter.count} tensors equal bit for bit; {len(prompts)} x {NEW} greedy tokens equal in {len(others) + 1} ways"
    )
