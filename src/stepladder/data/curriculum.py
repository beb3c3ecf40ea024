"""Tasks first, then text: a plan as plain data, in which every share and every difficulty is a function of the step.

Nothing runs here and nothing is remembered: the plan becomes the ``sources`` of a run's configuration, where everybody
can read it, and the stream draws each batch from (configuration, seed, step).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stepladder.core.config import chosen
from stepladder.core.errors import UserError
from stepladder.data.packing import probe
from stepladder.data.tasks import TASKS
from stepladder.data.tokenizers import ByteTokenizer

PERSISTENT = 0.15
"""Share of the tasks in phase 2, so that they are not forgotten."""
BAND = 0.1
"""Half the width of the way from the one mixture to the other, as a part of phase 1."""
RAMP = 0.5
"""The part of phase 1 over which the sizes grow; the rest of it draws from the whole training range.

Sizes are uniform from the lower end of the range to an upper end that rises linearly, so a size that enters at step t
is drawn in what is left of phase 1 from there, and the largest one in a part 1 - RAMP of the steps: half as often as
without a ramp, and phase 2 adds to that.
"""


def curriculum(
    tasks: Sequence[Any],
    text: str | None,
    alg_tokens: float,
    total_tokens: float,
    tokens_per_step: int,
    persistent: float = PERSISTENT,
) -> list[dict[str, Any]]:
    """The ``data.sources`` of a run over ``total_tokens``, ``alg_tokens`` of them on tasks before it turns to text.

    tasks: names, or trees with fields such as {kind: parity, train: [2, 8]}; all have equal shares. text: the path of
    a text source; None where there is no phase 2, both budgets being equal. tokens_per_step: batch x sequence; phases
    are rounded to steps. Tokens are those of ``train.tokens``: positions of rows, supervised or not. A text is
    supervised at every position and a task in its answers only, so the tasks' part of what the loss sums over is
    smaller in phase 2 than ``persistent``.

    The weights of all sources sum to 1. The tasks' is 1 in phase 1, ``persistent`` in phase 2, and linear from BAND
    before the boundary to as much after it; by this symmetry the tokens that tasks get are those of a sharp boundary,
    alg_tokens + persistent x (total_tokens - alg_tokens), in expectation over the seeds. Sizes reach the whole
    training range at RAMP of phase 1. Nothing depends on ``total_tokens`` if phase 2 is as long as half the band, so
    such a run can be extended.
    Raises UserError for budgets that leave a phase without a step, and for a text that is missing or never read.
    """
    if not 0 < alg_tokens <= total_tokens < float("inf"):
        raise UserError(
            f"alg_tokens = {alg_tokens:g} and total_tokens = {total_tokens:g} make no curriculum: the total counts"
            " the tasks' tokens too; give 0 < alg_tokens <= total_tokens"
        )
    if not tasks:
        raise UserError("a curriculum needs a task to begin with; name one, or 'all'")
    if not 0 <= persistent < 1:
        raise UserError(f"persistent = {persistent:g} is no share of tasks beside a text; give one from 0 to below 1")
    first, steps = round(alg_tokens / tokens_per_step), round(total_tokens / tokens_per_step)
    for name, tokens, count in (
        ("alg_tokens", alg_tokens, first),
        ("total_tokens - alg_tokens", total_tokens - alg_tokens, steps - first),
    ):
        if tokens and count < 1:
            raise UserError(
                f"{name} = {tokens:g} makes no step of {tokens_per_step} tokens; raise it, or make train.batch or"
                " data.sequence smaller"
            )
    shared = {"kind": "task", "ramp": int(RAMP * first)}
    if (steps > first) != (text is not None):
        raise UserError(
            f"'{text}' would never be read: alg_tokens = total_tokens leave nothing for text; raise total_tokens, or"
            " leave the text out"
            if text is not None
            else "a curriculum with total_tokens above alg_tokens needs a text for the rest; name a file, or 'pydoc'"
        )
    if text is None:
        return [{**shared, "task": task, "weight": 1 / len(tasks)} for task in tasks]
    half = min(max(1, int(BAND * first)), steps - first)
    # The middle of these is half a step before `first`, the first step of phase 2: as much is given as is taken.
    begin, end = first - half, first + half - 1

    def ramped(before: float, after: float) -> list[list[float]]:
        return [[begin, before], [end, after]]

    return [
        *({**shared, "task": task, "weight": ramped(1 / len(tasks), persistent / len(tasks))} for task in tasks),
        {"kind": "text", "path": text, "weight": ramped(0.0, 1 - persistent)},
    ]


def fitting(length: int) -> tuple[list[str], list[str]]:
    """Names of the registered tasks whose training examples fit into rows of ``length`` tokens; and a sentence for
    each of the others. A character counts as a token, which is right for all tokenizers but 'bpe', whose are longer.
    Raises UserError if none fits."""
    fit, left_out, named = [], [], chosen(TASKS, "task")
    for name in TASKS.names():
        try:
            probe(named(name), ByteTokenizer(), length)
        except UserError as error:
            left_out.append(f"without '{name}': {error}")
        else:
            fit.append(name)
    if not fit:
        raise UserError(f"no task fits into rows of {length} tokens; make data.sequence larger")
    return fit, left_out
