"""The control for position encoding: the plain transformer with a learned table of absolute positions."""

from __future__ import annotations

from typing import Literal

from stepladder.core.config import Field
from stepladder.models.spec import architecture
from stepladder.models.zoo.transformer import Transformer


@architecture("nano_absolute", tiny={"width": 32, "depth": 2, "heads": 2, "max_positions": 256})
class NanoAbsolute(Transformer):
    """``transformer`` whose positions are learned vectors added to the embeddings; no other thing differs.

    Source: learned position embeddings, Gehring et al., 2017, as in GPT-2 (Radford et al., 2019). Differs from the
    ancestor's control in: everything that is not about positions is the control's own (there: LayerNorm, biases,
    GELU, a file outside the trainer whose loss did not shift its targets); positions restart in every document;
    a document longer than the table is refused. Rows beyond the longest training document stay as they were
    initialised: what that does to longer inputs is the question this control answers. The table has
    max_positions x width parameters and they are counted: set max_positions to the longest document evaluated, so
    that matching parameters takes no more than that from the blocks.
    """

    positions: Literal["learned"] = Field("learned", description="how positions are told: a learned table")
