"""Base and adapter as one plain checkpoint: W + (lora_alpha / lora_rank) lora_b lora_a, matrix by matrix."""

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from accessory.checkpoint.convert import copy_tokenizer, stored_args
from accessory.checkpoint.formats import PREFIX, Source, base_sources, obstacles_to_files
from accessory.checkpoint.manifest import Manifest
from accessory.checkpoint.weights import StoredWeights
from accessory.checkpoint.writer import create_shard
from accessory.config import PEFT_TYPES, ModelArgs, PeftArgs
from accessory.errors import CheckpointError
from accessory.files import new_folder, write_json
from accessory.parallel.box import Box
from accessory.parallel.plan import parameter_shapes

logger = logging.getLogger(__name__)

# Settings that say nothing of the weights.
_FREE = ("peft", "max_batch_size", "max_seq_len", "load_balancing_weight", "z_loss_weight")
# What stands in the keys of a group of weights; the first that does names it.
_GROUPS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "norm", "gate", "tok_embeddings", "output")


@dataclass
class Change:
    """How far the weights of a group have moved: sums of squares of the change and of the weights before."""

    moved: float = 0.0
    before: float = 0.0

    @property
    def share(self) -> float:
        """Norm of the change over the norm of the weights."""
        return math.sqrt(self.moved / self.before) if self.before else math.sqrt(self.moved)


@dataclass
class MergeReport:
    """What a merge has done.

    Attributes:
        changes: of each group of weights (wq, ..., w3, norm).
        biases: trained biases are kept; the result is then of llama_type "mistral_peft".
        untrained: nothing has moved, and no bias is other than zero.
    """

    changes: dict[str, Change] = field(default_factory=dict)
    biases: bool = False

    @property
    def untrained(self) -> bool:
        return not self.biases and not any(change.moved for change in self.changes.values())

    def lines(self) -> Iterator[str]:
        """For a reader; each group's change relative to its weights."""
        if self.untrained:
            yield "the adapter is untrained, every update and bias in it is zero: the result is the base"
        for group, change in self.changes.items():
            if change.moved:
                yield f"{group:15} moved by {change.share:.3%}"
        if self.biases:
            yield f"biases          kept beside the weights: llama_type {PEFT_TYPES[0]}, lora_rank -1"


def merge(base: str | Path, adapter: str | Path, destination: str | Path) -> MergeReport:
    """Write ``base`` with ``adapter`` merged into it as an accessory checkpoint, in as many shards as the base has.

    On CPU, one tensor after another: beside the mapped files it takes memory for a few matrices. Sums are float32;
    the result has the base's dtype. Norms, and whatever else the adapter's folder holds, replace the base's.

    Raises:
        CheckpointError: the adapter is of another model, or a tensor of it has no place in the base.
        ValueError: the folder has no adapter, or the base has LoRA of its own.
        FileExistsError: the destination is not empty.
        FileNotFoundError, OSError: a folder is not there; the disk is full.
    """
    theirs = Manifest.read(adapter)
    own = Manifest.read(base)
    args, base_args = stored_args(theirs), stored_args(own)
    _check_pair(own, base_args, theirs, args)
    assert args.peft is not None
    merger = _Merger(StoredWeights(own, base_args), StoredWeights(theirs, args, partial=True), args.peft)
    merger.check_places(theirs.folder)
    peft = PeftArgs(bias_tuning=True) if merger.has_biases(args) else None
    out_args = base_args.replace(peft=peft)
    files = len(own.shards) if not obstacles_to_files(out_args, len(own.shards), sparse=False) else 1
    with new_folder(Path(destination)) as aside:
        targets = [source for source in base_sources(out_args, files) if merger.has(source.parameter)]
        with tqdm(total=len(targets), desc="merging", unit="tensor", disable=None) as progress:
            for file in range(files):
                wanted = [target for target in targets if target.file == file]
                dtypes = {target.key: merger.dtype(target.parameter) for target in wanted}
                path = aside / f"consolidated.{file:02d}-of-{files:02d}.model.pth"
                shard = create_shard(path, {PREFIX + own.key: (own.shape, dtypes[own.key]) for own in wanted})
                for target in wanted:
                    target.view(shard[PREFIX + target.key]).copy_(merger.merged(target))
                    progress.update()
        write_json(aside / "config.json", out_args.to_dict())
        write_json(aside / "meta.json", {"llama_type": PEFT_TYPES[0] if peft else "mistral"})
        copy_tokenizer(theirs if theirs.has_tokenizer else own, aside)
    report = MergeReport(merger.changes, peft is not None)
    if report.untrained:
        logger.warning("%s: %s", theirs.folder, next(report.lines()))
    return report


def _check_pair(base: Manifest, base_args: ModelArgs, adapter: Manifest, args: ModelArgs) -> None:
    if args.peft is None:
        raise ValueError(
            f"{adapter.folder} holds no adapter: its meta.json says {adapter.llama_type!r}, not {PEFT_TYPES[0]!r}"
        )
    if base_args.quant is not None:
        raise ValueError(
            f"{base.folder} is quantized ({base_args.quant.type}), and rounding would lose much of the adapter: merge "
            "into the weights that it was made of, then quantize the result"
        )
    if base_args.peft is not None and base_args.peft.lora_rank > 0:
        raise ValueError(f"{base.folder} has LoRA of its own: merge it into its own base first")
    fields = [one.name for one in dataclasses.fields(ModelArgs) if one.name not in _FREE]
    differing = [name for name in fields if getattr(args, name) != getattr(base_args, name)]
    if differing:
        values = ", ".join(f"{name} {getattr(args, name)} and {getattr(base_args, name)}" for name in differing)
        raise CheckpointError(
            f"{adapter.folder} is an adapter of another model than {base.folder} ({values}): give the base that it "
            "was trained on"
        )


class _Merger:
    """Two opened folders, and what is counted on the way through them."""

    def __init__(self, base: StoredWeights, adapter: StoredWeights, peft: PeftArgs) -> None:
        self.base, self.adapter, self.peft = base, adapter, peft
        self.changes: dict[str, Change] = {}

    def check_places(self, folder: Path) -> None:
        """See that every tensor of the adapter will be used."""
        used = {name for name in self.adapter.held if name in self.base.held or name.endswith("bias")}
        for name in self.base.held:
            pair = set(update_of(name)) & self.adapter.held
            if len(pair) == 2:
                used |= pair
        lost = sorted(self.adapter.held - used)
        if lost:
            raise CheckpointError(
                f"{folder}: {lost[0]}{f' and {len(lost) - 1} more' if lost[1:] else ''} found no place in the base: "
                "an update needs both lora_a and lora_b; copy the folder again"
            )

    def has_biases(self, args: ModelArgs) -> bool:
        """Whether any bias is other than zero."""
        shapes = dict(parameter_shapes(args.replace(peft=PeftArgs(bias_tuning=True))))
        biases = [name for name in shapes if name.endswith("bias") and self.has(name)]
        return any(bool(self._stored(name, Box.whole(shapes[name])).any()) for name in biases)

    def has(self, name: str) -> bool:
        return name in self.adapter.held or name in self.base.held

    def dtype(self, name: str) -> torch.dtype:
        return (self.base if name in self.base.held else self.adapter).dtype(name)

    def merged(self, target: Source) -> Tensor:
        """One tensor of the result, in the shape of its box."""
        name, box = target.parameter, target.box
        value = self._stored(name, box)
        if name not in self.base.held:
            return value
        before = self.base.read(name, box)
        lora_a, lora_b = update_of(name)
        if lora_a in self.adapter.held:
            inner_a = _replaced(box, -2, self.peft.lora_rank)
            inner_b = _replaced(box, -1, self.peft.lora_rank)
            update = self.adapter.read(lora_b, inner_b).float() @ self.adapter.read(lora_a, inner_a).float()
            value = value.float() + update.mul_(self.peft.scale)
        value = value.to(before.dtype)
        change = self.changes.setdefault(_group_of(target.key), Change())
        change.moved += torch.linalg.vector_norm(value.float() - before.float()).item() ** 2
        change.before += torch.linalg.vector_norm(before.float()).item() ** 2
        return value

    def _stored(self, name: str, box: Box) -> Tensor:
        return (self.adapter if name in self.adapter.held else self.base).read(name, box)


def update_of(name: str) -> tuple[str, str]:
    """Names of the low-rank update of a matrix, of its first factor (lora_a) and its second."""
    if name.endswith(".weight"):
        matrix = name.removesuffix(".weight")
        return f"{matrix}.lora_a.weight", f"{matrix}.lora_b.weight"
    return f"{name}_lora_a", f"{name}_lora_b"


def _replaced(box: Box, axis: int, size: int) -> Box:
    """The box with one axis whole and of another length."""
    start, sizes = list(box.start), list(box.size)
    start[axis], sizes[axis] = 0, size
    return Box(tuple(start), tuple(sizes))


def _group_of(key: str) -> str:
    parts: Sequence[str] = key.split(".")
    return next(group for group in _GROUPS if any(group in part for part in parts))
