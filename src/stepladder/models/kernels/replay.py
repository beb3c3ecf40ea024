"""CUDA graphs of loops over tokens: thousands of small kernels that a GPU is given as one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

USES = 2
"""Calls of one kind that run as they are; the next one is recorded. Whatever is seen once only is never recorded."""

KEPT = 16
"""Recordings kept for a loop; each holds its arrays on the GPU. The one that was used longest ago goes first."""


@dataclass
class Recording:
    """One recorded call: its graph, and the arrays that it reads and fills."""

    graph: torch.cuda.CUDAGraph
    given: list[Tensor]
    made: tuple[Tensor, ...]

    def replay(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """The results for other numbers of the same shapes; they are the caller's own."""
        for own, tensor in zip(self.given, tensors, strict=True):
            own.copy_(tensor)
        self.graph.replay()
        return tuple(each.clone() for each in self.made)


class Replayed:
    """``function(*tensors and numbers) -> tensors``; on a GPU recorded, then replayed: the same kernels in one launch.

    The function must be one of shapes and numbers in what it launches: no value of a tensor may decide anything on the
    host. On a CPU, and while someone else records, it is called as it is.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self.function = function
        self.uses: OrderedDict[Any, int] = OrderedDict()
        self.recordings: OrderedDict[Any, Recording] = OrderedDict()

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        tensors = [each for each in args if isinstance(each, Tensor)]
        if not tensors[0].is_cuda or torch.cuda.is_current_stream_capturing():
            return self.function(*args)
        kind = tuple(
            (each.shape, each.stride(), each.dtype, each.device) if isinstance(each, Tensor) else each for each in args
        )
        if kind in self.recordings:
            self.recordings.move_to_end(kind)
            return self.recordings[kind].replay(tensors)
        uses = self.uses.pop(kind, 0)
        if uses < USES:
            self.uses[kind] = uses + 1
            if len(self.uses) > 64 * KEPT:
                self.uses.popitem(last=False)
            return self.function(*args)
        if len(self.recordings) == KEPT:
            self.recordings.popitem(last=False)
        self.recordings[kind] = self._record(args)
        return self.recordings[kind].replay(tensors)

    @torch.no_grad()
    def _record(self, args: tuple[Any, ...]) -> Recording:
        own = [each.detach().clone() if isinstance(each, Tensor) else each for each in args]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # thread_local: a backward pass has a thread of its own, and what other threads do meanwhile is their affair.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            made = self.function(*own)
        return Recording(graph, [each for each in own if isinstance(each, Tensor)], made)
