"""Grouped-query attention, and the three patterns in which tokens see one another.

Attention itself works on a flat list of tokens and asks a pattern to relate them, so that training, prefill and
decoding share the projections and the rotary embedding.

Shape letters: T tokens, R rows (sequences), S slots of the cache, L length, H query heads, K key/value heads,
G query heads that share one (H = K * G), h width of a head; all heads are this rank's own.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory import kernels
from accessory.config import ModelArgs
from accessory.kernels import SlotAttention
from accessory.model.cache import KVCache
from accessory.model.norm import RMSNorm, rms_norm
from accessory.parallel.layers import Linears
from accessory.parallel.ops import copy_to_region, local, reduce_from_region
from accessory.parallel.plan import local_sizes
from accessory.parallel.state import ParallelState, Place

_QUERY_BLOCK = 64
_MASK_UNIT = 1024  # keys by which the mask of blocks grows


class Bounds(NamedTuple):
    """What a layer's tokens attend to beside or instead of all before them.

    Attributes:
        window: so many tokens, the last of them the token itself; None: all.
        sinks_H: each head's logit that takes its share of attention and gives nothing; None: there is none.
    """

    window: int | None
    sinks_H: Tensor | None


class Pattern(Protocol):
    """Which earlier tokens each token attends to."""

    positions_T: Tensor

    def attend(self, layer: int, q_THh: Tensor, k_TKh: Tensor, v_TKh: Tensor, bounds: Bounds | None = None) -> Tensor:
        """Attention of the new tokens over all that they may see; (T, H, h)."""
        ...


class CausalRows:
    """Rows of equal length, each token seeing those before it in its row; nothing is cached."""

    def __init__(self, rows: int, length: int, device: torch.device) -> None:
        self.rows = rows
        self.positions_T = torch.arange(length, device=device).repeat(rows)

    def attend(self, layer: int, q_THh: Tensor, k_TKh: Tensor, v_TKh: Tensor, bounds: Bounds | None = None) -> Tensor:
        q, k, v = (x.unflatten(0, (self.rows, -1)) for x in (q_THh, k_TKh, v_TKh))
        if bounds is not None:
            return attend_within(q, k, v, 0, bounds).flatten(0, 1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return _attention(q, k, v, causal=True).transpose(1, 2).flatten(0, 1)


class Prefill:
    """Ragged rows, one after another without padding, each continuing the sequence in its slot.

    Rows of a single token, the running answers of a serving batch, attend together, as in decoding.

    Args:
        lengths: new tokens of each row.
        slots: the slot of each row; what it holds already is seen by the new tokens.

    Raises:
        ValueError: a slot has no room for its tokens.
    """

    def __init__(self, cache: KVCache, lengths: Sequence[int], slots: Sequence[int]) -> None:
        cache.check_room(slots, lengths)
        self.cache = cache
        starts = [cache.length(slot) for slot in slots]
        spans = [torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)]
        self.positions_T = torch.cat(spans).to(cache.k.device)
        ends = itertools.accumulate(lengths)
        rows = [(slot, start, end - n, end) for slot, start, n, end in zip(slots, starts, lengths, ends, strict=True)]
        ones = [(slot, start, first) for slot, start, first, last in rows if last - first == 1]
        self._all = rows
        self._ones = _SingleTokens(cache, ones) if len(ones) > 1 else None
        self._rows = [row for row, n in zip(rows, lengths, strict=True) if n > 1 or self._ones is None]

    def attend(self, layer: int, q_THh: Tensor, k_TKh: Tensor, v_TKh: Tensor, bounds: Bounds | None = None) -> Tensor:
        out_THh = torch.empty_like(q_THh)
        for slot, start, first, last in self._rows if bounds is None else self._all:
            keys, values, before = self.cache.extended(layer, slot, start, k_TKh[first:last], v_TKh[first:last])
            out_THh[first:last] = _attend_row(q_THh[first:last], keys, values, before, bounds)
        if bounds is None and self._ones is not None:
            self._ones.attend(layer, q_THh, k_TKh, v_TKh, out_THh)
        return out_THh


class Ragged:
    """Texts of unequal length one after another, each token seeing those before it in its text; nothing is cached."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = list(lengths)
        self.positions_T = torch.cat([torch.arange(n) for n in self.lengths]).to(device)

    def attend(self, layer: int, q_THh: Tensor, k_TKh: Tensor, v_TKh: Tensor, bounds: Bounds | None = None) -> Tensor:
        split = (x.split(self.lengths) for x in (q_THh, k_TKh, v_TKh))
        return torch.cat([_attend_row(q, k, v, 0, bounds) for q, k, v in zip(*split, strict=True)])


class Decode:
    """One new token for every slot: fixed shapes, whatever the slots hold.

    Args:
        positions_S: where each slot's token goes; also the last position that it sees.
        bound: how far the cache is read where it is not read slot by slot.
    """

    def __init__(self, cache: KVCache, positions_S: Tensor, bound: int) -> None:
        self.positions_T, self.cache, self.bound = positions_S, cache, bound
        self._attention = SlotAttention(cache.k, cache.v, positions_S, bound=bound)

    def attend(self, layer: int, q_THh: Tensor, k_TKh: Tensor, v_TKh: Tensor, bounds: Bounds | None = None) -> Tensor:
        if bounds is None:
            return self._attention(self.cache.place(layer), q_THh, k_TKh, v_TKh)
        keys_SLKh, values_SLKh = self.cache.of_layer(layer)
        slots_S, length = torch.arange(len(q_THh), device=q_THh.device), keys_SLKh.shape[1]
        # Where there is a window, what is overwritten is behind it.
        places = slots_S, self.positions_T % length
        keys_SLKh.index_put_(places, k_TKh)
        values_SLKh.index_put_(places, v_TKh)
        end = min(self.bound, length)
        seen_S1L = (torch.arange(end, device=q_THh.device) <= self.positions_T[:, None])[:, None]
        return _weighted(q_THh[:, None], keys_SLKh[:, :end], values_SLKh[:, :end], seen_S1L, bounds.sinks_H)[:, 0]


class _SingleTokens:
    """Rows of a single token among those of a `Prefill`.

    Args:
        rows: the slot of each row, its position there, and its place among the tokens.
    """

    def __init__(self, cache: KVCache, rows: Sequence[tuple[int, int, int]]) -> None:
        slots, positions, places = zip(*rows, strict=True)
        self._place = cache.place
        positions_R, self.places_R = (torch.tensor(numbers, device=cache.k.device) for numbers in (positions, places))
        self._attention = SlotAttention(cache.k, cache.v, positions_R, slots, bound=max(positions) + 1)

    def attend(self, layer: int, q_THh: Tensor, k_TKh: Tensor, v_TKh: Tensor, out_THh: Tensor) -> None:
        """Attention of these rows' tokens, written to their places in ``out_THh``."""
        new_R = (x[self.places_R] for x in (q_THh, k_TKh, v_TKh))
        out_THh.index_copy_(0, self.places_R, self._attention(self._place(layer), *new_R))


class Attention(nn.Module):
    """Projections, rotary embedding and output product of one layer; heads are split over the ranks."""

    def __init__(self, layer: int, args: ModelArgs, state: ParallelState, place: Place, layers: Linears) -> None:
        super().__init__()
        self.layer, self.head_dim, self.group = layer, args.head_dim, state.mp_group
        own = local_sizes(args, state.mp_size)
        heads, kv_heads = own["heads"], own["kv_heads"]
        self.wq = layers.column(args.dim, heads * args.head_dim, place)
        self.wk = layers.column(args.dim, kv_heads * args.head_dim, place)
        self.wv = layers.column(args.dim, kv_heads * args.head_dim, place)
        self.wo = layers.row(heads * args.head_dim, args.dim, state, place)
        self.own = args.attention
        if self.own.qkv_bias:
            self.q_bias = place.parameter(heads * args.head_dim)
            self.k_bias, self.v_bias = (place.parameter(kv_heads * args.head_dim) for _ in range(2))
        if self.own.o_bias:
            self.o_bias = place.parameter(args.dim)
        if self.own.sinks:
            self.sinks = place.parameter(heads)
        self.window = args.window_of(layer)
        if self.own.qk_norm != "none":
            self.q_norm = RMSNorm(own["normed_heads"] * args.head_dim, args.norm_eps, place)
            self.k_norm = RMSNorm(own["normed_kv"] * args.head_dim, args.norm_eps, place)
            # Of which all ranks' values together are normalised; a key head may lie on several of them.
            self.width = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
            self.copies = state.mp_size * kv_heads // args.n_kv_heads

    def forward(self, x_TD: Tensor, rotation: tuple[Tensor, Tensor], pattern: Pattern) -> Tensor:
        """(T, D) -> (T, D), the same on every rank."""
        x_TD = copy_to_region(x_TD, self.group)
        q, k, v = (w(x_TD) for w in (self.wq, self.wk, self.wv))
        if self.own.qkv_bias:
            biases = (self.q_bias, self.k_bias, self.v_bias)
            q, k, v = (x + local(bias).type_as(x) for x, bias in zip((q, k, v), biases, strict=True))
        if self.own.qk_norm == "full":
            q, k = self._normed_together(q, k)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        if self.own.qk_norm == "head":
            q, k = (
                rms_norm(x, copy_to_region(local(norm.weight).type_as(x), self.group), norm.eps)
                for x, norm in ((q, self.q_norm), (k, self.k_norm))
            )
        if (clip := self.own.clip) is not None:
            q, k, v = (x.clamp(-clip, clip) for x in (q, k, v))
        q, k = kernels.rotate(q, k, rotation)
        out = pattern.attend(self.layer, q, k, v, self._bounds())
        y_TD: Tensor = self.wo(out.flatten(1))
        return y_TD + local(self.o_bias).type_as(y_TD) if self.own.o_bias else y_TD

    def _bounds(self) -> Bounds | None:
        if self.window is None and not self.own.sinks:
            return None
        return Bounds(self.window, local(self.sinks) if self.own.sinks else None)

    def _normed_together(self, q_TQ: Tensor, k_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's queries, and its keys, over the root mean square of those of all ranks."""
        wide = q_TQ.float(), k_TK.float()
        sums_2T = torch.stack([torch.linalg.vecdot(x, x) for x in wide])
        # What each rank makes of the sums, gradients included, is its part alone.
        sums_2T = copy_to_region(reduce_from_region(sums_2T, self.group), self.group)
        means_2T = sums_2T / sums_2T.new_tensor([[self.width[0]], [self.width[1] * self.copies]])
        q, k = (
            (x * torch.rsqrt(mean_T + norm.eps).unsqueeze(-1)).type_as(q_TQ) * local(norm.weight).type_as(q_TQ)
            for x, mean_T, norm in zip(wide, means_2T, (self.q_norm, self.k_norm), strict=True)
        )
        return q, k


def _attend_row(q_LHh: Tensor, k_MKh: Tensor, v_MKh: Tensor, start: int, bounds: Bounds | None = None) -> Tensor:
    """One sequence whose new tokens begin at position ``start`` of its M tokens."""
    if bounds is not None:
        return attend_within(q_LHh[None], k_MKh[None], v_MKh[None], start, bounds)[0]
    by_kernel = kernels.prompt_attention(q_LHh, k_MKh, v_MKh)
    if by_kernel is not None:
        return by_kernel
    if not q_LHh.is_cuda and not torch.is_grad_enabled():
        return _attend_in_blocks(q_LHh, k_MKh, v_MKh, start)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_LHh, k_MKh, v_MKh))
    if start == 0:
        out = _attention(q, k, v, causal=True)
    else:
        # Its import takes a second, and only GPUs come here: they need no tensor, which for the last piece of a long
        # prompt would have gigabytes.
        from torch.nn.attention.bias import causal_lower_right

        out = _attention(q, k, v, mask=causal_lower_right(q_LHh.shape[0], k_MKh.shape[0]))
    return out.squeeze(0).transpose(0, 1)


def _attend_in_blocks(q_LHh: Tensor, k_MKh: Tensor, v_MKh: Tensor, start: int) -> Tensor:
    """The same on CPU: blocks of queries against the keys up to their end, the heads of a group as one long query.

    Faster than one call with is_causal and enable_gqa (docs/benchmarks.md, "The kernels for few tokens").
    """
    q_KGLh = q_LHh.unflatten(1, (k_MKh.shape[1], -1)).permute(1, 2, 0, 3)
    k, v = k_MKh.transpose(0, 1).unsqueeze(0), v_MKh.transpose(0, 1).unsqueeze(0)
    groups = q_KGLh.shape[1]
    mask_GBM = _last_block_mask(groups, -(-k_MKh.shape[0] // _MASK_UNIT) * _MASK_UNIT, q_LHh.dtype)
    blocks = []
    for first in range(0, q_LHh.shape[0], _QUERY_BLOCK):
        block = q_KGLh[:, :, first : first + _QUERY_BLOCK]
        length = block.shape[2]
        end = start + first + length
        mask = mask_GBM[:, -length:, -end:].flatten(0, 1)
        out = F.scaled_dot_product_attention(
            block.flatten(1, 2).unsqueeze(0), k[:, :, :end], v[:, :, :end], attn_mask=mask
        )
        blocks.append(out.squeeze(0).unflatten(1, (groups, length)).permute(2, 0, 1, 3).flatten(1, 2))
    return torch.cat(blocks)


@functools.lru_cache(maxsize=2)
def _last_block_mask(groups: int, length: int, dtype: torch.dtype) -> Tensor:
    """What is added to the logits of a block of queries that end where the keys do, (groups, _QUERY_BLOCK, length).

    The last rows and columns are the mask of a shorter block and of fewer keys: layers and blocks share one.
    """
    seen = torch.ones(_QUERY_BLOCK, length, dtype=torch.bool).tril_(length - _QUERY_BLOCK)
    mask = torch.zeros(_QUERY_BLOCK, length, dtype=dtype).masked_fill_(~seen, float("-inf"))
    return mask.repeat(groups, 1, 1)


def _attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    shared = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shared)


def attend_within(q_RLHh: Tensor, k_RMKh: Tensor, v_RMKh: Tensor, start: int, bounds: Bounds) -> Tensor:
    """Attention with a window or sinks, of rows whose new tokens begin at position ``start`` of their M; (R, L, H, h).

    In blocks of queries, each against no more keys than its windows hold.
    """
    device, blocks = q_RLHh.device, []
    for first in range(0, q_RLHh.shape[1], _QUERY_BLOCK):
        block = q_RLHh[:, first : first + _QUERY_BLOCK]
        own = start + first
        end = own + block.shape[1]
        begin = 0 if bounds.window is None else max(0, own + 1 - bounds.window)
        keys_M, queries_L1 = torch.arange(begin, end, device=device), torch.arange(own, end, device=device)[:, None]
        seen_LM = keys_M <= queries_L1
        if bounds.window is not None:
            seen_LM &= keys_M > queries_L1 - bounds.window
        blocks.append(_weighted(block, k_RMKh[:, begin:end], v_RMKh[:, begin:end], seen_LM[None], bounds.sinks_H))
    return torch.cat(blocks, dim=1)


def _weighted(q_RLHh: Tensor, k_RMKh: Tensor, v_RMKh: Tensor, seen_RLM: Tensor, sinks_H: Tensor | None) -> Tensor:
    """The values by the softmax of queries times keys and of each head's sink, in float32; (R, L, H, h)."""
    length, heads = q_RLHh.shape[1], k_RMKh.shape[2]
    q_RKGLh = q_RLHh.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4)
    k_RKhM, v_RKMh = k_RMKh.permute(0, 2, 3, 1), v_RMKh.transpose(1, 2)
    logits_RKGLM = (q_RKGLh.flatten(2, 3) @ k_RKhM).unflatten(2, (-1, length)).float() * q_RLHh.shape[-1] ** -0.5
    logits_RKGLM = logits_RKGLM.masked_fill(~seen_RLM[:, None, None], float("-inf"))
    if sinks_H is not None:
        sinks = sinks_H.float().view(1, heads, -1, 1, 1).expand(*logits_RKGLM.shape[:-1], 1)
        logits_RKGLM = torch.cat((logits_RKGLM, sinks), dim=-1)
    shares_RKGLM = logits_RKGLM.softmax(-1)[..., : k_RMKh.shape[1]].type_as(v_RMKh)
    out_RKGLh = (shares_RKGLM.flatten(2, 3) @ v_RKMh).unflatten(2, (-1, length))
    return out_RKGLh.permute(0, 3, 1, 2, 4).flatten(2, 3)
