"""The recursive-halting transformer: one body, as many ticks for every token as a policy grants it."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

from stepladder.core.config import Field, chosen
from stepladder.models.layers import residual_gain
from stepladder.models.lm import LanguageModel
from stepladder.models.mixers.held import HeldAttention
from stepladder.models.policies import POLICIES, ACTPolicy, Policy
from stepladder.models.recurrences.recursive_halting import RecursiveHalting
from stepladder.models.spec import AttentionMacro, architecture
from stepladder.models.stack import Residual, Stack


@architecture(
    "recursive_halting",
    tiny={
        "width": 16,
        "depth": 1,
        "prelude": 1,
        "heads": 2,
        "ticks": 3,
        "deep": 0.1,
        "policy": {"kind": "act", "tau": 0.6},
    },
)
class RecursiveHaltingModel(AttentionMacro):
    """``prelude`` blocks, then ``depth`` blocks applied up to ``ticks`` times, each token until its policy stops it.

    Source: the recursive-halting ancestor, a Mistral body (Jiang et al., 2023: RMSNorm, rotary positions, grouped
    key/value heads, SwiGLU) with adaptive computation time (Graves, 2016). Differs from it in: states recur before the
    norm that the head reads, and the input is heard again at every tick; K ticks are K passes, not K + 1; remainder at
    the cap, so weights sum to 1 and expected ticks mean something; positions and document masks are the same at every
    tick; one head call on mixed states instead of K tensors of logits; modulation of a rank that ticks can use,
    starting at none; a gate for every channel, starting half open, instead of one a tick, at 0.12, which
    made all ticks alike; the ticks that deep supervision weighs are those that a token executed, all equally; a cache.
    There is no coda: behind one, a mixture of states would no longer be a mixture of logits.
    """

    prelude: int = Field(1, ge=0, description="blocks before the loop, applied once")
    depth: int = Field(2, ge=1, description="blocks of the body, applied at every tick")
    ticks: int = Field(4, ge=1, description="most applications of the body (the ancestor's k_max)")
    film_rank: int | None = Field(
        None, ge=0, description="rank of what tells ticks apart, <= ticks; default: ticks; 0: none"
    )
    deep: float = Field(
        0.0, ge=0, description="weight of the mean likelihood of every executed tick (lambda of deep supervision)"
    )
    policy: Annotated[Policy, BeforeValidator(chosen(POLICIES, "policy"))] = Field(
        ACTPolicy(), description="who stops a token: act, ponder, fixed, convergence, controller"
    )

    def build(self, vocab: int) -> LanguageModel:
        effective = self.prelude + self.depth * self.ticks
        parts = [part for _ in range(self.prelude) for part in self.attention_block(effective)]
        loop = RecursiveHalting(
            Stack(part for _ in range(self.depth) for part in self._held_block(effective)),
            self.width,
            vocab,
            ticks=self.ticks,
            film_rank=self.ticks if self.film_rank is None else self.film_rank,
            deep=self.deep,
            halting=self.policy.build(self.width, self.ticks),
        )
        return LanguageModel(
            vocab,
            self.width,
            loop,
            prelude=Stack(parts),
            tied=self.tied,
            learned_positions=self.learned_positions,
            final_norm=False,
        )

    def _held_block(self, effective_depth: int) -> list[Residual]:
        base, gain = self.rope_base if self.positions == "rope" else None, residual_gain(effective_depth)
        mixer = HeldAttention(self.width, self.heads, self.kv_heads or self.heads, base, gain)
        return self.block(mixer, effective_depth)
