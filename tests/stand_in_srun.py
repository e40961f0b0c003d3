"""A stand-in for SLURM's srun on one host: starts N processes and tells each its place, as ``srun -K`` would.

    srun -n8 [--ntasks-per-node=8] [--gres=gpu:8] PROGRAM [ARGUMENTS ...]

Signals go on to all processes. When one fails the others are ended, and its exit code is returned. Variables that
the caller has set (SLURM_JOB_ID, SLURM_NODELIST, ...) stay. ``STAND_IN_SRUN_NTASKS`` gives the variable for the
number of processes another name than SLURM_NTASKS: older versions had SLURM_NPROCS alone.
"""

import argparse
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

# Between the request to end and kill -9.
KILL_WAIT = 5.0


def install_srun(folder: Path) -> dict[str, str]:
    """Make a program ``srun`` in ``folder``; returns the environment in which a shell finds it, and our ``python``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, arguments in (("srun", f' "{Path(__file__).resolve()}"'), ("python", "")):
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}"{arguments} "$@"\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="srun", allow_abbrev=False)
    parser.add_argument("-n", "--ntasks", type=int, default=1)
    parser.add_argument("--ntasks-per-node", type=int)
    parser.add_argument("--gres")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args(arguments)
    if not given.command:
        parser.error("no program to start")
    if given.ntasks_per_node is not None and given.ntasks_per_node < given.ntasks:
        parser.error(f"{given.ntasks} tasks at {given.ntasks_per_node} a node need several hosts, and this is one")
    processes: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, forward)
    for rank in range(given.ntasks):
        processes.append(subprocess.Popen(given.command, env={**os.environ, **_variables(rank, given.ntasks)}))
    return _wait(processes)


def _variables(rank: int, size: int) -> Mapping[str, str]:
    return {
        "SLURM_NODELIST": os.environ.get("SLURM_NODELIST", "localhost"),
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        os.environ.get("STAND_IN_SRUN_NTASKS", "SLURM_NTASKS"): str(size),
    }


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Until all have ended, or one has failed and the others were ended; the first failure's code."""
    while True:
        codes = [process.poll() for process in processes]
        failures = [code for code in codes if code]
        if failures:
            break
        if None not in codes:
            return 0
        time.sleep(0.05)
    for process in processes:
        process.terminate()
    end = time.monotonic() + KILL_WAIT
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return failures[0] if failures[0] > 0 else 128 - failures[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
