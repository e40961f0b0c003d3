"""How a process's threads wait and how many there are, as PyTorch then has it."""

import os
import subprocess
import sys

import pytest
import torch

from accessory.launch.launcher import Launch
from accessory.launch.placement import Placement, environment_of
from accessory.launch.threads import settle_count, share_of

WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
SETTINGS = (*WAITING, "OMP_NUM_THREADS")
STEP = {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_NODELIST": "a", "SLURM_STEP_ID": "0"}
SEEN = "; ".join(
    [
        "import os, torch",
        *(f"print(os.environ.get({name!r}), end=' ')" for name in SETTINGS),
        "print(torch.get_num_threads())",
    ]
)


def python(program: str, **own: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS} | own
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip() + done.stderr


@pytest.mark.parametrize(
    ("before", "own", "expected"),
    [
        ("import accessory", {}, "1000 passive None None "),
        ("import accessory", {"OMP_WAIT_POLICY": "active"}, "None active None None "),
        ("import accessory", {"GOMP_SPINCOUNT": "5"}, "5 None None None "),
        ("import accessory", {"KMP_BLOCKTIME": "1"}, "None None 1 None "),
        ("import torch, accessory", {}, "None None None None "),
        # What a program is told beats a launcher.
        (
            "from accessory.cli import _parser; from accessory.commands.output import parsed; "
            "parsed(_parser(), ['generate', 'x', '--prompt', 'y', '--threads', '1'])",
            {"OMP_NUM_THREADS": "2"},
            "1000 passive None 1 1",
        ),
    ],
)
def test_the_environment_that_pytorch_reads(before: str, own: dict[str, str], expected: str) -> None:
    assert python(f"{before}; {SEEN}", **own).startswith(expected)


def test_what_came_too_late_is_said_once() -> None:
    program = "from accessory.launch.threads import say_if_late; torch.set_num_threads(2); say_if_late(); say_if_late()"
    assert python(f"import torch, accessory; {program}").count("imported before accessory") == 1
    for own in ({"GOMP_SPINCOUNT": "1"}, {"OMP_WAIT_POLICY": "passive"}):
        assert python(f"import torch, accessory; {program}", **own) == ""
    assert python(f"import accessory, torch; {program}") == ""


@pytest.mark.parametrize(
    ("environment", "threads", "expected"),
    [
        ({}, None, None),
        ({}, 3, 3),
        ({"OMP_NUM_THREADS": "1"}, 3, 3),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, None, None),
        (STEP, None, 2),
        (STEP | {"OMP_NUM_THREADS": "5"}, None, 5),
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
    for name in (*os.environ, *environment):
        if name.startswith(("SLURM_", "OMP_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if "SLURM_PROCID" in environment and expected not in (None, 5, 6):
        assert Launch.find().local_size == 4
    settle_count(threads)
    found = os.environ.get("OMP_NUM_THREADS")
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # so that what was set is taken back
    assert found == (None if expected is None else str(expected))


def test_ranks_of_ours_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for placement, threads in (
        (Placement.of(3, None, device=None), "2"),
        (Placement.of(None, [0, 1], device=None), "4"),
        (Placement.of(16, None, device="cpu"), "1"),
    ):
        environment = environment_of(placement)
        assert [environment.get(name) for name in SETTINGS] == ["1000", "passive", None, threads]
    assert share_of(1) == 8
