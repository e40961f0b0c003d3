"""The ranks of an engine, when a launcher has started them: the first one serves, the others follow it."""

import logging
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from accessory.checkpoint.hub import Place
from accessory.errors import out_of_memory
from accessory.launch.launcher import Launch
from accessory.launch.peers import accepted, listening_address, published_host
from accessory.launch.rendezvous import is_lost_peer, process_group_of_launcher
from accessory.model.meta import MetaModel
from accessory.model.pretrained import Paths
from accessory.parallel.state import ParallelState
from accessory.serve.client import Client
from accessory.serve.desk import Desk, lost
from accessory.serve.messages import Failed, Link, Lost, Order, Report
from accessory.serve.request import Engine, RankLost
from accessory.serve.runner import Runner, follow

logger = logging.getLogger(__name__)

# Tokens of prompts that are read in one step: what a running answer may have to wait for.
PREFILL_TOKENS = 512
_RANK = struct.Struct(">i")
_CONNECT = 50.0  # seconds
_SECONDS_TO_NOTICE = 2.0


def serve_on_ranks(
    program: Callable[[Engine], None],
    pretrained_path: Paths,
    *,
    slots: int = 16,
    queue: int = 64,
    prefill_tokens: int = PREFILL_TOKENS,
    timeout: float | None = None,
    say: Callable[[Exception], None] | None = None,
    **settings: Any,
) -> None:
    """Load a model on the ranks that torchrun or srun started, or on this process alone, and run a program on it.

    Every rank calls it. The program runs on rank 0, in the calling thread, while the ranks answer its requests; when
    it returns, all end.

    Args:
        slots: requests that run at once.
        queue: requests that may wait beside them.
        prefill_tokens: tokens of prompts that are read in one step.
        timeout: of collectives, in seconds; None: torch's own.
        say: is given an error that all ranks raise alike, on rank 0; None: it is logged.
        settings: of `MetaModel.from_pretrained`.

    Raises:
        ValueError: a setting makes no sense.
        SystemExit, OSError: as `process_group_of_launcher`.
        RankLost: the program has ended, and the ranks had failed before.
    """
    check_settings(slots=slots, queue=queue, prefill_tokens=prefill_tokens, timeout=timeout)
    say = say or (lambda error: logger.error("%s", error))
    limit = None if timeout is None else timedelta(seconds=timeout)
    with process_group_of_launcher(settings.get("device"), say=say, timeout=limit) as group:
        model = MetaModel.from_pretrained(pretrained_path, mp_group=group, **settings)
        if model.llma.state.is_first:
            _run_program(program, model, name_of(pretrained_path), slots, queue, prefill_tokens)
        else:
            follow_first(model, slots)


def check_settings(*, slots: int, queue: int, prefill_tokens: int, timeout: float | None) -> None:
    """Raise ValueError where a setting of an engine makes no sense, naming it."""
    check_count("slots", slots, least=1)
    check_count("queue", queue, least=0)
    check_count("prefill_tokens", prefill_tokens, least=1)
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout must be a positive number of seconds, not {timeout!r}")


def check_count(name: str, count: int, *, least: int) -> None:
    """Raise ValueError for a count that is less, or no whole number."""
    if type(count) is not int or count < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {count!r}")


def name_of(pretrained_path: Paths) -> str:
    """What a model is called: its last folder, on the Hub without the revision."""
    last = pretrained_path if isinstance(pretrained_path, str | Path) else list(pretrained_path)[-1]
    place = Place.of(last)
    return Path(last).resolve().name if place is None else place.name


def serve_first(
    model: MetaModel,
    slots: int,
    *,
    inbox: "queue.SimpleQueue[Order]",
    report: Callable[[Report], None],
    prefill_tokens: int,
    ready: Callable[[], None],
) -> None:
    """The first rank's part: meet the others, say that it is ``ready``, and serve orders until told to close.

    Raises:
        RankLost: another rank is gone.
    """
    followers = _meet_followers(model.llma.state)
    runner = Runner(model, slots)
    for rank, follower in enumerate(followers, start=1):
        threading.Thread(target=_watch, args=(rank, follower, inbox, report), daemon=True).start()
    try:
        runner.warm_up()
        ready()
        Desk(runner, followers, inbox=inbox, report=report, prefill_tokens=prefill_tokens).run()
    except Exception as error:
        # A collective may notice the loss of a rank before the watch over it does, but not say which rank.
        if is_lost_peer(error) and (reason := _lost_rank(inbox)):
            raise RankLost(reason) from None
        raise
    finally:
        for follower in followers:
            follower.close()


def follow_first(model: MetaModel, slots: int) -> None:
    """Another rank's part: meet the first, and do what it says.

    Raises:
        RuntimeError: the first rank is gone; one of those that `process_group_of_launcher` takes for a lost peer.
    """
    first = _meet_first(model.llma.state)
    runner = Runner(model, slots)
    try:
        runner.warm_up()
        follow(runner, first)
    except EOFError:
        raise RuntimeError(f"connection closed: {lost(0)}") from None
    finally:
        first.close()


def _run_program(
    program: Callable[[Engine], None], model: MetaModel, name: str, slots: int, queued: int, prefill_tokens: int
) -> None:
    """Run the program in this thread, and what it asks for in another."""
    inbox: queue.SimpleQueue[Order] = queue.SimpleQueue()
    engine = Client(
        tokenizer=model.tokenizer, args=model.llma.args, name=name, slots=slots, queued=queued, send=inbox.put
    )
    loaded = threading.Event()

    def serve() -> None:
        try:
            serve_first(model, slots, inbox=inbox, report=engine.take, prefill_tokens=prefill_tokens, ready=loaded.set)
        except Exception as error:
            shortage = out_of_memory(error)
            if not isinstance(error, RankLost) and shortage is None:
                logger.exception("the engine has failed")
            engine.take(Failed(shortage or error))
        finally:
            loaded.set()

    thread = threading.Thread(target=serve, name="engine", daemon=True)
    thread.start()
    loaded.wait()
    failure = engine.failure
    try:
        if failure is None:
            program(engine)
    finally:
        failure = engine.failure
        engine.close()
        if failure is None:
            thread.join()
    if failure is not None:
        raise RankLost(failure)


def _watch(rank: int, follower: Link, inbox: "queue.SimpleQueue[Order]", report: Callable[[Report], None]) -> None:
    """Notice the loss of a follower, whatever the first rank is doing; one that ends as told says so."""
    try:
        follower.receive()
    except EOFError:
        report(Failed(RankLost(lost(rank))))
        inbox.put(Lost(lost(rank)))


def _lost_rank(inbox: "queue.SimpleQueue[Order]") -> str | None:
    """What the watch over a rank says of its loss, if anything."""
    end = time.monotonic() + _SECONDS_TO_NOTICE
    with suppress(queue.Empty):
        while True:
            match inbox.get(timeout=max(0.0, end - time.monotonic())):
                case Lost(reason):
                    return reason
    return None


def _meet_followers(state: ParallelState) -> list[Link]:
    """Connections to the other ranks, by rank."""
    if state.mp_size == 1:
        return []
    launch = Launch.find()
    family, own = listening_address(launch)
    key = secrets.token_bytes(16)
    with socket.create_server(own, family=family, backlog=state.mp_size) as server:
        place = (published_host(launch), server.getsockname()[1], key)
        state.first_ones(place)
        links: dict[int, Link] = {}
        while len(links) < state.mp_size - 1:
            connection = accepted(server, key)
            (rank,) = _RANK.unpack(connection.recv(_RANK.size, socket.MSG_WAITALL))
            links[rank] = _linked(connection)
    return [links[rank] for rank in sorted(links)]


def _meet_first(state: ParallelState) -> Link:
    """The connection to the first rank."""
    not_known_yet: Any = None
    host, port, key = state.first_ones(not_known_yet)
    connection = socket.create_connection((host, port), timeout=_CONNECT)
    connection.sendall(key + _RANK.pack(state.mp_rank))
    return _linked(connection)


def _linked(connection: socket.socket) -> Link:
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Link(connection)
