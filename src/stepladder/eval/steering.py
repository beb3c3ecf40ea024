"""Steering a planner while it writes, and what it planned: what ``stepladder sample`` needs beside the decoder.

The knobs are those of the model's configuration under the names of the prototype's flags; what is not given stays as
the model was trained. They hold for the prompt, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from stepladder.core.errors import UserError
from stepladder.eval.beliefs import planner_of, replanned
from stepladder.eval.decode import evaluating
from stepladder.eval.trace import label
from stepladder.models.heads.belief import move
from stepladder.models.heads.plan_losses import boundary
from stepladder.models.lm import LanguageModel
from stepladder.run import Loaded


@contextmanager
def steered(
    model: LanguageModel,
    *,
    force_state: int | None = None,
    freeze_planner: bool = False,
    lookahead_steps: int | None = None,
    lookahead_feedback_scale: float | None = None,
    planner_temperature: float | None = None,
    token_filtering: bool | None = None,
) -> Iterator[None]:
    """Inside, the planner plans so. A UserError for a model without one, and for values out of bounds.

    force_state: one plan, exactly its expert. freeze_planner: the belief stays the prior. lookahead_steps,
    lookahead_feedback_scale: chunks of the forecast and its share in the gate. planner_temperature: of the gate.
    token_filtering: whether tokens are evidence.
    """
    fields: dict[str, Any] = {
        "horizon": lookahead_steps,
        "feedback": lookahead_feedback_scale,
        "temperature": planner_temperature,
        "filtering": token_filtering,
    }
    fields = {name: value for name, value in fields.items() if value is not None}
    if freeze_planner and force_state is not None:
        raise UserError("a planner is frozen, or a plan is forced; choose one")
    if freeze_planner:
        fields["control"] = "frozen"
    if force_state is not None:
        fields |= {"control": "forced", "forced": force_state}
    head = planner_of(model)
    if not fields:
        yield
        return
    if head is None:
        raise UserError("this model has no planner to steer; leave the planner's options out")
    if force_state is not None and not 0 <= force_state < head.plan.plans:
        raise UserError(f"plan {force_state}: there are plans 0 to {head.plan.plans - 1}; choose one of them")
    bad = {
        "lookahead_steps": lookahead_steps is not None and lookahead_steps < 0,
        "lookahead_feedback_scale": lookahead_feedback_scale is not None and not 0 <= lookahead_feedback_scale <= 1,
        "planner_temperature": planner_temperature is not None and not 0 < planner_temperature < float("inf"),
    }
    for name, wrong in bad.items():
        if wrong:
            bounds = {"lookahead_steps": "at least 0", "lookahead_feedback_scale": "in 0..1"}.get(name, "above 0")
            raise UserError(f"{name.replace('_', ' ')}: must be a number {bounds}")
    with replanned(model, **fields):
        yield


def snapshots(loaded: Loaded, ids: np.ndarray) -> Table:
    """A row for every chunk of a text, int ids [T]: the likeliest plan at its start, and those that were foreseen.

    Column +n is the chain's forecast for n chunks later, made at the start of the chunk. A UserError for a model whose
    belief does not move.
    """
    head = planner_of(loaded.model)
    if head is None or not head.filters:
        raise UserError("there are no beliefs to show: this model has no planner, or its gate is fixed")
    device = next(loaded.model.parameters()).device
    tokens = torch.from_numpy(np.asarray(ids, dtype=np.int64))[None].to(device)
    with evaluating(loaded.model):
        trace = loaded.model(tokens, trace=True, logits_at="last").trace
        moves_KK = head.chain().moves_KK
    place = torch.arange(tokens.shape[1])
    starts = [0, *(int(p) for p in boundary(place, head.plan.chunk, head.plan.first).nonzero()[:, 0] if p > 0)]
    shown = Table(title="plans by chunk", box=SIMPLE)
    ahead = max(1, head.plan.horizon)
    for column in ("token", "plan", *(f"+{n}" for n in range(1, ahead + 1))):
        shown.add_column(column, justify="right")
    shown.add_column("text")
    for first, after in zip(starts, [*starts[1:], tokens.shape[1] - 1], strict=True):
        log_b, cells = trace["plan"][0, first].log(), []
        for _ in range(1 + ahead):
            best = int(log_b.argmax())
            cells.append(f"{best} {float(log_b[best].exp()):.2f}")
            log_b = move(log_b, moves_KK)
        # A move lies behind its token: the chunk's own begin with the next one.
        own = ids[first + (first > 0) : after + 1]
        shown.add_row(str(first + (first > 0)), *cells, escape("".join(label(loaded.tokenizer, int(i)) for i in own)))
    return shown
