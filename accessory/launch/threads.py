"""How many of the processor's threads a process is to have; read by PyTorch when it is imported, so set before.

How they wait for one another is seen to by `model.threads`.
"""

import contextlib
import os
from collections.abc import Mapping, MutableMapping

from accessory.launch.launcher import Launch

COUNT = "OMP_NUM_THREADS"
# Says that the count is a share of the cores, and no wish of the user's.
SHARED = "ACCESSORY_SHARED_CORES"


def settle_count(threads: int | None) -> None:
    """Have so many threads, here and in ranks that are started later, whatever a launcher has set.

    Where no number is given a task of SLURM gets its share of the host's cores. (torchrun sets one thread for each of
    several ranks, and ranks of ours have their share.) It comes before PyTorch is imported.
    """
    if threads is not None:
        os.environ[COUNT] = str(threads)
        os.environ.pop(SHARED, None)
        return
    with contextlib.suppress(ValueError):  # wrong variables of a launcher, which the program refuses itself
        launch = Launch.find()
        if launch.launcher == "slurm" and launch.has_others:
            share(os.environ, _threads_of_task(launch, os.environ))


def share(environment: MutableMapping[str, str], threads: int) -> None:
    """Give a process that has these variables so many threads, if its user has not said how many."""
    if COUNT not in environment:
        environment.update({COUNT: str(threads), SHARED: "1"})


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
