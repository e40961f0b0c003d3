"""What the demos and the commands generate, chat and serve are told alike, as groups of arguments.

A program takes the groups that concern it and hands the namespace to `model_settings` or `driver_settings`, whose
dictionaries are keyword arguments. Names are spelled with underscores, as users' scripts have them, and with hyphens.
"""

import argparse
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accessory.arguments import add_threads_argument, given_count, given_name, given_number
from accessory.config.quant import add_quant_flags, quant_of_flags

if TYPE_CHECKING:
    from accessory.text.forms import Form

logger = logging.getLogger(__name__)

DTYPES = ("auto", "bf16", "fp16", "fp32")
DEFAULT_MASTER_ADDR = "127.0.0.1"
LOOPBACK = ("127.0.0.1", "::1", "localhost")  # where nobody listens in from another computer


@dataclass(frozen=True, kw_only=True)
class Account:
    """Who may open a page that asks for a name and a password."""

    user: str
    password: str

    def __repr__(self) -> str:
        return f"Account(user={self.user!r})"

    @classmethod
    def parse(cls, text: str) -> "Account":
        """Read USER:PASSWORD; the password may hold colons.

        Raises:
            argparse.ArgumentTypeError: without telling what was given.
        """
        user, _, password = text.partition(":")
        if not user or not password:
            raise argparse.ArgumentTypeError("give a name and a password as USER:PASSWORD")
        return cls(user=user, password=password)


def add_model_arguments(parser: argparse.ArgumentParser, *, positional: bool = False) -> None:
    """Which checkpoint is loaded, and how.

    Args:
        positional: the checkpoint is given without ``--pretrained_path``.
    """
    group = parser.add_argument_group("model")
    help_text = "checkpoint folder; of several, later ones overlay earlier ones"
    if positional:
        group.add_argument("pretrained_path", nargs="+", type=given_name, metavar="PATH", help=help_text)
    else:
        names = _spellings("pretrained_path")
        group.add_argument(*names, nargs="+", type=given_name, required=True, metavar="PATH", help=help_text)
    group.add_argument(*_spellings("llama_type"), help="architecture, where meta.json does not say")
    help_text = "config files in place of the folder's own, the last rules"
    group.add_argument(*_spellings("llama_config"), nargs="+", type=given_name, metavar="FILE", help=help_text)
    group.add_argument(*_spellings("tokenizer_path"), type=given_name, help="a tokenizer's file, or a folder with one")
    help_text = "tokens of prompt and answer together (default 4096)"
    group.add_argument(*_spellings("max_seq_len"), type=_context, default=4096, help=help_text)
    help_text = "of the weights (default auto: as they are stored; MetaModel.from_pretrained takes bf16)"
    group.add_argument("--dtype", choices=DTYPES, default="auto", help=help_text)
    add_quant_flags(group)
    group.add_argument("--device", help="cpu, cuda, or cuda:N for one rank (default: GPUs if each rank has one)")
    help_text = "auto (default), expert or tensor"
    group.add_argument(
        *_spellings("expert_placement"), choices=("auto", "expert", "tensor"), default="auto", help=help_text
    )
    add_threads_argument(group)


def add_rank_arguments(parser: argparse.ArgumentParser) -> None:
    """How many ranks hold the model, on which cards, and where they meet."""
    group = parser.add_argument_group("ranks").add_mutually_exclusive_group()
    help_text = "processes that hold the model together, one for each GPU; on the CPU where there are none (default 1)"
    group.add_argument(*_spellings("n_gpus"), dest="ranks", type=given_count, metavar="N", help=help_text)
    help_text = "cards to use, one process for each"
    group.add_argument(*_spellings("gpu_ids"), type=_card, nargs="+", metavar="CARD", help=help_text)
    add_master_arguments(parser)


def add_master_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the ranks meet one another."""
    group = parser.add_argument_group("meeting place of the ranks")
    help_text = f"address (default {DEFAULT_MASTER_ADDR})"
    group.add_argument(
        *_spellings("master_addr"), type=given_name, default=DEFAULT_MASTER_ADDR, metavar="HOST", help=help_text
    )
    help_text = "port (default: one that is free)"
    group.add_argument(*_spellings("master_port"), type=_port, metavar="PORT", help=help_text)


def add_batch_arguments(parser: argparse.ArgumentParser, *, slots: int) -> None:
    """How many requests run and wait at once.

    Args:
        slots: the program's default.
    """
    group = parser.add_argument_group("requests")
    group.add_argument("--slots", type=given_count, default=slots, help=f"answers written at once (default {slots})")
    help_text = "requests that may wait for one; more are refused (default 64)"
    group.add_argument("--queue", type=_not_negative, default=64, help=help_text)


def add_template_argument(parser: argparse.ArgumentParser) -> None:
    """How a dialogue is put to the model."""
    help_text = (
        "default, alpaca, mixtral-instruct, a template's file, or model for the checkpoint's own template "
        "(default: the form that it was trained on, else its template, else default)"
    )
    parser.add_argument(*_spellings("chat_template"), type=given_name, metavar="NAME|FILE", help=help_text)


def add_page_arguments(parser: argparse.ArgumentParser) -> None:
    """Where a demo's page is, and who may open it."""
    group = parser.add_argument_group("page")
    help_text = "address to listen at; 0.0.0.0 lets other computers in (default 127.0.0.1)"
    group.add_argument(*_spellings("server_name"), type=given_name, default="127.0.0.1", metavar="HOST", help=help_text)
    help_text = "port (default: 7860, or the next that is free)"
    group.add_argument(*_spellings("server_port"), type=_port, metavar="PORT", help=help_text)
    group.add_argument("--share", action="store_true", help="publish the page through gradio's servers")
    group.add_argument("--auth", type=Account.parse, metavar="USER:PASSWORD", help="ask for this name and password")


def model_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of from_pretrained, and of what passes them on, beside ``pretrained_path``.

    Raises:
        ValueError: quantization flags that contradict one another.
    """
    return {
        "llama_type": arguments.llama_type,
        "llama_config": arguments.llama_config,
        "tokenizer_path": arguments.tokenizer_path,
        "max_seq_len": arguments.max_seq_len,
        "dtype": arguments.dtype,
        "device": arguments.device,
        "quant": quant_of_flags(arguments.quant, group_size=arguments.group_size, head=arguments.quant_head),
        "expert_placement": arguments.expert_placement,
    }


def say_form(form: "Form") -> "Form":
    """Say in which form chats are asked; returns it."""
    logger.info(
        'chats are put into the form "%s"%s', form.name, ", for the checkpoint names none" if form.assumed else ""
    )
    return form


def form_of(arguments: argparse.Namespace) -> "Form":
    """The form in which the checkpoint is asked; found before its weights are read, which may take minutes.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: naming the folder, file or setting.
    """
    from accessory.model.pretrained import Pretrained  # not before it is wanted: it loads torch
    from accessory.text.form_files import find_form

    names = ("llama_type", "llama_config", "tokenizer_path", "max_seq_len")
    found = Pretrained.resolve(arguments.pretrained_path, **{name: getattr(arguments, name) for name in names})
    return find_form(found.tokenizer, found.paths, arguments.chat_template)


def serve_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `serve_on_ranks` beside ``program`` and ``pretrained_path``.

    What the program has no flag for, or none was given for, is left out.

    Raises:
        ValueError: as above.
    """
    return {**model_settings(arguments), **_given(arguments, ("slots", "queue"))}


def driver_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `Driver` beside ``pretrained_path``, in the same way; ValueError as above and below."""
    check_place(arguments)
    return {**serve_settings(arguments), **_given(arguments, ("ranks", "gpu_ids", "master_addr", "master_port"))}


def check_place(arguments: argparse.Namespace) -> None:
    """Refuse ranks for which the device is not there, before a rank is started or a port opened.

    Raises:
        ValueError: naming the device or the cards.
    """
    from accessory.launch.placement import Placement  # not before it is wanted: it loads torch

    ranks, cards = (getattr(arguments, name, None) for name in ("ranks", "gpu_ids"))
    Placement.of(ranks, cards, device=arguments.device)


def _given(arguments: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name, None) is not None}


def _spellings(name: str) -> tuple[str, ...]:
    return f"--{name}", f"--{name.replace('_', '-')}"


def _context(text: str) -> int:
    return given_number(text, 3, None, "a whole number of at least 3")


def _not_negative(text: str) -> int:
    return given_number(text, 0, None, "a whole number of at least 0")


def _card(text: str) -> int:
    return given_number(text, 0, None, "the number of a card, counted from 0")


def _port(text: str) -> int:
    return given_number(text, 1, 2**16 - 1, "a port from 1 to 65535")
