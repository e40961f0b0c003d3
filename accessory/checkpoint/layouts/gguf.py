"""GGUF files of a Mixtral, llama.cpp's form: one file or a split set, which say the model's sizes themselves.

The names are llama.cpp's, of its architecture "llama". Its converter has put the rows of q and k back into the order
of the releases, rotary pairs neighbouring, since its rotary embedding turns neighbours as ours does. Experts are one
tensor for each of the three matrices; early files (before April 2024) have one for each expert.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accessory.checkpoint.blocks import CODINGS, BlockType, Coding
from accessory.checkpoint.layouts.accessory import EXPERTS, MATRICES
from accessory.checkpoint.layouts.layout import Found, Keys, Layout, numbered
from accessory.checkpoint.layouts.rows import ALL, EACH, Row, Source, for_all
from accessory.config import ModelArgs
from accessory.errors import CheckpointError, shown
from accessory.gguf_header import SPLIT_NAME, SUFFIX, Header, are_one, read_header
from accessory.parallel.plan import split_of

_LAYER = re.compile(r"blk\.(\d{1,9})\..+")
ARCHITECTURE = "llama"
_OF_MODEL = f"{ARCHITECTURE}."

# Their modules by ours, outside of all layers and in a layer.
_MODULES = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
_LAYER_MODULES = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.gate": "ffn_gate_inp",
}
_EXPERTS = {"w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}
_OUTPUT = f"{_MODULES['output']}.weight"
# Divisors of rotary frequencies, which other architectures' scaling makes.
_FREQUENCIES = "rope_freqs.weight"
_GATE = "feed_forward.gate"


def _rows() -> Iterator[Row]:
    for ours, theirs in _MODULES.items():
        yield Row(f"{ours}.weight", f"{theirs}.weight")
    for ours, theirs in _LAYER_MODULES.items():
        yield Row(f"layers.N.{ours}.weight", f"blk.{{N}}.{theirs}.weight")
    for matrix, singles in MATRICES.items():
        for single, place in singles:
            name = f"blk.{{N}}.{_EXPERTS[single]}"
            yield Row(f"{EXPERTS}{matrix}", f"{name}_exps.weight", (ALL, *place))
            yield Row(f"{EXPERTS}{matrix}", f"{name}.{{E}}.weight", (EACH, *place), written=False)


def find_gguf(folder: Path, names: Sequence[str]) -> Found | None:
    """A file of any name, or a set that was split."""
    own = [name for name in names if name.endswith(SUFFIX)]
    if not own:
        return None
    splits = [match for name in own if (match := SPLIT_NAME.fullmatch(name))]
    files, unusable = tuple((name,) for name in own), None
    if splits and are_one(own):
        stem = splits[0]["stem"].replace("{", "{{").replace("}", "}}")
        try:
            files = numbered(folder, splits, stem + "-{:05d}-of-{:05d}.gguf", first=1)
        except CheckpointError as error:
            unusable = str(error)
    elif len(own) > 1:
        listed = ", ".join(own[:5]) + (", ..." if own[5:] else "")
        unusable = f"{folder} holds several GGUF files ({listed}): give the path of one of them"
    return Found(
        form="GGUF", files=files, layout=partial(_layout, folder, files), config=files[0][0], unusable=unusable
    )


def _layout(folder: Path, files: Sequence[tuple[str, ...]], keys: Keys, args: ModelArgs, probe: int) -> Layout:
    del args, probe
    for file, (name,) in enumerate(files if len(files) > 1 else ()):
        said = read_header(folder / name).values
        if (said.get("split.no"), said.get("split.count")) != (file, len(files)):
            raise CheckpointError(
                f"{folder / name} says that it is file {said.get('split.no')} (the first is 0) of "
                f"{said.get('split.count')}: copy the files of one set"
            )
    held = {key for file in range(len(files)) for key in keys(file)}
    if _FREQUENCIES in held:
        raise CheckpointError(
            f"{folder} holds {_FREQUENCIES}, a scaling of the rotary embedding that is not known here: of those that "
            "scale positions only linear is"
        )
    return GGUF if _OUTPUT in held else GGUF_TIED


# Their settings by ours, without the architecture before them.
_SIZES = {
    "dim": "embedding_length",
    "hidden_dim": "feed_forward_length",
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "vocab_size": "vocab_size",
    "max_seq_len": "context_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
}
_OF_EXPERTS = {"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_NEEDED = ("dim", "hidden_dim", "n_layers", "n_heads", "norm_eps")
_ROTATED = "rope.dimension_count"
_SCALING, _FACTOR = "rope.scaling.type", "rope.scaling.factor"
# What would change the computation, and the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "router_logit_softcapping": (0.0,),
    "attention.temperature_scale": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "expert_weights_scale": (0.0, 1.0),
    "expert_gating_func": (1,),
    "expert_shared_count": (0,),
    "expert_group_count": (0, 1),
    "leading_dense_block_count": (0,),
    "interleave_moe_layer_step": (0, 1),
    "moe_every_n_layers": (0, 1),
    "use_parallel_residual": (False,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scale_linear": (1.0,),
}


def sizes(header: Header) -> dict[str, Any]:
    """The settings of ModelArgs that a GGUF file says.

    Raises:
        ValueError: it is no Mixtral, or has a setting that this computation cannot follow, or that its tensors belie.
    """
    values = header.values
    kind = values.get("general.architecture")
    if kind != ARCHITECTURE:
        if kind is None and "split.no" in values:
            raise ValueError("it is not the first file of its set, which says the sizes: give that")
        raise ValueError(f"general.architecture is {shown(kind)}, and only {ARCHITECTURE} with experts is read")
    said = {key.removeprefix(_OF_MODEL): value for key, value in values.items() if key.startswith(_OF_MODEL)}
    if not said.get(_OF_EXPERTS["num_experts"]):
        raise ValueError(f"{_OF_MODEL}{_OF_EXPERTS['num_experts']} is absent or 0: the model has no experts")
    for name, neutral in _NEUTRAL.items():
        if name in said and said[name] not in neutral:
            raise ValueError(f"{_OF_MODEL}{name} is {shown(said[name])}, and the model here has {neutral[0]} alone")
    lacking = [theirs for ours, theirs in (_SIZES | _OF_EXPERTS).items() if theirs not in said and ours in _NEEDED]
    lacking += [theirs for theirs in _OF_EXPERTS.values() if theirs not in said]
    if lacking:
        raise ValueError(f"{_OF_MODEL}{lacking[0]} is missing: copy the file again")
    found = {ours: _one(said[theirs]) for ours, theirs in _SIZES.items() if theirs in said}
    found["moe"] = {ours: said[theirs] for ours, theirs in _OF_EXPERTS.items()}
    found.setdefault("rope_theta", 1e4)  # llama.cpp's own, where a file says none
    _check_counts(header, found)
    _check_heads(said, found)
    if not found.get("sliding_window", 1):
        del found["sliding_window"]
    if _SCALING in said or _FACTOR in said:
        if (scaling := said.get(_SCALING, "linear")) not in ("none", "linear"):
            raise ValueError(f"{_OF_MODEL}{_SCALING} is {shown(scaling)}: only linear is known here")
        factor = said.get(_FACTOR, 1.0)
        if not isinstance(factor, float) or not 0 < factor < float("inf"):
            raise ValueError(f"{_OF_MODEL}{_FACTOR} must be a number above 0, not {shown(factor)}")
        if scaling == "linear" and factor != 1:
            found["rope_scaling"] = 1 / factor
    return found


def _one(value: Any) -> Any:
    """A value that may be given for each layer, where all have the same."""
    if isinstance(value, np.ndarray):
        several = sorted(set(value.tolist()))
        if len(several) != 1:
            raise ValueError(f"layers have unlike sizes ({shown(several)}), and here all are alike")
        return several[0]
    return value


# llama.cpp's own bounds; of a damaged file's counts we would make as many sources.
_MOST = 512


def _check_counts(header: Header, found: Mapping[str, Any]) -> None:
    layers, experts = found["n_layers"], found["moe"]["num_experts"]
    for name, count in (("block_count", layers), ("expert_count", experts)):
        if type(count) is not int or not 0 < count <= _MOST:
            raise ValueError(f"{_OF_MODEL}{name} is {shown(count)}, and must be 1 to {_MOST}: copy the file again")
    held = {int(match[1]) for own in header.tensors if (match := _LAYER.fullmatch(own.name))}
    if "split.count" not in header.values and held != set(range(layers)):
        raise ValueError(f"{_OF_MODEL}block_count is {layers}, and there are tensors of {len(held)} layers")
    routers = {own.shape[0] for own in header.tensors if own.name.endswith(f"{_LAYER_MODULES[_GATE]}.weight")}
    if routers - {experts}:
        raise ValueError(f"{_OF_MODEL}expert_count is {experts}, and routers are for {sorted(routers)[0]}")


def _check_heads(said: Mapping[str, Any], found: dict[str, Any]) -> None:
    rotated = said.get(_ROTATED)
    if rotated is not None and found.setdefault("head_dim", rotated) != rotated:
        raise ValueError(f"{_OF_MODEL}{_ROTATED} is {rotated}, and heads of {found['head_dim']} are turned whole here")
    width = said.get("attention.value_length")
    if width is not None and found.setdefault("head_dim", width) != width:
        raise ValueError(f"{_OF_MODEL}attention.value_length is {width}, and keys have {found['head_dim']}")


# -- what is written

# By the name of --type; the numbers are those of llama.cpp's file types.
TYPES: dict[str, tuple[Coding, int]] = {
    "F32": (torch.float32, 0),
    "F16": (torch.float16, 1),
    "BF16": (torch.bfloat16, 32),
    "Q8_0": (next(own for own in CODINGS.values() if str(own) == "Q8_0"), 7),
    "Q4_0": (next(own for own in CODINGS.values() if str(own) == "Q4_0"), 2),
}


def coded(source: Source, wanted: Coding) -> Coding:
    """How a tensor is coded in a file of some type, by the rules of llama.cpp's converter.

    Vectors and routers are F32, and rows that blocks do not divide F16. Of dtypes that GGUF has no type for, those of
    8 bits become BF16, and float64 F32.
    """
    if len(source.shape) == 1 or split_of(source.parameter).kind == "router":
        return torch.float32
    if isinstance(wanted, BlockType):
        return torch.float16 if source.shape[-1] % wanted.size else wanted
    if wanted in CODINGS.values():
        return wanted
    return torch.bfloat16 if wanted.itemsize == 1 else torch.float32


def metadata(args: ModelArgs, most: Coding, name: str) -> dict[str, Any]:
    """What a file says of a model of these sizes."""
    file_type = next((number for coding, number in TYPES.values() if coding == most), 0)
    found: dict[str, Any] = {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        "general.name": name,
        "general.file_type": file_type,
        "general.quantization_version": 2,
    }
    own = {theirs: getattr(args, ours) for ours, theirs in _SIZES.items()}
    own |= {theirs: getattr(args.moe, ours) for ours, theirs in _OF_EXPERTS.items()}
    own |= {_ROTATED: args.head_dim, "attention.value_length": args.head_dim}
    own |= {theirs: float(own[theirs]) for theirs in (_SIZES["norm_eps"], _SIZES["rope_theta"])}
    if args.rope_scaling is not None:
        own |= {_SCALING: "linear", _FACTOR: 1 / args.rope_scaling}
    return found | {f"{_OF_MODEL}{key}": value for key, value in own.items() if value is not None}


GGUF = Layout(
    name="gguf",
    shown="llama.cpp's",
    rows=for_all(_rows()),
    cut=None,
    file_name=lambda file, files, ending: "model.gguf",
    one_file=True,
    coded=coded,
    metadata=metadata,
    config=None,
    plain=True,
    of_mixtral=True,
)
# The output head is the embedding's matrix.
_TIED = Row("output.weight", f"{_MODULES['tok_embeddings']}.weight")
GGUF_TIED = dataclasses.replace(
    GGUF,
    shown="llama.cpp's, tied",
    rows=lambda args: {**GGUF.rows(args), "output.weight": (_TIED,)},
)
