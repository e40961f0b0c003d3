"""GGUF files, llama.cpp's form: one file or a split set, which say the model's sizes themselves.

The names are llama.cpp's, and what differs between families stands in theirs. Of the architecture "llama" its converter
has put the rows of q and k back into the order of the releases, rotary pairs neighbouring, since its rotary embedding
turns neighbours as ours does; of the others they lie as in Hugging Face's folders. Experts are one tensor for each of
the three matrices; early files (before April 2024) have one for each expert.
"""

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accessory.checkpoint.blocks import CODINGS, BlockType, Coding
from accessory.checkpoint.layouts.accessory import BIASES, EXPERTS, MATRICES
from accessory.checkpoint.layouts.hf import lie_of, say_left_out
from accessory.checkpoint.layouts.layout import Found, Keys, Layout, numbered
from accessory.checkpoint.layouts.rows import ALL, EACH, PLAIN, Row, Source, by_parameter
from accessory.config import ModelArgs
from accessory.errors import CheckpointError, shown
from accessory.gguf_header import SPLIT_NAME, SUFFIX, Header, are_one, read_header, set_of
from accessory.model.LLM import FAMILIES
from accessory.model.LLM.family import Family, natural
from accessory.model.LLM.gguf import GATED, MODULES, Architecture
from accessory.parallel.plan import split_of

logger = logging.getLogger(__name__)

_LAYER = re.compile(r"blk\.(\d{1,9})\.(.+)")
_ARCHITECTURES = {family.gguf.name: family for family in FAMILIES.values() if family.gguf is not None}

# Their modules by ours, outside of all layers.
_MODULES = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
_OUTPUT = f"{_MODULES['output']}.weight"
# Divisors of rotary frequencies, which other architectures' scaling makes.
_FREQUENCIES = "rope_freqs.weight"
_GATE = "feed_forward.gate"


def _known(family: str) -> Architecture:
    """What llama.cpp makes of a family that `unsaid` lets pass, or whose file was read."""
    found = FAMILIES[family].gguf
    assert found is not None
    return found


@functools.cache
def _rows(family: str) -> Mapping[str, Sequence[Row]]:
    return by_parameter(_rows_of(_known(family)))


def _rows_of(own: Architecture) -> Iterator[Row]:
    for ours, theirs in _MODULES.items():
        yield Row(f"{ours}.weight", f"{theirs}.weight")
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in own.modules.items()} | {**own.names}
    for ours, theirs in names.items():
        lies = lie_of(ours.removesuffix(".weight")) if own.in_halves else PLAIN
        yield Row(f"layers.N.{ours}", f"blk.{{N}}.{theirs}", lies=lies)
    for matrix, singles in MATRICES.items():
        for single, place in singles:
            name = f"blk.{{N}}.{GATED[single]}"
            yield Row(f"{EXPERTS}{matrix}", f"{name}_exps.weight", (ALL, *place))
            yield Row(f"{EXPERTS}{matrix}", f"{name}.{{E}}.weight", (EACH, *place), written=False)
    for biases, singles in BIASES.items():
        for single, place in singles:
            theirs = GATED[single.replace("b", "w")]
            yield Row(f"{EXPERTS}{biases}", f"blk.{{N}}.{theirs}_exps.bias", (ALL, *place))


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
    del probe
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
            f"{folder} holds {_FREQUENCIES}, a scaling of the rotary embedding that is not known here: linear and yarn "
            "are"
        )
    if FAMILIES[args.family].gguf is None:
        raise CheckpointError(
            f"{folder} holds GGUF, in which {args.family} is not known: take the config out, or mend it"
        )
    layout = GGUF if _OUTPUT in held else GGUF_TIED
    behind = sorted({int(match[1]) for key in held if (match := _LAYER.fullmatch(key))} - {*range(args.n_layers)})
    key = f"{_known(args.family).name}.{_EXTRA}"
    if not behind or not read_header(folder / files[0][0]).values.get(key):
        return layout
    left = "|".join(map(str, behind))
    say_left_out(folder, f"blk.{left}.*", key)
    return dataclasses.replace(layout, passed_over=re.compile(rf"{layout.passed_over.pattern}|blk\.({left})\..+"))


# Their settings by ours, without the architecture before them.
_SIZES = {
    "dim": "embedding_length",
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
_WIDTH = "feed_forward_length"
_NEEDED = ("dim", "hidden_dim", "n_layers", "n_heads", "norm_eps")
_EXTRA = "nextn_predict_layers"
_ROTATED = "rope.dimension_count"
_SECTIONS = "rope.dimension_sections"
_SCALING, _FACTOR = "rope.scaling.type", "rope.scaling.factor"
_OF_YARN = {
    "original": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
# What yarn makes queries and keys longer by, beside 1 + 0.1 * log(factor).
_LONGER = ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor")
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
    _EXTRA: (0,),
    "interleave_moe_layer_step": (0, 1),
    "moe_every_n_layers": (0, 1),
    "use_parallel_residual": (False,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scale_linear": (1.0,),
}


def sizes(header: Header) -> dict[str, Any]:
    """The settings of ModelArgs that a GGUF file says.

    Raises:
        ValueError: it is of no family here, or has a setting that this computation cannot follow, or that its tensors
            belie.
    """
    values = header.values
    kind = values.get("general.architecture")
    if not isinstance(kind, str) or kind not in _ARCHITECTURES:
        if kind is None and "split.no" in values:
            raise ValueError("it is not the first file of its set, which says the sizes: give that")
        known = ", ".join(_ARCHITECTURES)
        raise ValueError(f"general.architecture is {shown(kind)}, and only {known} with experts are read")
    family = _ARCHITECTURES[kind]
    own, of_model = _known(family.name), f"{kind}."
    said = {key.removeprefix(of_model): value for key, value in values.items() if key.startswith(of_model)}
    if not said.get(_OF_EXPERTS["num_experts"]):
        raise ValueError(f"{of_model}{_OF_EXPERTS['num_experts']} is absent or 0: the model has no experts")
    for name, neutral in {**_NEUTRAL, **own.fixed}.items():
        if name not in said or name in own.settings.values():
            continue
        if isinstance(said[name], np.ndarray) or said[name] not in neutral:
            raise ValueError(f"{of_model}{name} is {shown(said[name])}, and the model here has {neutral[0]} alone")
    if np.any(said.get(_SECTIONS, 0)):
        raise ValueError(f"{of_model}{_SECTIONS} is {shown(said[_SECTIONS])}: positions of several kinds are not known")
    lacking = [theirs for ours, theirs in _sizes_of(own).items() if theirs not in said and ours in _NEEDED]
    lacking += [theirs for theirs in _OF_EXPERTS.values() if theirs not in said]
    if lacking:
        raise ValueError(f"{of_model}{lacking[0]} is missing: copy the file again")
    _check_counts(header, of_model, _one(said[_SIZES["n_layers"]]), said[_OF_EXPERTS["num_experts"]])
    stated = {}
    if own.tensors:
        held = {match[2] for name in _tensors(header) if (match := _LAYER.fullmatch(name))}
        stated = {setting: name in held for setting, name in own.tensors.items()}
    found = _arguments(family, said, stated)
    found.setdefault("rope_theta", 1e4)  # llama.cpp's own, where a file says none
    _check_heads(said, of_model, found, turns_whole="partial_rotary_factor" not in family.read)
    if not found.get("sliding_window", 1):
        del found["sliding_window"]
    try:
        return found | _rope(own, said)
    except ValueError as error:
        raise ValueError(f"{of_model}{error}") from None


def _rope(own: Architecture, said: Mapping[str, Any]) -> dict[str, Any]:
    """Our settings of how the rotary embedding is slowed down."""
    if _SCALING not in said and _FACTOR not in said:
        return {}
    if (kind := said.get(_SCALING, "linear")) not in ("none", "linear", "yarn"):
        raise ValueError(f"{_SCALING} is {shown(kind)}: only linear and yarn are known here")
    factor, longer = said.get(_FACTOR, 1.0), [said.get(name, 1.0) for name in _LONGER]
    for name, value in zip((_FACTOR, *_LONGER), (factor, *longer), strict=True):
        if not isinstance(value, float) or not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a number above 0, not {shown(value)}")
        if kind != "yarn" and name != _FACTOR and value != 1:
            raise ValueError(f"{name} is {shown(value)}, which {shown(kind)} scaling has not")
    if kind != "yarn":
        return {"rope_scaling": 1 / factor} if kind == "linear" and factor != 1 else {}
    rope = {ours: said[theirs] for ours, theirs in _OF_YARN.items() if theirs in said}
    rope.setdefault("original", said.get(_SIZES["max_seq_len"]))
    length = math.prod(longer) * _length_of_yarn(factor)
    # Without the last digits, which float32 has not.
    return {
        "rope": {
            **{name: value for name, value in rope.items() if value is not None},
            "kind": kind,
            "factor": factor,
            "truncate": own.rounds_yarn,
            "attention_factor": float(str(np.float32(length))) if math.prod(longer) != 1 else length,
        }
    }


def _length_of_yarn(factor: float) -> float:
    return 1 + 0.1 * math.log(max(factor, 1))


def _sizes_of(own: Architecture) -> dict[str, str]:
    found = {**_SIZES, "hidden_dim": own.width}
    return {ours: theirs for ours, theirs in found.items() if theirs not in own.settings.values()}


def _tensors(header: Header) -> set[str]:
    """The names of all the tensors of a file and of the others of its set."""
    folder = header.path.parent
    several = set_of(header.path.name, [path.name for path in folder.iterdir()])
    others = (read_header(folder / name) for name in several if name != header.path.name)
    return {place.name for own in (header, *others) for place in own.tensors}


def _arguments(family: Family, said: Mapping[str, Any], stated: Mapping[str, bool]) -> dict[str, Any]:
    """The settings of ModelArgs that follow from a file's keys, put in Hugging Face's words in between.

    Args:
        said: without the architecture before them.
        stated: settings of Hugging Face's that the tensors say.
    """
    own = _known(family.name)
    found = {ours: _one(said[theirs]) for ours, theirs in _sizes_of(own).items() if theirs in said}
    given = {family.experts[ours]: said[theirs] for ours, theirs in _OF_EXPERTS.items()}
    given |= {setting: _one(said[theirs]) for setting, theirs in own.settings.items() if theirs in said}
    given |= {setting: value for setting, value in own.absent.items() if not given.get(setting)}
    if family.extra_layers in given:  # they stand behind the others, and block_count counts them
        found["n_layers"] -= natural(given, family.extra_layers)
    given |= {theirs: found[ours] for ours, theirs in family.sizes.items() if ours in found}
    given = {**family.defaults, **given, **stated, **own.computed}
    found |= {"family": family.name, **family.arguments(given)}
    if "partial_rotary_factor" in family.read:
        found["attention"] = found.get("attention", {}) | {"rotary_dim": said.get(_ROTATED)}
    chosen = {ours: given[theirs] for ours, theirs in family.experts.items() if theirs in given}
    found["moe"] = chosen | found.get("moe", {})
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


def _check_counts(header: Header, of_model: str, layers: Any, experts: Any) -> None:
    for name, count in (("block_count", layers), ("expert_count", experts)):
        if type(count) is not int or not 0 < count <= _MOST:
            raise ValueError(f"{of_model}{name} is {shown(count)}, and must be 1 to {_MOST}: copy the file again")
    held = {int(match[1]) for own in header.tensors if (match := _LAYER.fullmatch(own.name))}
    if "split.count" not in header.values and held != set(range(layers)):
        raise ValueError(f"{of_model}block_count is {layers}, and there are tensors of {len(held)} layers")
    routers = {own.shape[0] for own in header.tensors if own.name.endswith(f"{MODULES[_GATE]}.weight")}
    if routers - {experts}:
        raise ValueError(f"{of_model}expert_count is {experts}, and routers are for {sorted(routers)[0]}")


def _check_heads(said: Mapping[str, Any], of_model: str, found: dict[str, Any], *, turns_whole: bool) -> None:
    rotated = said.get(_ROTATED)
    if turns_whole and rotated is not None and found.setdefault("head_dim", rotated) != rotated:
        raise ValueError(f"{of_model}{_ROTATED} is {rotated}, and heads of {found['head_dim']} are turned whole here")
    width = said.get("attention.value_length")
    if width is not None and found.setdefault("head_dim", width) != width:
        raise ValueError(f"{of_model}attention.value_length is {width}, and keys have {found['head_dim']}")


# -- what is written

_Q8_0, _Q4_0, _MXFP4 = (next(own for own in CODINGS.values() if str(own) == name) for name in ("Q8_0", "Q4_0", "MXFP4"))
# By the name of --type; the numbers are those of llama.cpp's file types.
TYPES: dict[str, tuple[Coding, int]] = {
    "F32": (torch.float32, 0),
    "F16": (torch.float16, 1),
    "BF16": (torch.bfloat16, 32),
    "Q8_0": (_Q8_0, 7),
    "Q4_0": (_Q4_0, 2),
    "MXFP4": (_MXFP4, 38),
}


def coded(source: Source, wanted: Coding) -> Coding:
    """How a tensor is coded in a file of some type, by the rules of llama.cpp's converter.

    Vectors, biases and routers are F32, and rows that blocks do not divide F16. MXFP4 is for experts, beside which all
    else is Q8_0. Of dtypes that GGUF has no type for, those of 8 bits become BF16, and float64 F32.
    """
    kind = split_of(source.parameter).kind
    if len(source.shape) == 1 or kind in ("router", "bias"):
        return torch.float32
    if wanted == _MXFP4 and kind != "expert":
        wanted = _Q8_0
    if isinstance(wanted, BlockType):
        return torch.float16 if source.shape[-1] % wanted.size else wanted
    if wanted in CODINGS.values():
        return wanted
    return torch.bfloat16 if wanted.itemsize == 1 else torch.float32


def metadata(args: ModelArgs, most: Coding, name: str) -> dict[str, Any]:
    """What a file says of a model of these sizes."""
    file_type = next((number for coding, number in TYPES.values() if coding == most), 0)
    own = _known(args.family)
    kind = own.name
    if args.rope is not None and args.rope.kind == "yarn" and not args.rope.truncate:
        logger.warning(
            "llama.cpp rounds the bounds of yarn's frequencies, which this model does not (truncate false): it will "
            "compute nearly the same"
        )
    found: dict[str, Any] = {
        "general.architecture": kind,
        "general.type": "model",
        "general.name": name,
        "general.file_type": file_type,
        "general.quantization_version": 2,
    }
    return found | {f"{kind}.{key}": value for key, value in _keys(args).items()}


def _keys(args: ModelArgs) -> dict[str, Any]:
    """The keys of a model's own, without the architecture before them."""
    own = _known(args.family)
    found = {_WIDTH: args.hidden_dim, **{key: values[0] for key, values in own.fixed.items()}}
    found |= {theirs: getattr(args, ours) for ours, theirs in _sizes_of(own).items()}
    found |= {theirs: getattr(args.moe, ours) for ours, theirs in _OF_EXPERTS.items()}
    settings = _settings(args)
    found |= {theirs: settings[setting] for setting, theirs in own.settings.items()}
    found |= {_ROTATED: args.rotary_dim, "attention.value_length": args.head_dim}
    floats = {_SIZES["norm_eps"], _SIZES["rope_theta"]}
    floats |= {own.settings[setting] for setting, value in own.absent.items() if isinstance(value, float)}
    if args.rope_scaling is not None:
        found |= {_SCALING: "linear", _FACTOR: 1 / args.rope_scaling}
    elif args.rope is not None and args.rope.kind == "yarn":
        rope = args.rope
        found |= {_SCALING: rope.kind, _FACTOR: float(rope.factor)}
        found |= {theirs: getattr(rope, ours) for ours, theirs in _OF_YARN.items()}
        floats |= {theirs for ours, theirs in _OF_YARN.items() if ours != "original"}
        found |= {_LONGER[0]: rope.attention_factor / _length_of_yarn(rope.factor)}
    found |= {key: float(found[key]) for key in floats}
    return {key: value for key, value in found.items() if value is not None}


def _settings(args: ModelArgs) -> dict[str, Any]:
    """Hugging Face's settings of a model, as far as they are its family's own."""
    family = FAMILIES[args.family]
    return {theirs: getattr(args.moe, ours) for ours, theirs in family.experts.items()} | family.settings(args)


def unsaid(args: ModelArgs) -> str:
    """What llama.cpp would compute otherwise than this model, or cannot hold of it; empty where it says all."""
    family = FAMILIES[args.family]
    if family.gguf is None:
        return f"what {args.family} computes"
    try:
        settings, keys = _settings(args), _keys(args)
        found = _arguments(family, keys, {setting: settings[setting] for setting in family.gguf.tensors})
        found |= _rope(family.gguf, keys)
        read = dict(_parts(ModelArgs.from_dict(found)))
    except ValueError as error:  # of what the family has in other ways only
        return f"that {error}"
    other = [(name, value, read.get(name)) for name, value in _parts(args) if read.get(name) != value]
    if other:
        return ", ".join(f"{name} {value} (llama.cpp's {family.gguf.name} has {there})" for name, value, there in other)
    refused = family.gguf.refuses(args)
    return f"{refused} (llama.cpp's {family.gguf.name} has them alike)" if refused else ""


def _parts(args: ModelArgs) -> Iterator[tuple[str, Any]]:
    """All settings that decide what is computed, but for the sizes."""
    for part, own in (("attention", args.attention), ("moe", args.moe), ("moe.router", args.moe.router)):
        yield from (
            (f"{part}.{each.name}", getattr(own, each.name))
            for each in dataclasses.fields(own)
            if each.name not in ("router", "clamp")
        )
    if args.moe.clamp is not None:
        yield from ((f"moe.clamp.{name}", value) for name, value in dataclasses.asdict(args.moe.clamp).items())
    if args.rope is not None:
        yield "rope.kind", args.rope.kind
    if args.dense is not None:
        yield from (("dense.layers", [*args.dense.layers]), ("dense.hidden_dim", args.dense.hidden_dim))


GGUF = Layout(
    name="gguf",
    shown="llama.cpp's",
    rows=lambda args: _rows(args.family),
    cut=None,
    file_name=lambda file, files, ending: "model.gguf",
    one_file=True,
    coded=coded,
    metadata=metadata,
    config=None,
    plain=True,
    unsaid=unsaid,
)
# The output head is the embedding's matrix.
_TIED = Row("output.weight", f"{_MODULES['tok_embeddings']}.weight")
GGUF_TIED = dataclasses.replace(
    GGUF,
    shown="llama.cpp's, tied",
    rows=lambda args: {**GGUF.rows(args), "output.weight": (_TIED,)},
)
