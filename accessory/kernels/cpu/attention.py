"""The native library's attention (attention.cpp, tiles_attention.cpp).

Shape letters as in kernels/attention.py.
"""

import ctypes
import functools

import torch
from torch import Tensor

from ..tensors import called_directly, whole_tokens
from .library import DTYPES, check_outcome, native_available, native_library, native_variant, tiles_serve


class _Part(ctypes.Structure):
    """struct accessory_cached_part of attention.cpp."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("layer", "slot", "position", "head"))]


class Cache(ctypes.Structure):
    """struct accessory_cache of attention.cpp. It is made of addresses: the tensors' memory must stay."""

    _fields_ = [
        ("keys", _Part),
        ("values", _Part),
        *((name, ctypes.c_int64) for name in ("layers", "slots", "length", "heads", "width")),
        ("bf16", ctypes.c_int32),
    ]


def described(keys: Tensor, values: Tensor) -> Cache:
    """The cache as the library reads it."""
    size = keys.element_size()
    parts = (_Part(x.data_ptr(), *(size * stride for stride in x.stride()[:-1])) for x in (keys, values))
    return Cache(*parts, *keys.shape, keys.dtype == torch.bfloat16)


def serves(keys: Tensor, values: Tensor) -> bool:
    """Whether `attend_slots` reads such a cache."""
    laid_out = called_directly(keys) and keys.dtype in DTYPES and keys.stride(-1) == 1 and values.stride(-1) == 1
    return laid_out and native_available()


def prompt_serves(q_LHh: Tensor, k_MKh: Tensor, v_MKh: Tensor) -> bool:
    """Whether `attend_prompt` does: with AMX, in bfloat16, for heads of up to 256, a multiple of 32."""
    bf16 = q_LHh.dtype == k_MKh.dtype == v_MKh.dtype == torch.bfloat16
    if not bf16 or not called_directly(q_LHh) or torch.is_grad_enabled() or not tiles_serve():
        return False
    width = q_LHh.shape[-1]
    return 0 < width <= 256 and width % 32 == 0 and k_MKh.stride(-1) == v_MKh.stride(-1) == 1


def attend_slots(
    cache: Cache,
    layer: int,
    q_RHh: Tensor,
    k_RKh: Tensor,
    v_RKh: Tensor,
    positions_R: Tensor,
    slots_R: Tensor | None,
    *,
    variant: str | None = None,
) -> Tensor:
    """`SlotAttention` of one layer, writing the new keys and values first; (R, H, h)."""
    if not 0 <= layer < cache.layers:
        raise IndexError(f"the cache has no layer {layer}")
    q_RHh, k_RKh, v_RKh = (whole_tokens(x) for x in (q_RHh, k_RKh, v_RKh))
    rows, heads, width = q_RHh.shape
    out_RHh = q_RHh.new_empty(rows, heads, width)
    size = q_RHh.element_size()
    outcome = _library().accessory_attend_slots(
        (variant or native_variant()).encode(),
        ctypes.byref(cache),
        layer,
        q_RHh.data_ptr(),
        k_RKh.data_ptr(),
        v_RKh.data_ptr(),
        None if slots_R is None else slots_R.data_ptr(),
        positions_R.data_ptr(),
        out_RHh.data_ptr(),
        rows,
        heads // cache.heads,
        q_RHh.stride(0) * size,
        k_RKh.stride(0) * size,
        v_RKh.stride(0) * size,
        torch.get_num_threads(),
    )
    if outcome > 0:
        row = outcome - 1
        slot, position = row if slots_R is None else int(slots_R[row]), int(positions_R[row])
        raise IndexError(f"the cache of {cache.slots} slots of {cache.length} has no position {position} in {slot}")
    check_outcome(outcome, None, 0)
    return out_RHh


def attend_prompt(q_LHh: Tensor, k_MKh: Tensor, v_MKh: Tensor) -> Tensor:
    """`prompt_attention`, where it serves; (L, H, h)."""
    (tokens, heads, width), (keys, kv_heads) = q_LHh.shape, k_MKh.shape[:2]
    q_LHh = whole_tokens(q_LHh)
    out_LHh = q_LHh.new_empty(tokens, heads, width)
    outcome = _library().accessory_attend_prompt(
        *(x.data_ptr() for x in (q_LHh, k_MKh, v_MKh, out_LHh)),
        *(tokens, keys - tokens, heads, kv_heads, width),
        *(q_LHh.stride(0), *k_MKh.stride()[:2], *v_MKh.stride()[:2]),
        torch.get_num_threads(),
    )
    check_outcome(outcome, None, 0)
    return out_LHh


@functools.cache
def _library() -> ctypes.CDLL:
    library = native_library()
    library.accessory_attend_slots.restype = ctypes.c_int64
    library.accessory_attend_slots.argtypes = [ctypes.c_char_p, ctypes.POINTER(Cache), ctypes.c_int64]
    library.accessory_attend_slots.argtypes += [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 5 + [ctypes.c_int]
    library.accessory_attend_prompt.restype = ctypes.c_int64
    library.accessory_attend_prompt.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 10 + [ctypes.c_int]
    return library
