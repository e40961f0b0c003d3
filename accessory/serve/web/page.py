"""Serving a page for as long as its model lives."""

import contextlib
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import gradio as gr
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.middleware import Middleware

from accessory.launch.launcher import Launch
from accessory.serve.options import Account
from accessory.serve.request import Engine, RankLost
from accessory.serve.web.gate import MOST_BYTES, Gate
from accessory.serve.web.style import CSS, HEAD, STATE_ROUTE, theme

# How long a page whose model is gone stays up, for open tabs to hear of it; they ask every other second.
_FAREWELL = 4.0
# A launcher that sees a rank die ends the others, this one too: so long after its signal the loss may show.
_EXPLAINED = 1.0


@contextlib.contextmanager
def served(
    blocks: gr.Blocks,
    engine: Engine,
    *,
    server_name: str = "127.0.0.1",
    server_port: int | None = None,
    share: bool = False,
    auth: Account | None = None,
) -> Iterator[str]:
    """Serve a page while entered; gives its address.

    Args:
        server_port: None: 7860, or the next that is free.

    Raises:
        OSError: the port is taken.
    """

    async def state() -> JSONResponse:
        return JSONResponse({"failure": engine.failure})

    # The engine has the one queue, and says when it is full: gradio hands everything on.
    most = 100 + engine.load.slots
    blocks.queue(default_concurrency_limit=most, api_open=True)
    try:
        _, local, shared = blocks.launch(
            server_name=server_name,
            server_port=server_port,
            share=share,
            auth=None if auth is None else matcher(auth),
            prevent_thread_lock=True,
            quiet=True,
            theme=theme(),
            css=CSS,
            head=HEAD,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            max_threads=most,
            max_file_size=MOST_BYTES,
            app_kwargs={
                "routes": [APIRoute(STATE_ROUTE, state, methods=["GET"])],
                "middleware": [Middleware(Gate)],
            },
        )
        # A tab that is still open must not hold the end back.
        blocks.server.config.timeout_graceful_shutdown = 1
        yield shared or local
    finally:
        blocks.close(verbose=False)


def serve_page(blocks: gr.Blocks, engine: Engine, **settings: object) -> None:
    """Serve a page until Ctrl-C, SIGTERM, or the end of the model; settings are those of `served`.

    Raises:
        RankLost: the model is gone, and open tabs were told.
        SystemExit: with 143, after SIGTERM.
    """
    terminated = threading.Event()
    with _on_sigterm(terminated.set), served(blocks, engine, **settings) as address:  # type: ignore[arg-type]
        sys.stdout.write(f"Running on {address}\n")
        sys.stdout.flush()
        while engine.failure is None and not terminated.wait(0.2):
            pass
        if engine.failure is None and Launch.find().world_size > 1:
            _wait_for(lambda: engine.failure is not None, _EXPLAINED)
        if engine.failure is not None:
            _wait_for(lambda: False, _FAREWELL)
            raise RankLost(engine.failure)
    raise SystemExit(128 + signal.SIGTERM)


def matcher(account: Account) -> Callable[[str, str], bool]:
    """Whether a name and a password are those of the account, in a time that tells nothing of how nearly."""

    def match(user: str, password: str) -> bool:
        given = (user, password)
        expected = (account.user, account.password)
        equal = [
            secrets.compare_digest(one.encode(), other.encode()) for one, other in zip(given, expected, strict=True)
        ]
        return all(equal)

    return match


@contextlib.contextmanager
def _on_sigterm(act: Callable[[], None]) -> Iterator[None]:
    """Act on SIGTERM instead of ending at once; where only the main thread may say so, and this is not it, nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        act()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    waiting = threading.Event()
    for _ in range(round(seconds / 0.1)):
        if condition():
            return
        waiting.wait(0.1)
