"""What a finetuning run is told: names as users' scripts have them, checked before any work; without torch."""

# ruff: noqa: RUF009  (_option makes a field)

import argparse
import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

from accessory.arguments import Parser, add_threads_argument
from accessory.config import LORA_TARGETS, PEFT_TYPES, PeftArgs, QuantArgs
from accessory.config.layouts import EXPORT_FORMS
from accessory.config.quant import add_quant_flags, quant_of_flags
from accessory.errors import nearest, shown
from accessory.train.schedule import SCHEDULES
from accessory.train.trackers import TRACKERS

Precision = Literal["bf16", "fp16", "tf32", "fp32"]
DataParallel = Literal["fsdp", "sdp", "ddp"]
RecomputePolicy = Literal["full", "moe", "none"]
OptimizerName = Literal["adamw", "adamw8bit", "muon"]

# The first is far beyond any run: sizes near 2^63 overflow in PyTorch. Of a seed it takes 64 bits.
_MOST, _MOST_SEED = 2**48, 2**64 - 1


def _option(
    group: str,
    default: Any,
    text: str,
    *,
    least: float | None = None,
    most: int = _MOST,
    known: Sequence[str] = (),
    **arguments: Any,
) -> Any:
    """A field that is a flag of its name; its type says how the flag is read.

    Args:
        group: heading of --help under which it stands.
        text: its help.
        least, most: bounds of a number.
        known: names that may be given, where argparse cannot be told its ``choices``.
        arguments: what argparse is told besides; ``flags``: other spellings.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "group": group,
            "help": text,
            "least": least,
            "most": most,
            "known": known or arguments.get("choices"),
            "arguments": arguments,
        },
    )


def _truth(text: str) -> bool:
    said = {"true": True, "yes": True, "false": False, "no": False}.get(text.lower())
    if said is None:
        raise argparse.ArgumentTypeError(f"{text!r} given: give true or false")
    return said


def _names(text: str) -> list[str]:
    return [name for name in map(str.strip, text.split(",")) if name]


def _count_or_auto(text: str) -> int | str:
    if text == "auto" or re.fullmatch(r"-?\d+", text):
        return text if text == "auto" else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} given: give a whole number, or auto")


def _ranks(text: str) -> dict[str, int]:
    pairs = [name.partition("=") for name in _names(text)]
    if not pairs or not all(name and rank.isdecimal() for name, _, rank in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} given: give names and ranks, as in attention=64,experts=8")
    return {name: int(rank) for name, _, rank in pairs}


_model, _adapter, _data = partial(_option, "model"), partial(_option, "adapters"), partial(_option, "data")
_steps, _parallel = partial(_option, "optimization"), partial(_option, "parallelism and memory")
_validation, _output = partial(_option, "validation"), partial(_option, "output")


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """The options of a finetuning run: each is declared here once, and is a flag, a check and a row of the docs."""

    llama_type: str | None = _model(None, "architecture; by default what the checkpoint's meta.json says")
    llama_config: tuple[str, ...] = _model((), "config files, merged, the last rules")
    tokenizer_path: str | None = _model(None, "a tokenizer's file, or a folder with one")
    pretrained_path: tuple[str, ...] = _model(
        (), "checkpoint folders, later ones overlay earlier ones; none: train from nothing"
    )
    # Their flags are those of all commands (add_quant_flags).
    quant: str | None = None
    group_size: int = 64
    quant_head: bool = False

    lora_rank: int | None = _adapter(
        None,
        "train low-rank updates (LoRA) of this width above frozen weights, and nothing else unless asked for",
        metavar="R",
    )
    lora_ranks: dict[str, int] | None = _adapter(
        None,
        "widths of some matrices' updates, by names of --lora_targets",
        type=_ranks,
        metavar="attention=64,experts=8",
    )
    lora_alpha: float | None = _adapter(None, "the updates are scaled by A / R; by default R", metavar="A")
    rslora: bool | None = _adapter(None, "scale the updates by A / sqrt(R)")
    lora_dropout: float | None = _adapter(None, "share of an update's inputs that is set to 0", metavar="P")
    lora_targets: tuple[str, ...] = _adapter(
        (),
        "matrices that get updates; experts are all of feed-forward parts (default: attention experts)",
        choices=LORA_TARGETS,
        metavar="|".join(LORA_TARGETS),
    )
    bias_tuning: bool | None = _adapter(None, "train a bias for every matrix")
    norm_tuning: bool | None = _adapter(None, "train the norms")

    data_config: str = _data(MISSING, "yaml file that lists the data files")
    dialog: bool = _data(False, "records are dialogues; Alpaca records are refused")
    chat_template: str | None = _data(
        None,
        "form of all prompts: default, alpaca, mixtral-instruct, a template's file, or model for the checkpoint's own "
        "template (default: dialogues in the default form, Alpaca records in theirs)",
        metavar="NAME|FILE",
        flags=("--chat-template",),
    )
    ignore_fields: tuple[str, ...] = _data(
        (), "fields of records to pass over, separated by commas", type=_names, nargs=None, metavar="A,B"
    )
    max_words: int = _data(1024, "tokens of an example at most; the rest is cut", least=3)
    skip_bad_records: bool = _data(False, "leave bad records out, and list them")
    packing: bool = _data(
        False, "several examples share a row of --max_words tokens, none of them cut and each seeing itself alone"
    )

    batch_size: int = _steps(
        4, "rows of a data-parallel rank's micro-batch, each an example, or with --packing several", least=1
    )
    accum_iter: int = _steps(1, "micro-batches of an optimizer step", least=1)
    epochs: int = _steps(1, "passes over the data", least=1)
    max_steps: int | None = _steps(
        None, "end after so many optimizer steps; all schedules but wsd follow --epochs", least=1
    )
    lr: float = _steps(2e-5, "highest learning rate", least=0)
    min_lr: float = _steps(0.0, "learning rate at the end", least=0)
    warmup_epochs: float = _steps(0.0, "epochs, or a part of one, until --lr", least=0)
    schedule: str = _steps(
        "cosine",
        f"how the rate falls from --lr to --min_lr: {', '.join(SCHEDULES)} (stays, and falls at the run's end)",
        choices=tuple(SCHEDULES),
        metavar="NAME",
    )
    decay_steps: int | None = _steps(
        None, "optimizer steps at the run's end over which wsd falls (default: a tenth of all)", least=1, metavar="N"
    )
    optimizer: OptimizerName = _steps(
        "adamw",
        "adamw; adamw8bit: the same with states of a byte for each number; muon: that for the matrices of attention, "
        "experts and adapters, adamw for all else",
    )
    weight_decay: float = _steps(0.0, "of all but norms and biases", least=0)
    train_router: bool | None = _steps(None, "train the routers (default: yes, but beside adapters no)")
    lr_router: float | None = _steps(None, "the routers' highest learning rate, in place of --lr", least=0)
    lr_embeddings: float | None = _steps(None, "the same of the token embeddings", least=0)
    lora_plus: float | None = _steps(
        None, "LoRA+: how many times --lr the rate of the updates' second factor (lora_b) is", least=0, metavar="RATIO"
    )
    clip_grad: float = _steps(1.0, "limit of the gradients' norm; 0 or less: off", least=-math.inf)
    load_balancing_weight: float | None = _steps(None, "in place of the config's", least=0)
    z_loss_weight: float | None = _steps(None, "weight of the router's z-loss, in place of the config's", least=0)
    bias_update_rate: float = _steps(
        0.0,
        "balance without a loss: after each step an expert's bias in the choice rises by R where it had less than the "
        "mean load, and else falls; 0: off (DeepSeek-V3 takes 0.001)",
        least=0,
        metavar="R",
    )
    seed: int = _steps(0, "of the data order, of dropout and of new weights", least=0, most=_MOST_SEED)

    model_parallel_size: int = _parallel(1, "ranks that hold one model together", least=1)
    expert_parallel_size: int | Literal["auto"] = _parallel(
        1,
        "data-parallel ranks over which the experts of a layer are spread, to which tokens travel; auto: as many as "
        "accessory plan would choose",
        least=1,
        type=_count_or_auto,
        metavar="N|auto",
    )
    data_parallel: DataParallel = _parallel(
        "sdp", "fsdp: all sharded; sdp: parameters kept from forward to backward; ddp: whole on every rank"
    )
    expert_placement: str = _parallel("auto", "auto, expert or tensor")
    precision: Precision = _parallel("bf16", "of the products; weights and optimizer are float32")
    grad_ckpt_policy: RecomputePolicy = _parallel(
        "none", "what is computed again in the backward pass: full (each block), moe (its experts), none"
    )
    device: str | None = _parallel(None, "by default CUDA where every rank has a card", choices=("cpu", "cuda"))

    eval_data_config: str | None = _validation(
        None, "yaml file of the held-out data, on which loss, perplexity and token accuracy are measured"
    )
    eval_ratio: float | None = _validation(
        None, "share of --data_config's records that is held back for that, the same in every run", metavar="R"
    )
    eval_interval: int | None = _validation(
        None, "optimizer steps between evaluations (default: those of an epoch); the last step has one", least=1
    )
    eval_first: bool = _validation(False, "evaluate before the first step too")
    keep_best: bool = _validation(False, "keep the model of the lowest held-out loss in output_dir/best")
    early_stop: int | None = _validation(
        None, "end after so many evaluations in a row without a lower loss", least=1, metavar="N"
    )

    output_dir: str = _output("./output_dir", "folder of the run, shared by all hosts")
    log_to: tuple[str, ...] = _output(
        ("tensorboard",),
        f"where the numbers of log.jsonl go as well, separated by commas: {', '.join(TRACKERS)} (default: tensorboard)",
        type=_names,
        nargs=None,
        known=tuple(TRACKERS),
        metavar="A,B",
    )
    save_interval: int = _output(1, "epochs between saves", least=1)
    save_iteration_interval: int = _output(5000, "micro-batches between saves within an epoch; 0: none", least=0)
    keep_last: int = _output(2, "training states, and models of within an epoch, that stay", least=1)
    keep_models: int | None = _output(
        None, "models of epochs' ends that stay, the newest (default: all)", least=1, metavar="N"
    )
    only_save_trainable: bool = _output(False, "leave frozen weights out")
    export_form: str = _output(
        EXPORT_FORMS[0],
        f"form of the models: {', '.join(EXPORT_FORMS[:-1])} or {EXPORT_FORMS[-1]}, which others load",
        choices=EXPORT_FORMS,
        metavar="FORM",
    )
    resume: str | None = _output(None, "training state, or output_dir of another run, to go on from")
    auto_resume: bool = _output(False, "go on from output_dir's last state, if there is one")

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            if option.metadata.get("least") is not None and getattr(self, option.name) != "auto":
                _check_bounds(option, getattr(self, option.name))
            _check_known(option, getattr(self, option.name))
        quant_of_flags(self.quant, group_size=self.group_size, head=self.quant_head)
        self._check_adapters()
        self._check_validation()
        self._check_schedule()
        for option in dataclasses.fields(self):
            given = getattr(self, option.name)
            if given == "" or (isinstance(given, tuple) and "" in given):
                raise ValueError(f"--{option.name} is given an empty name: is a variable of your script not set?")
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
        if self.train_router is False and "router" in self.lora_targets:
            raise ValueError("--lora_targets router trains updates of routers, and --train_router no none: give one")

    def _check_schedule(self) -> None:
        if self.min_lr > self.lr:
            raise ValueError(f"--min_lr {self.min_lr} is above --lr {self.lr}")
        if self.train_router is False and self.lr_router is not None:
            raise ValueError("--lr_router is a rate of routers, which --train_router no leaves as they are: give one")
        for name in ("lr_router", "lr_embeddings"):
            if getattr(self, name) is not None and self.lr == 0:
                raise ValueError(f"--{name} follows the schedule of --lr, which is 0: give --lr a rate")
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ValueError(f"--decay_steps is about --schedule wsd, and it is {self.schedule}: leave it out")

    def _check_validation(self) -> None:
        if self.eval_ratio is not None and not 0 < self.eval_ratio < 1:
            raise ValueError(f"--eval_ratio is {self.eval_ratio}: give a share of the records over 0 and below 1")
        if self.eval_ratio is not None and self.eval_data_config is not None:
            raise ValueError("--eval_ratio holds back records and --eval_data_config names others: give one of them")
        if not self.evaluates:
            for name in ("eval_interval", "eval_first", "keep_best", "early_stop"):
                if getattr(self, name):
                    raise ValueError(f"--{name} needs held-out data: give --eval_ratio 0.01 or --eval_data_config YAML")

    @property
    def evaluates(self) -> bool:
        """Whether there are held-out data."""
        return self.eval_data_config is not None or self.eval_ratio is not None

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
        names = [
            key.name for key in dataclasses.fields(PeftArgs) if hasattr(self, key.name)
        ]  # others training alone says
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
        says_nothing |= "(default" in (action.help or "")
        return action.help if says_nothing else super()._get_help_string(action)


def add_finetune_flags(parser: Parser) -> None:
    """Give a parser the flags of a run, for `FinetuneOptions.of`; a flag that is not given has the field's default."""
    parser.usage = "%(prog)s --data_config YAML [--pretrained_path FOLDER] [OPTIONS]   (--help lists them)"
    parser.needed.append(("--pretrained_path", "--llama_config"))
    options = dataclasses.fields(FinetuneOptions)
    for heading in dict.fromkeys(option.metadata["group"] for option in options if option.metadata):
        group = parser.add_argument_group(heading)
        for option in options:
            if option.metadata.get("group") == heading:
                _add_flag(group, option)
        for name, (where, settings) in _BESIDE.items():
            if where == heading:
                group.add_argument(f"--{name}", **settings)
        if heading == "model":
            add_quant_flags(group)
        elif heading == "parallelism and memory":
            add_threads_argument(group)
    defaults = {option.name: option.default for option in options if option.default is not MISSING}
    parser.set_defaults(**defaults | {"grad_ckpt_policy": None})  # which --checkpointing may set as well


def finetune_parser() -> argparse.ArgumentParser:
    """The parser of main_finetune.py."""
    parser = Parser(
        prog="main_finetune.py",
        description="Finetune a Mixture-of-Experts checkpoint, alone or started by torchrun or srun on many ranks.",
        formatter_class=ToldDefaults,
    )
    add_finetune_flags(parser)
    return parser


# Flags that are no options of their own, each with its group.
_BESIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "pretrained_type": ("model", {"choices": ["consolidated"], "help": "accepted; the form is recognised"}),
    "no_visual": ("model", {"action": "store_true", "help": "accepted; these models read no images"}),
    "cache_ann_on_disk": ("data", {"action": "store_true", "help": "accepted; tokens always lie in mapped files"}),
    "num_workers": ("data", {"type": int, "help": "accepted; mapped files need no workers"}),
    "pin_mem": ("data", {"action": "store_true", "help": "accepted; batches are small"}),
    "no_pin_mem": ("data", {"action": "store_true", "help": "accepted; batches are small"}),
    "checkpointing": (
        "parallelism and memory",
        {"action": "store_true", "help": "the same as --grad_ckpt_policy full"},
    ),
}


def _add_flag(group: argparse._ArgumentGroup, option: "dataclasses.Field[Any]") -> None:
    """Give a group of the parser an option's flag, and one that switches it off where it may also be left open."""
    settings = {"help": option.metadata["help"], **option.metadata["arguments"]}
    names = (f"--{option.name}", *settings.pop("flags", ()))
    if option.type == bool | None:
        group.add_argument(*names, nargs="?", const=True, type=_truth, metavar="true|false", **settings)
        text = f"do not {option.metadata['help']}"
        group.add_argument(
            f"--no_{option.name}", f"--no-{option.name}", dest=option.name, action="store_false", help=text
        )
        return
    if option.type is bool:
        settings["action"] = "store_true"
    elif option.type in _NUMBERS:
        settings["type"] = _NUMBERS[option.type]
    elif get_origin(option.type) is tuple:
        settings = {"nargs": "+", **settings}
    elif get_origin(option.type) is Literal:
        settings["choices"] = get_args(option.type)
    if option.default is MISSING:
        settings["required"] = True
    group.add_argument(*names, **settings)


_NUMBERS: dict[Any, type] = {int: int, int | None: int, float: float, float | None: float}


def _check_known(option: "dataclasses.Field[Any]", value: Any) -> None:
    """Raise ValueError where a name that is given, or one of several, is none of those to choose from."""
    of_type = get_args(option.type) if get_origin(option.type) is Literal else None
    known = of_type or option.metadata.get("known")
    for name in value if isinstance(value, tuple) else (value,):
        if known and name is not None and name not in known:
            message = f"--{option.name}: unknown value {name!r}{nearest(name, known)}: choose from {', '.join(known)}"
            raise ValueError(message)


def _check_bounds(option: "dataclasses.Field[Any]", value: float | None) -> None:
    """Raise ValueError where a number that is given lies outside of its option's bounds."""
    name, least, most = option.name, option.metadata["least"], option.metadata["most"]
    if value is None:
        return
    whole = isinstance(value, int)  # of any size, where isfinite wants a float's
    if not ((whole or math.isfinite(value)) and value >= least):
        fit = f"{least} or more" if whole or math.isfinite(value) else "a finite number"
        raise ValueError(f"--{name} is {shown(value)}: give {fit}")
    if whole and value > most:
        raise ValueError(f"--{name} is {shown(value)}: give {most} at most")
