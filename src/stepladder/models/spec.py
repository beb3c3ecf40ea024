"""What an architecture is to the rest of the house: a frozen, typed description that builds a LanguageModel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeVar

from stepladder.core.config import Field, Kinded, register, validate
from stepladder.core.errors import UserError
from stepladder.core.registry import Registry
from stepladder.models.base import Part
from stepladder.models.channels.swiglu import SwiGLU
from stepladder.models.layers import residual_gain
from stepladder.models.lm import LanguageModel
from stepladder.models.mixers.attention import Attention
from stepladder.models.stack import Residual

ARCHITECTURES: Registry[type[Spec]] = Registry("architecture")

SHAPES = {  # name: width, depth, heads. Where the name is a number of parameters, the solver meets it by ``hidden``.
    "nano": (512, 6, 8),
    "pilot": (512, 12, 8),
    "mid": (1024, 24, 16),
    "target": (1536, 32, 24),
    "50M": (512, 8, 8),
    "125M": (768, 12, 12),
    "300M": (1024, 20, 16),
    "350M": (1024, 24, 16),
    "760M": (1536, 24, 16),
    "1B": (2048, 18, 16),
    "1B-16k": (2048, 18, 16),
}

HEADED: dict[str, dict[str, Any]] = {
    size: {"width": width, "depth": depth, "heads": heads} for size, (width, depth, heads) in SHAPES.items()
}
"""The fields of these sizes, for architectures whose mixer has heads."""


class Spec(Kinded):
    """Base of every architecture's configuration: hyperparameters as documented fields, and ``build``.

    tiny: fields of the configuration that the laws run on; seconds on a CPU.
    sizes: fields by size name, for ``stepladder.build(name, size=...)``.
    knobs: fields, finest first, that the solver may turn to match a control's parameters.
    twins: field overrides that choose other implementations of the same function of the same parameters; the law
        "twin" compares them with the configuration that has them not.
    """

    tiny: ClassVar[dict[str, Any]] = {}
    sizes: ClassVar[dict[str, dict[str, Any]]] = {}
    knobs: ClassVar[tuple[str, ...]] = ("hidden", "width")
    twins: ClassVar[tuple[dict[str, Any], ...]] = ()

    def build(self, vocab: int) -> LanguageModel:
        """A freshly initialised model for ``vocab`` token ids; weights come from torch's global generator."""
        raise NotImplementedError


S = TypeVar("S", bound=Spec)


def architecture(name: str, tiny: dict[str, Any], aliases: tuple[str, ...] = ()) -> Callable[[type[S]], type[S]]:
    """Class decorator: admit a Spec to the zoo under ``name``; ``tiny`` is its configuration for the laws."""

    def admit(cls: type[S]) -> type[S]:
        cls.tiny = tiny
        return register(ARCHITECTURES, name, aliases)(cls)

    return admit


def spec(name: str, size: str | None = None, **fields: Any) -> Spec:
    """The configuration of architecture ``name`` at a named size, with ``fields`` on top."""
    cls = ARCHITECTURES.get(name)
    named = {"tiny": cls.tiny, **cls.sizes}
    if size is not None and size not in named:
        raise UserError(f"architecture '{name}' has no size '{size}'; sizes: {', '.join(named)}")
    tree = {**(named[size] if size else {}), **fields, "kind": ARCHITECTURES.name(name)}
    return validate(cls, tree, "model")


class Macro(Spec):
    """Fields of the Llama-style macro architecture (Touvron et al., 2023): pre-norm blocks of mixer and SwiGLU.

    Architectures that swap one thing inside it inherit these fields, so that a ladder can hold all else equal.
    """

    width: int = Field(128, ge=4, description="model width d")
    depth: int = Field(4, ge=1, description="number of blocks with weights of their own")
    hidden: int | None = Field(None, ge=1, description="hidden width of SwiGLU; default 8/3 d, rounded to 8")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on what each part adds to the residual stream")
    tied: bool = Field(False, description="whether the head shares the embedding's weights")

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        size: {"width": width, "depth": depth} for size, (width, depth, _) in SHAPES.items()
    }

    @property
    def hidden_width(self) -> int:
        """The SwiGLU width in force."""
        return self.hidden or max(8, round(self.width * 8 / 3 / 8) * 8)

    def block(self, mixer: Part | None, effective_depth: int) -> list[Residual]:
        """One block: ``mixer`` (left out if None), then SwiGLU. ``effective_depth`` counts ticks."""
        channel = SwiGLU(self.width, self.hidden_width, residual_gain(effective_depth))
        return [Residual(self.width, part, self.dropout) for part in (mixer, channel) if part is not None]


class AttentionMacro(Macro):
    """Macro with attention as the mixer."""

    heads: int = Field(4, ge=1, description="query heads; divides width")
    kv_heads: int | None = Field(None, ge=1, description="key/value heads; divides heads; default: heads")
    positions: Literal["rope", "learned", "none"] = Field("rope", description="how positions are told")
    rope_base: float = Field(10000.0, gt=1, description="base of the rotary frequencies")
    max_positions: int = Field(1024, ge=1, description="longest document with learned positions")

    sizes: ClassVar[dict[str, dict[str, Any]]] = HEADED | {
        "1B-16k": {"width": 2048, "depth": 18, "heads": 16, "kv_heads": 4, "max_positions": 16384}
    }

    def attention_block(self, effective_depth: int) -> list[Residual]:
        """One block of attention and SwiGLU."""
        base = self.rope_base if self.positions == "rope" else None
        gain = residual_gain(effective_depth)
        mixer = Attention(self.width, self.heads, self.kv_heads or self.heads, base, gain)
        return self.block(mixer, effective_depth)

    @property
    def learned_positions(self) -> int:
        """Rows of the learned position table; 0 where positions are told otherwise."""
        return self.max_positions if self.positions == "learned" else 0
