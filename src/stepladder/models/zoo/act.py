"""The thought stream with adaptive computation time."""

from __future__ import annotations

from stepladder.core.config import Field
from stepladder.models.halting import ACT, Halting
from stepladder.models.spec import architecture
from stepladder.models.zoo.latent import TINY, Latent


@architecture("act", tiny={**TINY, "epsilon": 0.4})  # so that the laws meet thoughts that halt early
class Act(Latent):
    """``latent`` in which every thought decides how many ticks it takes, up to ``ticks``; halting is the one factor.

    Source: Graves, 2016, applied to the thoughts of ``latent``; models.halting.ACT lists what differs from the paper
    and which of the ancestor's defects are repaired. A token's ticks are those of the thought that it reads. With
    gradients every tick is computed and the later ones weigh nothing; without, the loop ends when no thought of
    the batch runs. A price on ticks pulls from the first step on, when thoughts cannot help yet: watch the trace.
    """

    min_ticks: int = Field(1, ge=1, description="ticks that every thought takes")
    epsilon: float = Field(0.01, gt=0, lt=1, description="a thought halts when its mass is within this of 1")
    ponder: float = Field(0.01, ge=0, description="price of an expected tick per token, in nats, in the objective")

    def halting(self) -> Halting:
        """When a thought stops: when its halting mass is spent."""
        return ACT(self.width, self.ticks, self.min_ticks, self.epsilon, self.ponder)
