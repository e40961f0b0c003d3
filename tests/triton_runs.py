"""How the tests of Triton kernels run their cases: in Triton's interpreter, on a GPU, and through the compiler."""

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: PyTorch's builds for GPUs bring it")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def report_failures(cases: Iterable[tuple[str, Callable[[], None]]]) -> None:
    """Run cases and print what failed, by case, as JSON: what a script for the interpreter does."""
    failures = {}
    for name, check in cases:
        try:
            check()
        except Exception:
            failures[name] = traceback.format_exc()
    print(json.dumps(failures))


def failures_in_the_interpreter(script: str) -> dict[str, str]:
    """What `report_failures` of a script beside this file says, in a process with the interpreter from the start."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "error", Path(__file__).parent / script]
    done = subprocess.run(command, env=environment, timeout=250, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def compile_alone(script: str, cache: Path) -> None:
    """Run a script that compiles kernels, outside of the interpreter and with an empty cache."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    subprocess.run([sys.executable, "-c", script], env=environment, timeout=200, check=True)
