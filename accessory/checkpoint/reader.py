"""Reading shards: memory-mapped, plain tensors only, and only the slices that this rank owns."""

import pickle
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from accessory.checkpoint.formats import PREFIX, Source, is_sparse, obstacles_to_files, sources
from accessory.checkpoint.manifest import Manifest
from accessory.config import ModelArgs
from accessory.errors import CheckpointError, first_line
from accessory.parallel.plan import is_adapter, other_factor, trains
from accessory.quant import TENSOR_DTYPES

# How torch.save began a file before it wrote zip archives: its magic number, pickled.
_OLD_FORMAT = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


def open_shard(path: Path) -> dict[str, Tensor]:
    """Map a shard into memory; keys come without the ``llma.`` prefix, and no tensor's bytes are read yet.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: damaged, in PyTorch's old format, or holding anything but tensors (nothing of such a
            pickle is executed).
    """
    if not path.exists():
        raise FileNotFoundError(f"shard {path} does not exist: copy it again")
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except PermissionError as error:
        raise CheckpointError(f"{path} may not be read ({error.strerror}): change its permissions") from None
    except Exception as error:  # damage can surface as almost any type
        raise CheckpointError(_unreadable(path, error)) from None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds no dictionary of tensors: copy it again, or save the weights alone")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: {key!r} is a {type(value).__name__}, not a named tensor; remove it and save the weights alone"
            )
        if value.layout != torch.strided or value.device.type != "cpu":
            raise CheckpointError(
                f"{path}: {key} is no dense tensor with data ({value.layout}, {value.device}); save it as one"
            )
    tensors = {key.removeprefix(PREFIX): value for key, value in content.items()}
    if len(tensors) < len(content):
        twice = next(key for key in tensors if key in content and PREFIX + key in content)
        raise CheckpointError(f"{path} holds both {twice} and {PREFIX}{twice}, which is one tensor: save it once")
    return tensors


def embedding_rows(manifest: Manifest) -> int | None:
    """Rows of a folder's embedding, each file having a slice of all of them; None where it has no embedding.

    Raises:
        CheckpointError: its shape is not an embedding's.
    """
    path = manifest.shards[0]
    embedding = open_shard(path).get("tok_embeddings.weight")
    if embedding is None:
        return None
    if embedding.dim() != 2 or not embedding.shape[0]:
        raise CheckpointError(
            f"{path}: tok_embeddings.weight has shape {tuple(embedding.shape)}, and not a row for each token: "
            "copy the file again"
        )
    return embedding.shape[0]


@dataclass(frozen=True)
class Checkpoint:
    """A recognised folder together with the sizes of the model it should hold: what each file must contain."""

    manifest: Manifest
    args: ModelArgs
    sparse: bool
    by_file: tuple[tuple[Source, ...], ...]

    @classmethod
    def open(cls, manifest: Manifest, args: ModelArgs, *, probe: int = 0) -> "Checkpoint":
        """Work out the files' expected contents; looks into shard ``probe`` for the form.

        Args:
            args: sizes of the model; whether matrices are quantized in the folder is its own to say.

        Raises:
            CheckpointError: that shard is unusable, or the number of shards does not fit the sizes.
        """
        args = args.replace(quant=manifest.load_quant())
        files = len(manifest.shards)
        sparse = is_sparse(open_shard(manifest.shards[probe]), file=probe, files=files, args=args)
        obstacles = obstacles_to_files(args, files, sparse=sparse)
        if obstacles:
            raise CheckpointError(
                f"{manifest.folder}: {files} shards cannot hold this model ({'; '.join(obstacles)}): "
                "check the config, or copy the shards of one run"
            )
        by_file: list[list[Source]] = [[] for _ in range(files)]
        for source in sources(args, files, sparse=sparse):
            by_file[source.file].append(source)
        return cls(manifest, args, sparse, tuple(map(tuple, by_file)))

    def read_file(self, file: int, *, partial: bool = False) -> dict[str, Tensor]:
        """Map one shard and hold its names, shapes and types against what the sizes demand.

        Args:
            partial: allow tensors to be missing (a folder that overlays another); adapters always may.

        Raises:
            CheckpointError: naming file and tensor.
        """
        path = self.manifest.shards[file]
        tensors = open_shard(path)
        expected = {source.key: source.shape for source in self.by_file[file]}
        missing = [
            source.key
            for source in self.by_file[file]
            if source.key not in tensors and not is_adapter(source.parameter)
        ]
        unexpected = [key for key in tensors if key not in expected]
        if unexpected:
            way_out = "the config is of another model, or the file of another run"
            if self.args.peft is None and any(key.endswith(".lora_a.weight") for key in unexpected):
                way_out = "they are an adapter's: give its folder behind its base's, or llama_type mistral_peft"
            raise CheckpointError(f"{path} holds {some(unexpected)} that the model does not have: {way_out}")
        if missing and not partial:
            if self.is_adapter:
                raise CheckpointError(
                    f"{path} holds an adapter alone: give the folder of its base before it, or one that merge wrote"
                )
            raise CheckpointError(f"{path} lacks {some(missing)}: copy it again, or check the config")
        for key, tensor in tensors.items():
            if tuple(tensor.shape) != expected[key]:
                raise CheckpointError(
                    f"{path}: {key} has shape {tuple(tensor.shape)}, config and tokenizer ask for {expected[key]} "
                    f"in each of {len(self.by_file)} shards: check the config, or copy the shards of one run"
                )
            wanted = TENSOR_DTYPES.get(key.rpartition(".")[2])
            if wanted is None and not tensor.is_floating_point():
                raise CheckpointError(f"{path}: {key} is {tensor.dtype}; weights must be floating-point")
            if wanted not in (None, tensor.dtype):
                raise CheckpointError(f"{path}: {key} is {tensor.dtype}, not {wanted}: copy it again")
        return tensors

    def held(self) -> set[str]:
        """The parameters of which the folder holds any part."""
        return {
            source.parameter
            for path, contents in zip(self.manifest.shards, self.by_file, strict=True)
            for keys in [open_shard(path).keys()]
            for source in contents
            if source.key in keys
        }

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds nothing but what finetuning with adapters trains."""
        trained = {source.key for source in self.by_file[0] if trains(source.parameter, self.args)}
        return self.args.peft is not None and open_shard(self.manifest.shards[0]).keys() <= trained

    def check_pieces(self) -> None:
        """Refuse a folder of which some files hold their part of a tensor and others lack it, or half of an update.

        As an overlay it would mix two models within one matrix. Of the experts' adapters, which are one parameter,
        all must be there or none.

        Raises:
            CheckpointError: naming the tensor and a file that lacks it, or the missing half.
        """
        holders: dict[str, list[Path]] = {}
        wanted: dict[str, list[Path]] = {}
        for path, contents in zip(self.manifest.shards, self.by_file, strict=True):
            tensors = open_shard(path)
            for source in contents:
                whole = source.parameter if is_adapter(source.parameter) else source.key
                wanted.setdefault(whole, []).append(path)
                if source.key in tensors:
                    holders.setdefault(whole, []).append(path)
        for key, paths in holders.items():
            lacking = list((Counter(wanted[key]) - Counter(paths)).elements())
            if lacking:
                raise CheckpointError(
                    f"{lacking[0]} lacks a part of tensor {key}, of which {paths[0].name} has one: copy the folder "
                    "again, or leave the tensor out of all files"
                )
        for key in holders:
            other = other_factor(key)
            if other is not None and other not in holders:
                raise CheckpointError(
                    f"{self.manifest.folder} holds {key} but not {other}: an update needs both lora_a and lora_b; "
                    "copy the folder again, or leave both out"
                )


def some(keys: Iterable[str], limit: int = 3) -> str:
    keys = list(keys)
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return f"tensor{'s' if len(keys) > 1 else ''} {', '.join(keys[:limit])}{more}"


def _unreadable(path: Path, error: Exception) -> str:
    """One line on a file that torch.load refused, whose own message may be a page that recommends to trust it."""
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        if match := re.search(r"GLOBAL (\S+)", text):
            return (
                f"{path} holds more than plain tensors ({match[1]}) and was refused, nothing in it was executed. "
                "Get the weights from a source that you trust"
            )
        text = "its pickle is broken"
    elif "_use_new_zipfile_serialization" in text:
        with path.open("rb") as file:
            if file.read(len(_OLD_FORMAT)) == _OLD_FORMAT:
                return (
                    f"{path} is in PyTorch's old format (before 1.6), which cannot be mapped: "
                    "read it with torch.load(..., weights_only=True) and write it again with torch.save"
                )
        text = "no zip archive"
    reason = first_line(text, otherwise=type(error).__name__)
    return (
        f"{path} ({path.stat().st_size:,} bytes) is damaged, truncated or not a PyTorch file ({reason}). Copy it again"
    )
