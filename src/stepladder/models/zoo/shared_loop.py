"""The looped transformer: the same blocks applied tick after tick."""

from __future__ import annotations

from stepladder.core.config import Field
from stepladder.models.lm import LanguageModel
from stepladder.models.recurrences.loop import Loop
from stepladder.models.spec import AttentionMacro, architecture
from stepladder.models.stack import Stack


@architecture("shared_loop", tiny={"width": 32, "depth": 1, "heads": 2, "ticks": 3})
class SharedLoop(AttentionMacro):
    """``depth`` blocks with weights of their own, applied ``ticks`` times: effective depth = depth x ticks.

    Source: Dehghani et al., 2019 (Universal Transformers); Fan et al., 2024 for re-injection. Differs from them
    in what recurrences.loop.Loop lists. At call time any number of ticks may be asked for.
    """

    ticks: int = Field(4, ge=1, description="applications of the shared blocks")
    inject: bool = Field(True, description="whether the embedded input is added again at every tick")

    def build(self, vocab: int) -> LanguageModel:
        effective = self.depth * self.ticks
        parts = [part for _ in range(self.depth) for part in self.attention_block(effective)]
        loop = Loop(Stack(parts), self.width, self.ticks, self.inject)
        return LanguageModel(vocab, self.width, loop, tied=self.tied, learned_positions=self.learned_positions)
