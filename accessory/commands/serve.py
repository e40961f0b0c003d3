"""The command serve: a model behind an OpenAI-compatible HTTP API."""

import argparse
import logging
import os
import re
from typing import Any

from accessory.arguments import add_nproc_argument, given_name
from accessory.errors import shown
from accessory.log import setup_logging
from accessory.serve.options import (
    LOOPBACK,
    add_batch_arguments,
    add_model_arguments,
    add_template_argument,
    driver_settings,
    form_of,
    say_form,
)

logger = logging.getLogger(__name__)

KEY_VARIABLE = "ACCESSORY_API_KEY"
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")
_PORTS = {"http": "80", "https": "443"}


def add_commands(commands: Any) -> None:
    """Give a parser's subparsers the command."""
    serve = commands.add_parser(
        "serve",
        help="answer requests over HTTP, as OpenAI's API does",
        description="Answer requests over HTTP, as OpenAI's API does, many at once. /docs describes the API.",
        epilog="example: accessory serve runs/finetuned/epoch11 --nproc 2 --port 8000",
    )
    add_model_arguments(serve, positional=True)
    add_nproc_argument(serve)
    add_batch_arguments(serve, slots=16)
    add_template_argument(serve)
    server = serve.add_argument_group("server")
    server.add_argument(
        "--host", type=given_name, default="127.0.0.1", help="address to listen at; 0.0.0.0 lets other computers in"
    )
    server.add_argument(
        "--port", type=_port, default=8000, help="port to listen at (default 8000; 0: one that is free)"
    )
    server.add_argument(
        "--api-key", "--api_key", metavar="KEY", help=f"demand this key (default: the variable {KEY_VARIABLE})"
    )
    server.add_argument(
        "--model-name",
        "--model_name",
        type=given_name,
        metavar="NAME",
        help="the model's name (default: that of its folder)",
    )
    server.add_argument(
        "--body-limit", "--body_limit", type=float, default=4, metavar="MB", help="largest request body (default 4)"
    )
    help_text = "answer scripts of web pages from there, such as https://example.org; *: from anywhere (default: none)"
    server.add_argument("--cors", nargs="+", type=given_name, default=[], metavar="ORIGIN", help=help_text)
    help_text = "the least that is logged (default info, with a line for each request but of monitors)"
    server.add_argument(
        "--log-level", "--log_level", choices=("debug", "info", "warning", "error"), default="info", help=help_text
    )
    server.add_argument("--restart", action="store_true", help="bring the ranks back when one is lost")
    alone = "accessory serve starts its ranks itself: give --nproc N in place of torchrun"
    serve.set_defaults(run=_serve, alone=alone)


def _serve(arguments: argparse.Namespace) -> None:
    from accessory.serve.driver import Driver
    from accessory.serve.http.server import ApiServer, listen
    from accessory.serve.http.settings import MEGABYTE, ServerSettings

    setup_logging(level=logging.getLevelNamesMapping()[arguments.log_level.upper()])
    key = arguments.api_key if arguments.api_key is not None else os.environ.get(KEY_VARIABLE)
    if key is not None:
        key = _usable_key(key)
    origins = tuple(map(_origin, arguments.cors))
    if not 0.001 <= arguments.body_limit <= 1024:
        raise ValueError(f"--body-limit {arguments.body_limit} is no size from 0.001 to 1024 MB")
    driver = driver_settings(arguments)
    settings = ServerSettings(
        api_key=key,
        form=say_form(form_of(arguments)),
        model_name=arguments.model_name,
        body_limit=int(arguments.body_limit * MEGABYTE),
        origins=origins,
    )
    listener = listen(arguments.host, arguments.port)
    if key is None and arguments.host not in LOOPBACK:
        logger.warning("whoever reaches %s may ask: give --api-key, or set %s", arguments.host, KEY_VARIABLE)

    def load() -> Driver:
        return Driver(arguments.pretrained_path, restart=arguments.restart, **driver)

    ApiServer(listener, load, settings, restarts=arguments.restart).run()


def _usable_key(text: str) -> str:
    """The key as clients can send it: a file with a secret often ends its line, a header cannot."""
    key = text.strip()
    if not key:
        raise ValueError(f"the API key is empty: give --api-key a key, or unset {KEY_VARIABLE}")
    if not key.isprintable() or " " in key:
        raise ValueError(f"the API key holds spaces or control characters: choose another (--api-key, {KEY_VARIABLE})")
    return key


def _origin(text: str) -> str:
    """An origin as browsers name it: in small letters, without the port that its scheme has anyway."""
    if text == "*":
        return text
    parts = _ORIGIN.fullmatch(text.lower())
    if parts is None:
        raise ValueError(f"--cors {shown(text)} is no origin: give a scheme and a host, such as https://example.org")
    scheme, host, port = parts.groups()
    return f"{scheme}://{host}" + ("" if port in (None, _PORTS.get(scheme)) else f":{port}")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**16:
        raise argparse.ArgumentTypeError(f"{text!r} given: give a port from 0 to 65535")
    return int(text)
