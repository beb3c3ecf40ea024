"""VecSTur: VecTur with random symbols on its tape."""

from __future__ import annotations

from stepladder.core.config import Field
from stepladder.models.mixers.vectur import Symbols, VecTur
from stepladder.models.spec import architecture
from stepladder.models.zoo.vectur import TINY, VectorTuring


@architecture("vecstur", tiny=TINY)
class VectorStochasticTuring(VectorTuring):
    """``vectur`` with a second cell per token that holds random symbols; those are the one factor.

    Source: VecSTur of the same system (spec "vectur", 2.8). Differs from it in: symbols are a function of the call's
    key, the block, the token's position in its document and the channel, so the same in recomputation, in any
    chunking and beside any batch-mates, and an evaluation repeats (there: a global generator, unseeded, in training
    and evaluation alike); a position's machine has the symbols of its own prefix only; signs by default (there:
    normal numbers); symbols are on the tape as they are, not through W_T; the last head begins among them.

    In evaluation the symbols are those of the key: fixed, whatever is evaluated twice. With ``draws`` K a block's
    output is the mean over K tapes in eval mode (before its output map; training draws one). It is a field of the
    architecture because everything that evaluates then does the same, and the cost says so; averaging the
    predictions of whole models instead needs no field: call the model with several keys.
    """

    symbols: Symbols = Field("rademacher", description="what a random cell holds: signs, or normal numbers")
    draws: int = Field(1, ge=1, description="random tapes over which a block's output is averaged in eval mode")

    def mixer(self, random: Symbols | None = None, draws: int = 1) -> VecTur:
        """The machine of one block, with random cells."""
        return super().mixer(self.symbols, self.draws)
