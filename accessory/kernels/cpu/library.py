"""Loading of the native library.

setup.py builds the library (the .cpp files here) where there is a C++ compiler with OpenMP. It holds several variants
of its inner loops, of which the best that this CPU runs is taken. The environment variable ACCESSORY_KERNELS overrides
that, for tests and bug reports: ``avx512_bf16``, ``avx512``, ``avx2`` and ``portable`` name a variant, ``off`` uses
PyTorch alone, ``auto`` (or nothing) is the default. It is read at the first product, not at import. Where the CPU has
the tiles of AMX, the default multiplies by them in bfloat16; a variant by name does without.
"""

import ctypes
import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

# torch comes first: its wheel brings the OpenMP runtime, and the library, loaded later, shares its threads. (Clang's
# OpenMP is another one, which starts threads of its own.)

logger = logging.getLogger("accessory.kernels")

VARIANTS = ("avx512_bf16", "avx512", "avx2", "portable")  # best first
DTYPES = (torch.bfloat16, torch.float32)
_ABI = 10  # of products.cpp
_ADVICE = (
    "Decoding on CPU uses PyTorch's slower products; a C++ compiler with OpenMP (GCC, or clang and libomp) and a "
    "reinstall give speed."
)


def native_available() -> bool:
    """Whether the native products serve (on CPU, in bfloat16 and float32)."""
    return native_variant() != "none"


@functools.cache
def native_variant() -> str:
    """Name of the variant in use, one of `VARIANTS`, or 'none' where PyTorch alone serves."""
    wanted = named_variant()
    allowed = ("auto", "off", *VARIANTS)
    if wanted not in allowed:
        raise ValueError(f"ACCESSORY_KERNELS={wanted} is unknown: it may be {', '.join(allowed)}")
    if wanted == "off":
        logger.warning("Kernels switched off by ACCESSORY_KERNELS=off. Decoding on CPU uses PyTorch's slower products.")
        return "none"
    library, reason = _load()
    if library is None:
        logger.warning("Kernels not built (%s). %s", reason, _ADVICE)
        return "none"
    runnable = runnable_variants()
    if wanted == "auto":
        return runnable[0]
    if wanted not in runnable:
        raise ValueError(f"ACCESSORY_KERNELS={wanted}: this CPU runs only {', '.join(runnable)}")
    return wanted


@functools.cache
def tiles_serve() -> bool:
    """Whether AMX's tiles multiply in bfloat16: on a CPU that has them, where no variant was named."""
    return native_available() and named_variant() == "auto" and bool(native_library().accessory_has_tiles())


def runnable_variants() -> list[str]:
    """The variants that this CPU runs, best first; none where the library does not serve."""
    library, _ = _load()
    return [name for name in VARIANTS if library and library.accessory_has_variant(name.encode())]


def native_library() -> ctypes.CDLL:
    """The library itself; RuntimeError where it does not serve."""
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"the native library does not serve: {reason}")
    return library


def named_variant() -> str:
    """What ACCESSORY_KERNELS asks for."""
    return os.environ.get("ACCESSORY_KERNELS") or "auto"


def check_outcome(outcome: int, expert_P: Tensor | None, experts: int) -> None:
    """Raise what a native product returned: 0, or 1 + the first bad place in expert_P, or -1."""
    if outcome > 0 and expert_P is not None:
        bad = int(expert_P[outcome - 1])
        raise IndexError(f"expert_P holds {bad}, but the weight has {experts} experts")
    if outcome != 0:
        raise RuntimeError("this CPU does not run that variant of the kernels")


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    spec = importlib.util.find_spec("accessory.kernels.cpu._native")
    if spec is None or spec.origin is None:
        return None, "no library beside the package"
    try:
        library = ctypes.CDLL(spec.origin)
        abi = library.accessory_kernels_abi()
    except (OSError, AttributeError) as error:
        return None, str(error)
    if abi != _ABI:
        return None, f"{spec.origin} is of another version"
    library.accessory_has_variant.argtypes = [ctypes.c_char_p]
    return library, ""
