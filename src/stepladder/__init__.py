"""Stepladder: a laboratory for language models that take steps.

import stepladder as sl
sl.architectures()                         # names in the zoo
model = sl.build("shared_loop", vocab=259, size="tiny")
model(tokens_BT, ticks=8).logits           # one forward for everything
sl.climb("ladders/first.yaml")             # a matched, seeded comparison and its page
sl.load("runs/first/transformer-s0").model # a trained model
sl.records("runs/first/transformer-s0")    # what it answered, item by item
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepladder.api import architectures, build, climb, load, records

__version__ = "0.1.0"
__all__ = ["architectures", "build", "climb", "load", "records"]


def __getattr__(name: str) -> Any:
    """Load the surface on first use, so that ``import stepladder`` and ``stepladder --help`` stay free of torch."""
    if name in __all__:
        return getattr(import_module("stepladder.api"), name)
    raise AttributeError(f"module 'stepladder' has no attribute '{name}'")
