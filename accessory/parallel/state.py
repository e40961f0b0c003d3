"""Which ranks work together, and on which device: one object, handed to whatever is parallel."""

import atexit
import contextlib
import functools
import hashlib
import io
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NamedTuple, Self, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from accessory.config import QuantArgs
from accessory.errors import CheckpointError
from accessory.quant import QuantizedParameter

Result = TypeVar("Result")

_ON_ALL_RANKS = "(raised alike on every rank of the model)"

# What a rank's failure may be raised as on its peers, the nearest of its types that stands here; anything else
# becomes a RuntimeError with its text.
_AGREED_TYPES: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (CheckpointError, FileNotFoundError, OSError, TypeError, ValueError)
}


class Place(NamedTuple):
    """Dtype and device in which a model's parameters are created, and how its matrices are quantized."""

    dtype: torch.dtype
    device: torch.device
    quant: QuantArgs | None = None

    def parameter(self, *shape: int) -> nn.Parameter:
        """An uninitialised parameter: a loader or `init_weights` fills it."""
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device))

    def matrix(self, *shape: int, head: bool = False) -> nn.Parameter | QuantizedParameter:
        """The same for a matrix (..., outputs, inputs) that quantization may change.

        Args:
            head: it is the output head, which is quantized only where that was asked for.
        """
        if self.quant is None or (head and not self.quant.head):
            return self.parameter(*shape)
        return QuantizedParameter(shape, self.quant, self.device)


@dataclass(frozen=True, kw_only=True)
class ParallelState:
    """Process groups of a model and this process's place in them.

    Ranks of ``mp_group`` hold one model together (tensor and expert parallel); ranks of ``dp_group`` hold equal
    slices of it and see different data. A group of None has one member.

    Attributes:
        mp_group, mp_rank, mp_size: the model-parallel group.
        dp_group, dp_rank, dp_size: the data-parallel group.
        device: where this rank's parameters lie.
    """

    mp_group: dist.ProcessGroup | None
    mp_rank: int
    mp_size: int
    dp_group: dist.ProcessGroup | None
    dp_rank: int
    dp_size: int
    device: torch.device

    @classmethod
    def single(cls, device: torch.device | str | None = None) -> Self:
        """This process alone, whatever groups exist."""
        return cls(
            mp_group=None,
            mp_rank=0,
            mp_size=1,
            dp_group=None,
            dp_rank=0,
            dp_size=1,
            device=pick_device(device),
        )

    @classmethod
    def from_group(cls, mp_group: dist.ProcessGroup | None, device: torch.device | str | None = None) -> Self:
        """The model lies on the ranks of ``mp_group`` (None: on this process alone).

        Raises:
            ValueError: this process is no member of the group.
        """
        if mp_group is None:
            return cls.single(device)
        if mp_group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("mp_group does not contain this rank: only its members may load the model")
        _outlive_gloo()
        return cls(
            mp_group=mp_group,
            mp_rank=dist.get_rank(mp_group),
            mp_size=dist.get_world_size(mp_group),
            dp_group=None,
            dp_rank=0,
            dp_size=1,
            device=pick_device(device, mp_group),
        )

    @classmethod
    def init(cls, mp_size: int, device: torch.device | str | None = None, timeout: timedelta | None = None) -> Self:
        """Lay out data- and model-parallel groups over all ranks of an initialised torch.distributed.

        Args:
            timeout: of the groups' collectives; None: torch's own.

        Raises:
            ValueError: the world's size is not a multiple of ``mp_size``.
        """
        if mp_size < 1 or dist.get_world_size() % mp_size:
            raise ValueError(
                f"model_parallel_size {mp_size} does not divide the number of processes, {dist.get_world_size()}: "
                "start another number of them, or give another size"
            )
        from fairscale.nn.model_parallel import initialize as fs_init

        if fs_init.model_parallel_is_initialized():
            fs_init.destroy_model_parallel()
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the sizes
            fs_init.initialize_model_parallel(mp_size)
        _outlive_gloo()
        mp_group, dp_group = fs_init.get_model_parallel_group(), fs_init.get_data_parallel_group()
        if timeout is not None:
            for group in (mp_group, dp_group):  # fairscale makes them with torch's own
                dist.distributed_c10d._set_pg_timeout(timeout, group)
        return cls(
            mp_group=mp_group,
            mp_rank=dist.get_rank(mp_group),
            mp_size=mp_size,
            dp_group=dp_group,
            dp_rank=dist.get_rank(dp_group),
            dp_size=dist.get_world_size(dp_group),
            device=pick_device(device, mp_group),
        )

    @property
    def is_first(self) -> bool:
        """True on the rank that speaks for its model: the first of its model-parallel group."""
        return self.mp_rank == 0

    def agree(self, error: Exception | None, request: Any = None) -> None:
        """Exchange the outcome of a step that may have failed on one rank alone; collective over mp_group.

        Every rank raises if any has an error, so that none waits for a peer that gave up: all raise what the
        first failing rank met.

        Args:
            error: this rank's exception, or None where the step succeeded.
            request: anything whose repr must be the same on all ranks (the call's arguments).

        Raises:
            ValueError: the ranks' requests differ.
        """
        if self.mp_size == 1:
            if error is not None:
                raise error
            return
        outcomes: list[Any] = [None] * self.mp_size
        failure = None if error is None else ([kind.__name__ for kind in type(error).__mro__], str(error))
        dist.all_gather_object(outcomes, (failure, repr(request)), group=self.mp_group)
        for rank, (theirs, _) in enumerate(outcomes):
            if theirs is not None:
                kinds, message = theirs
                own = error if rank == self.mp_rank else None
                known = [_AGREED_TYPES[kind] for kind in kinds if kind in _AGREED_TYPES]
                raise on_all_ranks(own or (known or [RuntimeError])[0](message))
        differing = [rank for rank, (_, theirs) in enumerate(outcomes) if theirs != outcomes[0][1]]
        if differing:
            raise on_all_ranks(
                ValueError(
                    f"the ranks were given different arguments: rank(s) {differing} differ from rank 0; "
                    "every rank of a model must make the same call with the same prompts and settings"
                )
            )


def agreed(state: ParallelState, step: Callable[[], Result], request: Any = None) -> Result:
    """Run a step that may fail on one rank alone, and raise on all ranks if it failed on any.

    Args:
        request: the call's arguments, which must be the same on every rank.
    """
    failure: Exception | None = None
    result: Result | None = None
    try:
        result = step()
    except Exception as error:
        failure = error
    state.agree(failure, None if request is None else hashlib.sha256(repr(request).encode()).hexdigest())
    return result  # type: ignore[return-value]


def on_first(state: ParallelState, step: Callable[[], Result]) -> Result:
    """Run a step on the group's first rank; every rank has its result, which must be picklable, or raises its error."""
    found = [agreed(state, lambda: step() if state.is_first else None)]
    if state.mp_size > 1:
        dist.broadcast_object_list(found, group_src=0, group=state.mp_group)
    return found[0]  # type: ignore[return-value]


def over_all_ranks(state: ParallelState, group: dist.ProcessGroup | None = None) -> ParallelState:
    """A state in which all ranks of the run are one group, to agree over; ``group``: other than the default one."""
    if not dist.is_initialized():
        return state
    group = group or dist.group.WORLD
    return replace(state, mp_group=group, mp_rank=dist.get_rank(), mp_size=dist.get_world_size())


@functools.cache
def _outlive_gloo() -> None:
    """Let gloo's threads come to rest before Python ends.

    A thread lets go of a collective's tensors after the collective has returned, and needs Python's lock for it.
    Should Python be ending by then, the process aborts ("terminate called without an active exception"; PyTorch's
    issue 190489). Nothing tells when they are done, so a process that used a group pauses at its exit.
    """
    atexit.register(time.sleep, 0.1)


def on_all_ranks(error: Exception) -> Exception:
    """Mark an error that every rank of a model raises alike, so that a command says it once."""
    error.add_note(_ON_ALL_RANKS)
    return error


def check_device(device: torch.device | str) -> torch.device:
    """The device that is asked for, without touching it.

    Raises:
        ValueError: it is no device, or none that this host has.
    """
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is unknown: give cpu, cuda or cuda:N") from None
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"the device {device} was asked for, but PyTorch sees no CUDA device: give the device cpu")
        count = torch.cuda.device_count()
        if chosen.index is not None and chosen.index >= count:
            known = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
            raise ValueError(f"the device {device} was asked for, but PyTorch sees only {known}: give one of them")
    return chosen


def pick_device(device: torch.device | str | None = None, group: dist.ProcessGroup | None = None) -> torch.device:
    """The device asked for; else the current GPU where there is one that the group can talk over; else the CPU.

    Raises:
        ValueError: as `check_device`.
    """
    if device is None:
        gloo = group is not None and dist.get_backend(group) == "gloo"
        device = "cuda" if torch.cuda.is_available() and not gloo else "cpu"
    chosen = check_device(device)
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
    return chosen


def raised_on_all_ranks(error: Exception) -> bool:
    """Whether every rank of the model raised this error alike: it went through `on_all_ranks`."""
    return _ON_ALL_RANKS in getattr(error, "__notes__", ())
