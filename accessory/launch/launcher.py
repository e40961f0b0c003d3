"""Who started this process, and as which of how many: read from the environment of torchrun or of SLURM.

What a launcher is told of a failure has its place here too.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

# By which ranks that a command of ours has started (`--nproc`) know it: its process id.
PARENT_VARIABLE = "ACCESSORY_LAUNCHER"
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where torchrun looks for a rank's last words

_DEFAULT_PORT = 29500
# Ports for the jobs of a cluster: below those that Linux gives to outgoing connections (32768 and up).
_FIRST_PORT, _PORTS = 20_000, 12_000


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A process's place among those that were started with it.

    Attributes:
        launcher: "torchrun" (or whatever sets its variables), "slurm" (srun), or "alone".
        rank, world_size: among all processes.
        local_rank, local_size: among those of this host.
        address, port: where rank 0 waits for the others.
        run: tells this run from others that may come to the same port; empty where the launcher gives no name.
        parent: process id of the command of ours that started the ranks of this host; None: it was none of ours.
        is_step: srun has started it. Without, the variables of SLURM are those of a batch script, or of a shell.
    """

    launcher: Literal["torchrun", "slurm", "alone"] = "alone"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = "127.0.0.1"
    port: int = _DEFAULT_PORT
    run: str = ""
    parent: int | None = None
    is_step: bool = False

    @property
    def has_others(self) -> bool:
        """Whether other processes were started with this one: a batch script of SLURM only has the variables of it."""
        return self.world_size > 1 and (self.launcher != "slurm" or self.is_step)

    @classmethod
    def find(cls, environment: Mapping[str, str] | None = None) -> Self:
        """Read the variables of torchrun (RANK, WORLD_SIZE, ...), else those of SLURM (SLURM_PROCID, ...).

        MASTER_ADDR and MASTER_PORT rule under both. SLURM tells no port: it is made of the job's number, so that
        two jobs on a host do not meet.

        Raises:
            ValueError: names the variable that is missing or wrong.
        """
        environment = os.environ if environment is None else environment
        if "RANK" in environment:
            return cls._of_torchrun(environment)
        if "SLURM_PROCID" in environment and ("SLURM_NTASKS" in environment or "SLURM_NPROCS" in environment):
            return cls._of_slurm(environment)
        return cls()

    @classmethod
    def _of_torchrun(cls, environment: Mapping[str, str]) -> Self:
        world_size = _number(environment, "WORLD_SIZE", least=1)
        return cls(
            launcher="torchrun",
            rank=_number(environment, "RANK", below=world_size),
            world_size=world_size,
            local_rank=_number(environment, "LOCAL_RANK", default=0, below=world_size),
            local_size=_number(environment, "LOCAL_WORLD_SIZE", default=1, least=1),
            address=environment.get("MASTER_ADDR", "127.0.0.1"),
            port=_number(environment, "MASTER_PORT", default=_DEFAULT_PORT, least=1, below=2**16),
            run=environment.get("TORCHELASTIC_RESTART_COUNT", ""),
            parent=_number(environment, PARENT_VARIABLE) if PARENT_VARIABLE in environment else None,
        )

    @classmethod
    def _of_slurm(cls, environment: Mapping[str, str]) -> Self:
        tasks = "SLURM_NTASKS" if "SLURM_NTASKS" in environment else "SLURM_NPROCS"
        world_size = _number(environment, tasks, least=1)
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")
        job = _number(environment, "SLURM_JOB_ID", default=-1, least=-1)
        step = _number(environment, "SLURM_STEP_ID", default=0)
        made = _DEFAULT_PORT if job < 0 else _FIRST_PORT + (17 * job + step) % _PORTS
        return cls(
            launcher="slurm",
            rank=_number(environment, "SLURM_PROCID", below=world_size),
            world_size=world_size,
            local_rank=_number(environment, "SLURM_LOCALID", default=0, below=world_size),
            local_size=min(world_size, _tasks_of_node(environment, world_size, nodes)),
            address=environment.get("MASTER_ADDR") or first_host(nodes),
            port=_number(environment, "MASTER_PORT", default=made, least=1, below=2**16),
            run="" if job < 0 else f"{job}.{step}",
            # The shell that salloc opens is a step of one task, and keeps SLURM_NTASKS of the job.
            is_step="SLURM_STEP_ID" in environment and environment.get("SLURM_STEP_NUM_TASKS") != "1",
        )


def report_failure(message: str) -> None:
    """Let torchrun's report end with the reason why this rank fails; without a torchrun, nothing.

    Of several ranks it shows one of those that failed in the earliest second: whoever fails with the others says the
    same. What a process reports first is the reason of what it reports later, and stays.
    """
    file = os.environ.get(_ERROR_FILE)
    if not file or os.path.exists(file):
        return
    message = message.rstrip()
    extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
    aside = f"{file}.{os.getpid()}"
    # torchrun may look at any time, and fails over a file that is half written.
    with contextlib.suppress(OSError):
        with open(aside, "w", encoding="utf-8") as written:
            json.dump({"message": {"message": message, "extraInfo": extra}}, written)
        os.replace(aside, file)


_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def first_host(nodes: str) -> str:
    """The first of a SLURM node list, such as "gpu[07-09,12],login1"; this host where the list is empty."""
    if not nodes.strip():
        return "127.0.0.1"
    # A name may hold several brackets: "rack[1-2]node[01-16]".
    match = re.match(r"[^,\[\]\s](\[\d[^\]]*\]|[^,\[\]\s])*(?=,|$)", nodes.strip())
    if match is None:
        raise ValueError(f"SLURM_NODELIST is {nodes!r}: no host can be read from it; set MASTER_ADDR")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[0])


def _tasks_of_node(environment: Mapping[str, str], world_size: int, nodes: str) -> int:
    """Tasks of this host: SLURM_NODEID's in a list such as "8(x4)" or "8(x3),4"."""
    node = _number(environment, "SLURM_NODEID", default=0)
    # What the step was given comes before what was asked for the job.
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        counts = [
            int(count) for count, times in _TASKS.findall(environment.get(name, "")) for _ in range(int(times or 1))
        ]
        if counts:
            return max(1, counts[min(node, len(counts) - 1)])
    several = "," in nodes or "[" in nodes
    return 1 if several else world_size


def _number(
    environment: Mapping[str, str],
    name: str,
    *,
    default: int | None = None,
    least: int = 0,
    below: int | None = None,
) -> int:
    value = environment.get(name, "")
    if not value and default is not None:
        return default
    if not re.fullmatch(r"-?\d+", value) or int(value) < least or (below is not None and int(value) >= below):
        fit = f"from {least}" + ("" if below is None else f" to {below - 1}")
        raise ValueError(
            f"the environment has {name}={value!r}, which should be a number {fit}: "
            "start through torchrun or srun, or unset RANK and SLURM_PROCID to run alone"
        )
    return int(value)
