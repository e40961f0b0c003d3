"""The transformer that all families share.

Shape letters: B rows, L length, T = B * L tokens (or the tokens of ragged rows), R rows, S slots of the cache,
D model width, V tokens of the vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from accessory.config import ModelArgs
from accessory.model.attention import Attention, CausalRows, Decode, Pattern, Prefill, Ragged
from accessory.model.balance import RouterStats
from accessory.model.cache import KVCache, new_cache
from accessory.model.gated_unit import Dense, GatedUnit
from accessory.model.layers import PLAIN, Layers
from accessory.model.moe import MoE
from accessory.model.norm import RMSNorm
from accessory.model.rope import RotaryTable
from accessory.model.router import Routing
from accessory.model.threads import adapt_waiting
from accessory.parallel.layers import ParallelEmbedding
from accessory.parallel.ops import is_distributed
from accessory.parallel.placement import resolve_placement
from accessory.parallel.plan import Placement, local_sizes
from accessory.parallel.state import ParallelState, Place


class TransformerBlock(nn.Module):
    """Attention and feed-forward part, each behind a norm and added to the residual stream."""

    def __init__(
        self, layer: int, args: ModelArgs, state: ParallelState, placement: Placement, place: Place, layers: Layers
    ) -> None:
        super().__init__()
        self.attention = Attention(layer, args, state, place, layers.attention)
        self.feed_forward = _feed_forward(layer, args, state, placement, place, layers)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps, place)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps, place)

    def forward(
        self,
        x_TD: Tensor,
        rotation: tuple[Tensor, Tensor],
        pattern: Pattern,
        active_T: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """The residual stream after the block, and its routing; None in a layer without experts."""
        attended_TD = self.attention(self.attention_norm(x_TD), rotation, pattern)
        x_TD, normed_TD = self.ffn_norm.after_adding(x_TD, attended_TD)
        y_TD, routing = self.feed_forward(normed_TD, active_T)
        return x_TD + y_TD, routing


def _feed_forward(
    layer: int, args: ModelArgs, state: ParallelState, placement: Placement, place: Place, layers: Layers
) -> MoE | Dense:
    own = local_sizes(args, state.mp_size)
    if layer not in args.moe_layers:
        return Dense(args.dim, own["dense_hidden"], state, place, layers.dense)
    shared = None
    if width := own["shared_hidden"]:
        shared = GatedUnit(args.dim, width, state, place, layers.shared)
    gate, experts = layers.router(args, place), layers.experts(args, state, placement, place)
    return MoE(state, gate=gate, experts=experts, shared=shared)


class Transformer(nn.Module):
    """A model of any family, or a rank's part of one; parameters are created uninitialised.

    Args:
        args: sizes; vocab_size must be known by now.
        state: which ranks hold the model together.
        expert_placement: "expert" (whole experts on each rank), "tensor" (a slice of every expert on each) or
            "auto" (the first where the rank count divides the expert count).
        layers: what the blocks are built of.
        n_tokens: the tokenizer's; None: args.vocab_size. Embedding and output head may have more rows, to which no
            logit that leaves the model belongs.

    Attributes:
        gaps: of the tokens' ids, those that are none.
        cuda_graphs: on a GPU `decode` may capture a step and replay it; what a hook sees of one is then seen once.

    Raises:
        ValueError: the model cannot be split over so many ranks.
    """

    def __init__(
        self,
        args: ModelArgs,
        state: ParallelState,
        *,
        expert_placement: str = "auto",
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        layers: Layers = PLAIN,
        n_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.args, self.state = args, state
        self.n_tokens = args.vocab_size if n_tokens is None else n_tokens
        assert self.n_tokens <= args.vocab_size
        self.gaps: tuple[int, ...] = ()
        self.cuda_graphs = True
        self.placement = resolve_placement(args, expert_placement, state.mp_size, ep_size=state.ep.size)
        own = local_sizes(args, state.mp_size, self.placement)
        place = Place(dtype, state.device if device is None else device, args.quant)
        self.tok_embeddings = ParallelEmbedding(args.vocab_size, own["dim"], state, place)
        self.layers = nn.ModuleList(
            TransformerBlock(layer, args, state, self.placement, place, layers) for layer in range(args.n_layers)
        )
        self.norm = RMSNorm(args.dim, args.norm_eps, place)
        padded = self.n_tokens < args.vocab_size
        n_tokens = self.n_tokens if padded else None
        self.output = layers.output(args.dim, own["vocab"], state, place, n_tokens=n_tokens)
        self.rotary = RotaryTable(
            args.head_dim,
            args.max_seq_len,
            turned=args.rotary_dim,
            theta=args.rope_theta,
            scaling=args.rope_scaling,
            slowed=args.rope,
            device=state.device,
        )

    def leave_out(self, gaps: Sequence[int]) -> None:
        """Give ids that are no tokens a logit of -infinity, so that they are never sampled, counted or scored."""
        assert all(0 <= gap < self.n_tokens for gap in gaps)
        self.gaps = tuple(gaps)
        self.output.gaps = torch.tensor(self.gaps, device=self.state.device) if gaps else None

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def forward(
        self, tokens_BL: Tensor, counted_BL: Tensor | None = None, lengths: Sequence[int] | None = None
    ) -> tuple[Tensor, RouterStats]:
        """Logits of every token, for training; no cache.

        Args:
            tokens_BL: int64 (B, L), L at most args.max_seq_len.
            counted_BL: bool; which tokens the router's statistics count (None: all).
            lengths: of the texts that share rows, row by row, B * L together; None: each row is one.

        Returns:
            Logits (B, L, V) in the compute dtype, of padding -infinity, and the statistics stacked over the layers that
            have experts.
        """
        rows, length = tokens_BL.shape
        device = tokens_BL.device
        pattern = CausalRows(rows, length, device) if lengths is None else Ragged(lengths, device)
        counted_T = None if counted_BL is None else counted_BL.flatten()
        x_TD, routings = self._run(tokens_BL.flatten(), pattern)
        # FSDP's hooks want no view here: rows are told apart before the product and not behind it, and nothing is cut.
        logits_BLV = self.output(self.norm(x_TD).unflatten(0, (rows, length)), cuts=False)
        return logits_BLV, RouterStats.stacked([routing.stats(counted_T) for routing in routings])

    def score(self, tokens_T: Tensor, lengths: Sequence[int]) -> Tensor:
        """Logits (T, V) of every token of ragged rows that stand one after another."""
        x_TD, _ = self._run(tokens_T, Ragged(lengths, tokens_T.device))
        return self.output(self.norm(x_TD))

    def prefill(
        self,
        tokens_T: Tensor,
        lengths: Sequence[int],
        slots: Sequence[int],
        cache: KVCache,
        *,
        all_logits: bool = False,
    ) -> Tensor:
        """Read new tokens into the cache; logits (R, V) of each row's last token.

        Args:
            tokens_T: the rows' new tokens one after another, without padding.
            lengths: how many of them belong to each row.
            slots: distinct slots; a slot that holds tokens already is continued.
            all_logits: give those of every token, (T, V).
        """
        pattern = Prefill(cache, lengths, slots)
        x_TD, routings = self._run(tokens_T, pattern)
        if cache.routes is not None:
            slots_T = torch.tensor(slots).repeat_interleave(torch.tensor(lengths)).to(x_TD.device)
            cache.record([routing.experts_TK for routing in routings], slots_T, pattern.positions_T, None)
        cache.extend(slots, lengths)
        if all_logits:
            return self.output(self.norm(x_TD))
        last_R = torch.tensor(lengths).cumsum(0).to(x_TD.device) - 1
        return self.output(self.norm(x_TD[last_R]))

    def decode(self, tokens_S: Tensor, cache: KVCache, active_S: Tensor) -> Tensor:
        """One new token for every slot; logits (S, V), meaningless where inactive.

        Shapes depend on nothing but the slots and ``cache.bound``, and nothing is asked of the device but where the
        experts' product of many pairs must (`Experts.synchronises`). The caller records the new tokens with
        ``cache.extend``.

        Args:
            tokens_S: each slot's last token.
            active_S: bool; an inactive slot keeps its tokens, but for the last one of a full slot.
        """
        if not self._captures(tokens_S):
            return self._decode(tokens_S, cache, active_S)
        key = (self.norm.weight.data_ptr(), tokens_S.shape[0], cache.bound)
        return cache.graphs.run(key, lambda tokens, active: self._decode(tokens, cache, active), tokens_S, active_S)

    def _decode(self, tokens_S: Tensor, cache: KVCache, active_S: Tensor) -> Tensor:
        # A full slot can only be an inactive one; its write must still land inside the cache.
        positions_S = cache.lengths.clamp(max=cache.max_seq_len - 1)
        pattern = Decode(cache, positions_S, cache.bound)
        x_SD, routings = self._run(tokens_S, pattern, active_T=active_S)
        if cache.routes is not None:
            cache.record(
                [routing.experts_TK for routing in routings],
                torch.arange(len(positions_S), device=positions_S.device),
                positions_S,
                active_S,
            )
        return self.output(self.norm(x_SD))

    def _captures(self, tokens_S: Tensor) -> bool:
        """Whether a step may become a CUDA graph. Across ranks that was not tried; a sharded weight has no address.

        A graph cannot wait for the device, so none is made where the experts' products do.
        """
        if not (tokens_S.is_cuda and self.cuda_graphs and self.state.mp_size == 1):
            return False
        changes = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        if changes or is_distributed(self.norm.weight):
            return False
        block = self.layers[self.args.moe_layers[0]]  # all that have experts are alike
        assert isinstance(block, TransformerBlock)
        assert isinstance(block.feed_forward, MoE)
        pairs = tokens_S.shape[0] * self.args.moe.num_experts_per_tok
        return not block.feed_forward.experts.synchronises(self.norm.weight, pairs)

    def new_cache(self, slots: int, max_seq_len: int, *, routes: bool = False) -> KVCache:
        """An empty cache of this rank's key/value heads.

        Args:
            routes: it is to remember which experts took each token.

        Raises:
            ValueError: a sequence could be longer than the model's positions reach.
        """
        if max_seq_len > self.args.max_seq_len:
            raise ValueError(f"a cache for {max_seq_len} tokens: the model's max_seq_len is {self.args.max_seq_len}")
        return new_cache(self.args, self.state, slots, max_seq_len, dtype=self.dtype, routes=routes)

    def _run(
        self,
        tokens_T: Tensor,
        pattern: Pattern,
        *,
        active_T: Tensor | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """The residual stream behind the last block, and the routing of every layer that has experts."""
        if not tokens_T.is_cuda:
            adapt_waiting()
        rotation = self.rotary(pattern.positions_T)
        x_TD = self.tok_embeddings(tokens_T)
        routings = []
        for block in self.layers:
            x_TD, routing = block(x_TD, rotation, pattern, active_T)
            if routing is not None:
                routings.append(routing)
        return x_TD, routings
