"""Large pages of memory for weights: a step reads all of them, and looks up a place for every page of 4 KiB."""

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

from torch import Tensor

_LEAST = 4 << 20  # bytes: two large pages of x86


def in_large_pages(tensor: Tensor) -> Tensor:
    """The same tensor, fresh from the allocator: what Linux gives its memory when it is written may be large pages.

    Of its own accord the kernel gives them to nobody, or to all, as /sys/kernel/mm/transparent_hugepage/enabled says.
    Where it gives none ("never", another system, no large piece of memory left) nothing changes.
    """
    advise = _advise()
    # A fake tensor has no memory.
    if advise is not None and type(tensor) is Tensor and tensor.is_cpu and tensor.nbytes >= _LEAST:
        begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        advise(begin, (tensor.data_ptr() + tensor.nbytes - begin) // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
    return tensor


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    """madvise of the C library; None where there is none, or no such advice."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    advise.restype = ctypes.c_int
    return advise
