"""Our own files, base and sparse, and those of Meta's and Mistral's releases, which have the same names.

Byte-for-byte descriptions stand in docs/checkpoints.md.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from accessory.checkpoint.layouts.layout import CORRECTIONS, Found, Keys, Layout, numbered
from accessory.checkpoint.layouts.rows import ALL, EACH, STACKED, STACKED_TRANSPOSED, Row, Source, for_all
from accessory.config import ModelArgs
from accessory.errors import CheckpointError
from accessory.parallel.plan import TABLE, generic_name

PREFIX = "llma."
_CONVERTED = re.compile(r"consolidated\.(?P<file>\d+)-of-(?P<files>\d+)\.model(?P<ending>\.pth|\.safetensors)")
_RELEASED = re.compile(r"consolidated\.(?P<file>\d+)(?P<ending>\.pth|\.pt|\.safetensors)")
_NUMBERED = re.compile(r"consolidated-(?P<file>\d+)-of-(?P<files>\d+)\.safetensors")
_CUT = re.compile(r"consolidated\.00\.pth-split(?P<file>\d+)")  # as the torrent has it
_WHOLE_NAME = "consolidated.safetensors"

EXPERTS = "layers.N.feed_forward.experts."
# What stands behind a matrix's name in a file, by what stands behind it in the stacked parameter's.
ENDINGS = {"": "weight", "_lora_a": "lora_a.weight", "_lora_b": "lora_b.weight", "_bias": "bias"}
# An expert's matrices, by the stacked parameter that holds them, and their place in it behind the expert.
MATRICES: dict[str, tuple[tuple[str, tuple[int, ...]], ...]] = {
    "w13": (("w1", (0,)), ("w3", (1,))),
    "w2": (("w2", ()),),
}
# The same of its biases, which are the base's own and no adapters'.
BIASES: dict[str, tuple[tuple[str, tuple[int, ...]], ...]] = {
    "b13": (("b1", (0,)), ("b3", (1,))),
    "b2": (("b2", ()),),
}


def own_name(pattern: str) -> str:
    """A row's name in the plan's table as a key."""
    return pattern.replace(".N.", ".{N}.")


def _expert_rows(pattern: str) -> Iterator[Row]:
    """Of a stacked parameter, one tensor for each expert's matrix."""
    stacked = pattern.removeprefix(EXPERTS)
    for single, place in BIASES.get(stacked, ()):
        yield Row(pattern, f"{own_name(EXPERTS)}{{E}}.{single}", (EACH, *place))
    if stacked in BIASES:
        return
    matrix = stacked.partition("_")[0]
    for single, place in MATRICES[matrix]:
        ending = ENDINGS[stacked.removeprefix(matrix)]
        yield Row(pattern, f"{own_name(EXPERTS)}{{E}}.{single}.{ending}", (EACH, *place))


def _stacked_rows(room: str, *, written: bool) -> Iterator[Row]:
    """Of the experts' matrices, one tensor for each of the three: one expert below the other, w2 transposed."""
    for matrix, singles in MATRICES.items():
        for single, place in singles:
            lies = STACKED_TRANSPOSED if matrix == "w2" else STACKED
            yield Row(f"{EXPERTS}{matrix}", f"layers.{{N}}.{room}.{single}", (ALL, *place), lies, written)


def _shard_name(file: int, files: int, ending: str | None) -> str:
    return f"consolidated.{file:02d}-of-{files:02d}.model{ending or '.pth'}"


def _release_name(file: int, files: int, ending: str | None) -> str:
    if files == 1 and ending is None:
        return _WHOLE_NAME
    return f"consolidated.{file:02d}{ending or '.safetensors'}"


def _own_config(args: ModelArgs, dtype: torch.dtype) -> tuple[str, dict[str, Any]]:
    del dtype
    return "config.json", args.to_dict()


# Of params.json, as Mistral's releases have them.
_PARAMS = ["dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size", "rope_theta"]


def _params(args: ModelArgs, dtype: torch.dtype) -> tuple[str, dict[str, Any]]:
    del dtype
    values = args.to_dict()
    window = {} if args.sliding_window is None else {"sliding_window": args.sliding_window}
    return "params.json", {name: values[name] for name in (*_PARAMS, "moe")} | window


def _unsaid(args: ModelArgs) -> str:
    """What params.json has no words for."""
    if args.computes_as_mixtral:
        return ""
    return CORRECTIONS if args.without_corrections().computes_as_mixtral else f"what {args.family} computes"


_WHOLE = [Row(row.pattern, own_name(row.pattern)) for row in TABLE if not row.pattern.startswith(EXPERTS)]
_EXPERTS = [row for own in TABLE if own.pattern.startswith(EXPERTS) for row in _expert_rows(own.pattern)]
_BESIDE = [row for row in _EXPERTS if row.parameter.removeprefix(EXPERTS) not in MATRICES]
_GATE = Row("layers.N.feed_forward.gate.weight", "layers.{N}.block_sparse_moe.gate.weight", written=False)

BASE = Layout(
    name="accessory",
    shown="whole experts (base)",
    rows=for_all([*_WHOLE, *_EXPERTS]),
    cut="expert",
    prefix=PREFIX,
    strips=PREFIX,
    file_name=_shard_name,
    config=_own_config,
)
# The experts' biases and adapters have the names of the base form, cut as placement "tensor" cuts them.
SPARSE = dataclasses.replace(
    BASE,
    name="accessory-sparse",
    shown="experts cut in slices (sparse)",
    rows=for_all([*_WHOLE, *_stacked_rows("feed_forward", written=True), *_BESIDE]),
    cut="tensor",
)
# Several consolidated.NN.pth of which each has a slice of every tensor that is split.
META = dataclasses.replace(BASE, name="meta", prefix="", file_name=_release_name, config=_params)
# Whole tensors, the experts' one by one or stacked.
MISTRAL = dataclasses.replace(
    META,
    name="mistral",
    shown="whole tensors",
    rows=for_all([*_WHOLE, *_EXPERTS, _GATE, *_stacked_rows("block_sparse_moe", written=False)]),
    cut=None,
    plain=True,
    unsaid=_unsaid,
)


def own_key(source: Source) -> str:
    """What a tensor of any layout is called in our own files, for messages; of all experts at once without a number."""
    pattern = generic_name(source.parameter)
    if not pattern.startswith(EXPERTS):
        return source.parameter
    experts, _, stacked = source.parameter.rpartition(".")
    matrix, _, adapter = stacked.partition("_")
    single = (MATRICES | BIASES)[matrix][source.box.start[1] if matrix.endswith("13") else 0][0]
    number = f".{source.box.start[0]}" if source.box.size[0] == 1 else ""
    if matrix in BIASES:
        return f"{experts}{number}.{single}"
    return f"{experts}{number}.{single}.{ENDINGS[f'_{adapter}' if adapter else '']}"


def find_own(folder: Path, names: Sequence[str]) -> Found | None:
    """Our own shards."""
    matches = [match for name in names if (match := _CONVERTED.fullmatch(name))]
    if not matches:
        return None
    endings = sorted({match["ending"] for match in matches})
    if len(endings) > 1:
        raise CheckpointError(f"{folder} holds shards that end in {' and in '.join(endings)}: keep those of one run")
    files = numbered(folder, matches, "consolidated.{:02d}-of-{:02d}.model" + endings[0])

    return Found(form="converted", files=files, layout=partial(_own_layout, len(files)))


def _own_layout(files: int, keys: Keys, args: ModelArgs, probe: int) -> Layout:
    own = [key.removeprefix(PREFIX) for key in keys(probe)]
    return SPARSE if _is_sparse(own, file=probe, files=files, args=args) else BASE


def find_release(folder: Path, names: Sequence[str]) -> Found | None:
    """Files of a release: Meta's slices or Mistral's whole tensors."""
    files: tuple[tuple[str, ...], ...]
    if _WHOLE_NAME in names:
        files = ((_WHOLE_NAME,),)
    elif matches := [match for name in names if (match := _RELEASED.fullmatch(name))]:
        files = numbered(folder, matches, "consolidated.{:02d}" + matches[0]["ending"])
    elif matches := [match for name in names if (match := _NUMBERED.fullmatch(name))]:
        files = numbered(folder, matches, "consolidated-{:05d}-of-{:05d}.safetensors", first=1)
    elif matches := [match for name in names if (match := _CUT.fullmatch(name))]:
        files = (tuple(name for (name,) in numbered(folder, matches, "consolidated.00.pth-split{}")),)
    else:
        return None

    return Found(form="consolidated", files=files, layout=partial(_release_layout, len(files)))


def _release_layout(files: int, keys: Keys, args: ModelArgs, probe: int) -> Layout:
    del args, probe
    return META if files > 1 and set(keys(0)) & set(keys(1)) else MISTRAL


def _is_sparse(keys: Sequence[str], *, file: int, files: int, args: ModelArgs) -> bool:
    """Whether the keys of shard ``file`` are those of the sparse form.

    A folder with adapters alone tells itself by whose they are: in the base form a file has its own experts only.
    Without any of experts its files are the same in both forms, so that it has the one that divides.
    """
    if any(re.search(r"\.feed_forward\.w[123]$", key) for key in keys):
        return True
    if any(".experts." in key for key in keys):
        share = args.moe.num_experts // files
        adapters = (re.search(r"\.experts\.(\d+)\.w[123]\.(lora_[ab]\.weight|bias)$", key) for key in keys)
        return any(key and not file * share <= int(key[1]) < (file + 1) * share for key in adapters)
    return bool(BASE.obstacles(args, files)) and not SPARSE.obstacles(args, files)
