"""What a run starts from when it does not start from fresh weights: another run's, all trained on or with adapters."""

from __future__ import annotations

from stepladder.core.config import Config, Field


class Adapters(Config):
    """Low-rank adapters on every hidden matrix, W + alpha/rank B A (models.adapters). All else is frozen."""

    rank: int = Field(ge=1, description="columns of B, rows of A")
    alpha: float | None = Field(None, gt=0, description="scale of the change, times rank; default: 2 x rank")

    vocabulary: bool = Field(
        False, description="train embeddings and head, too: for texts with symbols that the base has never seen"
    )

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


class Start(Config):
    """The base run: training begins at step 0, with a fresh optimizer, from exactly its weights."""

    run: str = Field(description="directory of the base run, as it was; where it lies decides nothing")
    weights: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of the base's weights, adapters merged")
    adapters: Adapters | None = Field(None, description="low-rank adapters; default: all weights are trained")
