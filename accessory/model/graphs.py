"""Decoding on a GPU as CUDA graphs: a step is hundreds of small kernels, and launching them takes longer than they do.

A captured graph holds the addresses of what it reads and writes, so it serves one cache and the shapes it was captured
for: so many slots, and the cache read so far.
"""

import functools
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], Tensor]  # tokens and which of them count, to logits

# Steps of a shape that are run kernel by kernel before it is captured. They warm up what the first call of a kernel
# sets up, and a short answer is over before a capture would have paid.
_STEPS_BEFORE_CAPTURE = 3
# Graphs that are kept, the last ones used: each holds a few MB, and a long answer leaves many shapes behind.
_MOST_KEPT = 16


class DecodeGraphs:
    """The captured steps of one cache; made with it, and gone with it."""

    def __init__(self) -> None:
        self._steps: Counter[Hashable] = Counter()
        self._captured: dict[Hashable, _Captured] = {}
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, key: Hashable, step: Step, tokens_S: Tensor, active_S: Tensor) -> Tensor:
        """``step(tokens, active)``, replayed where a step of this key was captured before.

        Args:
            key: equal keys are steps with equal shapes on the same weights and cache.
        """
        captured = self._captured.pop(key, None)
        if captured is None:
            self._steps[key] += 1
            if self._steps[key] <= _STEPS_BEFORE_CAPTURE:
                return step(tokens_S, active_S)
            if self._pool is None:  # shared: the graphs run one after another
                self._pool = torch.cuda.graph_pool_handle()
            captured = _Captured(step, tokens_S, active_S, self._pool)
            if len(self._captured) >= _MOST_KEPT:
                del self._captured[next(iter(self._captured))]
        self._captured[key] = captured  # at the end: in the order of use
        return captured.replay(tokens_S, active_S)


class _Captured:
    """One graph with its inputs and its output."""

    def __init__(self, step: Step, tokens_S: Tensor, active_S: Tensor, pool: Any) -> None:
        with torch.inference_mode(False):  # written again at every step, from within such a mode and outside of it
            self._tokens_S, self._active_S = torch.empty_like(tokens_S), torch.empty_like(active_S)
        self._load(tokens_S, active_S)
        self._graph = torch.cuda.CUDAGraph()
        # On the GPU of the step, which need not be the current one: what another GPU's stream is given is not captured.
        # Another thread may use the GPU in the meantime: what it does is not captured, and does not end the capture.
        stream = _capture_stream(tokens_S.device)
        with (
            torch.cuda.device(tokens_S.device),
            torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            self._logits_SV = step(self._tokens_S, self._active_S)

    def replay(self, tokens_S: Tensor, active_S: Tensor) -> Tensor:
        self._load(tokens_S, active_S)
        self._graph.replay()
        return self._logits_SV.clone()  # the next step of any of the cache's graphs writes over it

    def _load(self, tokens_S: Tensor, active_S: Tensor) -> None:
        self._tokens_S.copy_(tokens_S)
        self._active_S.copy_(active_S)


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures on a GPU: cuBLAS keeps a workspace of MBs for every stream that it has met."""
    return torch.cuda.Stream(device)
