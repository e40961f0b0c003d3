"""Attention of decoding, one new token in each of some slots of a cache over what its slot holds; and of a prompt.

Shape letters: R rows (new tokens), S slots, L length, H query heads, K key/value heads, G query heads that share one
(H = K * G), h width of a head.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import attention as on_cpu
from .tensors import called_directly, shown


class SlotAttention:
    """Attention of the same rows in every layer of a step.

    For inference: there is no derivative. With the native kernel every row reads its slot no further than it is filled,
    and its result depends on nothing else, to the bit.

    Args:
        keys, values: (layers, S, L, K, h), of one dtype.
        positions_R: int64, where each row's token goes in its slot; also the last position that it sees.
        slots: distinct, one for each row; None: the first ones in order.
        bound: how far the reference reads the cache: beyond every position.

    Raises:
        ValueError: tensors that do not fit each other.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, positions_R: Tensor, slots: Sequence[int] | None = None, *, bound: int
    ) -> None:
        _check_cache(keys, values)
        rows = positions_R.numel() if slots is None else len(slots)
        if positions_R.shape != (rows,) or positions_R.dtype != torch.int64:
            raise ValueError(f"positions_R {shown(positions_R)} must hold one int64 for each row")
        self.keys, self.values, self.bound = keys, values, bound
        self.positions_R = positions_R.contiguous()
        self.slots = slots
        self.slots_R = None if slots is None else torch.tensor(slots, device=keys.device)
        self._cache = on_cpu.described(keys, values) if on_cpu.serves(keys, values) else None
        # Made once for all layers, but not where it is not wanted: a small operation costs as much as the kernel.
        self._plain = self._reference() if self._cache is None else None

    def __call__(
        self, layer: int, q_RHh: Tensor, k_RKh: Tensor, v_RKh: Tensor, *, variant: str | None = None
    ) -> Tensor:
        """Write the new keys and values to their places in a layer, and attend to all up to them; (R, H, h)."""
        self._check(q_RHh, k_RKh, v_RKh)
        if self._cache is not None and called_directly(q_RHh) and not torch.is_grad_enabled():
            new = (q_RHh, k_RKh, v_RKh)
            return on_cpu.attend_slots(self._cache, layer, *new, self.positions_R, self.slots_R, variant=variant)
        plain = self._plain or self._reference()
        return plain(self.keys[layer], self.values[layer], q_RHh, k_RKh, v_RKh)

    def _reference(self) -> "SlotAttentionReference":
        count = len(self.positions_R) if self.slots is None else max(self.slots) + 1
        return SlotAttentionReference(self.positions_R, self.slots_R, count=count, bound=self.bound)

    def _check(self, q_RHh: Tensor, k_RKh: Tensor, v_RKh: Tensor) -> None:
        rows, heads, width = len(self.positions_R), *self.keys.shape[3:]
        new = (rows, heads, width)
        fits = q_RHh.dim() == 3 and q_RHh.shape[0] == rows and q_RHh.shape[2] == width
        if not fits or q_RHh.shape[1] % heads or q_RHh.dtype != self.keys.dtype:
            raise ValueError(f"q_RHh {shown(q_RHh)} does not fit {rows} rows and a cache {shown(self.keys)}")
        for x in (k_RKh, v_RKh):
            if x.shape != new or x.dtype != self.keys.dtype:
                raise ValueError(f"keys or values {shown(x)} do not fit {rows} rows and a cache {shown(self.keys)}")


class SlotAttentionReference:
    """In plain PyTorch, of one layer: its cost is the bound's, whatever the slots hold.

    All slots up to the last one take part, since a choice of them would be a copy of their keys and values.

    Args:
        count: of these slots.
    """

    def __init__(self, positions_R: Tensor, slots_R: Tensor | None, *, count: int, bound: int) -> None:
        device = positions_R.device
        self.slots_R, self.count, self.bound = slots_R, count, bound
        positions_S = positions_R
        if slots_R is not None:
            # A slot that is not asked sees its first position: a row that sees nothing would be NaN.
            positions_S = torch.zeros(count, dtype=torch.int64, device=device).index_copy_(0, slots_R, positions_R)
        self.places = (torch.arange(count, device=device) if slots_R is None else slots_R, positions_R)
        self.seen_S11L = (torch.arange(bound, device=device) <= positions_S[:, None])[:, None, None]

    def __call__(self, keys_SLKh: Tensor, values_SLKh: Tensor, q_RHh: Tensor, k_RKh: Tensor, v_RKh: Tensor) -> Tensor:
        """(R, H, h)."""
        keys_SLKh.index_put_(self.places, k_RKh)
        values_SLKh.index_put_(self.places, v_RKh)
        q_SHh = q_RHh
        if self.slots_R is not None:
            q_SHh = q_RHh.new_zeros(self.count, *q_RHh.shape[1:]).index_copy_(0, self.slots_R, q_RHh)
        # The heads of a group see the same keys through the same mask: they can stand where a query's length stands,
        # and no key is repeated.
        q_SKGh = q_SHh.unflatten(1, (keys_SLKh.shape[2], -1))
        k_SKLh, v_SKLh = (x[: self.count, : self.bound].transpose(1, 2) for x in (keys_SLKh, values_SLKh))
        out_SHh = F.scaled_dot_product_attention(q_SKGh, k_SKLh, v_SKLh, attn_mask=self.seen_S11L).flatten(1, 2)
        return out_SHh if self.slots_R is None else out_SHh[self.slots_R]


def prompt_attention(q_LHh: Tensor, k_MKh: Tensor, v_MKh: Tensor) -> Tensor | None:
    """The last L tokens of a sequence of M over what is before each, and itself; (L, H, h), or None where no kernel
    serves.

    One does on a CPU with AMX, in bfloat16, for heads of up to 256, a multiple of 32 (tiles_attention.cpp); a token's
    result depends on its own query and what it sees, to the bit. No derivative.

    Raises:
        ValueError: tensors that do not fit each other.
    """
    if not on_cpu.prompt_serves(q_LHh, k_MKh, v_MKh):
        return None
    (tokens, heads, width), (keys, kv_heads) = q_LHh.shape, k_MKh.shape[:2]
    fits = k_MKh.shape == v_MKh.shape == (keys, kv_heads, width) and tokens <= keys and heads % max(1, kv_heads) == 0
    if not fits:
        raise ValueError(f"q {shown(q_LHh)}, keys {shown(k_MKh)} and values {shown(v_MKh)} do not fit")
    return on_cpu.attend_prompt(q_LHh, k_MKh, v_MKh)


def _check_cache(keys: Tensor, values: Tensor) -> None:
    if keys.dim() != 5 or keys.shape != values.shape or keys.dtype != values.dtype:
        raise ValueError(f"keys {shown(keys)} and values {shown(values)} are not those of a cache")
