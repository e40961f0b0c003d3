"""The table: which parameters a model has, what each is, and how it is split over the ranks of its mesh.

The loader, the converter, checkpoint saving, initial weights, the optimizer, counting and the layers ask here; none has
a rule of its own, and none reads a parameter's name. Names
are those of the Transformer's ``named_parameters()``. The experts of a layer are stacked, so that both
placements are the same parameter with another split axis (see docs/architecture.md). The meshes are drawn in
`ParallelState`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from accessory.config import QUANT_FORMS, ModelArgs, QuantArgs
from accessory.parallel.box import Box
from accessory.parallel.state import ParallelState
from accessory.quant import ROW_TENSORS, TENSOR_DTYPES, format_of

Placement = Literal["expert", "tensor"]
PLACEMENTS: tuple[str, ...] = ("auto", "expert", "tensor")

# What a parameter is. "dense" are matrices of a feed-forward part without experts, "shared" those of the expert that
# all tokens visit; a "sink" is a logit that takes its share of attention; "correction" is a bias on the router's
# scores, which no gradient reaches; "lora" is either factor of a low-rank update.
Kind = Literal[
    "embedding",
    "attention",
    "router",
    "correction",
    "expert",
    "dense",
    "shared",
    "norm",
    "bias",
    "sink",
    "lora",
    "head",
]
# What some layers have and others lack.
Part = Literal[
    "qk_norm", "qkv_bias", "o_bias", "sinks", "experts", "router_bias", "correction", "expert_bias", "shared", "dense"
]


MeshAxis = Literal["dp", "efsdp", "ep", "mp"]
# Of either mesh; the first axis cuts nothing here: what lies along it is FSDP's (`train.sharding`).
DENSE_MESH: tuple[MeshAxis, ...] = ("dp", "mp")
EXPERT_MESH: tuple[MeshAxis, ...] = ("efsdp", "ep", "mp")


class Cut(NamedTuple):
    """One axis of the mesh cuts one axis of a tensor.

    Attributes:
        mesh: the axis of the mesh.
        axis: the tensor's.
        unit: the setting of ModelArgs whose count the ranks must divide (a head is never cut in two).
    """

    mesh: MeshAxis
    axis: int
    unit: str


@dataclass(frozen=True)
class Split:
    """One row of the table.

    Attributes:
        pattern: full match for the parameter's name; ``N`` stands for a layer number.
        kind: what it is.
        cuts: for each placement of the experts what cuts it, in the order of the mesh; every rank along an axis of the
            mesh that is not among them holds the same.
        adapter: for what parameter-efficient finetuning adds, which matrices' updates it belongs to, of LORA_KINDS, or
            "bias".
        quantized: whether quantization may change it.
        to_residual: what the matrix makes is added to the residual stream.
        part: what a layer must have to have it, as `parts_of_layer` says; None: every layer has it.
    """

    pattern: str
    kind: Kind
    shape: tuple[str, ...]
    cuts: dict[str, tuple[Cut, ...]]
    adapter: str = ""
    quantized: bool = False
    to_residual: bool = False
    part: Part | None = None

    @property
    def per_expert(self) -> bool:
        """Whether each expert has a part of its own, so that a token meets only those of its experts."""
        return any(cut.mesh == "ep" for cut in self.cuts["expert"])

    @property
    def mesh(self) -> tuple[MeshAxis, ...]:
        """The axes of the mesh over which it lies."""
        return EXPERT_MESH if self.per_expert else DENSE_MESH

    def axis(self, placement: Placement, mesh: MeshAxis = "mp") -> int | None:
        """The tensor's axis that an axis of the mesh cuts; None: none."""
        return next((cut.axis for cut in self.cuts[placement] if cut.mesh == mesh), None)


def _row(pattern: str, kind: Kind, shape: str, axis: int | None, unit: str = "", **more: Any) -> Split:
    cuts = () if axis is None else (Cut("mp", axis, unit),)
    return Split(pattern, kind, tuple(shape.split()), dict.fromkeys(PLACEMENTS[1:], cuts), **more)


def _of_experts(name: str, kind: Kind, shape: str, tensor_axis: int | None, **more: Any) -> Split:
    """A stacked parameter: cut by expert, and by the model-parallel ranks so too or along its hidden dimension."""
    spread = Cut("ep", 0, "experts")
    return Split(
        f"layers.N.feed_forward.experts.{name}",
        kind,
        tuple(shape.split()),
        {
            "expert": (spread, Cut("mp", 0, "experts")),
            "tensor": (spread, *(() if tensor_axis is None else [Cut("mp", tensor_axis, "hidden")])),
        },
        **{"part": "experts", **more},
    )


def _column_adapters(prefix: str, out: str, unit: str, target: str, part: Part | None = None) -> list[Split]:
    """Of a matrix whose rows are split."""
    return [
        _row(f"{prefix}.lora_a.weight", "lora", "rank dim", None, adapter=target, part=part),
        _row(f"{prefix}.lora_b.weight", "lora", f"{out} rank", 0, unit, adapter=target, part=part),
        _row(f"{prefix}.bias", "bias", out, 0, unit, adapter="bias", part=part),
    ]


def _row_adapters(prefix: str, inputs: str, unit: str, target: str, part: Part | None = None) -> list[Split]:
    """Of a matrix whose columns are split."""
    return [
        _row(f"{prefix}.lora_a.weight", "lora", f"rank {inputs}", 1, unit, adapter=target, part=part),
        _row(f"{prefix}.lora_b.weight", "lora", "dim rank", None, adapter=target, part=part),
        _row(f"{prefix}.bias", "bias", "dim", None, adapter="bias", part=part),
    ]


def _gated_unit(module: str, kind: Literal["dense", "shared"]) -> list[Split]:
    """w1, w3 and w2 of a feed-forward part through which every token goes, cut along its hidden dimension."""
    prefix, hidden = f"layers.N.{module}", f"{kind}_hidden"
    columns = [f"{prefix}.{name}" for name in ("w1", "w3")]
    return [
        *(_row(f"{name}.weight", kind, f"{hidden} dim", 0, hidden, quantized=True, part=kind) for name in columns),
        _row(f"{prefix}.w2.weight", kind, f"dim {hidden}", 1, hidden, quantized=True, to_residual=True, part=kind),
        *(row for name in columns for row in _column_adapters(name, hidden, hidden, kind, kind)),
        *_row_adapters(f"{prefix}.w2", hidden, hidden, kind, kind),
    ]


_ATTENTION = "layers.N.attention."


TABLE: tuple[Split, ...] = (
    _row("tok_embeddings.weight", "embedding", "vocab dim", 1, "dim"),
    _row("layers.N.attention.wq.weight", "attention", "heads*head_dim dim", 0, "heads", quantized=True),
    _row("layers.N.attention.wk.weight", "attention", "kv_heads*head_dim dim", 0, "kv_heads", quantized=True),
    _row("layers.N.attention.wv.weight", "attention", "kv_heads*head_dim dim", 0, "kv_heads", quantized=True),
    _row(
        "layers.N.attention.wo.weight",
        *("attention", "dim heads*head_dim", 1, "heads"),
        quantized=True,
        to_residual=True,
    ),
    _row(f"{_ATTENTION}q_bias", "bias", "heads*head_dim", 0, "heads", part="qkv_bias"),
    _row(f"{_ATTENTION}k_bias", "bias", "kv_heads*head_dim", 0, "kv_heads", part="qkv_bias"),
    _row(f"{_ATTENTION}v_bias", "bias", "kv_heads*head_dim", 0, "kv_heads", part="qkv_bias"),
    _row(f"{_ATTENTION}o_bias", "bias", "dim", None, part="o_bias"),
    _row(f"{_ATTENTION}sinks", "sink", "heads", 0, "heads", part="sinks"),
    _row(f"{_ATTENTION}q_norm.weight", "norm", "normed_heads*head_dim", 0, "normed_heads", part="qk_norm"),
    _row(f"{_ATTENTION}k_norm.weight", "norm", "normed_kv*head_dim", 0, "normed_kv", part="qk_norm"),
    _row("layers.N.attention_norm.weight", "norm", "dim", None),
    _row("layers.N.feed_forward.gate.weight", "router", "experts dim", None, part="experts"),
    _row("layers.N.feed_forward.gate.bias", "bias", "experts", None, part="router_bias"),
    _row("layers.N.feed_forward.gate.correction_bias", "correction", "experts", None, part="correction"),
    _of_experts("w13", "expert", "experts 2 hidden dim", 2, quantized=True),
    _of_experts("w2", "expert", "experts dim hidden", 2, quantized=True, to_residual=True),
    _of_experts("b13", "bias", "experts 2 hidden", 2, part="expert_bias"),
    _of_experts("b2", "bias", "experts dim", None, part="expert_bias"),
    *_column_adapters(f"{_ATTENTION}wq", "heads*head_dim", "heads", "attention"),
    *_column_adapters(f"{_ATTENTION}wk", "kv_heads*head_dim", "kv_heads", "attention"),
    *_column_adapters(f"{_ATTENTION}wv", "kv_heads*head_dim", "kv_heads", "attention"),
    *_row_adapters(f"{_ATTENTION}wo", "heads*head_dim", "heads", "attention"),
    _of_experts("w13_lora_a", "lora", "experts 2 rank dim", None, adapter="routed"),
    _of_experts("w13_lora_b", "lora", "experts 2 hidden rank", 2, adapter="routed"),
    _of_experts("w13_bias", "bias", "experts 2 hidden", 2, adapter="bias"),
    _of_experts("w2_lora_a", "lora", "experts rank hidden", 2, adapter="routed"),
    _of_experts("w2_lora_b", "lora", "experts dim rank", None, adapter="routed"),
    _of_experts("w2_bias", "bias", "experts dim", None, adapter="bias"),
    _row("layers.N.feed_forward.gate.lora_a.weight", "lora", "rank dim", None, adapter="router", part="experts"),
    _row("layers.N.feed_forward.gate.lora_b.weight", "lora", "experts rank", None, adapter="router", part="experts"),
    *_gated_unit("feed_forward.shared", "shared"),
    *_gated_unit("feed_forward", "dense"),
    _row("layers.N.ffn_norm.weight", "norm", "dim", None),
    _row("norm.weight", "norm", "dim", None),
    _row("output.weight", "head", "vocab dim", 0, "vocab", quantized=True),
    _row("output.lora_a.weight", "lora", "rank dim", None, adapter="head"),
    _row("output.lora_b.weight", "lora", "vocab rank", 0, "vocab", adapter="head"),
)
_ROWS = {row.pattern: row for row in TABLE}


def sizes(args: ModelArgs) -> dict[str, int]:
    """The counts that the table's shapes and units name."""
    full = args.attention.qk_norm == "full"
    return {
        "dim": args.dim,
        "vocab": args.vocab_size,
        "heads": args.n_heads,
        "kv_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        # A norm of each head has the same weights for all of them.
        "normed_heads": args.n_heads if full else 1,
        "normed_kv": args.n_kv_heads if full else 1,
        "hidden": args.hidden_dim,
        "experts": args.moe.num_experts,
        "shared_hidden": args.moe.shared_hidden_dim,
        "dense_hidden": 0 if args.dense is None else args.dense.hidden_dim,
        "2": 2,
    }


def local_sizes(args: ModelArgs, size: int, placement: Placement = "expert", *, ep_size: int = 1) -> dict[str, int]:
    """The same counts of what one of ``size`` model-parallel ranks holds of the split axes.

    Where ranks outnumber key/value heads, several ranks hold the same head.

    Args:
        ep_size: ranks over which the experts are spread besides.
    """
    counts = sizes(args)
    local = {unit: counts[unit] // size for unit in ("dim", "vocab", "heads", "shared_hidden", "dense_hidden")}
    for heads in ("kv_heads", "normed_heads", "normed_kv"):
        local[heads] = max(1, counts[heads] // size)
    local["experts"] = counts["experts"] // (ep_size * (size if placement == "expert" else 1))
    local["hidden"] = counts["hidden"] // size if placement == "tensor" else counts["hidden"]
    return local


@functools.lru_cache(maxsize=2**14)
def split_of(name: str) -> Split:
    """The table's row for a parameter, or for one tensor of a quantized matrix.

    Raises:
        KeyError: no row matches; every parameter must have one.
    """
    matrix, tensor = matrix_of(name)
    row = _ROWS.get(generic_name(matrix))
    if row is None:
        raise KeyError(f"parallel/plan.py has no row for parameter {name}")
    return _without_inputs(row) if tensor in ROW_TENSORS else row


def generic_name(name: str) -> str:
    """A parameter's name with ``N`` for its layer, as the table has it."""
    return re.sub(r"\.\d+\.", ".N.", name)


def layer_of(name: str) -> int:
    """The layer of a parameter that lies in one."""
    return int(name.split(".")[1])


_TENSOR = re.compile(rf"(.+)\.((?:{'|'.join(QUANT_FORMS)})_\w+)")


def matrix_of(name: str) -> tuple[str, str]:
    """The matrix that a parameter is, or is a tensor of, and that tensor's name behind it ("" for a plain one)."""
    match = _TENSOR.fullmatch(name)
    return (match[1], match[2]) if match else (name, "")


def _without_inputs(row: Split) -> Split:
    """Of what stands for whole rows: it is not cut where their inputs are."""
    last = len(row.shape) - 1
    kept = {placement: tuple(cut for cut in cuts if cut.axis != last) for placement, cuts in row.cuts.items()}
    return dataclasses.replace(row, cuts=kept)


def is_quantized(row: Split, quant: QuantArgs) -> bool:
    """Whether such matrices are."""
    return row.quantized and quant.covers(row.kind)


def is_adapter(name: str) -> bool:
    """Whether parameter-efficient finetuning has added the parameter to the model."""
    return bool(split_of(name).adapter)


def share_of_tokens(row: Split, args: ModelArgs) -> float:
    """Which share of the tokens goes through each part of a parameter: of an expert's those that chose it."""
    return args.moe.num_experts_per_tok / args.moe.num_experts if row.per_expert else 1.0


def other_factor(name: str) -> str | None:
    """Of a factor of a low-rank update (lora_a or lora_b) the other one's name; None for any other parameter."""
    if "lora_" not in name:
        return None
    return name.replace("lora_a", "lora_b") if "lora_a" in name else name.replace("lora_b", "lora_a")


def trains(name: str, args: ModelArgs) -> bool:
    """Whether finetuning changes the parameter: all of a plain model, adapters (and norms) of one with adapters."""
    row = split_of(name)
    if args.peft is None:
        return not matrix_of(name)[1] and row.kind != "correction"
    return bool(row.adapter) or (args.peft.norm_tuning and row.kind == "norm")


def is_moved(name: str, args: ModelArgs) -> bool:
    """Whether the parameter is a training run's own though no gradient reaches it: a bias that balancing moves."""
    return args.owns_corrections and split_of(name).kind == "correction"


def changes(name: str, args: ModelArgs) -> bool:
    """Whether a training run may leave the parameter other than it was, by gradients or by balancing."""
    return trains(name, args) or is_moved(name, args)


def parts_of_layer(args: ModelArgs, layer: int) -> frozenset[Part]:
    """What a layer has of that which not every layer has."""
    has: dict[Part, bool] = {
        "qk_norm": args.attention.qk_norm != "none",
        "qkv_bias": args.attention.qkv_bias,
        "experts": (experts := layer in args.moe_layers),
        "o_bias": args.attention.o_bias,
        "sinks": args.attention.sinks,
        "router_bias": experts and args.moe.router.bias,
        "expert_bias": experts and args.moe.bias,
        "correction": experts and args.moe.router.correction,
        "shared": experts and args.moe.shared_hidden_dim > 0,
        "dense": not experts,
    }
    return frozenset(part for part, there in has.items() if there)


def rows_of_model(args: ModelArgs) -> list[Split]:
    """The rows of which some layer of a model has a parameter."""
    parts = frozenset[Part]().union(*(parts_of_layer(args, layer) for layer in range(args.n_layers)))
    return [row for row in TABLE if _asked_for(row, args) and (row.part is None or row.part in parts)]


def cut_widths(args: ModelArgs) -> list[tuple[str, int]]:
    """Settings, and their values, of the feed-forward parts that every placement cuts; the ranks must divide them."""
    widths = [("moe.shared_hidden_dim", args.moe.shared_hidden_dim)]
    widths += [] if args.dense is None else [("dense.hidden_dim", args.dense.hidden_dim)]
    return [(label, width) for label, width in widths if width]


def _asked_for(row: Split, args: ModelArgs) -> bool:
    if not row.adapter or args.peft is None:
        return not row.adapter
    if row.adapter == "bias":
        return args.peft.bias_tuning
    return args.peft.rank_of(row.adapter) > 0


def parameter_shapes(args: ModelArgs) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and whole shape of every parameter of a model, layer by layer; adapters where ``args.peft`` has them.

    A matrix that ``args.quant`` quantizes counts as the tensors that it then consists of. Where the vocabulary is not
    known (vocab_size -1), parameters that have a row for each of its tokens are left out.
    """
    asked = [row for row in TABLE if _asked_for(row, args)]
    rows = [row for row in asked if ".N." in row.pattern]
    per_layer: dict[frozenset[Part], list[tuple[str, tuple[int, ...]]]] = {}
    yield from _parameters(split_of("tok_embeddings.weight"), args)
    for layer in range(args.n_layers):
        parts = parts_of_layer(args, layer)
        if parts not in per_layer:
            own = (row for row in rows if row.part is None or row.part in parts)
            per_layer[parts] = [parameter for row in own for parameter in _parameters(row, args)]
        for name, shape in per_layer[parts]:
            yield name.replace(".N.", f".{layer}."), shape
    for row in asked:
        if ".N." not in row.pattern and row.kind != "embedding":
            yield from _parameters(row, args)


def _parameters(row: Split, args: ModelArgs) -> Iterator[tuple[str, tuple[int, ...]]]:
    if "vocab" in row.shape and args.vocab_size == -1:
        return
    counts = sizes(args) | {"rank": args.peft.rank_of(row.adapter) if args.peft else 0}
    *rest, inputs = (math.prod(counts[factor] for factor in axis.split("*")) for axis in row.shape)
    if args.quant is None or not is_quantized(row, args.quant):
        yield row.pattern, (*rest, inputs)
        return
    for tensor, stored in format_of(args.quant.type, args.quant.group_size).tensors.items():
        yield f"{row.pattern}.{args.quant.type}_{tensor}", (*rest, stored.elements(inputs))


def cut_axis(name: str, args: ModelArgs, *, placement: Placement, size: int, mesh: MeshAxis = "mp") -> int | None:
    """Along which axis the ``size`` ranks of a mesh axis hold parts of a parameter; None where each holds the whole.

    The latter also where the table names an axis, for the weights of a norm that all heads share.
    """
    cut = next((cut for cut in split_of(name).cuts[placement] if cut.mesh == mesh), None)
    return None if cut is None or size == 1 or sizes(args)[cut.unit] == 1 else cut.axis


def local_box(
    name: str,
    shape: tuple[int, ...],
    args: ModelArgs,
    *,
    placement: Placement,
    rank: int,
    size: int,
    ep_rank: int = 0,
    ep_size: int = 1,
) -> Box:
    """The part of a parameter of whole ``shape`` that model-parallel rank ``rank`` of ``size`` holds.

    Args:
        ep_rank, ep_size: its place among the ranks over which experts are spread.
    """
    places = {"ep": (ep_rank, ep_size), "mp": (rank, size)}
    start, part = [0] * len(shape), list(shape)
    units_of = {cut.axis: cut.unit for cut in split_of(name).cuts[placement]}
    for axis, unit in units_of.items():
        # Two axes of the mesh that cut the same axis of the tensor are one, the first of them the slower.
        own, ranks = 0, 1
        for cut in split_of(name).cuts[placement]:
            if cut.axis == axis:
                own, ranks = own * places[cut.mesh][1] + places[cut.mesh][0], ranks * places[cut.mesh][1]
        if ranks > 1:
            units = sizes(args)[unit]
            # Multiplied first: of packed codes there may be fewer than units. Heads that ranks outnumber are shared.
            start[axis], part[axis] = own * units // ranks * shape[axis] // units, shape[axis] // min(units, ranks)
    return Box(tuple(start), tuple(part))


def dtype_of(name: str, plain: torch.dtype) -> torch.dtype:
    """The dtype of a frozen parameter of a model whose plain weights have ``plain``.

    Tensors of quantized weights have their own, and a router adds its correction in float32, whatever the others are.
    """
    own = torch.float32 if split_of(name).kind == "correction" else plain
    return TENSOR_DTYPES.get(matrix_of(name)[1], own)


def rank_bytes(args: ModelArgs, placement: Placement, size: int, itemsize: Callable[[str], float]) -> int:
    """What the parameters of the first of ``size`` model-parallel ranks take, which holds no less than another.

    Args:
        itemsize: bytes of an element, by the parameter's name.
    """
    found = (
        local_box(name, shape, args, placement=placement, rank=0, size=size).numel * itemsize(name)
        for name, shape in parameter_shapes(args)
    )
    return int(sum(found))


def local_boxes(args: ModelArgs, state: ParallelState, *, placement: Placement) -> dict[str, Box]:
    """`local_box` of every parameter of a model on this rank, by name."""
    own = {"rank": state.mp.rank, "size": state.mp.size, "ep_rank": state.ep.rank, "ep_size": state.ep.size}
    return {name: local_box(name, shape, args, placement=placement, **own) for name, shape in parameter_shapes(args)}
