"""What `accessory inspect` says of a checkpoint folder."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from accessory.checkpoint.blocks import Blocks
from accessory.checkpoint.companions import CONFIG_FILES
from accessory.checkpoint.folder import Folder, Weights
from accessory.checkpoint.layouts import Source, find_weights, load_args
from accessory.checkpoint.write import AT_ONCE
from accessory.config import QUANT_FORMS, ModelArgs, QuantArgs
from accessory.config.quant import GROUP_SIZES
from accessory.errors import CheckpointError, shown_bytes
from accessory.parallel.box import Box
from accessory.parallel.placement import resolve_placement
from accessory.parallel.plan import dtype_of, is_adapter, parameter_shapes, rank_bytes, share_of_tokens, split_of
from accessory.quant import TENSOR_DTYPES

RANK_COUNTS = (1, 2, 4, 8)
_PLAIN = torch.bfloat16  # weights of which a config alone tells

# A parameter's name and a part of it.
Part = tuple[str, Box]


def describe(
    folder: str | Path, *, check_values: bool = False, llama_config: Sequence[str | Path] | None = None
) -> Iterator[str]:
    """Lines about a folder: form, shards, sizes, bytes for each rank, and files that are missing or odd.

    A config file may be given alone; then they are about the model that it describes.

    Every shard's tensors are held against the config; with ``check_values`` they are read and searched for NaN and
    infinity, and copies of one tensor in several shards are compared.

    Raises:
        CheckpointError, FileNotFoundError, ValueError: as loading the folder would.
    """
    if Path(folder).is_file() and Path(folder).suffix == ".json":
        yield from _describe_config(Path(folder))
        return
    opened = _opened(Path(folder))
    if opened.is_adapter_of_any:
        yield from _describe_adapter(opened)
        return
    args = opened.stored_args(llama_config)
    weights = opened.weights(args, partial=True)
    adapter_alone = weights.is_adapter
    if not adapter_alone:
        weights = opened.weights(args)
    dtypes: set[torch.dtype] = set()
    codings: set[str] = set()
    itemsizes: dict[str, int] = {}
    first_copies: dict[Part, tuple[Path, Tensor]] = {}
    for file, path in enumerate(opened.files):
        tensors = weights.tensors(file)
        plain = {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[2] not in TENSOR_DTYPES}
        dtypes |= {tensor.dtype for tensor in plain.values()}
        codings |= {str(tensor.coding if isinstance(tensor, Blocks) else tensor.dtype) for tensor in plain.values()}
        for source in weights.expected(file):
            if source.key in tensors:
                own = tensors[source.key].dtype.itemsize
                itemsizes[source.parameter] = max(own, itemsizes.get(source.parameter, 0))
        if check_values:
            _check_finite(path, tensors)
            if weights.layout.cut is not None:  # others hold each tensor once
                _check_copies(path, tensors, weights.expected(file), first_copies)
    layout = _layout(weights)
    size = sum(path.stat().st_size for path in opened.paths)
    yield f"folder      {opened.place}"
    form = layout if layout.startswith(opened.form) else f"{opened.form}, {layout}"
    yield f"format      {form}{'' if opened.llama_type is None else f', llama_type {opened.llama_type}'}"
    yield f"shards      {len(opened.files)}, {shown_bytes(size)} in all"
    together = ", base and adapter together" if adapter_alone else ""
    if adapter_alone:
        count = sum(math.prod(shape) for name, shape in parameter_shapes(args) if name in weights.held)
        yield f"holds       {count:,} parameters, an adapter alone: it loads behind the folder of its base"
    yield from _sizes(args, together)
    if args.quant is not None:
        groups = f", groups of {args.quant.group_size}" if args.quant.type in GROUP_SIZES else ""
        yield f"quantized   {args.quant.type}{groups}: matrices of {args.quant.matrices}"
    yield from _adapters(args)
    yield f"dtype       {', '.join(sorted(coding.removeprefix('torch.') for coding in codings))}"
    # An adapter's folder does not say which its base has.
    default = max(dtype.itemsize for dtype in dtypes)
    itemsizes = {name: itemsizes.get(name, default) for name, _ in parameter_shapes(args)}
    for ranks in RANK_COUNTS if args.vocab_size != -1 else ():
        yield f"at mp {ranks}     {_per_rank(args, ranks, itemsizes)}{together}"
    if check_values:
        yield "values      all finite"
    yield from _remarks(opened)


def _opened(path: Path) -> Folder:
    """The folder; CheckpointError of one that holds a config alone says how to ask for its sizes."""
    try:
        return Folder(path)
    except CheckpointError as error:
        names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        config = next((path / name for name in CONFIG_FILES if name in names), None)
        if config is None or find_weights(path, names):
            raise
        raise CheckpointError(f"{error}; accessory inspect {config} says its sizes") from None


def _describe_adapter(folder: Folder) -> Iterator[str]:
    """Of an adapter for whatever base: the sizes are that one's."""
    tensors = folder.tensors(0)
    count = sum(tensor.numel() for tensor in tensors.values())
    yield f"folder      {folder.path}"
    yield f"format      {folder.form}: an adapter alone, which loads behind the folder of its base"
    yield f"adapters    {count:,} parameters in {len(tensors)} tensors"
    yield f"dtype       {', '.join(sorted({str(tensor.dtype).removeprefix('torch.') for tensor in tensors.values()}))}"


def _describe_config(path: Path) -> Iterator[str]:
    """Of a model whose weights are not there."""
    try:
        args = load_args([path])
    except ValueError as error:
        if path.name in CONFIG_FILES:
            raise
        raise ValueError(f"{error} (inspect takes a checkpoint's folder, or its {' or '.join(CONFIG_FILES)})") from None
    yield f"config      {path}"
    yield from _sizes(args)
    for ranks in RANK_COUNTS if args.vocab_size != -1 else ():
        sizes = [f"bf16 {_per_rank(args, ranks, _itemsizes(args), placed=False)}"]
        for form in QUANT_FORMS if args.quant is None else ():
            quantized = args.replace(quant=QuantArgs(type=form))
            sizes.append(f"{form} {_per_rank(quantized, ranks, _itemsizes(quantized), placed=False)}")
        yield f"at mp {ranks}     each rank {', '.join(sizes)}"


def _itemsizes(args: ModelArgs) -> dict[str, int]:
    """Of a model whose weights are plain where they are not quantized."""
    return {name: dtype_of(name, _PLAIN).itemsize for name, _ in parameter_shapes(args)}


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            continue
        whole = Box.whole(tuple(tensor.shape))
        bad = 0
        for part in whole.pieces(AT_ONCE):
            values = tensor[part.within(whole)]
            # PyTorch looks for NaN in some 8-bit floats only.
            values = values.to(torch.bfloat16) if values.dtype.itemsize == 1 else values
            bad += part.numel - int(torch.isfinite(values).sum())
        if bad:
            raise CheckpointError(
                f"{path}: {key} holds {bad} values that are NaN or infinite: copy it again, or take the weights "
                "of an earlier step of its training"
            )


def _check_copies(
    path: Path, tensors: Mapping[str, Tensor], contents: Iterable[Source], first: dict[Part, tuple[Path, Tensor]]
) -> None:
    """See that what lies whole in several files is the same in all: it betrays a file of another run.

    Args:
        first: the first copy of each part that was met, and its file; grows.
    """
    for source in contents:
        if source.key not in tensors:
            continue
        tensor = tensors[source.key][:]
        other, copy = first.setdefault((source.parameter, source.box), (path, tensor))
        if other != path and not torch.equal(tensor.double(), copy.double()):
            raise CheckpointError(
                f"{path}: {source.key} differs from its copy in {other.name}: the two files are of different runs; "
                "copy the shards of one"
            )


def _layout(weights: Weights) -> str:
    return weights.layout.shown if any(split_of(name).per_expert for name in weights.held) else "no experts"


def _sizes(args: ModelArgs, of: str = "") -> Iterator[str]:
    total = active = 0
    for name, shape in parameter_shapes(args.replace(quant=None)):
        count = math.prod(shape)
        total += count
        active += round(count * share_of_tokens(split_of(name), args))
    yield (f"family      {args.family}")
    yield (
        f"model       {args.n_layers} layers, dim {args.dim}, {args.n_heads} heads ({args.n_kv_heads} key/value) of "
        f"{args.head_dim}, vocabulary {args.vocab_size if args.vocab_size != -1 else 'left to the tokenizer'}"
    )
    layers = "layer" if args.dense is None else f"of {len(args.moe_layers)} layers"
    yield (
        f"experts     {args.moe.num_experts} in each {layers}, {args.moe.num_experts_per_tok} for each token, "
        f"hidden {args.hidden_dim}"
        f"{f'; and one for every token, hidden {args.moe.shared_hidden_dim}' if args.moe.shared_hidden_dim else ''}"
    )
    if args.dense is not None:
        yield f"dense       {len(args.dense.layers)} of {args.n_layers} layers, hidden {args.dense.hidden_dim}"
    beside = " beside embedding and output head" if args.vocab_size == -1 else ""
    yield f"parameters  {total:,}{beside}, of which {active:,} active for each token{of}"


def _adapters(args: ModelArgs) -> Iterator[str]:
    if args.peft is None:
        return
    count = sum(math.prod(shape) for name, shape in parameter_shapes(args) if is_adapter(name))
    settings = ", ".join(f"{name} {value}" for name, value in args.peft.to_dict().items())
    yield f"adapters    {count:,} parameters: {settings}"


def _per_rank(args: ModelArgs, ranks: int, itemsizes: Mapping[str, int], *, placed: bool = True) -> str:
    try:
        placement = resolve_placement(args, "auto", ranks)
    except ValueError:
        return "not possible (sizes do not divide)"
    size = rank_bytes(args, placement, ranks, itemsizes.__getitem__)
    if not placed:
        return shown_bytes(size)
    return f'{shown_bytes(size)} for each rank (expert_placement "{placement}")'


def _remarks(folder: Folder) -> Iterator[str]:
    if not folder.has_tokenizer:
        yield "missing     tokenizer.model: loading needs it here or as tokenizer_path"
    if folder.form == "converted" and folder.llama_type is None:
        yield 'missing     meta.json: taken as {"llama_type": "mistral"}'
    if folder.odd:
        yield f"odd         {', '.join(folder.odd)}: no part of a checkpoint"
