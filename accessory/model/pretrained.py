"""What from_pretrained is to load, worked out from folders and arguments before any weight is read."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from accessory.checkpoint.base import check_base
from accessory.checkpoint.folder import Folder, config_files
from accessory.checkpoint.hub import local_path
from accessory.checkpoint.layouts import load_args
from accessory.checkpoint.loader import load_parameters
from accessory.checkpoint.quantize import matrix_boxes, measure_rows
from accessory.config import PEFT_TYPES, ModelArgs, QuantArgs
from accessory.errors import unknown
from accessory.model.factory import build_transformer
from accessory.model.lora import begin_adapters
from accessory.model.transformer import Transformer
from accessory.parallel.box import Box
from accessory.parallel.plan import local_boxes, matrix_of, split_of
from accessory.parallel.state import ParallelState, Ranks, agreed
from accessory.quant import shown_quantized
from accessory.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Names that checkpoints carry for the Transformer, and for that with adapters. Its family stands in the config, and
# base and sparse differ in the layout of their files only, which the reader recognises by itself.
LLAMA_TYPES = ("mistral", "mixtral", "mistral_sparse", "mixtral_sparse", *PEFT_TYPES)

Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A checkpoint, its sizes and its tokenizer, checked against one another.

    Attributes:
        folders: in the order in which they overlay one another.
        args: sizes, with the vocabulary and the context length settled, and how matrices are (to be) quantized.
        begins_corrections: the routers' correction biases are in no folder, and begin at 0.
    """

    folders: tuple[Folder, ...]
    llama_type: str
    args: ModelArgs
    tokenizer: Tokenizer
    begins_corrections: bool = False

    @classmethod
    def resolve(
        cls,
        pretrained_path: Paths,
        *,
        llama_type: str | None = None,
        llama_config: Paths | None = None,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int = 4096,
        quant: QuantArgs | None = None,
        adapters: Mapping[str, Any] | None = None,
    ) -> "Pretrained":
        """Find what is not given in the last folder.

        Args:
            pretrained_path: what of it lies on the Hub is downloaded.
            quant: how to quantize; None: as the folders are.
            adapters: keys about adapters, which rule over the config files.

        Raises:
            FileNotFoundError, CheckpointError, ValueError, OSError: naming the folder, file or setting.
        """
        folders = tuple(Folder(path) for path in _several(pretrained_path, "pretrained_path"))
        # Above whatever base it is put, an adapter of peft's has neither sizes nor a type, and perhaps no tokenizer.
        last = next((folder for folder in reversed(folders) if not folder.is_adapter_of_any), folders[-1])
        configs = None if llama_config is None else _several(llama_config, "llama_config")
        for folder in folders:
            if folder.is_adapter_of_any:
                adapters = {**folder.adapter_settings(last.load_args(configs)), **(adapters or {})}
                llama_type = llama_type or PEFT_TYPES[0]
        llama_type = _known_type(llama_type if llama_type is not None else last.llama_type or None)
        args = _quantized(last.load_args(configs, llama_type, adapters), quant, folders)
        beside = next((folder for folder in (folders[-1], last) if folder.has_tokenizer), last)
        tokenizer = Tokenizer(
            _find_tokenizer(beside.place) if tokenizer_path is None else _one(tokenizer_path),
            beside=[folder.place for folder in folders],
        )
        if args.vocab_size == -1:
            args = args.replace(vocab_size=_vocabulary(folders, args, tokenizer))
        args = _settle(args, tokenizer, max_seq_len)
        check_base(folders, args)
        return cls(folders=folders, llama_type=llama_type, args=args, tokenizer=tokenizer)

    @classmethod
    def untrained(
        cls,
        *,
        llama_type: str | None = None,
        llama_config: Paths | None = None,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int = 4096,
        quant: QuantArgs | None = None,
        adapters: Mapping[str, Any] | None = None,
    ) -> "Pretrained":
        """The same for a model that is trained from nothing: no folders, everything given.

        Raises:
            FileNotFoundError, ValueError: naming the file or setting.
        """
        if llama_config is None or tokenizer_path is None:
            missing = "llama_config" if llama_config is None else "tokenizer_path"
            raise ValueError(f"{missing} is not given: a model without a pretrained_path needs it")
        if quant is not None:
            raise ValueError("quantization was asked for without a pretrained_path: there are no weights to quantize")
        llama_type = _known_type(llama_type)
        args = load_args(config_files(_several(llama_config, "llama_config")), llama_type, adapters)
        tokenizer = Tokenizer(_one(tokenizer_path))
        args = _settle(args, tokenizer, max_seq_len)
        return cls(folders=(), llama_type=llama_type, args=args, tokenizer=tokenizer)

    def with_corrections(self) -> "Pretrained":
        """The same with routers whose correction biases balancing moves."""
        begins = self.begins_corrections or not self.args.moe.router.correction
        return dataclasses.replace(self, args=self.args.with_corrections(), begins_corrections=begins)

    @property
    def stored_args(self) -> ModelArgs:
        """The sizes of what the folders hold."""
        return self.args.without_corrections() if self.begins_corrections else self.args

    @property
    def paths(self) -> list[Path]:
        """Where the folders lie; of a GGUF file that was named, this file."""
        return [folder.place for folder in self.folders]

    def stored_dtype(self) -> torch.dtype:
        """The dtype of the weights on disk (of the first tensor of the first file)."""
        return self.folders[0].stored_dtype()


def load_transformer(
    pretrained: Pretrained, state: ParallelState, *, dtype: torch.dtype, expert_placement: str = "auto"
) -> Transformer:
    """Build this rank's part of a model and read its weights; collective over the model-parallel ranks.

    Raises:
        CheckpointError, FileNotFoundError, ValueError: as `MetaModel.from_pretrained`.
    """

    n_tokens, gaps = pretrained.tokenizer.n_words, pretrained.tokenizer.gaps

    def build() -> Transformer:
        llma = build_transformer(
            pretrained.args, state, expert_placement=expert_placement, dtype=dtype, n_tokens=n_tokens
        )
        llma.leave_out(gaps)
        return llma

    # Parameters made in a caller's inference_mode could never be trained.
    with torch.inference_mode(False), torch.no_grad():
        # Paths may differ between hosts; what was found there must not.
        llma = agreed(state, build, (pretrained.args, n_tokens, gaps, dtype, expert_placement))
        boxes = local_boxes(llma.args, state, placement=llma.placement)
        fill_parameters(dict(llma.named_parameters()), boxes, pretrained, state)
    return llma


def fill_parameters(
    parameters: Mapping[str, Tensor],
    boxes: Mapping[str, Box],
    pretrained: Pretrained,
    state: ParallelState,
    *,
    everyone: Ranks | None = None,
    seed: int = 0,
) -> None:
    """Read a rank's parameters, as `load_parameters` does; adapters that no folder holds begin untrained.

    Correction biases that begin are left as they are. Collective over ``everyone``, to whom an error on any rank is
    raised.

    Args:
        everyone: all ranks that load; None: those of ``state``.
        seed: of adapters that begin.
    """
    folders, args = pretrained.folders, pretrained.stored_args
    everyone = everyone or state.mp
    if pretrained.begins_corrections:
        boxes = {name: box for name, box in boxes.items() if split_of(name).kind != "correction"}
    maxima = agreed(everyone, lambda: measure_rows(boxes, folders, args))
    if maxima and state.mp_group is not None:
        rows = torch.cat(list(maxima.values())).to(state.device)
        dist.all_reduce(rows, dist.ReduceOp.MAX, group=state.mp_group)
        maxima = dict(zip(maxima, rows.split([own.numel() for own in maxima.values()]), strict=True))
    absent = agreed(everyone, lambda: load_parameters(parameters, boxes, folders, args, state, maxima))
    agreed(everyone, lambda: begin_adapters(parameters, boxes, absent, args, seed=seed))
    if args.quant is not None and everyone.is_first:
        logger.info("%s", _describe_quantized(parameters, boxes, args))
    if absent and everyone.is_first:
        paths = ", ".join(str(folder.path) for folder in folders)
        logger.info(
            "%s: no adapter there for %d parameters (%s, ...): they begin untrained", paths, len(absent), absent[0]
        )


def _describe_quantized(parameters: Mapping[str, Tensor], boxes: Mapping[str, Box], args: ModelArgs) -> str:
    assert args.quant is not None
    weights = sum(box.numel for box in matrix_boxes(boxes, args).values())
    own = sum(tensor.nbytes for name, tensor in parameters.items() if matrix_of(name)[1])
    return f"{args.quant.matrices} in {args.quant.type}: on this rank {shown_quantized(own, weights)}"


def _quantized(args: ModelArgs, asked: QuantArgs | None, folders: Sequence[Folder]) -> ModelArgs:
    """The arguments with the quantization that was asked for, or that the folders have."""
    found = args.quant
    for folder in folders:
        stored = folder.load_quant()
        if stored is not None and (asked or found or stored) != stored:
            wanted = (asked or found or stored).to_dict()
            raise ValueError(
                f"{folder.path} is quantized already, {stored.to_dict()}, and cannot become {wanted}: "
                "leave quant out, or load the weights that it was made of"
            )
        found = found or stored
    return args.replace(quant=asked or found)


def _known_type(llama_type: str | None) -> str:
    if llama_type is None:
        return LLAMA_TYPES[0]
    if llama_type not in LLAMA_TYPES:
        raise ValueError(unknown("llama_type", llama_type, LLAMA_TYPES))
    return llama_type


def _vocabulary(folders: Sequence[Folder], args: ModelArgs, tokenizer: Tokenizer) -> int:
    """Rows of an embedding whose config leaves them open: as many as it has, where these are enough."""
    rows = (folder.embedding_rows(args) for folder in reversed(folders))
    return max(next((found for found in rows if found is not None), 0), tokenizer.n_words)


def _settle(args: ModelArgs, tokenizer: Tokenizer, max_seq_len: int) -> ModelArgs:
    """The sizes with the vocabulary and the context length that the model will have.

    Raises:
        ValueError: a tokenizer with more tokens than the embedding has rows, or a context length below 3 or beyond
            the model's window.
    """
    vocab_size = tokenizer.n_words if args.vocab_size == -1 else args.vocab_size
    if vocab_size < tokenizer.n_words:
        raise ValueError(
            f"tokenizer {tokenizer.path} has {tokenizer.n_words} tokens, the model's vocab_size is only "
            f"{vocab_size}: they belong to different models"
        )
    if not isinstance(max_seq_len, int) or isinstance(max_seq_len, bool) or max_seq_len < 3:
        raise ValueError(f"max_seq_len must be a whole number of at least 3, not {max_seq_len!r}")
    if args.sliding_window is not None and max_seq_len > args.sliding_window:
        raise ValueError(
            f"the config's sliding_window is {args.sliding_window}, and attention here has no window: give a "
            f"max_seq_len of {args.sliding_window} at most (now {max_seq_len}), or a config without it where the model "
            "was trained without"
        )
    return args.replace(vocab_size=vocab_size, max_seq_len=max_seq_len)


def _several(paths: Paths, setting: str) -> list[str | Path]:
    listed: list[Any] = [paths]
    if isinstance(paths, Iterable) and not isinstance(paths, str | Mapping):
        listed = list(paths)
    # An empty name, of a variable that is not set, would be the current folder.
    if not listed or not all(isinstance(path, str | Path) and str(path) for path in listed):
        raise ValueError(f"{setting} must be a path or a list of paths, not {paths!r}")
    return listed


def _one(tokenizer_path: Any) -> Path:
    if not isinstance(tokenizer_path, str | Path) or not str(tokenizer_path):
        raise ValueError(f"tokenizer_path must be a path, not {tokenizer_path!r}")
    return local_path(tokenizer_path, weights=False)


def _find_tokenizer(folder: Path) -> Path:
    found = Tokenizer.find(folder)
    if found is None:
        raise FileNotFoundError(
            f"{folder} has no tokenizer.model (nor tokenizer.json): copy it there, or name it (tokenizer_path)"
        )
    return found
