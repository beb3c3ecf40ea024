"""What hand-written loops over tokens share: how autograd and torch.compile see them, and rows that begin afresh."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor


class Loop:
    """A loop over tokens with its backward pass, as one operator ``stepladder::name`` of autograd and compilers.

    forward(*tensors, *numbers, keep) -> (*outputs, *kept): with ``keep`` what the backward pass needs, else empty.
    shapes: what ``forward`` returns, as empty tensors. backward(*gradients of outputs, *tensors, *numbers, *outputs,
    *kept) -> the gradients of the tensors numbered ``derived``. The others (masks) have none.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        shapes: Callable[..., Any],
        *,
        tensors: int,
        numbers: int = 0,
        outputs: int,
        kept: int,
        derived: Sequence[int],
    ) -> None:
        self.plain = forward
        given = [f"Tensor x{n}" for n in range(tensors)] + [f"int n{n}" for n in range(numbers)]
        results = [f"Tensor y{n}" for n in range(outputs + kept)]
        slopes = [f"Tensor d{n}" for n in range(outputs)]
        self.operator = _operator(name, forward, [*given, "bool keep"], outputs + kept)
        self.operator.register_fake(shapes)

        def contiguous(*args: Any) -> tuple[Tensor, ...]:
            return tuple(each.contiguous() for each in backward(*args))

        def back_shapes(*args: Any) -> tuple[Tensor, ...]:
            return tuple(args[outputs + n].new_empty(args[outputs + n].shape) for n in derived)

        back = _operator(f"{name}_backward", contiguous, [*slopes, *given, *results], len(derived))
        back.register_fake(back_shapes)

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.numbers = inputs[tensors:-1]
            ctx.save_for_backward(*inputs[:tensors], *output)
            ctx.set_materialize_grads(False)  # what is kept gets no gradient, not even one of zeros

        def derive(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors  # once: recomputation under a checkpoint does not give them twice
            inputs, results = saved[:tensors], saved[tensors:]
            pairs = zip(gradients[:outputs], results, strict=False)
            known = (torch.zeros_like(result) if slope is None else slope for slope, result in pairs)
            found = dict(zip(derived, back(*known, *inputs, *ctx.numbers, *results), strict=True))
            return tuple(found.get(n) for n in range(tensors + numbers + 1))

        self.operator.register_autograd(derive, setup_context=setup_context)

    def __call__(self, *inputs: Any) -> Any:
        """Outputs and what is kept. Where nothing is differentiated or traced, the loop itself runs."""
        needed = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        if needed or torch.compiler.is_compiling():
            return self.operator(*inputs, needed)
        return self.plain(*inputs, False)


def _operator(name: str, function: Callable[..., Any], given: list[str], results: int) -> Any:
    schema = f"({', '.join(given)}) -> ({', '.join(['Tensor'] * results)})"
    return torch.library.custom_op(f"stepladder::{name}", function, mutates_args=(), schema=schema)


def some_rows(reset_TB: Tensor) -> Iterator[Tensor | None]:
    """Of every token the rows that begin a document there, as a mask (B,), or None where no row does."""
    for any_row, reset_B in zip(reset_TB.any(1).tolist(), reset_TB.unbind(0), strict=True):
        yield reset_B if any_row else None


def stepwise(kept: Tensor, tokens: int) -> Iterator[Tensor]:
    """Where every token writes: a place of its own, or one and the same if only one was allocated."""
    return iter(kept.unbind(0)) if len(kept) == tokens else repeat(kept[0], tokens)


def before(first: Tensor, values: Tensor, reset_TB: Tensor, start: Tensor | float = 0.0) -> Tensor:
    """(T, B, ...): what every token found, ``first`` and then ``values`` one token late; ``start`` where a document begins."""
    found = torch.cat((first[None], values[:-1]))
    return torch.where(reset_TB.view(*reset_TB.shape, *(1,) * (found.dim() - 2)), start, found)


def blocks(tokens: int, numbers: int) -> Iterator[slice]:
    """Blocks of tokens, the last one first, in which ``numbers`` a token make about half a megabyte.

    What is computed for a block at once is then used while it is still in a processor's cache.
    """
    size = max(1, 2**17 // numbers)
    for first in reversed(range(0, tokens, size)):
        yield slice(first, min(first + size, tokens))
