"""Running the API: listens at once, loads the model meanwhile, ends with its ranks or when it is told to."""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn

from accessory.serve.http.app import create_app
from accessory.serve.http.settings import ServerSettings
from accessory.serve.request import Engine, RankLost

logger = logging.getLogger(__name__)

# Answers that are being written may go on for so long once the program is told to end; then their clients are told.
# With the seconds that connections get to close, and ranks to end (processes.py), it must be over within 10.
SECONDS_TO_FINISH = 3
SECONDS_TO_CLOSE = 2
# A server whose ranks are lost says so for a while before it ends, so that its clients need not guess.
SECONDS_OF_FAREWELL = 5.0
# Ranks that are brought back may load so long; then the program ends, for whatever watches it to start it elsewhere.
SECONDS_TO_COME_BACK = 600.0
_POLL = 0.1


class _Server(uvicorn.Server):
    """Leaves signals to `ApiServer`, which has more to end than connections."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class ApiServer:
    """One run of the API.

    Args:
        listener: a socket that is bound; it is closed at the end.
        make_engine: loads the model; called in a thread, while requests are answered with 503.
        restarts: the engine brings its ranks back by itself, so their loss is no reason to end.
    """

    def __init__(
        self,
        listener: socket.socket,
        make_engine: Callable[[], Engine],
        settings: ServerSettings,
        *,
        restarts: bool = False,
    ) -> None:
        self._listener, self._make_engine, self._restarts = listener, make_engine, restarts
        self._app = create_app(None, settings)
        config = uvicorn.Config(
            self._app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=SECONDS_TO_FINISH + SECONDS_TO_CLOSE,  # it counts from the same moment
        )
        self._server = _Server(config)
        self._engine: Engine | None = None
        self._outcome: Exception | None = None
        self._interrupted = False

    def run(self) -> None:
        """Serve until SIGTERM, or until the ranks are lost.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            RankLost: the ranks ended.
            Exception: what loading the model raises.
        """
        try:
            asyncio.run(self._run())
        finally:
            self._listener.close()
            if self._engine is not None:
                self._engine.close()
        if self._outcome is not None:
            raise self._outcome
        if self._interrupted:
            raise KeyboardInterrupt

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_end, number)
        serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        # A daemon: a program that is told to end while it loads does not wait for that.
        threading.Thread(target=self._load, args=(loop,), name="loading", daemon=True).start()
        await self._until_over(serving)
        self._app.state.server.generations.close("the server is shutting down")
        await serving

    def _load(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            engine = self._make_engine()
        except Exception as error:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._end_with, error)
            return
        self._engine = engine
        self._app.state.server.load(engine)
        host, port = self._listener.getsockname()[:2]
        logger.info("serving %s at http://%s:%d/v1", self._app.state.server.name, host, port)

    async def _until_over(self, serving: "asyncio.Task[None]") -> None:
        """Wait until running answers need be waited for no longer."""
        patience = SECONDS_TO_COME_BACK if self._restarts else SECONDS_OF_FAREWELL
        lost: float | None = None  # since when the ranks are
        while not self._server.should_exit and not serving.done():
            await asyncio.sleep(_POLL)
            failure = None if self._engine is None else self._engine.failure
            if failure is None:
                lost = None
                continue
            lost = lost or time.monotonic()
            if time.monotonic() - lost >= patience:
                self._end_with(RankLost(failure))
        if self._outcome is None:
            await asyncio.wait({serving}, timeout=SECONDS_TO_FINISH)

    def _told_to_end(self, number: int) -> None:
        if self._server.should_exit:  # told twice: at once
            self._server.force_exit = True
        self._interrupted |= number == signal.SIGINT
        self._server.should_exit = True

    def _end_with(self, error: Exception) -> None:
        self._outcome = self._outcome or error
        self._server.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address, before anything is loaded for it.

    Raises:
        OSError: naming the address and what to do.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        advice = "choose another address with --host or --port"
        raise OSError(f"cannot listen at {host}:{port} ({error.strerror or error}): {advice}") from error
    return listener
