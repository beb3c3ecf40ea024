"""What hand-written loops over tokens share: how autograd and torch.compile see them, and rows that begin afresh."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from stepladder.models.kernels.replay import Replayed


class Loop:
    """A loop over tokens with its backward pass, as one operator ``stepladder::name`` of autograd and compilers.

    Given and Made: NamedTuples of tensors, what goes in and what comes out. Of the latter the first ``outputs`` are
    results; the rest is kept for the backward pass, and small without ``keep``. Of the former ``reset_TB`` has no
    gradient.

    forward(given, *numbers, keep) -> Made; shapes, the same, but only allocates. backward(gradients of the results,
    given, made, *numbers) -> the gradients of what was given, in its order. On a GPU both are recorded and replayed.
    """

    def __init__(
        self,
        name: str,
        given: type[tuple[Tensor, ...]],
        made: type[tuple[Tensor, ...]],
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        shapes: Callable[..., Any],
        *,
        outputs: int,
        numbers: int = 0,
    ) -> None:
        names: tuple[str, ...] = given._fields  # type: ignore[attr-defined]
        count, results = len(names), len(made._fields)  # type: ignore[attr-defined]
        derived = [place for place, each in enumerate(names) if each != "reset_TB"]
        tensors, ints = [f"Tensor {each}" for each in names], [f"int n{place}" for place in range(numbers)]

        def run(*args: Any) -> tuple[Tensor, ...]:
            return tuple(forward(given(*args[:count]), *args[count:]))

        def run_shapes(*args: Any) -> tuple[Tensor, ...]:
            return tuple(shapes(given(*args[:count]), *args[count:]))

        def back(*args: Any) -> tuple[Tensor, ...]:
            slopes, rest = args[:outputs], args[outputs:]
            given_, made_ = given(*rest[:count]), made(*rest[count : count + results])
            return tuple(each.contiguous() for each in backward(slopes, given_, made_, *rest[count + results :]))

        def back_shapes(*args: Any) -> tuple[Tensor, ...]:
            return tuple(args[outputs + place].new_empty(args[outputs + place].shape) for place in derived)

        self.run = Replayed(run)
        self.operator = _operator(name, self.run, run_shapes, [*tensors, *ints, "bool keep"], results)
        known = [f"Tensor d{place}" for place in range(outputs)] + tensors + [f"Tensor y{n}" for n in range(results)]
        back_operator = _operator(f"{name}_backward", Replayed(back), back_shapes, [*known, *ints], len(derived))

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.numbers = inputs[count:-1]
            ctx.save_for_backward(*inputs[:count], *output)
            ctx.set_materialize_grads(False)  # what is kept gets no gradient, not even one of zeros

        def derive(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors  # once: recomputation under a checkpoint does not give them twice
            pairs = zip(slopes[:outputs], saved[count:], strict=False)
            full = (torch.zeros_like(result) if slope is None else slope for slope, result in pairs)
            found = dict(zip(derived, back_operator(*full, *saved, *ctx.numbers), strict=True))
            return tuple(found.get(place) for place in range(count + numbers + 1))

        self.operator.register_autograd(derive, setup_context=setup_context)

    def __call__(self, given: tuple[Tensor, ...], *numbers: int) -> Any:
        """What was made, as a plain tuple. Where nothing is differentiated or traced, the loop itself runs."""
        needed = torch.is_grad_enabled() and any(each.requires_grad for each in given)
        if needed or torch.compiler.is_compiling():
            return self.operator(*given, *numbers, needed)
        return self.run(*given, *numbers, False)


def _operator(
    name: str, function: Callable[..., Any], shapes: Callable[..., Any], given: list[str], results: int
) -> Any:
    schema = f"({', '.join(given)}) -> ({', '.join(['Tensor'] * results)})"
    operator = torch.library.custom_op(f"stepladder::{name}", function, mutates_args=(), schema=schema)
    operator.register_fake(shapes)
    return operator


def some_rows(reset_TB: Tensor) -> Iterator[Tensor | None]:
    """Of every token the rows that begin a document there, as a mask (B,), or None where no row does.

    A GPU is not asked which they are, it gets all masks: the host would wait for it, and a recording could not.
    """
    if reset_TB.is_cuda:
        yield from reset_TB.unbind(0)
        return
    for any_row, reset_B in zip(reset_TB.any(1).tolist(), reset_TB.unbind(0), strict=True):
        yield reset_B if any_row else None


def stepwise(kept: Tensor, tokens: int) -> Iterator[Tensor]:
    """Where every token writes: a place of its own, or one and the same if only one was allocated."""
    return iter(kept.unbind(0)) if len(kept) == tokens else repeat(kept[0], tokens)


def before(first: Tensor, values: Tensor, reset_TB: Tensor, start: Tensor | float = 0.0) -> Tensor:
    """(T, B, ...): what tokens found: ``first``, then ``values`` one token late; ``start`` where documents begin."""
    found = torch.cat((first[None], values[:-1]))
    return torch.where(reset_TB.view(*reset_TB.shape, *(1,) * (found.dim() - 2)), start, found)


def blocks(tokens: int, numbers: int) -> Iterator[slice]:
    """Blocks of tokens, the last one first, in which ``numbers`` a token make about half a megabyte.

    What is computed for a block at once is then used while it is still in a processor's cache.
    """
    size = max(1, 2**17 // numbers)
    for first in reversed(range(0, tokens, size)):
        yield slice(first, min(first + size, tokens))
