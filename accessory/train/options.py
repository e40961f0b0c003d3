"""What a finetuning run is told: names as users' scripts have them, checked before any work; without torch."""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from accessory.arguments import Parser, add_threads_argument
from accessory.config import LORA_TARGETS, PEFT_TYPES, PeftArgs, QuantArgs
from accessory.config.layouts import EXPORT_FORMS
from accessory.config.quant import add_quant_flags, quant_of_flags
from accessory.errors import shown

Precision = Literal["bf16", "fp16", "tf32", "fp32"]
DataParallel = Literal["fsdp", "sdp", "ddp"]
RecomputePolicy = Literal["full", "moe", "none"]

# The first is far beyond any run: sizes near 2^63 overflow in PyTorch. Of a seed it takes 64 bits.
_MOST, _MOST_SEED = 2**48, 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """The options of a finetuning run; each is a flag of the command, whose help explains it."""

    data_config: str
    llama_config: tuple[str, ...] = ()
    llama_type: str | None = None
    tokenizer_path: str | None = None
    pretrained_path: tuple[str, ...] = ()
    expert_placement: str = "auto"
    quant: str | None = None
    group_size: int = 64
    quant_head: bool = False
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    lora_targets: tuple[str, ...] = ()
    bias_tuning: bool | None = None
    norm_tuning: bool | None = None
    max_words: int = 1024
    dialog: bool = False
    chat_template: str | None = None
    ignore_fields: tuple[str, ...] = ()
    skip_bad_records: bool = False
    batch_size: int = 4
    accum_iter: int = 1
    epochs: int = 1
    max_steps: int | None = None
    lr: float = 2e-5
    min_lr: float = 0.0
    warmup_epochs: float = 0.0
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    load_balancing_weight: float | None = None
    z_loss_weight: float | None = None
    seed: int = 0
    model_parallel_size: int = 1
    data_parallel: DataParallel = "sdp"
    precision: Precision = "bf16"
    grad_ckpt_policy: RecomputePolicy = "none"
    device: str | None = None
    output_dir: str = "./output_dir"
    save_interval: int = 1
    save_iteration_interval: int = 5000
    keep_last: int = 2
    keep_models: int | None = None
    only_save_trainable: bool = False
    export_form: str = EXPORT_FORMS[0]
    resume: str | None = None
    auto_resume: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            *(("batch_size", 1), ("accum_iter", 1), ("epochs", 1), ("max_steps", 1), ("max_words", 3)),
            *(("model_parallel_size", 1), ("save_interval", 1), ("save_iteration_interval", 0), ("keep_last", 1)),
            ("keep_models", 1),
            *(("lr", 0), ("min_lr", 0), ("warmup_epochs", 0), ("weight_decay", 0), ("seed", 0)),
            *(("load_balancing_weight", 0), ("z_loss_weight", 0), ("clip_grad", -math.inf)),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            whole = isinstance(value, int)  # of any size, where isfinite wants a float's
            if not ((whole or math.isfinite(value)) and value >= least):
                fit = f"{least} or more" if whole or math.isfinite(value) else "a finite number"
                raise ValueError(f"--{name} is {shown(value)}: give {fit}")
            if whole and value > (most := _MOST_SEED if name == "seed" else _MOST):
                raise ValueError(f"--{name} is {shown(value)}: give {most} at most")
        quant_of_flags(self.quant, group_size=self.group_size, head=self.quant_head)
        self._check_adapters()
        if self.min_lr > self.lr:
            raise ValueError(f"--min_lr {self.min_lr} is above --lr {self.lr}")
        for name in (
            "data_config",
            "llama_config",
            "tokenizer_path",
            "pretrained_path",
            "output_dir",
            "resume",
            "chat_template",
        ):
            given = getattr(self, name)
            if given == "" or (isinstance(given, tuple) and "" in given):
                raise ValueError(f"--{name} is given an empty name: is a variable of your script not set?")
        try:
            self.output_dir.encode()
        except UnicodeEncodeError as error:  # PyTorch would find it out when the first model is written
            raise ValueError(f"--output_dir {self.output_dir!r} is not UTF-8: give another name") from error

    def _check_adapters(self) -> None:
        given = self.adapters
        try:
            PeftArgs(**given)
        except ValueError as error:  # it begins with the setting's name
            raise ValueError(f"--{error}") from None
        if given and self.llama_type is not None and self.llama_type not in PEFT_TYPES:
            raise ValueError(
                f"--{next(iter(given))} is about adapters, which --llama_type {self.llama_type} does not have: leave "
                "--llama_type out"
            )

    @classmethod
    def parse(cls, arguments: Sequence[str] | None = None) -> Self:
        """Read the command line.

        Raises:
            ValueError: a value out of range, or an option that this version cannot serve.
        """
        return cls.of(finetune_parser().parse_args(arguments))

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Self:
        """What a parser with the flags of `add_finetune_flags` has read; ValueError as above."""
        given = dict(vars(arguments))
        checkpointing = given.pop("checkpointing")
        if given["grad_ckpt_policy"] is None:
            given["grad_ckpt_policy"] = "full" if checkpointing else "none"
        fields = {field.name for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
        }
        return cls(**{name: value for name, value in values.items() if name in fields})

    @property
    def quant_args(self) -> QuantArgs | None:
        """How the frozen weights are quantized; None: as they are stored."""
        return quant_of_flags(self.quant, group_size=self.group_size, head=self.quant_head)

    @property
    def adapters(self) -> dict[str, Any]:
        """What is said of adapters, by the keys of config.json, over whose files it rules."""
        names = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "bias_tuning", "norm_tuning")
        return {name: value for name in names if (value := getattr(self, name)) not in (None, ())}

    @property
    def asks_for_adapters(self) -> bool:
        """Whether a flag alone says that adapters are to train, and not only how."""
        return (self.lora_rank or 0) > 0 or self.bias_tuning is True or self.norm_tuning is True

    @property
    def checkpoints(self) -> Path:
        """Where the training states lie."""
        return Path(self.output_dir).absolute() / "checkpoints"


class ToldDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help with the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False or action.default == ()
        return action.help if says_nothing else super()._get_help_string(action)


def add_finetune_flags(parser: Parser) -> None:
    """Give a parser the flags of a run, for `FinetuneOptions.of`; a flag that is not given has the field's default."""
    parser.usage = "%(prog)s --data_config YAML [--pretrained_path FOLDER] [OPTIONS]   (--help lists them)"
    parser.needed.append(("--pretrained_path", "--llama_config"))
    _add_model_flags(parser.add_argument_group("model"))
    _add_adapter_flags(parser.add_argument_group("adapters"))
    _add_data_flags(parser.add_argument_group("data"))
    _add_optimizer_flags(parser.add_argument_group("optimization"))
    _add_parallel_flags(parser.add_argument_group("parallelism and memory"))
    _add_output_flags(parser.add_argument_group("output"))
    defaults = {field.name: field.default for field in dataclasses.fields(FinetuneOptions)}
    del defaults["data_config"], defaults["grad_ckpt_policy"]  # the one is required, --checkpointing sets the other
    parser.set_defaults(**defaults)


def finetune_parser() -> argparse.ArgumentParser:
    """The parser of main_finetune.py."""
    parser = Parser(
        prog="main_finetune.py",
        description="Finetune a Mixtral checkpoint, alone or started by torchrun or srun on many ranks.",
        formatter_class=ToldDefaults,
    )
    add_finetune_flags(parser)
    return parser


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--llama_type", help="architecture; by default what the checkpoint's meta.json says")
    group.add_argument("--llama_config", nargs="+", help="config files, merged, the last rules")
    group.add_argument("--tokenizer_path", help="a tokenizer's file, or a folder with one")
    help_text = "checkpoint folders, later ones overlay earlier ones; none: train from nothing"
    group.add_argument("--pretrained_path", nargs="+", help=help_text)
    group.add_argument("--pretrained_type", choices=["consolidated"], help="accepted; the form is recognised")
    group.add_argument("--no_visual", action="store_true", help="accepted; Mixtral reads no images")
    add_quant_flags(group)


def _add_adapter_flags(group: argparse._ArgumentGroup) -> None:
    help_text = "train low-rank updates (LoRA) of this width above frozen weights, and nothing else unless asked for"
    group.add_argument("--lora_rank", type=int, metavar="R", help=help_text)
    group.add_argument("--lora_alpha", type=float, metavar="A", help="the updates are scaled by A / R; by default R")
    group.add_argument("--lora_dropout", type=float, metavar="P", help="share of an update's inputs that is set to 0")
    help_text, names = "matrices that get updates (default: both)", "|".join(LORA_TARGETS)
    group.add_argument("--lora_targets", nargs="+", choices=LORA_TARGETS, metavar=names, help=help_text)
    for name, what in (("bias_tuning", "a bias for every matrix"), ("norm_tuning", "the norms")):
        help_text = f"train {what}"
        group.add_argument(f"--{name}", nargs="?", const=True, type=_truth, metavar="true|false", help=help_text)
        help_text = f"do not {help_text}"
        group.add_argument(f"--no_{name}", f"--no-{name}", dest=name, action="store_false", help=help_text)


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} given: give true or false")
    return text.lower() == "true"


def _add_data_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--data_config", required=True, help="yaml file that lists the data files")
    group.add_argument("--dialog", action="store_true", help="records are dialogues; Alpaca records are refused")
    help_text = (
        "form of all prompts: default, alpaca, mixtral-instruct, a template's file, or model for the checkpoint's own "
        "template (default: dialogues in the default form, Alpaca records in theirs)"
    )
    group.add_argument("--chat_template", "--chat-template", metavar="NAME|FILE", help=help_text)
    help_text = "fields of records to pass over, separated by commas"
    group.add_argument("--ignore_fields", type=_names, metavar="A,B", help=help_text)
    group.add_argument("--max_words", type=int, help="tokens of an example at most; the rest is cut")
    group.add_argument("--skip_bad_records", action="store_true", help="leave bad records out, and list them")
    group.add_argument("--cache_ann_on_disk", action="store_true", help="accepted; tokens always lie in mapped files")
    group.add_argument("--num_workers", type=int, help="accepted; mapped files need no workers")
    group.add_argument("--pin_mem", action="store_true", help="accepted; batches are small")
    group.add_argument("--no_pin_mem", action="store_true", help="accepted; batches are small")


def _names(text: str) -> list[str]:
    return [name for name in map(str.strip, text.split(",")) if name]


def _add_optimizer_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--batch_size", type=int, help="examples of a data-parallel rank's micro-batch")
    group.add_argument("--accum_iter", type=int, help="micro-batches of an optimizer step")
    group.add_argument("--epochs", type=int, help="passes over the data")
    group.add_argument("--max_steps", type=int, help="end after so many optimizer steps; the schedule follows --epochs")
    group.add_argument("--lr", type=float, help="highest learning rate")
    group.add_argument("--min_lr", type=float, help="learning rate at the end")
    group.add_argument("--warmup_epochs", type=float, help="epochs, or a part of one, until --lr")
    group.add_argument("--weight_decay", type=float, help="of AdamW, for matrices")
    group.add_argument("--clip_grad", type=float, help="limit of the gradients' norm; 0 or less: off")
    group.add_argument("--load_balancing_weight", type=float, help="in place of the config's")
    group.add_argument("--z_loss_weight", type=float, help="weight of the router's z-loss, in place of the config's")
    group.add_argument("--seed", type=int, help="of the data order, of dropout and of new weights")


def _add_parallel_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model_parallel_size", type=int, help="ranks that hold one model together")
    help_text = "fsdp: all sharded; sdp: parameters kept from forward to backward; ddp: whole on every rank"
    group.add_argument("--data_parallel", choices=get_args(DataParallel), help=help_text)
    group.add_argument("--expert_placement", help="auto, expert or tensor")
    help_text = "of the products; weights and optimizer are float32"
    group.add_argument("--precision", choices=get_args(Precision), help=help_text)
    group.add_argument("--checkpointing", action="store_true", help="the same as --grad_ckpt_policy full")
    help_text = "what is computed again in the backward pass: full (each block), moe (its experts), none"
    group.add_argument("--grad_ckpt_policy", choices=get_args(RecomputePolicy), help=help_text)
    group.add_argument("--device", choices=["cpu", "cuda"], help="by default CUDA where every rank has a card")
    add_threads_argument(group)


def _add_output_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--output_dir", help="folder of the run, shared by all hosts")
    group.add_argument("--save_interval", type=int, help="epochs between saves")
    help_text = "micro-batches between saves within an epoch; 0: none"
    group.add_argument("--save_iteration_interval", type=int, help=help_text)
    group.add_argument("--keep_last", type=int, help="training states, and models of within an epoch, that stay")
    help_text = "models of epochs' ends that stay, the newest (default: all)"
    group.add_argument("--keep_models", type=int, metavar="N", help=help_text)
    help_text = f"form of the models: {', '.join(EXPORT_FORMS[:-1])} or {EXPORT_FORMS[-1]}, which others load"
    group.add_argument("--export_form", choices=EXPORT_FORMS, metavar="FORM", help=help_text)
    group.add_argument("--only_save_trainable", action="store_true", help="leave frozen weights out")
    group.add_argument("--resume", help="training state, or output_dir of another run, to go on from")
    group.add_argument("--auto_resume", action="store_true", help="go on from output_dir's last state, if there is one")
