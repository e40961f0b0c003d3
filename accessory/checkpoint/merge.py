"""Base and adapter as one plain checkpoint: W + scale lora_b lora_a, matrix by matrix."""

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from accessory.checkpoint.base import check_base
from accessory.checkpoint.folder import Folder, Weights, is_finite
from accessory.checkpoint.layouts import BASE, Source, own_key, written_layout
from accessory.checkpoint.write import new_checkpoint, shards_like
from accessory.config import PEFT_TYPES, ModelArgs, PeftArgs, differences, peft_from_dict
from accessory.errors import CheckpointError, first_of
from accessory.parallel.box import Box
from accessory.parallel.plan import changes, is_moved, parameter_shapes, split_of
from accessory.progress import showing
from accessory.text.form_files import has_form

logger = logging.getLogger(__name__)

BIASES = "bias"
# What stands in the keys of a group of weights; the first that does names it.
_GROUPS = (
    *(BIASES, "wq", "wk", "wv", "wo", "w1", "w2", "w3", "b1", "b2", "b3"),
    *("sinks", "norm", "gate", "tok_embeddings", "output"),
)
_WORTH_SAYING = 0.001
# Settings that say nothing of the weights.
_FREE = ("max_batch_size", "max_seq_len", "load_balancing_weight", "z_loss_weight")
# No more comes of two roundings to bfloat16; and, near zero, to float16.
_ROUNDING = {"rtol": 2**-7, "atol": 2**-24}


@dataclass
class Change:
    """How far the weights of a group have moved, in sums of squares.

    Attributes:
        moved: of the change, as the adapter asks for it.
        before: of the weights before.
        lost: of what rounding to the base's dtype left out of the change, or added to it.
        dtype: the base's.
    """

    moved: float = 0.0
    before: float = 0.0
    lost: float = 0.0
    dtype: torch.dtype = torch.float32

    def add(self, change: Tensor | None, before: Tensor, written: Tensor) -> None:
        """Count a tensor; no ``change`` is one of zero."""
        self.before += _square(before)
        self.dtype = before.dtype
        if change is not None:
            self.moved += _square(change)
            self.lost += _square(written.float() - before.float() - change)

    @property
    def share(self) -> float:
        """Norm of the change over the norm of the weights."""
        return math.sqrt(self.moved / self.before) if self.before else math.sqrt(self.moved)

    @property
    def lost_share(self) -> float:
        """Norm of what rounding lost over the norm of the change."""
        return math.sqrt(self.lost / self.moved) if self.moved else 0.0

    def __str__(self) -> str:
        text = f"moved by {self.share:.3%}"
        if self.lost_share < _WORTH_SAYING:
            return text
        return f"{text}, of which rounding to {str(self.dtype).removeprefix('torch.')} lost {self.lost_share:.1%}"


@dataclass
class MergeReport:
    """What a merge has done.

    Attributes:
        changes: of each group of weights (wq, ..., w3, norm, bias).
        biases: biases are kept; the result is then of llama_type "mistral_peft".
        untrained: the adapter changes nothing; what rounding swallows is a change.
    """

    changes: dict[str, Change] = field(default_factory=dict)
    biases: bool = False

    def change_of(self, key: str) -> Change:
        """That of the group which a key belongs to."""
        return self.changes.setdefault(group_of(key), Change())

    @property
    def untrained(self) -> bool:
        return not any(change.moved for change in self.changes.values())

    def lines(self) -> Iterator[str]:
        """For a reader; each group's change relative to its weights."""
        if self.untrained:
            yield "the adapter is untrained and changes nothing: the result is the base"
        for group in _GROUPS:
            change = self.changes.get(group)
            if change is not None and change.moved and group != BIASES:
                yield f"{group:15} {change}"
        if self.biases:
            yield f"biases          kept beside the weights: llama_type {PEFT_TYPES[0]}, lora_rank -1"


def group_of(key: str) -> str:
    """The group of weights that a key of our names belongs to."""
    return next(group for group in _GROUPS if any(group in part for part in key.split(".")))


def _square(tensor: Tensor) -> float:
    norm: float = torch.linalg.vector_norm(tensor.float()).item()
    return norm**2


def merge(
    base: str | Path,
    adapter: str | Path,
    destination: str | Path,
    *,
    to: str = BASE.name,
    llama_config: Sequence[str | Path] | None = None,
) -> MergeReport:
    """Write ``base`` with ``adapter`` merged into it, as an accessory checkpoint in as many shards as the base has.

    It is one shard where that many do not divide the experts of a sparse base.
    On CPU, one tensor after another: beside the mapped files it takes memory for a few matrices. Sums are float32;
    the result has the base's dtype. Norms that trained replace the base's. Frozen weights are the base's, whatever
    the adapter's folder holds of them: there they may be rounded to the dtype of the run.

    Args:
        to: the layout of the result, a key of `layouts.WRITTEN`.
        llama_config: config files for an adapter that has none, or to overrule it; a base without one has its sizes.

    Raises:
        CheckpointError: the adapter is of another model or base, a tensor of it has no place in the base, or a sum has
            infinities or NaN.
        ValueError: the folder has no adapter, or the base has LoRA of its own.
        FileExistsError: the destination is not empty.
        FileNotFoundError, OSError: a folder is not there; the disk is full.
    """
    theirs = Folder(adapter)
    own = Folder(base)
    args, base_args = _args_of_both(theirs, own, llama_config)
    whole_args = base_args.with_corrections() if args.owns_corrections else base_args
    layout = written_layout(to, whole_args)
    _check_pair(own, whole_args, theirs, args)
    check_base([own, theirs], args)
    assert args.peft is not None
    merger = _Merger(own.weights(base_args), theirs.weights(args, partial=True), args)
    merger.check_biases()
    merger.check_corrections()
    peft = PeftArgs(bias_tuning=True) if merger.has_biases() else None
    out_args = whole_args.replace(peft=peft)
    if peft is not None and layout.plain:
        raise ValueError(
            f"{theirs.path} has trained biases, for which {layout.name} has no place: write accessory's form"
        )
    files = shards_like(merger.base, layout, out_args)
    form = theirs if has_form(theirs.place) else own
    # A template may stand in the tokenizer's own files.
    tokenizer = next((one for one in (form, theirs, own) if one.has_tokenizer), own)
    with (
        new_checkpoint(
            *(destination, layout, out_args, tokenizer),
            held=merger.held,
            dtype=merger.dtype,
            files=files,
            form_of=form,
        ) as writer,
        showing("merging", writer.count, unit="tensors") as merging,
    ):
        writer.fill(merger.merged, merging.advance)
    report = merger.report
    report.biases = peft is not None
    if report.untrained:
        logger.warning("%s: %s", theirs.path, next(report.lines()))
    return report


def _args_of_both(
    adapter: Folder, base: Folder, llama_config: Sequence[str | Path] | None
) -> tuple[ModelArgs, ModelArgs]:
    """Sizes of adapter and base: what one of them does not say is as with the other."""
    if adapter.is_adapter_of_any:
        base_args = base.stored_args(llama_config)
        return base_args.replace(peft=peft_from_dict(adapter.adapter_settings(base_args))), base_args
    args = adapter.load_args(llama_config)
    if base.config is None:
        plain = args.replace(peft=None)
        base_args = base.with_vocabulary(plain if base.llama_type is None else plain.for_type(base.llama_type))
    else:
        base_args = base.stored_args()
    return (args.replace(vocab_size=base_args.vocab_size) if args.vocab_size == -1 else args), base_args


def _check_pair(base: Folder, base_args: ModelArgs, adapter: Folder, args: ModelArgs) -> None:
    if args.peft is None and adapter.llama_type is None:
        raise ValueError(
            f"{adapter.path} holds no adapter by its config, and has no meta.json: give a config that sets "
            "lora_rank, bias_tuning or norm_tuning"
        )
    if args.peft is None:
        raise ValueError(
            f"{adapter.path} holds no adapter: its meta.json says {adapter.llama_type!r}, not {PEFT_TYPES[0]!r} "
            "(the base's folder comes first, then the adapter's)"
        )
    if base_args.quant is not None:
        raise ValueError(
            f"{base.path} is quantized ({base_args.quant.type}), and rounding would lose much of the adapter: merge "
            "into the weights that it was made of, then quantize the result"
        )
    if base_args.peft is not None and base_args.peft.lora_rank > 0:
        raise ValueError(f"{base.path} has LoRA of its own: merge it into its own base first")
    own, below = (dataclasses.asdict(one.replace(peft=None)) for one in (args, base_args))
    values = [f"{name} {one} and {other}" for name, one, other in differences(own, below) if name not in _FREE]
    if values:
        raise CheckpointError(
            f"{adapter.path} is an adapter of another model than {base.path} ({', '.join(values)}): give the base that "
            "it was trained on"
        )


class _Merger:
    """Two opened folders, and what is counted on the way through them."""

    def __init__(self, base: Weights, adapter: Weights, args: ModelArgs) -> None:
        assert args.peft is not None
        self.base, self.adapter, self.args, self.peft = base, adapter, args, args.peft
        self.held = base.held | adapter.held
        self.report = MergeReport()

    def check_biases(self) -> None:
        """See that the base has biases only where the adapter knows of them."""
        biases = sorted(name for name in self.base.held if split_of(name).adapter == "bias")
        if biases and not self.peft.bias_tuning:
            raise CheckpointError(
                f"{self.base.folder.path} has biases ({first_of(biases, 1)}), and {self.adapter.folder.path}, whose "
                "bias_tuning is false, cannot have been trained on it: give the base that it was trained on"
            )

    def check_corrections(self) -> None:
        """See that the adapter has the correction biases that by its config are its own."""
        own = [name for name, _ in parameter_shapes(self.args) if is_moved(name, self.args)]
        lacking = next((name for name in own if name not in self.adapter.held), None)
        if lacking is not None:
            raise CheckpointError(
                f"{self.adapter.folder.path} lacks {lacking}, which its balance_tuning says is its own: copy it again"
            )

    def has_biases(self) -> bool:
        """Whether any bias is other than zero."""
        shapes = dict(parameter_shapes(self.args.replace(peft=PeftArgs(bias_tuning=True))))
        biases = [name for name in shapes if split_of(name).adapter == "bias" and name in self.held]
        return any(bool(self._stored(name, Box.whole(shapes[name])).any()) for name in biases)

    def dtype(self, target: Source) -> torch.dtype:
        held = self.base if target.parameter in self.base.held else self.adapter
        return held.dtype_of(target)

    def merged(self, target: Source, box: Box) -> Tensor:
        """A part of a tensor of the result."""
        name = target.parameter
        value = self._stored(name, box)
        before = self.base.read(name, box) if name in self.base.held else torch.zeros_like(value)
        change: Tensor | None = None
        if not self._replaces(name):
            self._check_frozen(target, box, before)
            change = self._update(name, box)
            value = before if change is None else before.float() + change
        elif torch.equal(value, before.to(value.dtype)):
            value = before  # it has not moved: the run's export has rounded it
        else:
            change = value.float() - before.float()
        if not is_moved(name, self.args):  # what is float32 always is not rounded as the base has it
            value = value.to(before.dtype)
        if change is not None and not is_finite(value):
            culprit = self.adapter if is_finite(before) else self.base
            raise CheckpointError(
                f"{culprit.folder.path}: {own_key(target)} has infinities or NaN, or gets them in {before.dtype}: copy "
                "the folder again, or take the weights of an earlier step"
            )
        self.report.change_of(own_key(target)).add(change, before, value)
        return value

    def _update(self, name: str, box: Box) -> Tensor | None:
        """What the adapter adds to a part of a matrix, float32; None: nothing."""
        lora_a, lora_b = update_of(name)
        if lora_a not in self.adapter.held:
            return None
        kind = split_of(lora_a).adapter
        rank = self.peft.rank_of(kind)
        first = self.adapter.read(lora_a, _replaced(box, -2, rank)).float()
        second = self.adapter.read(lora_b, _replaced(box, -1, rank)).float()
        return (second @ first).mul_(self.peft.scale_of(kind))

    def _replaces(self, name: str) -> bool:
        """Whether the adapter has trained this parameter itself, a norm or a bias, or balancing has moved it."""
        return name in self.adapter.held and changes(name, self.args)

    def _stored(self, name: str, box: Box) -> Tensor:
        return (self.adapter if self._replaces(name) else self.base).read(name, box)

    def _check_frozen(self, target: Source, box: Box, before: Tensor) -> None:
        """See that a frozen weight, where the adapter's folder holds it as well, is the base's but for rounding."""
        if not self.adapter.holds(target.parameter, box):
            return
        frozen = self.adapter.read(target.parameter, box)
        if not torch.allclose(frozen.float(), before.float(), **_ROUNDING, equal_nan=True):
            raise CheckpointError(
                f"{self.adapter.folder.path}: {own_key(target)}, which it has frozen, differs from that of "
                f"{self.base.folder.path}: give the base that the adapter was trained on"
            )


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
