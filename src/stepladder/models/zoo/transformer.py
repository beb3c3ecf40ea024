"""The control: a plain decoder-only transformer."""

from __future__ import annotations

from stepladder.models.lm import LanguageModel
from stepladder.models.recurrences.once import Once
from stepladder.models.spec import AttentionMacro, architecture
from stepladder.models.stack import Stack


@architecture("transformer", tiny={"width": 32, "depth": 2, "heads": 2}, aliases=("baseline",))
class Transformer(AttentionMacro):
    """Decoder-only transformer with pre-norm, rotary positions and SwiGLU.

    Source: Vaswani et al., 2017, with the changes of Llama (Touvron et al., 2023). Differs from it in: initial
    scales 1/sqrt(fan-in) with residual outputs divided by sqrt(2 x depth).
    """

    def build(self, vocab: int) -> LanguageModel:
        parts = [part for _ in range(self.depth) for part in self.attention_block(self.depth)]
        return LanguageModel(
            vocab, self.width, Once(Stack(parts)), tied=self.tied, learned_positions=self.learned_positions
        )
