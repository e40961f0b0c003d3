"""The Triton kernels in Triton's interpreter, on the CPU: no GPU is needed, and none is measured.

Triton decides when it is imported whether it interprets, so this has a process of its own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton comes with PyTorch's CUDA builds; for this test: pip install triton",
)
def test_kernels_are_their_plain_twins() -> None:
    tests = Path(__file__).with_name("interpreted_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
