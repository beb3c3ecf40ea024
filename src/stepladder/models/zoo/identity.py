"""The floor: the macro architecture with nothing in the mixer's place."""

from __future__ import annotations

from stepladder.models.lm import LanguageModel
from stepladder.models.recurrences.once import Once
from stepladder.models.spec import Macro, architecture
from stepladder.models.stack import Stack


@architecture("identity", tiny={"width": 16, "depth": 2})
class IdentityFloor(Macro):
    """A per-token model: every position sees its own token only. What it can do, no mixer is needed for."""

    def build(self, vocab: int) -> LanguageModel:
        parts = [part for _ in range(self.depth) for part in self.block(None, self.depth)]
        return LanguageModel(vocab, self.width, Once(Stack(parts)), tied=self.tied)
