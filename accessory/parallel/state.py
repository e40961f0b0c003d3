"""Which ranks work together, and on which device: one object, handed to whatever is parallel."""

import atexit
import contextlib
import functools
import hashlib
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, Self, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from accessory.config import QuantArgs
from accessory.errors import CheckpointError
from accessory.pages import in_large_pages
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
        return nn.Parameter(in_large_pages(torch.empty(shape, dtype=self.dtype, device=self.device)))

    def matrix(self, *shape: int, kind: str = "attention") -> nn.Parameter | QuantizedParameter:
        """The same for a matrix (..., outputs, inputs) that quantization may change.

        Args:
            kind: of the plan's, if quantization tells it from attention's: "expert", "head".
        """
        if self.quant is None or not self.quant.covers(kind):
            return self.parameter(*shape)
        return QuantizedParameter(shape, self.quant, self.device)


@dataclass(frozen=True)
class Ranks:
    """Processes that work together, and this one's place among them.

    Attributes:
        group: None: it has one member, this process.
    """

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Self:
        """The members of a group to which this process belongs."""
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    @property
    def is_first(self) -> bool:
        """True on the rank that speaks for all of them."""
        return self.rank == 0

    def agree(self, error: Exception | None, request: Any = None) -> None:
        """Exchange the outcome of a step that may have failed on one rank alone; collective over the group.

        Every rank raises if any has an error, so that none waits for a peer that gave up: all raise what the
        first failing rank met.

        Args:
            error: this rank's exception, or None where the step succeeded.
            request: anything whose repr must be the same on all ranks (the call's arguments).

        Raises:
            ValueError: the ranks' requests differ.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return
        failure = None if error is None else ([kind.__name__ for kind in type(error).__mro__], str(error))
        outcomes = self.gathered((failure, repr(request)))
        for rank, (theirs, _) in enumerate(outcomes):
            if theirs is not None:
                kinds, message = theirs
                own = error if rank == self.rank else None
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

    def gathered(self, own: Result) -> list[Result]:
        """What every rank gives, which must be picklable, by their ranks; collective over the group."""
        found = [own] * self.size
        if self.size > 1:
            dist.all_gather_object(found, own, group=self.group)
        return found

    def first_ones(self, value: Result) -> Result:
        """The first rank's value, which must be picklable, on every rank; collective over the group."""
        found = [value]
        if self.size > 1:
            dist.broadcast_object_list(found, group_src=0, group=self.group)
        return found[0]


@dataclass(frozen=True, kw_only=True)
class ParallelState:
    """Where this process stands among those of a model, and on which device its part lies.

    The same ranks are seen as two meshes, in both of which the last axis changes fastest from one rank to the next::

        dense parameters    (dp, mp)           those of mp hold a copy together, those of dp see different data
        experts             (efsdp, ep, mp)    dp = efsdp x ep: those of ep hold different experts of a layer, to which
                                               tokens travel, and those of efsdp hold the same

    Eight ranks with mp 2 and ep 2::

                        ep 0            ep 1
                    mp 0   mp 1     mp 0   mp 1
        efsdp 0       0      1        2      3      dp 0 is ranks 0 and 1, dp 1 is 2 and 3
        efsdp 1       4      5        6      7      dp 2 is ranks 4 and 5, dp 3 is 6 and 7

    Attributes:
        mp: the ranks that hold one model together with this one; where something is asked of a ParallelState as of
            `Ranks` (`agreed`), it is these.
        dp: those that hold the same slice of dense parameters.
        ep, efsdp: the two axes of those; where ep has one rank, efsdp is dp.
        device: where this rank's parameters lie.
    """

    mp: Ranks = Ranks()
    dp: Ranks = Ranks()
    ep: Ranks = Ranks()
    efsdp: Ranks = Ranks()
    device: torch.device

    @classmethod
    def single(cls, device: torch.device | str | None = None) -> Self:
        """This process alone, whatever groups exist."""
        return cls(device=pick_device(device))

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
        return cls(mp=Ranks.of(mp_group), device=pick_device(device, mp_group))

    @classmethod
    def init(
        cls,
        mp_size: int,
        device: torch.device | str | None = None,
        timeout: timedelta | None = None,
        *,
        ep_size: int = 1,
    ) -> Self:
        """Lay out the groups of both meshes over all ranks of an initialised torch.distributed.

        Args:
            timeout: of the groups' collectives; None: torch's own.
            ep_size: data-parallel ranks over which a layer's experts are spread.

        Raises:
            ValueError: ``mp_size`` does not divide the number of ranks, or ``ep_size`` that of the data-parallel ones.
        """
        world = dist.get_world_size()
        if mp_size < 1 or world % mp_size:
            raise ValueError(
                f"model_parallel_size {mp_size} does not divide the number of processes, {world}: "
                "start another number of them, or give another size"
            )
        dp_size = world // mp_size
        if ep_size < 1 or dp_size % ep_size:
            raise ValueError(
                f"expert_parallel_size {ep_size} does not divide the number of data-parallel ranks, {dp_size} "
                f"(processes: {world}, model_parallel_size {mp_size}): start another number of processes, or give "
                "another size"
            )
        from fairscale.nn.model_parallel import initialize as fs_init

        if fs_init.model_parallel_is_initialized():
            fs_init.destroy_model_parallel()
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the sizes
            fs_init.initialize_model_parallel(mp_size)
        _outlive_gloo()
        groups = fs_init.get_model_parallel_group(), fs_init.get_data_parallel_group()
        if timeout is not None:
            for group in groups:  # fairscale makes them with torch's own
                dist.distributed_c10d._set_pg_timeout(timeout, group)
        mp, dp = map(Ranks.of, groups)
        ep, efsdp = _unflattened(dp, ep_size, mp_size, timeout)
        return cls(mp=mp, dp=dp, ep=ep, efsdp=efsdp, device=pick_device(device, mp.group))

    @property
    def mp_group(self) -> dist.ProcessGroup | None:
        return self.mp.group

    @property
    def mp_rank(self) -> int:
        return self.mp.rank

    @property
    def mp_size(self) -> int:
        return self.mp.size

    @property
    def dp_group(self) -> dist.ProcessGroup | None:
        return self.dp.group

    @property
    def dp_rank(self) -> int:
        return self.dp.rank

    @property
    def dp_size(self) -> int:
        return self.dp.size

    @property
    def is_first(self) -> bool:
        """True on the rank that speaks for its model: the first of its model-parallel ones."""
        return self.mp.is_first

    def agree(self, error: Exception | None, request: Any = None) -> None:
        """`Ranks.agree` of the model-parallel ranks."""
        self.mp.agree(error, request)

    def first_ones(self, value: Result) -> Result:
        """`Ranks.first_ones` of the model-parallel ranks."""
        return self.mp.first_ones(value)


def _unflattened(dp: Ranks, ep_size: int, mp_size: int, timeout: timedelta | None) -> tuple[Ranks, Ranks]:
    """The axes ep and efsdp of the data-parallel ranks; all ranks of the run call, since they make groups together."""
    if ep_size == 1:
        return Ranks(), dp
    if ep_size == dp.size:
        return dp, Ranks()
    own, world = dist.get_rank(), torch.arange(dp.size * mp_size).view(-1, ep_size, mp_size)
    found: list[Ranks] = []
    for peers in (world.transpose(1, 2).flatten(0, 1), world.flatten(1).T):
        groups = [(members, dist.new_group(members, timeout=timeout)) for members in peers.tolist()]
        found += [Ranks.of(group) for members, group in groups if own in members]
    ep, efsdp = found
    return ep, efsdp


def agreed(ranks: Ranks | ParallelState, step: Callable[[], Result], request: Any = None) -> Result:
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
    ranks.agree(failure, None if request is None else hashlib.sha256(repr(request).encode()).hexdigest())
    return result  # type: ignore[return-value]


def on_first(ranks: Ranks | ParallelState, step: Callable[[], Result]) -> Result:
    """Run a step on the first rank; every rank has its result, which must be picklable, or raises its error."""
    return ranks.first_ones(agreed(ranks, lambda: step() if ranks.is_first else None))  # type: ignore[return-value]


def all_ranks(group: dist.ProcessGroup | None = None) -> Ranks:
    """All ranks of the run, to agree over; ``group``: other than the default one, of the same ranks."""
    if not dist.is_initialized():
        return Ranks()
    return Ranks.of(dist.distributed_c10d._get_default_group() if group is None else group)


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
