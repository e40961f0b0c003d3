"""The two demos as programs: their arguments, the engine behind the page, and how they end."""

import argparse
import logging
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from accessory.arguments import Parser
from accessory.commands.output import ended, parsed, refuse, say
from accessory.launch.launcher import Launch
from accessory.log import setup_logging
from accessory.serve.options import (
    LOOPBACK,
    add_batch_arguments,
    add_model_arguments,
    add_page_arguments,
    add_rank_arguments,
    add_template_argument,
    check_place,
    driver_settings,
    form_of,
    say_form,
    serve_settings,
)

if TYPE_CHECKING:
    from accessory.text.forms import Form

logger = logging.getLogger(__name__)

# What a page's visitors may have written at once; each answer takes a cache of max_seq_len tokens.
_SLOTS = 4


def single_turn(arguments: Sequence[str] | None = None) -> int:
    """The program demos/single_turn.py: one page, and the ranks that a launcher started; returns the exit code."""
    parser = _parser("single_turn.py", "A page that answers one instruction at a time, on the ranks of torchrun.")
    return _run(parser, arguments, _single_turn, says=_say_single_form)


def multi_turn(arguments: Sequence[str] | None = None) -> int:
    """The program demos/multi_turn.py: one page, and ranks that it starts itself; returns the exit code."""
    parser = _parser("multi_turn.py", "A page that holds a dialogue, with a model on processes that it starts.")
    add_rank_arguments(parser)
    alone = "multi_turn.py starts its ranks itself: give --n_gpus N in place of torchrun"
    return _run(parser, arguments, _multi_turn, alone=alone)


def _parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=description)
    add_model_arguments(parser)
    add_batch_arguments(parser, slots=_SLOTS)
    add_template_argument(parser)
    add_page_arguments(parser)
    return parser


def _single_turn(arguments: argparse.Namespace) -> None:
    from accessory.serve.ranks import serve_on_ranks
    from accessory.serve.request import Engine

    def program(engine: Engine) -> None:
        from accessory.serve.web.page import serve_page
        from accessory.serve.web.single_turn import SingleTurnPage

        serve_page(SingleTurnPage(engine, arguments.form).blocks, engine, **_page_settings(arguments))

    serve_on_ranks(program, arguments.pretrained_path, say=say, **serve_settings(arguments))


def _multi_turn(arguments: argparse.Namespace) -> None:
    from accessory.serve.driver import Driver

    with Driver(arguments.pretrained_path, **driver_settings(arguments)) as engine:
        from accessory.serve.web.multi_turn import MultiTurnPage
        from accessory.serve.web.page import serve_page

        serve_page(MultiTurnPage(engine, arguments.form).blocks, engine, **_page_settings(arguments))


def _page_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("server_name", "server_port", "share", "auth")}


def _run(
    parser: argparse.ArgumentParser,
    given: Sequence[str] | None,
    program: Callable[[argparse.Namespace], None],
    *,
    says: Callable[["Form"], object] = say_form,
    alone: str | None = None,
) -> int:
    """Run a demo; returns the exit code.

    Args:
        says: tells in which form the model is asked.
        alone: why the program is not to be started on several ranks.
    """
    setup_logging()
    try:
        launch = Launch.find()
    except ValueError as error:
        say(error)
        return 1
    arguments = parsed(parser, given)
    if alone is not None and launch.has_others:
        return ended(lambda: refuse(ValueError(alone)))
    try:
        if launch.rank == 0:
            # A large model takes minutes to load: what is wrong is said before.
            check_place(arguments)
            _check_address(arguments.server_name, arguments.server_port)
            arguments.form = form_of(arguments)
            says(arguments.form)
            if arguments.auth is None and (arguments.share or arguments.server_name not in LOOPBACK):
                logger.warning("whoever reaches the page may use it: --auth USER:PASSWORD asks for a password")
    except (OSError, ValueError) as error:
        say(error)
        if launch.has_others:
            from accessory.launch.rendezvous import refuse_together

            refuse_together(str(error))
        return 1
    return ended(lambda: program(arguments))


def _say_single_form(form: "Form") -> None:
    if form.assumed:
        logger.info("instructions are asked as the page's system prompt says, for the checkpoint names no form")
    else:
        say_form(form)


def _check_address(host: str, port: int | None) -> None:
    """Raise OSError where nothing can listen."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        where = f"--server_name {host}" + ("" if port is None else f" --server_port {port}")
        raise OSError(f"no page can be served at {where} ({error.strerror or error}): give another") from None
