"""A run is a value: one frozen tree of everything that decides its result, its hash, and its directory's name."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, SerializeAsAny, field_validator, model_validator

from stepladder.core.config import Config, Field, chosen, digest, override, read_tree, validate
from stepladder.core.errors import UserError
from stepladder.core.files import Corrupt, read_json, safe_name, verify_manifest
from stepladder.data.corpora import PYDOC
from stepladder.data.curriculum import curriculum, fitting
from stepladder.data.images import ImageSource
from stepladder.data.sources import AnySource
from stepladder.data.stream import DataConfig
from stepladder.data.tokenizers import Tokenizer
from stepladder.data.tokenizers import from_json as tokenizer_from_json
from stepladder.models.adapters import add_adapters, merge_adapters
from stepladder.models.encoders import ENCODERS, EncoderSpec
from stepladder.models.lm import LanguageModel
from stepladder.models.weights import load_weights
from stepladder.models.zoo import ARCHITECTURES, Spec
from stepladder.start import Start

Count = Annotated[int, Field(ge=1)]


class TrainConfig(Config):
    """How a model is trained. A step is one optimizer update; the budget is one of steps, tokens, flops, seconds."""

    batch: int = Field(32, ge=1, description="rows per step")
    micro: Count | Literal["auto"] | None = Field(
        None, description="rows per micro-batch (accumulation); auto: as many as fit into memory; default: batch"
    )
    memory: float | None = Field(
        None,
        gt=0,
        description="GiB that a step may take, for micro: auto; default: a share of what is free at the start",
    )
    steps: int | None = Field(None, ge=1, description="budget in optimizer steps")
    tokens: int | None = Field(None, ge=1, description="budget in input tokens")
    flops: float | None = Field(None, gt=0, description="budget in training FLOPs (3 x forward, executed ticks)")
    seconds: float | None = Field(None, gt=0, description="budget in wall seconds; such runs do not repeat bitwise")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="adamw; or muon for hidden matrices, and AdamW for the rest"
    )
    lr: float = Field(3e-3, gt=0, description="peak learning rate, of AdamW")
    muon_lr: float | None = Field(None, gt=0, description="Muon's peak learning rate; the schedule is AdamW's [0.02]")
    min_lr: float = Field(0.1, ge=0, le=1, description="final learning rate, as a fraction of lr")
    warmup: float = Field(0.05, ge=0, lt=1, description="fraction of the budget with a rising learning rate")
    schedule: Literal["cosine", "wsd", "constant"] = Field("cosine", description="learning rate after warm-up")
    decay: float = Field(0.2, gt=0, le=1, description="wsd: fraction of the budget with a falling rate")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's decay of matrices; norms and embeddings have none")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first moment")
    beta2: float = Field(0.98, ge=0, lt=1, description="AdamW's second moment")
    clip: float = Field(1.0, gt=0, description="bound on the global gradient norm")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="compute type; masters stay fp32")
    matmul: Literal["highest", "high", "medium"] = Field(
        "highest", description="matrix products of fp32: highest: fp32; on a GPU also high: TF32, medium: bf16"
    )
    tf32: bool = Field(False, description="convolutions of fp32 in TF32, on a GPU")
    compile: bool = Field(False, description="torch.compile the model")
    freeze_encoder: bool = Field(False, description="leave the image encoder as it was initialised")
    horizon: int | None = Field(
        None,
        ge=1,
        description="tokens after which gradients are cut (truncated BPTT); the state goes on; default: none",
    )
    recompute: bool = Field(False, description="activation checkpointing: recompute blocks in the backward pass")
    losses: dict[str, float] = Field({}, description="weights of a model's named losses; unnamed ones weigh 1")
    losses_warmup: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="steps over which the weight of a named loss rises from 0, in a line"
    )
    log_every: int = Field(10, ge=1, description="steps between metric lines")
    eval_every: int | None = Field(None, ge=1, description="steps between evaluations; default: only at the end")
    eval_samples: int = Field(64, ge=1, description="items per task in evaluations during training")
    save_every: int | None = Field(
        None,
        ge=1,
        description="steps between checkpoints; default: a tenth of the budget (in seconds: only at the end)",
    )
    keep: int = Field(2, ge=1, description="complete checkpoints kept")
    spike: float | None = Field(None, gt=1, description="skip steps whose loss exceeds this multiple of its mean")
    max_skips: int = Field(20, ge=0, description="non-finite or spiking steps in a row before a run counts as diverged")
    threads: int | None = Field(1, ge=1, description="CPU threads; fixed, so that sums repeat bitwise")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to train")

    @field_validator("batch", mode="before")
    @classmethod
    def _decides(cls, value: Any) -> Any:
        if value in ("auto", "adaptive"):
            raise ValueError("the rows of a step decide its result, so memory does not; give a number, and micro: auto")
        return value

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        budgets = [n for n in ("steps", "tokens", "flops", "seconds") if getattr(self, n) is not None]
        if len(budgets) != 1:
            raise ValueError(f"give exactly one budget of steps, tokens, flops, seconds, not {budgets or 'none'}")
        if self.batch % self.at_once(self.batch):
            raise ValueError(f"micro={self.micro} does not divide batch={self.batch}")
        if self.memory is not None and self.micro != "auto":
            raise ValueError(f"memory={self.memory:g} is for micro: auto; set that, or leave it out")
        if self.muon_lr is not None and self.optimizer != "muon":
            raise ValueError(f"muon_lr={self.muon_lr} is for Muon; set optimizer: muon (--use-muon), or leave it out")
        return self

    def at(self, step: int) -> TrainConfig:
        """The settings in force at a step, counted from 0: these, with the weights of losses that still warm up."""
        if not self.losses_warmup:
            return self
        rising = {
            name: self.losses.get(name, 1.0) * min(1.0, (step + 1) / steps)
            for name, steps in self.losses_warmup.items()
        }
        return self.model_copy(update={"losses": {**self.losses, **rising}})

    def at_once(self, rows: int) -> int:
        """How many of the ``rows`` of a batch go through the model at a time: all, unless a number is given."""
        return self.micro if isinstance(self.micro, int) else rows


Ticks = Annotated[int, Field(ge=1)]
Length = Annotated[int, Field(ge=16, le=1 << 24)]
Shots = Annotated[int, Field(ge=0, le=64)]
MemoryPath = Annotated[str, Field(pattern=r"^(all|memory|selfmod|cms(\.\d+)?)$")]


class Memorize(Config):
    """Memorisation at test time: texts are read by the memories that learn, before what is scored (eval.memorize)."""

    steps: int = Field(1, ge=1, description="how many times a text is read")
    use_correct_answer: bool = Field(False, description="feed right answers too, each after its item was scored")
    reset: bool = Field(True, description="forget between items; false carries memories on, in the order of the items")
    paths: tuple[MemoryPath, ...] = Field(
        ("all",), min_length=1, description="memories that learn: all, memory, selfmod, cms, cms.0 (its fastest level)"
    )
    surprise: float | None = Field(None, ge=0, description="least mean loss, nats per token, of a text to be memorised")

    @model_validator(mode="after")
    def _check(self) -> Memorize:
        if self.use_correct_answer and self.reset:
            raise ValueError(
                "use_correct_answer needs reset=false: an answer is fed after its item was scored, for later ones"
            )
        return self


class EvalConfig(Config):
    """What is evaluated after training, and how outputs are decoded."""

    suites: tuple[str, ...] = Field(("algorithmic", "likelihood"), description="suites to run; 'all' = every one")
    samples: int = Field(200, ge=1, description="items per (task, size) cell")
    batch: int = Field(128, ge=1, description="sequences decoded or scored at a time")
    max_new_tokens: int | None = Field(None, ge=1, description="bound on output; default: the longest answer + 2")
    temperature: float = Field(0.0, ge=0, description="0 = greedy")
    top_k: int | None = Field(None, ge=1, description="sample among the k likeliest tokens")
    top_p: float = Field(1.0, ge=0, le=1, description="sample within this probability mass")
    seed: int = Field(1234, ge=0, description="key of the evaluation items: the same for every rung and seed")
    text_tokens: int = Field(200_000, ge=1, description="validation tokens scored per text source, at most")
    ticks: tuple[Ticks, ...] = Field((), description="depth suite: tick budgets to evaluate at")
    lengths: tuple[Length, ...] = Field(
        (256, 512, 1024, 2048, 4096), min_length=1, description="longctx suite: tokens of an item, answer included"
    )
    adapt_tokens: int = Field(4096, ge=2, description="adaptation suite: tokens of a document that are read")
    memorize: Memorize | None = Field(
        None, description="algorithmic, likelihood and longctx: scores after memorising, beside the plain ones; {} = on"
    )
    tasks: tuple[str, ...] = Field((), description="tasks that suites of tasks are restricted to; default: all")
    transfer: tuple[AnySource, ...] = Field(
        (), description="transfer suite: sources, as in data.sources, that the run is not trained on"
    )
    shots: tuple[Shots, ...] = Field(
        (0,), min_length=1, description="transfer suite: numbers of demonstrations before a question"
    )


BOOKKEEPING = ("log_every", "eval_every", "eval_samples", "save_every", "keep")
"""Fields of ``train`` that say what is noted and kept on the way, and decide nothing."""


class Run(Config):
    """One (architecture, data, training, seed): everything that decides the result."""

    name: str = Field("run", description="directory of the run under runs/")
    seed: int = Field(0, ge=0, description="seed of initial weights, data order and noise")
    model: Annotated[SerializeAsAny[Spec], BeforeValidator(chosen(ARCHITECTURES, "model"))]
    encoder: Annotated[SerializeAsAny[EncoderSpec] | None, BeforeValidator(chosen(ENCODERS, "encoder"))] = Field(
        None, description="what turns images among the tokens into embeddings; any architecture takes one"
    )
    data: DataConfig
    train: TrainConfig
    eval: EvalConfig = Field(EvalConfig())
    start: Start | None = Field(None, description="the run whose weights it starts from; default: fresh weights")

    @model_validator(mode="after")
    def _check(self) -> Run:
        safe_name(self.name)
        if self.train.freeze_encoder and self.encoder is None:
            raise ValueError("train.freeze_encoder: there is no encoder to freeze; give one, such as encoder: conv")
        if self.train.micro == "auto" and self.encoder is not None:
            raise ValueError("train.micro: auto does not measure image encoders; give a number of rows")
        for place, source in enumerate(self.data.sources):
            if isinstance(source, ImageSource):
                _fits(self.encoder, source, f"data.sources.{place}")
        return self

    @model_validator(mode="before")
    @classmethod
    def _geometry(cls, tree: Any) -> Any:
        """Sources of images are told what the encoder makes of one, where they do not say it themselves."""
        try:
            seen = chosen(ENCODERS, "encoder")(tree["encoder"])
            told = {"side": seen.side, "channels": seen.channels, "slots": seen.slots}
            sources = [{"kind": source} if isinstance(source, str) else source for source in tree["data"]["sources"]]
        except (LookupError, TypeError, ValueError, AttributeError):
            return tree  # there is no encoder; or the fields' own checks say what is wrong
        for place, source in enumerate(sources):
            if isinstance(source, dict) and source.get("kind") == "images" and source.get("levels") is None:
                sources[place] = {**told, **source}
        return {**tree, "data": {**tree["data"], "sources": sources}}

    def build(self, vocab: int) -> LanguageModel:
        """A freshly initialised model for ``vocab`` token ids, with its encoder; weights as those of ``Spec.build``."""
        model = self.model.build(vocab)
        if self.encoder is not None:
            model.vision = self.encoder.build(model.width)
        return model

    def tree(self) -> dict[str, Any]:
        """The run as plain JSON data; ``Run.of(run.tree())`` gives it back."""
        return self.model_dump(mode="json")

    @staticmethod
    def of(tree: dict[str, Any], where: str = "run") -> Run:
        """Validate a tree; a mistake is one sentence naming the path."""
        return validate(Run, tree, where)

    def hash(self) -> str:
        """Identity of the weights: equal hashes mean equal training."""
        return digest(self.decisive())

    def decisive(self) -> dict[str, Any]:
        """The part of the tree that decides the weights: all but name, ``eval``, the bookkeeping of ``train``, and
        where the run lies whose weights it starts from."""
        tree = {name: node for name, node in self.tree().items() if name not in ("name", "eval", "start")}
        tree["train"] = {name: node for name, node in tree["train"].items() if name not in BOOKKEEPING}
        return tree if self.start is None else {**tree, "start": self.start.model_dump(mode="json", exclude={"run"})}


def _fits(encoder: EncoderSpec | None, source: ImageSource, where: str) -> None:
    if source.levels is not None:
        return
    if encoder is None:
        raise ValueError(
            f"{where} has images and the run has no encoder; give one, such as encoder: {{kind: conv, side: 28}}, "
            f"or show pixels as tokens with {where}.levels=16"
        )
    for name in ("side", "channels", "slots"):
        if getattr(source, name) != getattr(encoder, name):
            raise ValueError(
                f"{where}.{name} is {getattr(source, name)} and the encoder has {getattr(encoder, name)}; leave it out"
            )


def switches(use_muon: bool, muon_lr: float | None, aux_adam_lr: float | None, freeze_encoder: bool) -> list[str]:
    """Overrides that stand for flags of ``stepladder train``; they go with a run file, too."""
    given = {"muon_lr": muon_lr, "lr": aux_adam_lr}
    found = [f"train.{field}={value}" for field, value in given.items() if value is not None]
    found += ["train.optimizer=muon"] if use_muon else []
    return found + (["train.freeze_encoder=true"] if freeze_encoder else [])


def read(
    path: Path | None,
    overrides: list[str],
    flags: dict[str, Any] | None = None,
    *,
    name: str | None = None,
    seed: int | None = None,
) -> Run:
    """A run from a file with ``path=value`` overrides, or from plain flags; never from both.

    flags: model, tasks (comma-separated), text, steps; or, for a curriculum of tasks first and text then, model, text,
    alg_tasks (comma-separated; default: all), alg_tokens, total_tokens; None where not given. Without a file they
    choose from small defaults that train on a laptop. name and seed replace the file's.
    """
    if path is not None and "=" in path.name:  # no file was given, and this is the first override
        path, overrides = None, [str(path), *overrides]
    given = {flag: value for flag, value in (flags or {}).items() if value is not None}
    if path is not None and given:
        raise UserError(
            f"give either the run file {path} or {_dashed(given)}, not both; with a file, write model.kind=..., "
            "train.steps=... instead"
        )
    tree = read_tree(path) if path is not None else from_flags(given, overrides)
    own = {"name": name or tree.get("name") or (path.stem if path else "run"), "seed": seed}
    tree = {**tree, **{field: value for field, value in own.items() if value is not None}}
    return Run.of(override(tree, overrides), str(path or "flags"))


def from_flags(given: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The tree of a run from plain flags, as ``read`` takes them."""
    if given.keys() & {"alg_tasks", "alg_tokens", "total_tokens"}:
        return _curriculum(given, overrides)
    tasks = [{"kind": "task", "task": task} for task in str(given.get("tasks", "")).split(",") if task]
    texts = [{"kind": "text", "path": given["text"]}] if "text" in given else []
    if "tasks" in given and not tasks:
        raise UserError("--tasks names no task; give some, comma-separated, as in --tasks parity,copy")
    default = [{"kind": "task", "task": "copy"}] if not tasks and not texts else []
    return _small(given, tasks + texts + default, {"steps": given.get("steps", 500)})


def _small(given: dict[str, Any], sources: list[dict[str, Any]], budget: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": {"kind": given.get("model", "transformer"), "width": 64, "depth": 2},
        "data": {"sequence": 64, "sources": sources},
        "train": budget,
    }


def _curriculum(given: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    if wrong := given.keys() & {"tasks", "steps"}:
        raise UserError(
            f"{_dashed(wrong)} cannot be given with a curriculum; its tasks are --alg-tasks and its budget is"
            " --alg-tokens and --total-tokens"
        )
    if missing := {"alg_tokens", "total_tokens"} - given.keys():
        raise UserError(
            f"a curriculum needs {_dashed(missing)} too; give both its budgets, as in --alg-tokens 2e6"
            " --total-tokens 1e7"
        )
    first, total = given["alg_tokens"], given["total_tokens"]
    text = given.get("text", PYDOC if first < total else None)
    # The plan counts in steps, and how many tokens one has is for the overrides to say: ask a run with a stand-in.
    stand_in = _small(given, curriculum(["copy"], text, first, total, tokens_per_step=1), {"tokens": total})
    run = Run.of(override(stand_in, [o for o in overrides if not o.lstrip().startswith("data.sources")]), "flags")
    tasks = [task for task in str(given.get("alg_tasks", "all")).split(",") if task]
    left_out: list[str] = []
    if tasks == ["all"]:
        tasks, left_out = fitting(run.data.sequence)
    sources = curriculum(tasks, text, first, total, run.train.batch * run.data.sequence)
    for sentence in left_out:
        print(f"stepladder: {sentence}", file=sys.stderr)
    return _small(given, sources, {"tokens": total})


def _dashed(flags: Iterable[str]) -> str:
    """Flags as they are typed."""
    return " ".join(f"--{flag.replace('_', '-')}" for flag in sorted(flags))


CHECKPOINT_SCHEMA = 1
"""Version of state.json and of the tensors' names beside it."""


@dataclass(frozen=True)
class Loaded:
    """A trained model with what belongs to it. ``model`` is in eval mode; ``path`` is the checkpoint's folder."""

    run: Run
    model: LanguageModel
    tokenizer: Tokenizer
    step: int
    path: Path


def load(run_dir: str | Path, checkpoint: int | str | Path | None = None, device: str = "auto") -> Loaded:
    """The model that a run directory holds, from its newest sound checkpoint or from ``checkpoint`` (step or folder).

    Needs config.json, tokenizer.json and a checkpoint's weights, nothing else; every file is verified first and
    weights must fit exactly; adapters are merged into plain weights. Whatever is missing or flawed is a UserError.
    device "auto": the GPU if there is one.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    home = Path(run_dir)
    if not (home / "config.json").is_file():
        raise UserError(f"{home} is no run directory: it has no config.json; give the folder of a run, as in runs/NAME")
    run = Run.of(read_json(home / "config.json"), str(home / "config.json"))
    if checkpoint is None:
        path = latest_checkpoint(home)
    else:
        path = checkpoint_path(home, checkpoint) if isinstance(checkpoint, int) else Path(checkpoint)
    if path is None or not path.is_dir():
        have = ", ".join(p.name for p in checkpoints(home)) or "none"
        raise UserError(f"{path or home} has no sound checkpoint (there: {have}); train the run, or resume it")
    verify_manifest(path)
    if not (home / "tokenizer.json").is_file():
        raise UserError(f"{home} has no tokenizer.json; restore it, or train the run again under another name")
    tokenizer = tokenizer_from_json((home / "tokenizer.json").read_text(encoding="utf-8"))
    trained = read_json(home / "data.json").get("tokenizer") if (home / "data.json").is_file() else None
    if trained not in (None, tokenizer.fingerprint):
        raise UserError(f"{home}/tokenizer.json is not the tokenizer that this run was trained with; restore it")
    adapters = run.start and run.start.adapters
    with torch.random.fork_rng(devices=[]):  # the initial weights are drawn, then overwritten
        model = run.build(tokenizer.vocab)
        if adapters:
            add_adapters(model, adapters.rank, adapters.scale, adapters.vocabulary)
    load_weights(model, path / "model.safetensors")
    merge_adapters(model)
    return Loaded(run, model.to(device).eval(), tokenizer, int(read_state(path)["step"]), path)


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest checkpoint whose files are all as written; None if there is none.

    Flawed ones are skipped with a line on stderr: what follows starts from older weights than expected.
    """
    for path in reversed(checkpoints(Path(run_dir))):
        try:
            verify_manifest(path)
        except Corrupt as error:
            print(f"stepladder: warning: {error}; looking for an older checkpoint", file=sys.stderr)
        else:
            return path
    return None


def checkpoints(run_dir: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first, unverified."""
    found = [p for p in (run_dir / "checkpoints").glob("step-*") if p.name[5:].isdecimal() and p.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lives."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def cache_folder() -> Path:
    """Where token shards are kept between runs: ``$STEPLADDER_CACHE``, or ``~/.cache/stepladder``."""
    return Path(os.environ.get("STEPLADDER_CACHE") or Path.home() / ".cache" / "stepladder")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint; another version of it is refused, naming both."""
    state = read_json(checkpoint / "state.json")
    schema = state.get("schema") if isinstance(state, dict) else None
    if schema != CHECKPOINT_SCHEMA:
        raise UserError(
            f"{checkpoint} has checkpoint version {schema}, this Stepladder reads version {CHECKPOINT_SCHEMA}; "
            f"use the version that wrote it (provenance.json names it)"
        )
    return state
