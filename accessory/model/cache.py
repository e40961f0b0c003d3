"""The key/value cache; it belongs to the caller, the model only writes into it."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from accessory.config import ModelArgs
from accessory.model.graphs import DecodeGraphs
from accessory.parallel.plan import local_sizes
from accessory.parallel.state import ParallelState


class KVCache:
    """Keys and values of every layer for a fixed number of slots, one sequence in each.

    A slot of length 5 holds the tokens at positions 0..4; the next token of its sequence goes to position 5.
    With slots of lengths [5, 0, 9], `decode` writes position 5 of slot 0 and position 9 of slot 2 if those two
    are active, and reads no further than `bound` says: on a CPU 64, the least multiple of 64 that holds position 9.

    Of a layer with a window only the positions within it are there: position p of a slot lies at p % window, where
    p - window lay, which nothing will see again.

    Args:
        windows: of each layer, None where it has none; none at all: no layer has one.
        routes: (experts, experts chosen for each token, numbers of the layers that have experts) where the cache is to
            remember who took each token.

    Attributes:
        k, v: (layers without a window, slots, max_seq_len, local kv heads, head_dim).
        near_k, near_v: of the layers with one, and their windows in place of max_seq_len where these are shorter.
        lengths: (slots,) int64 on the device: tokens held by each slot.
        bound: how far the next decoding step reads: covers the new position of the longest slot.
        routes: (layers with experts, slots, max_seq_len, experts for each token) int16, beside k and v; None: not
            remembered.
        expert_counts: (layers with experts, experts) int64: pairs of token and expert so far, of all sequences ever.
        graphs: the decoding steps with this cache that were captured, on a GPU.
    """

    # Decoding reads the cache up to a multiple of this, so that shapes seldom change: what is compiled or captured for
    # them is made anew. On a CPU it is what is read in vain that costs, where the native kernel does not read each slot
    # no further than it is filled (docs/benchmarks.md, "The kernels for few tokens").
    BLOCK, BLOCK_ON_CPU = 256, 64

    def __init__(
        self,
        *,
        layers: int,
        slots: int,
        max_seq_len: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        windows: Sequence[int | None] = (),
        routes: tuple[int, int, tuple[int, ...]] | None = None,
    ) -> None:
        self.layers = layers
        self._near = [layer for layer, window in enumerate(windows) if window is not None]
        self._far = [layer for layer in range(layers) if layer not in self._near]
        window = min([max_seq_len, *(own for own in windows if own is not None)])
        # Zeros, not empty: masked positions still enter a product, and 0 * NaN would be NaN.
        self.k, self.v, self.near_k, self.near_v = (
            torch.zeros((len(own), slots, length, kv_heads, head_dim), dtype=dtype, device=device)
            for own, length in ((self._far, max_seq_len), (self._near, window))
            for _ in range(2)
        )
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        self.routes: Tensor | None = None
        if routes is not None:
            experts, chosen, self._routed = routes
            own = len(self._routed)
            self.routes = torch.zeros((own, slots, max_seq_len, chosen), dtype=torch.int16, device=device)
            self.expert_counts = torch.zeros((own, experts), dtype=torch.int64, device=device)
        self._block = self.BLOCK_ON_CPU if device.type == "cpu" else self.BLOCK
        self.graphs = DecodeGraphs()
        # The host's copy of `lengths`, so that bounds and positions cost no synchronisation.
        self._host_lengths = [0] * slots
        self._set_bound()

    @property
    def tensors(self) -> list[Tensor]:
        """All that it consists of."""
        return [own for own in vars(self).values() if isinstance(own, Tensor)]

    @property
    def nbytes(self) -> int:
        return sum(own.nbytes for own in self.tensors)

    @property
    def slots(self) -> int:
        return self.k.shape[1]

    @property
    def max_seq_len(self) -> int:
        return self.k.shape[2]

    def first(self, slots: int) -> "KVCache":
        """The first slots as a cache of their own, in the same memory, for one decoding step.

        Lengths are recorded, and slots freed, in the whole.
        """
        part = copy.copy(self)
        part.k, part.v, part.lengths = self.k[:, :slots], self.v[:, :slots], self.lengths[:slots]
        part.near_k, part.near_v = self.near_k[:, :slots], self.near_v[:, :slots]
        part.routes = None if self.routes is None else self.routes[:, :slots]
        return part

    def length(self, slot: int) -> int:
        """Tokens held by a slot."""
        return self._host_lengths[slot]

    def free(self, slot: int) -> None:
        """Forget a slot's sequence."""
        self._host_lengths[slot] = 0
        self.lengths[slot] = 0
        self._set_bound()

    def clear(self, slot: int) -> None:
        """Overwrite what a slot holds, which may not be finite; where decoding wrote for an inactive slot, too."""
        written = self._host_lengths[slot] + 1
        self.k[:, slot, :written] = 0
        self.v[:, slot, :written] = 0
        self.near_k[:, slot] = 0
        self.near_v[:, slot] = 0

    def place(self, layer: int) -> int:
        """The number of a layer without a window among these."""
        return self._far.index(layer) if self._near else layer

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, each (slots, length, local kv heads, head_dim)."""
        if layer in self._near:
            place = self._near.index(layer)
            return self.near_k[place], self.near_v[place]
        return self.k[self.place(layer)], self.v[self.place(layer)]

    def extended(self, layer: int, slot: int, start: int, k_LKh: Tensor, v_LKh: Tensor) -> tuple[Tensor, Tensor, int]:
        """Write a slot's new tokens behind its first ``start`` ones.

        Returns:
            The keys and values that they may see, their own at the end, and how many are before these.
        """
        whole, found = [x[slot] for x in self.of_layer(layer)], []
        length, end = whole[0].shape[0], start + k_LKh.shape[0]
        if layer not in self._near:
            for x, new in zip(whole, (k_LKh, v_LKh), strict=True):
                x[start:end] = new
            return whole[0][:end], whole[1][:end], start
        before = torch.arange(max(0, start - length), start, device=k_LKh.device)
        kept = torch.arange(max(start, end - length), end, device=k_LKh.device)
        for x, new in zip(whole, (k_LKh, v_LKh), strict=True):
            found.append(torch.cat((x[before % length], new)))
            x[kept % length] = new[-len(kept) :]
        return found[0], found[1], len(before)

    def check_room(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        """Raise ValueError where ``counts`` more tokens in ``slots`` would exceed max_seq_len."""
        for slot, count in zip(slots, counts, strict=True):
            if self._host_lengths[slot] + count > self.max_seq_len:
                raise ValueError(
                    f"slot {slot} holds {self._host_lengths[slot]} tokens: {count} more exceed the cache's "
                    f"max_seq_len of {self.max_seq_len}"
                )

    def extend(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        """Record that ``counts`` tokens were written to ``slots``.

        Raises:
            ValueError: a slot would exceed max_seq_len; nothing is recorded then.
        """
        self.check_room(slots, counts)
        for slot, count in zip(slots, counts, strict=True):
            self._host_lengths[slot] += count
        self.lengths.copy_(torch.tensor(self._host_lengths))
        self._set_bound()

    def record(self, experts: Sequence[Tensor], slots_T: Tensor, positions_T: Tensor, active_T: Tensor | None) -> None:
        """Remember the experts of new tokens, where the cache does.

        Args:
            experts: of every layer that has some, (T, K).
            active_T: bool; which of the tokens count (None: all).
        """
        if self.routes is None:
            return
        experts_LTK = torch.stack(list(experts))
        self.routes[:, slots_T, positions_T] = experts_LTK.to(torch.int16)
        counted_T = torch.ones_like(slots_T) if active_T is None else active_T.long()
        counted_LP = counted_T[:, None].expand(experts_LTK.shape[1:]).flatten().expand(experts_LTK.shape[0], -1)
        self.expert_counts.scatter_add_(1, experts_LTK.flatten(1), counted_LP)

    def by_layer(self, routed: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        """What each layer with experts has, by the layer's number; empty for those without."""
        found = dict(zip(self._routed, map(tuple, routed), strict=True))
        return tuple(found.get(layer, ()) for layer in range(self.layers))

    def _set_bound(self) -> None:
        # A number, not a property: torch.compile would make the lengths behind it part of what it compiled for.
        longest = max(self._host_lengths) + 1
        self.bound = min(-(-longest // self._block) * self._block, self.max_seq_len)


def new_cache(
    args: ModelArgs, state: ParallelState, slots: int, max_seq_len: int, *, dtype: torch.dtype, routes: bool
) -> KVCache:
    """An empty cache of a rank's key/value heads.

    Args:
        routes: it is to remember which experts took each token.
    """
    moe = args.moe
    return KVCache(
        layers=args.n_layers,
        slots=slots,
        max_seq_len=max_seq_len,
        kv_heads=local_sizes(args, state.mp_size)["kv_heads"],
        head_dim=args.head_dim,
        dtype=dtype,
        device=state.device,
        windows=[args.window_of(layer) for layer in range(args.n_layers)],
        routes=(moe.num_experts, moe.num_experts_per_tok, args.moe_layers) if routes else None,
    )
