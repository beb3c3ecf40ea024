"""One decode step as an ONNX graph with explicit state: tokens and state in, logits and state out.

Needs the extra ``onnx``. What is exported is ``torch.export``'s graph of the one forward that everything else runs too.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepladder.core.errors import UserError
from stepladder.core.files import write_atomic
from stepladder.models.base import State, leaves, map_state
from stepladder.models.lm import LanguageModel
from stepladder.models.mixers.lstm import LSTM
from stepladder.models.spec import Spec
from stepladder.models.weights import save_tensors

EXTRA = "ONNX needs packages of its own: pip install 'stepladder[onnx]' -c constraints.txt"


TRIED, CLOSE = 4, 1e-4
"""Tokens that are run through a graph before it is written, and how far its logits may be off (float32)."""


class DecodeStep(nn.Module):
    """A model as a function of tensors alone: tokens (B, 1) and the leaves of a state to logits (B, V) and leaves."""

    def __init__(self, model: LanguageModel, like: State, ticks: int | None) -> None:
        super().__init__()
        self.model, self.like, self.ticks = model, like, ticks

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        given = iter(state)
        out = self.model(tokens, map_state(lambda _: next(given), self.like), ticks=self.ticks, logits_at="last")
        assert out.logits is not None
        return out.logits[:, -1], *leaves(out.state)


def export(
    spec: Spec,
    model: LanguageModel,
    file: str | Path,
    *,
    batch: int = 1,
    capacity: int = 1024,
    ticks: int | None = None,
) -> dict[str, Any]:
    """Write the decode step of ``model``, made by ``spec``, to ``file``; returns what it says of itself.

    In float32 on a CPU. Inputs: "tokens" int64 (batch, 1) and "state.0", "state.1", ...; outputs: "logits"
    (batch, vocab) and "next.0", ..., to be given as the state of the next token. FILE.start.safetensors has the state
    of a sequence that has not begun, by the same names; FILE.json the names, shapes and bounds. ``capacity``: tokens
    that a state can hold; nothing refuses more outside of Stepladder, so the caller counts. The graph is
    run and compared before anything is written: a model that cannot be such a graph, and a missing package, is a
    UserError.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401, torch's exporter is built on it
    except ImportError as error:
        raise UserError(EXTRA) from error
    model = plain(spec, model)
    if capacity < TRIED:
        raise UserError(f"capacity={capacity}: give room for at least {TRIED} tokens, which try out what is written")
    start = model.init_state(batch, capacity, ticks=ticks)
    tokens = torch.zeros(batch, 1, dtype=torch.int64)
    given = [leaf.clone() for leaf in leaves(start)]
    names = [str(place) for place in range(len(given))]
    with _refusing(spec.kind), torch.no_grad():
        program = torch.export.export(DecodeStep(model, start, ticks), (tokens, *given), strict=False)
        after = [node.meta["val"] for node in program.graph.output_node().args[0][1:]]
        if [(leaf.shape, leaf.dtype) for leaf in after] != [(leaf.shape, leaf.dtype) for leaf in given]:
            raise ValueError("its state grows with every token, and a graph has fixed shapes")
        written = torch.onnx.export(
            program,
            input_names=["tokens", *(f"state.{name}" for name in names)],
            output_names=["logits", *(f"next.{name}" for name in names)],
            verbose=False,
        )
        assert written is not None
        graph = written.model_proto
        quiet = onnxruntime.SessionOptions()
        quiet.log_severity_level = 4  # what goes wrong is raised; it need not be printed, too
        _run(onnxruntime.InferenceSession(graph.SerializeToString(), quiet), model, start, ticks)
    about = {
        "schema": 1,
        "architecture": spec.kind,
        "vocab": model.vocab,
        "batch": batch,
        "capacity": capacity,
        "ticks": ticks,
        "state": [{"shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch.")} for leaf in given],
    }
    onnx.helper.set_model_props(graph, {"stepladder": json.dumps(about)})
    file = Path(file)
    write_atomic(file, graph.SerializeToString())
    save_tensors({f"state.{name}": leaf for name, leaf in zip(names, given, strict=True)}, start_of(file))
    write_atomic(file.with_name(file.name + ".json"), json.dumps(about, indent=1) + "\n")
    return about


def _run(session: Any, model: LanguageModel, state: State, ticks: int | None) -> None:
    """Run some tokens through the graph and the model: exporters write graphs that do not run, or run otherwise."""
    given = [leaf.numpy() for leaf in leaves(state)]
    for step in range(TRIED):
        tokens = (torch.arange(len(given[0])) * 5 + step * step + 1)[:, None] % model.vocab
        out = model(tokens, state, ticks=ticks, logits_at="last")
        assert out.logits is not None
        names = (f"state.{place}" for place in range(len(given)))
        logits, *given = session.run(None, {"tokens": tokens.numpy(), **dict(zip(names, given, strict=True))})
        off = float((torch.from_numpy(logits) - out.logits[:, -1]).abs().max())
        if not off < CLOSE:
            raise ValueError(f"onnxruntime's logits are {off:.2g} off")
        state = out.state


def start_of(file: Path) -> Path:
    """Where the state before the first token is."""
    return file.with_name(file.name + ".start.safetensors")


def plain(spec: Spec, model: LanguageModel) -> LanguageModel:
    """The same function of the same weights without hand-written kernels, in float32 on a CPU, for evaluation."""
    naive = next((twin for twin in type(spec).twins if "naive" in twin.values()), {})
    with torch.random.fork_rng(devices=[]):
        twin = type(spec).model_validate({**spec.model_dump(mode="json"), **naive}).build(model.vocab)
    twin.load_state_dict(model.state_dict())
    for part in twin.modules():
        if isinstance(part, LSTM):  # also those inside a graph, of which the specification's twins know nothing
            part.scan = "naive"
    return twin.float().eval()


@contextlib.contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Whatever the exporters cannot do becomes one sentence, and what they print is kept from the terminal."""
    loggers = [logging.getLogger(each) for each in ("torch.onnx", "torch.export", "torch._dynamo", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:  # both exporters raise a dozen kinds, of which none is public
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        why = " ".join(str(cause).split("\n")[0].split())[:160].rstrip(" .")
        raise UserError(
            f"architecture '{name}' cannot be written as an ONNX graph ({type(cause).__name__}: {why}); "
            "run it with stepladder sample"
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
