"""How many threads a process has, and how they wait for one another while others want the cores."""

import os
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from patience import PATIENCE

from accessory.launch.launcher import Launch
from accessory.launch.placement import Placement, environment_of
from accessory.launch.threads import COUNT, SHARED, settle_count, share_of
from accessory.model.threads import Waiting

DECIDED = (COUNT, SHARED, "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
STEP = {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_NODELIST": "a", "SLURM_STEP_ID": "0"}


# --- how many there are


@pytest.mark.parametrize(
    ("environment", "threads", "expected"),
    [
        ({}, None, None),
        ({}, 3, 3),
        ({COUNT: "1"}, 3, 3),  # as torchrun sets it
        ({COUNT: "4", SHARED: "1"}, 3, 3),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, None, None),
        (STEP, None, 2),
        (STEP | {COUNT: "5"}, None, 5),
        (STEP | {"SLURM_CPUS_PER_TASK": "6"}, None, 6),
        (STEP | {"SLURM_CPU_BIND": "quiet,mask_cpu:0x1,0x2"}, None, 8),
        (STEP | {"SLURM_CPU_BIND": "quiet,none"}, None, 2),
        ({name: value for name, value in STEP.items() if name != "SLURM_STEP_ID"}, None, None),  # a batch script
        (STEP | {"SLURM_PROCID": "9"}, None, None),  # refused elsewhere
    ],
)
def test_the_count_on_eight_cores(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], threads: int | None, expected: int | None
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMP_", "RANK"))}
    monkeypatch.setattr(os, "environ", own | environment)
    settle_count(threads)
    assert os.environ.get(COUNT) == (None if expected is None else str(expected))
    assert (SHARED in os.environ) == (expected is not None and threads is None and COUNT not in environment)


def test_ranks_of_ours_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for name in DECIDED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for placement, threads in (
        (Placement.of(3, None, device=None), "2"),
        (Placement.of(None, [0, 1], device=None), "4"),
        (Placement.of(16, None, device="cpu"), "1"),
    ):
        environment = environment_of(placement)
        assert (environment[COUNT], environment[SHARED]) == (threads, "1")
    monkeypatch.setenv(COUNT, "7")
    assert SHARED not in environment_of(placement)
    assert environment_of(placement)[COUNT] == "7"
    assert share_of(1) == 8
    assert Launch.find({}).local_size == 1


# --- how they wait


@dataclass
class Machine:
    """A clock, and another program that threads that spin wait for, or none."""

    now: float = 0.0
    waited: float = 0.0
    told: list[bool] = field(default_factory=list)

    def waiting(self) -> Waiting:
        return Waiting(sleep=self.told.append, waited=lambda: self.waited, clock=lambda: self.now)

    def run(self, waiting: Waiting, seconds: float, *, busy: bool, step: float = 0.1) -> list[bool]:
        """Steps of a model; returns what the threads were told meanwhile."""
        self.told.clear()
        for _ in range(round(seconds / step)):
            self.now += step
            self.waited += step * (0.15 + 0.65 * (busy and not waiting.sleeps))
            waiting.adapt()
        return [*self.told]


def test_threads_sleep_while_another_program_computes() -> None:
    machine = Machine()
    waiting = machine.waiting()
    assert machine.run(waiting, 60, busy=False) == []
    assert machine.run(waiting, 2, busy=True) == [True]
    # Spinning is tried again, less and less often: after 5, 10, 20, 40 and then every 60 seconds.
    told = machine.run(waiting, 300, busy=True)
    assert told == [False, True] * (len(told) // 2)
    assert 5 <= len(told) // 2 <= 8
    assert machine.run(waiting, 120, busy=False) == [False]
    # As soon as ever, when another one comes; also where a step takes long.
    assert machine.run(waiting, 10, busy=True, step=2.5) == [True, False, True]


BESIDE = """
import os, subprocess, sys, time
cores = sorted(os.sched_getaffinity(0))[:2]
os.sched_setaffinity(0, cores)
import torch
import accessory.model.threads as threads
torch.set_num_threads(2)
a = torch.rand(300, 300)
others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in cores]
try:
    end = time.monotonic() + float(sys.argv[1])
    while time.monotonic() < end:
        before = (a @ a).sum()
        for _ in range(20):
            assert (a @ a).sum() == before
        threads.adapt_waiting()
        if (waiting := threads._of_process()) is None or waiting.sleeps:
            break
finally:
    for other in others:
        other.kill()
print("as they were" if waiting is None else waiting.sleeps)
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core has one thread")
@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, "True"),
        ({COUNT: "2", SHARED: "1"}, "True"),
        ({COUNT: "2"}, "as they were"),
        ({"GOMP_SPINCOUNT": "300000"}, "as they were"),
        ({COUNT: "2", SHARED: "1", "OMP_WAIT_POLICY": "active"}, "as they were"),
    ],
)
def test_beside_programs_that_compute(own: dict[str, str], expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in DECIDED} | own
    command = [sys.executable, "-c", BESIDE, "60"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.stdout.strip(), done.returncode) == (expected, 0), done.stderr
