"""AdamW whose moments are 8-bit codes with a scale for each block (https://arxiv.org/abs/2110.02861), by torchao.

torchao's own optimizer takes blocks from what a rank happens to hold, so that its states fit one number of ranks alone,
and compiles its step, which takes a minute on a CPU. Here blocks lie along a parameter's last axis, each within a row:
codes and scales are DTensors cut as the parameter is, and are saved and resumed on any ranks. The step is torchao's,
not compiled, on a piece of a parameter at a time, so that its float32 copies stay small.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from accessory.parallel.ops import local

BLOCK = 64
# As in torchao: of smaller parameters the moments stay float32.
_LEAST = 4096
# Elements of a step's float32 copies.
_AT_ONCE, _CUDA_AT_ONCE = 1 << 16, 1 << 24
# Each moment, and whether its numbers have a sign.
_MOMENTS = {"exp_avg": True, "exp_avg_sq": False}


def is_coded(shape: Sequence[int]) -> bool:
    """Whether the moments of a parameter of this shape are codes."""
    return math.prod(shape) >= _LEAST and shape[-1] % BLOCK == 0


def state_bytes(shape: Sequence[int]) -> float:
    """Of each number of a moment of a parameter of this shape."""
    return 1 + 4 / BLOCK if is_coded(shape) else 4.0


def refusal(shape: Sequence[int], own: Sequence[int]) -> str:
    """What is said where a rank that holds ``own`` of a ``shape`` would hold part of a block; else empty."""
    if not is_coded(shape) or own[-1] % BLOCK == 0:
        return ""
    return (
        f"--optimizer adamw8bit has blocks of {BLOCK} numbers, and of a parameter of shape {tuple(shape)} a rank holds "
        f"rows of {own[-1]}: give another --model_parallel_size, --expert_placement or --expert_parallel_size, "
        "--data_parallel ddp, or --optimizer adamw"
    )


class AdamW8bit(torch.optim.Optimizer):
    """AdamW over groups of parameters, whose keys are AdamW's.

    Raises:
        ValueError: torchao is not there, or ranks hold parts of a block.
    """

    STATES = tuple(_MOMENTS)

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        refuse_absent()
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0, "eps": 1e-8})
        for name in ("torchao", "torch.utils._pytree"):  # of kernels that it does not find, and of its own classes
            logging.getLogger(name).setLevel(logging.ERROR)
        self._moment = import_module("torchao.optim.subclass_8bit").OptimState8bit
        self._tables: dict[tuple[bool, torch.device], Tensor] = {}
        self._adam: Callable[..., None] = import_module("torchao.optim.adam").single_param_adam
        for group in self.param_groups:
            for parameter in group["params"]:
                if said := refusal(parameter.shape, local(parameter).shape):
                    raise ValueError(said)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step; ``closure`` is not called."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)

    def _step(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in _MOMENTS:
                state |= _zeros(name, parameter)
        state["step"] += 1
        own, settings = local(parameter), [group[key] for key in ("weight_decay", "eps")]
        flat = own.contiguous().view(-1)
        gradient = local(parameter.grad).reshape(-1)  # type: ignore[arg-type]
        moments = [self._pieces(name, state) for name in _MOMENTS]
        for part, first, second in zip(_parts(flat), *moments, strict=True):
            taken = (flat[part], gradient[part], state["step"], first, second, None)
            # Behind the settings: it is AdamW, and does not round at random.
            self._adam(*taken, group["lr"], *group["betas"], *settings, True, False)
        if flat.data_ptr() != own.data_ptr():
            own.copy_(flat.view_as(own))

    def _pieces(self, name: str, state: dict[str, Any]) -> Iterator[Tensor]:
        """A moment's pieces, as the step takes them."""
        values = local(state[name]).view(-1)
        scales = local(state[scales_of(name)]).view(-1) if scales_of(name) in state else None
        for part in _parts(values):
            if scales is None:
                yield values[part]
                continue
            blocks = slice(part.start // BLOCK, part.stop // BLOCK)
            signed = _MOMENTS[name]
            yield self._moment(values[part], scales[blocks], self._values(signed, values.device), signed, torch.float32)

    def _values(self, signed: bool, device: torch.device) -> Tensor:
        """What the codes stand for, of a block whose largest is 1."""
        if (signed, device) not in self._tables:
            self._tables[signed, device] = self._moment.zeros((BLOCK,), signed, BLOCK, device).qmap
        return self._tables[signed, device]


def scales_of(name: str) -> str:
    """The state that holds the scales of a moment's blocks."""
    return f"{name}_scale"


def _zeros(name: str, parameter: nn.Parameter) -> dict[str, Tensor]:
    if not is_coded(parameter.shape):
        return {name: torch.zeros_like(parameter)}
    own = local(parameter)
    codes = torch.zeros(own.shape, dtype=torch.uint8, device=own.device)
    scales = torch.zeros((*own.shape[:-1], own.shape[-1] // BLOCK), device=own.device)
    return {name: _as(parameter, codes), scales_of(name): _as(parameter, scales)}


def _as(parameter: nn.Parameter, own: Tensor) -> Tensor:
    """A rank's part of a state as a DTensor that is cut as the parameter is; where that is none, itself."""
    if not isinstance(parameter, DTensor):
        return own
    shape = torch.Size((*parameter.shape[:-1], parameter.shape[-1] * own.shape[-1] // local(parameter).shape[-1]))
    layout: dict[str, Any] = {"run_check": False, "shape": shape, "stride": torch.empty(shape, device="meta").stride()}
    return DTensor.from_local(own, parameter.device_mesh, parameter.placements, **layout)


def _parts(flat: Tensor) -> Iterator[slice]:
    size = _CUDA_AT_ONCE if flat.is_cuda else _AT_ONCE
    return (slice(begin, min(begin + size, len(flat))) for begin in range(0, len(flat), size))


def refuse_absent() -> None:
    """Raise ValueError where torchao is not installed."""
    if find_spec("torchao") is None:
        raise ValueError('--optimizer adamw8bit needs torchao, which is not installed: pip install -e ".[adamw8bit]"')
