"""The command chat: a dialogue in the terminal."""

import argparse
import io
import logging
import sys
from typing import Any

from accessory.arguments import add_nproc_argument
from accessory.serve.options import (
    add_master_arguments,
    add_model_arguments,
    add_template_argument,
    driver_settings,
    form_of,
    say_form,
)

logger = logging.getLogger(__name__)


def add_commands(commands: Any) -> None:
    """Give a parser's subparsers the command."""
    chat = commands.add_parser(
        "chat",
        help="talk to a model in the terminal",
        description="Talk to a model in the terminal; /help lists what can be said to the program itself.",
        epilog="example: accessory chat runs/finetuned/epoch11 --nproc 2",
    )
    add_model_arguments(chat, positional=True)
    add_nproc_argument(chat)
    add_master_arguments(chat)
    add_template_argument(chat)
    help_text = "tokens of an answer at most (default 512, or half of the context)"
    chat.add_argument("--max-gen-len", "--max_gen_len", type=int, help=help_text)
    chat.add_argument("--temperature", type=float, default=0.0, help="0 (default): the most probable token")
    chat.add_argument("--top-p", "--top_p", type=float, default=0.95, help="nucleus of the sampling (default 0.95)")
    chat.add_argument("--stop", action="append", default=[], help="text that ends an answer too; may be repeated")
    chat.add_argument("--seed", type=int, help="seed of the sampling (default: another one each time)")
    alone = "accessory chat starts its ranks itself: give --nproc N in place of torchrun"
    chat.set_defaults(run=_chat, alone=alone)


def _chat(arguments: argparse.Namespace) -> None:
    from accessory.generation.sampling import Sampling
    from accessory.serve.dialogue import usual_length
    from accessory.serve.driver import Driver
    from accessory.serve.terminal import Terminal

    length = arguments.max_gen_len
    if length is None:
        length = usual_length(arguments.max_seq_len)
    sampling = Sampling.of(length, arguments.temperature, arguments.top_p, arguments.stop)
    sampling.check(arguments.max_seq_len)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what cannot be read or shown ends no dialogue
    settings, form = driver_settings(arguments), say_form(form_of(arguments))
    if form.of_single_questions:
        logger.info("it is a form of single questions: /reset before one that has nothing to do with those before it")
    with Driver(arguments.pretrained_path, slots=1, **settings) as engine:
        Terminal(engine, sampling, form=form, seed=arguments.seed).run()
