"""Hugging Face's folders, as transformers 4 and 5 write them; what differs between families stands in theirs.

Their rotary embedding turns the two halves of a head against one another where ours turns neighbours, so that the rows
of q and k lie in another order there (see docs/checkpoints.md).
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

import torch

from accessory.checkpoint.layouts.accessory import EXPERTS, MATRICES
from accessory.checkpoint.layouts.layout import CORRECTIONS, Found, Keys, Layout, numbered
from accessory.checkpoint.layouts.rows import (
    BY_TURNS,
    BY_TURNS_TRANSPOSED,
    EACH,
    FUSED,
    PLAIN,
    ROTARY_HALVES,
    TRANSPOSED,
    VALUES_BY_TURNS,
    Lie,
    Row,
    by_parameter,
)
from accessory.config import ModelArgs, read_json
from accessory.config.checks import is_number
from accessory.config.model import MOST_LAYERS
from accessory.errors import CheckpointError, first_of, shown
from accessory.model.LLM import FAMILIES, family_of_config
from accessory.model.LLM.family import Family

logger = logging.getLogger(__name__)

INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SHARD = re.compile(r"(?P<stem>model|pytorch_model)-(?P<file>\d+)-of-(?P<files>\d+)(?P<ending>\.safetensors|\.bin)")
_WHOLE = ("model.safetensors", "pytorch_model.bin")

# Their modules by ours, outside of all layers.
MODULES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
IN_LAYER = "model.layers.{N}."
# Where a layer's router and experts lie in some families' folders, and where transformers 5 holds them.
ROOM, ROOM_5 = "block_sparse_moe.", "mlp."
# What lies as queries' and keys' rows do.
_ROTATED = tuple(f"attention.{name}" for name in ("wq", "wk", "q_bias", "k_bias", "q_norm", "k_norm"))


def lie_of(module: str) -> Lie:
    """How the rows lie of one of our modules in a layer."""
    return ROTARY_HALVES if module in _ROTATED else PLAIN


@functools.cache
def _rows(family: str) -> Mapping[str, Sequence[Row]]:
    return by_parameter(_rows_of(FAMILIES[family]))


def _rows_of(family: Family) -> Iterator[Row]:
    for ours, theirs in MODULES.items():
        yield Row(f"{ours}.weight", f"{theirs}.weight")
    tensors = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in family.modules.items()} | {**family.tensors}
    for ours, theirs in tensors.items():
        own = Row(f"layers.N.{ours}", f"{IN_LAYER}{theirs}", lies=lie_of(ours.removesuffix(".weight")))
        yield own
        if theirs.startswith(ROOM):
            key = own.key.replace(ROOM, ROOM_5)
            yield dataclasses.replace(own, key=key, written=False)
    room = f"{IN_LAYER}mlp.experts."
    if not family.matrices:
        yield Row(f"{EXPERTS}w13", f"{room}gate_up_proj", lies=BY_TURNS_TRANSPOSED)
        yield Row(f"{EXPERTS}w2", f"{room}down_proj", lies=TRANSPOSED)
        yield Row(f"{EXPERTS}b13", f"{room}gate_up_proj_bias", lies=VALUES_BY_TURNS)
        yield Row(f"{EXPERTS}b2", f"{room}down_proj_bias")
        # As `checkpoint.scaled` makes whole matrices of them.
        yield Row(f"{EXPERTS}w13", f"{room}gate_up_proj_blocks", lies=BY_TURNS, written=False)
        yield Row(f"{EXPERTS}w2", f"{room}down_proj_blocks", written=False)
        return
    for matrix, singles in MATRICES.items():
        for single, place in singles:
            yield Row(f"{EXPERTS}{matrix}", f"{IN_LAYER}{family.matrices[single]}.weight", (EACH, *place))
    # As transformers 5 holds them.
    yield Row(f"{EXPERTS}w13", f"{room}gate_up_proj", lies=FUSED, written=False)
    yield Row(f"{EXPERTS}w2", f"{room}down_proj", lies=PLAIN, written=False)


# Settings that this computation has in one way only, and that way; what they would change otherwise.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "lm_head_bias": (False,),
    "rope_interleaved": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
# Settings of training, of generating and of bookkeeping, which do not change what the model computes.
PASSED_OVER = frozenset(
    {
        *("_name_or_path", "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "auto_map"),
        *("attention_dropout", "hidden_dropout", "initializer_range", "use_cache"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id"),
        *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "input_jitter_noise"),
        *("output_attentions", "output_hidden_states", "return_dict", "use_return_dict", "chunk_size_feed_forward"),
        *("id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params", "is_decoder"),
        *("pretraining_tp", "tie_word_embeddings", "tie_encoder_decoder", "_attn_implementation"),
        *("attn_implementation", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
        *("quantization_config", "layer_types"),
        *("_experts_implementation", "experts_implementation", "is_llama_config", "transformers.js_config"),
        *("tokenizer_class", "torchscript", "pruned_heads", "prefix", "cross_attention_hidden_size", "unsloth_version"),
    }
)


def is_hf(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is Hugging Face's."""
    return "hidden_size" in values or "architectures" in values


def sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of ModelArgs that a config.json says.

    Raises:
        ValueError: it is of another architecture, quantized, or has a setting that this computation cannot follow.
    """
    family = family_of_config(values)
    said = values.get("quantization_config")
    if said is not None and not _is_decoded(said, family):
        method = said.get("quant_method") if isinstance(said, Mapping) else None
        raise ValueError(
            f"the weights are quantized by another program (quantization_config: {shown(method or said)}): take the "
            "model's plain folder, and quantize it while it is read"
        )
    given = {family.aliases.get(name, name): value for name, value in values.items() if value is not None}
    for name, neutral in {**_NEUTRAL, **family.fixed}.items():
        if name in given and name not in family.read and given[name] not in neutral:
            raise ValueError(f"{name} is {shown(given[name])}, and the model here has {shown(neutral[0])} alone")
    asked = [name for name in _ROPES if given.get(name)]
    given = {**family.defaults, **given}
    if values.get(_KV_HEADS, 0) is None:
        given.pop(_KV_HEADS, None)  # of which null, unlike no word at all, means as many as of queries
    found = {ours: given[theirs] for ours, theirs in family.sizes.items() if theirs in given}
    found |= family.arguments(given)
    own = {ours: given[theirs] for ours, theirs in family.experts.items() if theirs in given}
    found["moe"] = own | found.get("moe", {})
    found["rope_theta"], scaling, part = _rope(given, asked)
    found |= scaling
    if part not in (1, 1.0):
        if "partial_rotary_factor" not in family.read:
            raise ValueError(f"partial_rotary_factor is {shown(part)}, and {family.name} has 1 alone")
        found["attention"] = found.get("attention", {}) | {"rotary_dim": _turned(given, part)}
    return {**found, "family": family.name}


def _is_decoded(said: Any, family: Family) -> bool:
    """Whether a quantization_config speaks of what is read as `checkpoint.scaled` has it."""
    if isinstance(said, Mapping) and said.get("quant_method") == "mxfp4":
        return not family.matrices
    wanted = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    of_codes = isinstance(said, Mapping) and said.get("fmt", "e4m3") in ("e4m3", "float8_e4m3fn")
    return of_codes and all(said.get(name) == value for name, value in wanted.items())


def unknown_keys(values: Mapping[str, Any]) -> list[str]:
    """Keys of a config.json of which nothing is known here; as of any, transformers passes over them."""
    family = family_of_config(values)
    known = {*family.sizes.values(), *family.experts.values(), *family.aliases, *family.fixed, *family.passed_over}
    known |= {*family.read, *([family.extra_layers] if family.extra_layers else [])}
    return sorted(set(values) - known - set(_NEUTRAL) - PASSED_OVER)


def in_their_words(values: Mapping[str, Any], error: str) -> str:
    """What a config.json calls those settings of ours that an error names; empty where they are called alike."""
    try:
        family = family_of_config(values)
    except ValueError:
        return ""
    names = {ours: theirs for ours, theirs in {**family.sizes, **family.experts}.items() if ours != theirs}
    named = [ours for ours in names if re.search(rf"(?<![\w.])(moe\.)?{ours}\b", error)]
    return f" (in that file {', '.join(f'{ours} is {names[ours]}' for ours in named)})" if named else ""


def _turned(values: Mapping[str, Any], part: Any) -> int:
    """How many numbers of a head are turned."""
    width = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    if not isinstance(part, int | float) or isinstance(part, bool) or not 0 < part <= 1:
        raise ValueError(f"partial_rotary_factor must be a number from 0 to 1, not {shown(part)}")
    return int(width * part)


# Settings of kinds of rotary embedding, by ours.
_SLOWED: dict[str, dict[str, str]] = {
    "yarn": {name: name for name in ("beta_fast", "beta_slow", "truncate")},
    "llama3": {name: name for name in ("low_freq_factor", "high_freq_factor")},
}
_ORIGINAL = "original_max_position_embeddings"


_KV_HEADS = "num_key_value_heads"
# Where a config.json says how positions are turned: transformers 5's way, and that of transformers 4.
_ROPES = ("rope_parameters", "rope_scaling")


def _rope(values: Mapping[str, Any], names: Sequence[str]) -> tuple[Any, dict[str, Any], Any]:
    """The base of the rotary embedding, our settings of how it is slowed down, and which part of a head is turned.

    Args:
        names: those of `_ROPES` that a config.json has; none: the family's own.

    Raises:
        ValueError: what they say is not known here, or not the same. transformers lets ``rope_scaling`` rule, and then
            takes a base that stands in ``rope_parameters`` alone for its default.
    """
    found = [_rope_by(values, name) for name in names or _ROPES[1:]]
    if found[0] != found[-1]:
        said = " and ".join(f"{name} {shown(values[name])}" for name in names)
        raise ValueError(f"{said} do not say the same: keep one of them, with the rope_theta that is meant")
    return found[0]


def _rope_by(values: Mapping[str, Any], name: str) -> tuple[Any, dict[str, Any], Any]:
    said = values.get(name, {})
    if not isinstance(said, Mapping):
        raise ValueError(f"{name} must be an object, not {shown(said)}")
    kind = said.get("rope_type", said.get("type", "default"))
    theta = said.get("rope_theta", values["rope_theta"])
    part = said.get("partial_rotary_factor", values.get("partial_rotary_factor", 1))
    if kind == "default":
        return theta, {}, part
    if kind not in ("linear", *_SLOWED):
        why = ": its angles depend on the longest text of a batch" if kind == "dynamic" else ""
        raise ValueError(f"rope_type is {shown(kind)}{why}; known here are default, linear, {', '.join(_SLOWED)}")
    known = {name: value for name, value in said.items() if value is not None}
    longest = values.get("max_position_embeddings")
    original = values.get(_ORIGINAL, known.get(_ORIGINAL, longest))
    factor: Any = known.get("factor")
    if kind == "yarn" and factor is None and is_number(longest) and is_number(original) and original > 0:
        factor = longest / original
    if not is_number(factor) or factor <= 0:
        raise ValueError(f"the factor of {kind} rope scaling must be a number above 0, not {shown(factor)}")
    if kind == "linear":
        return theta, {"rope_scaling": 1 / factor}, part
    own = {ours: known[theirs] for ours, theirs in _SLOWED[kind].items() if theirs in known}
    if kind == "yarn":
        own["attention_factor"] = known.get("attention_factor", _attention_factor(factor, known))
    return theta, {"rope": {"kind": kind, "factor": factor, "original": original, **own}}, part


def _attention_factor(factor: float, said: Mapping[str, Any]) -> float:
    """What YaRN makes queries and keys longer by, where its config does not say it."""
    scales = [said.get("mscale"), said.get("mscale_all_dim")]
    for value in scales:
        if value is not None and not is_number(value):
            raise ValueError(f"mscale and mscale_all_dim of yarn must be numbers, not {shown(value)}")
    over, under = (1 + 0.1 * (scale or 0) * math.log(max(factor, 1)) for scale in (scales if all(scales) else (1, 0)))
    return over / under


def config_of(args: ModelArgs, dtype: torch.dtype) -> tuple[str, dict[str, Any]]:
    """The config.json of such a model, for transformers 4 and 5 alike."""
    rope: dict[str, Any] = {"rope_theta": args.rope_theta, "rope_type": "default"}
    scaling: dict[str, Any] = {}
    if args.rope_scaling is not None:
        scaling = {"type": "linear", "rope_type": "linear", "factor": 1 / args.rope_scaling}
    elif args.rope is not None:
        own = args.rope
        scaling = {"type": own.kind, "rope_type": own.kind, "factor": own.factor, _ORIGINAL: own.original}
        scaling |= {theirs: getattr(own, ours) for ours, theirs in _SLOWED[own.kind].items()}
        scaling |= {"attention_factor": own.attention_factor} if own.kind == "yarn" else {}
    rope |= {name: value for name, value in scaling.items() if name != "type"}
    name = str(dtype).removeprefix("torch.")
    family = FAMILIES[args.family]
    part = {}
    if "partial_rotary_factor" in family.read:
        factor = args.rotary_dim / args.head_dim
        # Readers round down.
        exact = int(args.head_dim * factor) == args.rotary_dim
        part = {"partial_rotary_factor": factor if exact else math.nextafter(factor, 1)}
        rope |= part
    return "config.json", {
        "architectures": [family.architecture],
        "model_type": family.name,
        **{theirs: getattr(args, ours) for ours, theirs in family.sizes.items()},
        **{theirs: getattr(args.moe, ours) for ours, theirs in family.experts.items()},
        **{name: ways[0] for name, ways in family.fixed.items()},
        **family.settings(args),
        **part,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "output_router_logits": False,
        "router_jitter_noise": 0.0,
        "rope_theta": args.rope_theta,
        "rope_scaling": scaling or None,
        "rope_parameters": rope,
        "tie_word_embeddings": False,
        "torch_dtype": name,
        "dtype": name,
        "use_cache": True,
    }


def _file_name(file: int, files: int, ending: str | None) -> str:
    stem, own = ("pytorch_model", ".bin") if ending == ".bin" else ("model", ".safetensors")
    return f"{stem}{own}" if files == 1 else f"{stem}-{file + 1:05d}-of-{files:05d}{own}"


def unsaid(args: ModelArgs) -> str:
    """What transformers has no tensor for; empty where it has all."""
    lacks = args.moe.router.correction and "feed_forward.gate.correction_bias" not in FAMILIES[args.family].tensors
    return f"{CORRECTIONS}, which {args.family} does not have there" if lacks else ""


HF = Layout(
    name="hf",
    shown="Hugging Face's",
    rows=lambda args: _rows(args.family),
    cut=None,
    file_name=_file_name,
    index_name=INDEX_NAMES[0],
    config=config_of,
    plain=True,
    unsaid=unsaid,
    says_ends=True,
)


def _tied(key: str) -> Layout:
    """The layout of a folder whose embedding and output head are one matrix, which has that key."""
    rows = {f"{ours}.weight": (Row(f"{ours}.weight", key),) for ours in ("tok_embeddings", "output")}
    return dataclasses.replace(HF, shown="Hugging Face's, tied", rows=lambda args: {**_rows(args.family), **rows})


# By the one of the two keys that is there: safetensors' own writer keeps the head's.
_TIED = {key: _tied(key) for key in (f"{MODULES[ours]}.weight" for ours in ("tok_embeddings", "output"))}


def find_hf(folder: Path, names: Sequence[str]) -> Found | None:
    """model*.safetensors, or else pytorch_model*.bin; the safetensors rule where both lie there, as in transformers."""
    shards = [match for name in names if (match := _SHARD.fullmatch(name))]
    for whole, index in zip(_WHOLE, INDEX_NAMES, strict=True):
        stem, dot, ending = whole.partition(".")
        own = [match for match in shards if match["stem"] == stem and match["ending"] == dot + ending]
        named: Mapping[str, str] = {}
        if index in names:
            named = _weight_map(folder / index, names)
            files = tuple((name,) for name in sorted({*named.values()}))
        elif whole in names:
            files = ((whole,),)
        elif own:
            files = numbered(folder, own, f"{stem}-{{:05d}}-of-{{:05d}}{dot}{ending}", first=1)
        else:
            continue
        layout = partial(_layout, folder / index, named, [name for (name,) in files])
        return Found(form="Hugging Face", files=files, layout=layout, rules=True)
    return None


def _weight_map(path: Path, names: Sequence[str]) -> Mapping[str, str]:
    """Which tensor is in which file, as an index says it; ``names`` lie beside it.

    Raises:
        CheckpointError: it is unusable, or names files that are not there.
    """
    try:
        named = read_json(path).get("weight_map")
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(named, Mapping) or not named or not all(isinstance(name, str) for name in named.values()):
        raise CheckpointError(f"{path} has no weight_map of tensors' names and files: copy it again")
    files = sorted(set(named.values()))
    odd = [name for name in files if Path(name).name != name]
    if odd:
        raise CheckpointError(f"{path} names {shown(odd[0])}, which is no file beside it: copy it again")
    lacking = [name for name in files if name not in names]
    if lacking:
        raise CheckpointError(f"{path.parent} lacks {first_of(lacking, 1)}, which {path.name} names: copy the rest")
    return named


def _layout(
    index: Path, named: Mapping[str, str], files: Sequence[str], keys: Keys, args: ModelArgs, probe: int
) -> Layout:
    """The layout of a folder; what its index says (nothing, where it has none) is held against its files."""
    del probe
    held = {name: keys(file).keys() for file, name in enumerate(files if named else ())}
    for key, name in named.items():
        if key not in held[name]:
            raise CheckpointError(f"{index} says that {name} holds {key}, and it does not: copy both again")
    config = index.with_name("config.json")
    values = read_json(config) if config.exists() else {}
    tied = _TIED if values.get("tie_word_embeddings") else {}
    there = [layout for key, layout in tied.items() if any(key in keys(file) for file in range(len(files)))]
    # Two matrices are read as two, as transformers 5 does, whatever the config says.
    layout = there[0] if len(there) == 1 else HF
    return _without_extra_layers(layout, values, args, index.parent)


def _without_extra_layers(layout: Layout, values: Mapping[str, Any], args: ModelArgs, folder: Path) -> Layout:
    """The layout of a folder that has layers behind the model's last one, where its config says so."""
    family = FAMILIES[args.family]
    if family.extra_layers is None:
        return layout
    names = [family.extra_layers, *(own for own, theirs in family.aliases.items() if theirs == family.extra_layers)]
    count = next((values[name] for name in names if name in values), 0)
    if type(count) is not int or not 0 < count <= MOST_LAYERS:
        return layout
    left = "|".join(str(args.n_layers + number) for number in range(count))
    say_left_out(folder, rf"model.layers.{left}.*", family.extra_layers)
    return dataclasses.replace(
        layout, passed_over=re.compile(rf"{layout.passed_over.pattern}|model\.layers\.({left})\..+")
    )


@functools.cache
def say_left_out(folder: Path, tensors: str, setting: str) -> None:
    """Say it once in a process."""
    logger.info("%s: %s, if there, are left out: they predict further tokens (%s)", folder, tensors, setting)
