"""What a block of a model keeps and needs besides in training, found by running it on tensors without memory.

The very modules of the model run, forward and backward, on the meta device, and every tensor that an operation makes is
followed from its birth to its end. So no formula restates what a layer keeps: a layer that keeps more is seen to.

Numbers that a pass asks for (which experts, how many rows) are real, small and as even as can be.

Shape letters: T tokens of a micro-batch, D model width.
"""

import contextlib
import dataclasses
import functools
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._distributed_c10d import _register_process_group
from torch.distributed.distributed_c10d import GroupName
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from accessory import kernels
from accessory.config import ModelArgs
from accessory.model.attention import CausalRows, Prefill
from accessory.model.cache import new_cache
from accessory.model.cross_entropy import cross_entropy
from accessory.model.factory import build_transformer
from accessory.model.transformer import Transformer
from accessory.parallel.plan import Placement, parts_of_layer, split_of
from accessory.parallel.state import ParallelState, Ranks
from accessory.train.options import RecomputePolicy
from accessory.train.recompute import recompute_activations

_META = torch.device("meta")


class Traced(NamedTuple):
    """Bytes of one part of a model in a micro-batch's passes.

    Attributes:
        kept: from the forward to the backward pass.
        forward, backward: the most that there is at once during the pass, over what is there as it begins; of the
            backward pass with the gradients of its parameters.
    """

    kept: int
    forward: int
    backward: int


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What is traced: a rank's part of a model and its micro-batch.

    Of the data-parallel ranks a layer meets those alone over which its experts are spread.

    Attributes:
        mp_size, ep_size: ranks along the axes of the mesh.
        dtype: of products and activations.
        weight_dtype: in which FSDP, or the rank itself, hands trained weights to the layers.
        expert_dtype: the same of experts.
        rows, length: of the micro-batch.
        gpu: on a GPU some steps are taken at once that go piece by piece on a CPU.
    """

    args: ModelArgs
    mp_size: int
    ep_size: int
    placement: Placement
    policy: RecomputePolicy
    dtype: torch.dtype
    weight_dtype: torch.dtype
    expert_dtype: torch.dtype
    rows: int
    length: int
    gpu: bool


@functools.lru_cache(maxsize=256)
def trace_layers(run: Pass) -> tuple[Traced, ...]:
    """Every layer's bytes."""
    args = run.args
    kinds = [(parts_of_layer(args, layer), args.window_of(layer)) for layer in range(args.n_layers)]
    firsts = {kind: kinds.index(kind) for kind in kinds}
    few = _with_layers(args, max(firsts.values()) + 1)
    model = build_transformer(
        few,
        planned_state(run.mp_size, run.ep_size),
        expert_placement=run.placement,
        dtype=run.dtype,
        trained_dtype=run.weight_dtype,
        device=_META,
    )
    for name, own in list(model.named_parameters()):
        if own.requires_grad and own.dtype != run.expert_dtype and split_of(name).per_expert:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, nn.Parameter(own.detach().to(run.expert_dtype)))
    recompute_activations(model, run.policy)
    with _attention_of_device(), kernels.meta_as_gpu(run.gpu):
        found = {kind: _trace_layer(model, layer, run) for kind, layer in firsts.items()}
    return tuple(found[kind] for kind in kinds)


@functools.lru_cache(maxsize=16)
def trace_head(args: ModelArgs, *, dtype: torch.dtype, weight_dtype: torch.dtype, tokens: int, gpu: bool) -> Traced:
    """The bytes of what stands behind the last layer: norm, output head and cross-entropy.

    The output head is traced as one rank has it whole; ranks of mp gather its logits.

    Args:
        dtype, weight_dtype, gpu: as `Pass` has them.
        tokens: of the micro-batch.
    """
    few = _with_layers(args, 1)
    model = build_transformer(few, planned_state(1, 1), dtype=dtype, trained_dtype=weight_dtype, device=_META)
    targets_T = torch.ones(tokens, dtype=torch.int64)

    def forward(x_TD: Tensor) -> list[Tensor]:
        logits_TV = model.output(model.norm(x_TD))
        return [cross_entropy(logits_TV, targets_T)]

    with kernels.meta_as_gpu(gpu):
        return _trace(model, forward, torch.empty(tokens, args.dim, dtype=dtype, device=_META))


@functools.lru_cache(maxsize=64)
def trace_prefill(
    args: ModelArgs, *, mp_size: int, placement: Placement, dtype: torch.dtype, rows: tuple[int, ...], gpu: bool
) -> int:
    """The most bytes that there are at once while new prompts are read, beside weights and cache.

    The output head is traced as one rank has it whole.

    Args:
        rows: tokens of each prompt.
    """
    kinds = [(parts_of_layer(args, layer), args.window_of(layer)) for layer in range(args.n_layers)]
    firsts = sorted({kinds.index(kind) for kind in kinds})
    few = _with_layers(args, firsts[-1] + 1)
    parts = [
        build_transformer(few, planned_state(size, 1), expert_placement=placement, dtype=dtype, device=_META)
        for size in dict.fromkeys((mp_size, 1))
    ]
    model, whole = parts[0], parts[-1]
    cache = new_cache(few, model.state, len(rows), max(rows), dtype=dtype, routes=False)
    held = [*cache.tensors, *(own for part in parts for own in (*part.parameters(), *part.buffers()))]
    with torch.no_grad(), _Live(held) as live, _attention_of_device(), kernels.meta_as_gpu(gpu):
        pattern = Prefill(cache, rows, range(len(rows)))
        rotation = _rotation(args, sum(rows))
        x_TD = torch.empty(sum(rows), args.dim, dtype=dtype, device=_META)
        for layer in firsts:  # none leaves anything that counts to the next
            model.layers[layer](x_TD, rotation, pattern)
        whole.output(whole.norm(x_TD[: len(rows)]))
    return live.peak


@functools.lru_cache(maxsize=256)
def trace_call(function: Callable[..., Tensor], shape: tuple[int, ...], *arguments: Any) -> int:
    """The most bytes that there are at once in a function of a float32 tensor of this shape, its result included."""
    given = torch.empty(shape, device=_META)
    with torch.no_grad(), _Live([given]) as live:
        function(given, *arguments)
    return live.peak


def _rotation(args: ModelArgs, tokens: int) -> tuple[Tensor, Tensor]:
    """What a rotary table gives for so many tokens."""
    cos, sin = (torch.empty(tokens, 1, args.head_dim, device=_META) for _ in range(2))
    return cos, sin


def _with_layers(args: ModelArgs, count: int) -> ModelArgs:
    """The same model cut behind so many layers, and with a rotary table of one position, which would be real."""
    dense = args.dense
    if dense is not None:
        own = tuple(layer for layer in dense.layers if layer < count)
        dense = dataclasses.replace(dense, layers=own) if own else None
    attention = args.attention
    if attention.windowed:
        kept = tuple(layer for layer in attention.windowed if layer < count)
        attention = dataclasses.replace(attention, windowed=kept, window=attention.window if kept else None)
    return args.replace(n_layers=count, dense=dense, attention=attention, max_seq_len=1)


def _trace_layer(model: Transformer, layer: int, run: Pass) -> Traced:
    tokens, width = run.rows * run.length, run.args.dim
    rotation = _rotation(run.args, tokens)
    pattern = CausalRows(run.rows, run.length, torch.device("cpu"))

    def forward(x_TD: Tensor) -> list[Tensor]:
        y_TD, routing = model.layers[layer](x_TD, rotation, pattern)
        return [y_TD] if routing is None else [y_TD, *routing.stats(None)]

    return _trace(model, forward, torch.empty(tokens, width, dtype=run.dtype, device=_META))


def _trace(model: nn.Module, forward: Callable[[Tensor], list[Tensor]], x_TD: Tensor) -> Traced:
    live = _Live(model.parameters())
    with torch.enable_grad(), live, _young_garbage():
        held = [x_TD.requires_grad_().clone()]
        begin = live.now
        outputs = forward(held.pop())
        gc.collect()
        kept, most = live.now - begin, live.peak - begin
        outputs = [output for output in outputs if output.requires_grad]
        gradients = [torch.empty_like(output) for output in outputs]
        begin = live.peak = live.now
        torch.autograd.backward(outputs, gradients)
        return Traced(kept, most, live.peak - begin)


@contextlib.contextmanager
def _young_garbage() -> Iterator[None]:
    """Collections of garbage look at what is made from here on alone: going through all that is there takes long."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Live(TorchDispatchMode):
    """Follows the bytes of all storages that operations make.

    Args:
        there: tensors that are not counted.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _without_memory(func, args, kwargs or {})
        for tensor in _tensors([out]):
            self._follow(tensor)
        self.peak = max(self.peak, self.now)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._ended, storage._cdata, storage.nbytes())

    def _ended(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


_CHOICES = (torch.ops.aten.topk.default, torch.ops.aten.topk.values)


def _without_memory(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation's result: real where all that goes in is, and of integers that are made of none; else on meta."""
    if func is torch.ops._c10d_functional.all_to_all_single.default:
        rows, arrive = args[:2]
        return rows.new_empty(sum(arrive), *rows.shape[1:])
    if func is torch.ops._c10d_functional.wait_tensor.default:
        return args[0]
    if func is torch.ops.aten._grouped_mm.default:  # on meta PyTorch has it for bfloat16 alone
        a, b, offsets = args[:3]
        return a.new_empty(*((len(offsets), len(a)) if b.ndim == 2 else (len(a),)), b.shape[-1])
    if func is torch.ops.accessory.exchange_counts.default:  # of even ranks each gets what it gives
        return args[0].clone()
    inputs = [*_tensors(args), *_tensors(kwargs.values())]
    if not inputs:
        dtype = kwargs.get("dtype")
        whole = dtype is not None and not dtype.is_floating_point
        whole |= dtype is None and func.namespace == "aten" and func._schema.name == "aten::arange"
        return func(*args, **({**kwargs, "device": "cpu"} if whole and "device" in kwargs else kwargs))
    if any(tensor.is_meta for tensor in inputs):
        if not all(tensor.is_meta for tensor in inputs):
            args, kwargs = tree_map(
                lambda value: value.to(_META) if isinstance(value, Tensor) else value, (args, kwargs)
            )
        out = func(*args, **kwargs)
        if func in _CHOICES:
            values, chosen = out
            places = torch.arange(chosen.numel()) % args[0].shape[-1]
            return values, places.view(chosen.shape)
        return out
    return func(*args, **kwargs)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among an operation's inputs or outputs, and in its lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


@contextlib.contextmanager
def _attention_of_device() -> Iterator[None]:
    """Attention by the kernel that a device has for it; for meta PyTorch would take one that makes all products."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, **_: Any) -> Tensor:
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)[0]
        return out

    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


def planned_state(mp_size: int, ep_size: int) -> ParallelState:
    """The first rank of so many, with no more data-parallel ones than experts are spread over.

    Nothing is sent; of groups only the exchange's is there, to be asked for its size.
    """
    return ParallelState(
        mp=Ranks(None, 0, mp_size),
        dp=Ranks(None, 0, ep_size),
        ep=Ranks(_stand_in(ep_size) if ep_size > 1 else None, 0, ep_size),
        device=_META,
    )


class _Group(dist.ProcessGroup):
    """One that is asked for its name and its size alone."""

    @property
    def group_name(self) -> str:  # type: ignore[override]
        return f"planned {self.size()}"


@functools.cache
def _stand_in(size: int) -> dist.ProcessGroup:
    group = _Group(0, size)  # type: ignore[call-arg]
    _register_process_group(GroupName(group.group_name), group)
    return group
