"""The processor's threads of a process: how they wait for one another, and how many there are.

PyTorch's OpenMP reads both from the environment when PyTorch is imported; so this comes before, and imports none of it.
What users have set stays.
"""

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Mapping, MutableMapping

from accessory.launch.launcher import Launch

logger = logging.getLogger(__name__)

COUNT = "OMP_NUM_THREADS"
# By default a thread that waits for another holds its core for milliseconds. Where another program wants that core, the
# thread that is waited for may be the one that has none: a training step then takes 20 to 60 times as long. GNU's
# OpenMP, which PyTorch has on Linux, counts turns; others follow the policy.
_WAITING = {"GOMP_SPINCOUNT": "1000", "OMP_WAIT_POLICY": "passive"}
_SET_BY_USERS = (*_WAITING, "KMP_BLOCKTIME")

_too_late = False


def let_go_early(environment: MutableMapping[str, str] | None = None) -> None:
    """Have threads that wait for others let go of their cores, unless the environment says how they wait.

    Args:
        environment: of a process to be started; None: this process's own, whose PyTorch may be there already.
    """
    global _too_late
    own = environment is None
    environment = os.environ if environment is None else environment
    if any(variable in environment for variable in _SET_BY_USERS):
        return
    if own and "torch" in sys.modules:
        _too_late = True
    else:
        environment.update(_WAITING)


@functools.cache
def say_if_late() -> None:
    """Warn, once, where PyTorch was imported before this package, and several threads hold on to their cores."""
    import torch

    if _too_late and torch.get_num_threads() > 1:
        settings = " ".join(f"{name}={value}" for name, value in _WAITING.items())
        logger.warning(
            "PyTorch was imported before accessory: beside other programs its %d threads may be 20 times slower. "
            "Import accessory first, or set %s",
            *(torch.get_num_threads(), settings),
        )


def settle_count(threads: int | None) -> None:
    """Have so many threads, here and in ranks that are started later, whatever a launcher has set.

    Where no number is given a task of SLURM gets its share of the host's cores. (torchrun sets one thread for each of
    several ranks, and ranks of ours have their share.) It comes before PyTorch is imported.
    """
    if threads is not None:
        os.environ[COUNT] = str(threads)
        return
    with contextlib.suppress(ValueError):  # wrong variables of a launcher, which the program refuses itself
        launch = Launch.find()
        if launch.launcher == "slurm" and launch.has_others:
            os.environ.setdefault(COUNT, str(_threads_of_task(launch, os.environ)))


def share_of(ranks: int) -> int:
    """Threads for each of so many ranks on the cores that this process may use."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def _threads_of_task(launch: Launch, environment: Mapping[str, str]) -> int:
    told = environment.get("SLURM_CPUS_PER_TASK", "")
    if told.isdecimal() and int(told) > 0:
        return int(told)
    # Bound by srun, a task sees its own cores alone.
    bound = any(way in environment.get("SLURM_CPU_BIND", "") for way in ("mask_cpu", "map_cpu"))
    return share_of(1 if bound else launch.local_size)
