"""What the C library does with memory that tensors on the CPU have given back."""

import contextlib
import ctypes
import sys

# glibc's name for its limit (malloc.h), and the size from which a block is worth a mapping of its own.
_M_MMAP_THRESHOLD = -3
_THRESHOLD = 4 * 2**20


def return_freed_memory() -> None:
    """Let freed blocks of 4 MiB and more go back to the system at once; glibc on Linux, elsewhere nothing.

    By itself glibc raises its limit to 32 MiB once such blocks are freed, and keeps smaller ones on its heap, where
    activations of one kind leave holes that those of another do not fit: after three steps of a model of 0.25 B
    parameters 1.3 GB lay unused, growing. The limit cost no measurable time there.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
