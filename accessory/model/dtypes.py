"""In which dtype a model computes."""

import logging
import platform
from collections.abc import Callable

import torch

from accessory.log import say_once
from accessory.parallel.state import ParallelState

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def default_dtype(state: ParallelState) -> torch.dtype:
    """bfloat16, or float32 on a CPU whose bfloat16 products would be emulated; the latter is said once."""
    if state.device.type != "cpu" or _cpu_multiplies_bf16():
        return torch.bfloat16
    if state.is_first:
        say_once(logger, logging.WARNING, "this CPU has no native bfloat16 products: the model computes in float32")
    return torch.float32


def _cpu_multiplies_bf16() -> bool:
    if platform.machine() in ("aarch64", "arm64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    # oneDNN says yes for any AVX-512, and emulates.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def settle_dtype(
    dtype: torch.dtype | str | None, stored: Callable[[], torch.dtype], state: ParallelState
) -> torch.dtype:
    """The dtype to compute in, of what a user gave.

    The first rank says which it is: what is asked by Python is bfloat16 unless told otherwise, as the reference page
    has it, and what is asked by a command as the weights are stored.

    Args:
        dtype: a torch dtype, a name of `DTYPES`, "auto" for the stored one, or None for the default.
        stored: tells the dtype of the weights on disk.

    Raises:
        ValueError: anything else.
    """
    chosen = _chosen(dtype, stored, state)
    if state.is_first and (on_disk := stored()) in DTYPES.values():
        name, other = (str(one).removeprefix("torch.") for one in (chosen, on_disk))
        keeps = ", which dtype auto keeps" if dtype is None and on_disk != torch.bfloat16 else ""
        as_stored = "as they are stored" if chosen == on_disk else f"stored in {other}{keeps}"
        logger.info("computing with the weights in %s, %s", name, as_stored)
    return chosen


def _chosen(dtype: torch.dtype | str | None, stored: Callable[[], torch.dtype], state: ParallelState) -> torch.dtype:
    if isinstance(dtype, str) and dtype == "auto":
        on_disk = stored()
        if on_disk == torch.bfloat16:
            return default_dtype(state)
        return on_disk if on_disk in DTYPES.values() else torch.float32
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if dtype is not None:
        names = ", ".join([*DTYPES, "auto"])
        raise ValueError(
            f"dtype {dtype!r} is none that the model computes in: give torch.bfloat16, torch.float16 or "
            f"torch.float32, or one of {names}"
        )
    return default_dtype(state)
