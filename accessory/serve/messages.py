"""What the side that asks and the ranks that answer say to each other, and the line on which they say it."""

import contextlib
import logging
import pickle
import select
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import Any

from accessory.config import ModelArgs
from accessory.serve.request import Event, Load, Request

_LENGTH = struct.Struct(">Q")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """To every rank, first of all: what to load, and how to serve it.

    Attributes:
        settings: keyword arguments of `MetaModel.from_pretrained`.
        timeout: of collectives, in seconds; None: torch's own.
        log_level: of the first rank's log.
    """

    settings: dict[str, Any]
    slots: int
    prefill_tokens: int
    timeout: float | None = None
    log_level: int = logging.INFO


@dataclass(frozen=True)
class Submit:
    """To the first rank: a request, under a number by which its events are known."""

    number: int
    request: Request


@dataclass(frozen=True)
class Cancel:
    """To the first rank: end a request; nothing where it has ended."""

    number: int


@dataclass(frozen=True)
class Call:
    """To the first rank: a method of the MetaModel, for all ranks."""

    number: int
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Close:
    """To the first rank: end."""


@dataclass(frozen=True)
class Lost:
    """To the first rank's loop: another rank is gone."""

    reason: str


Order = Submit | Cancel | Call | Close | Lost


@dataclass(frozen=True)
class Ready:
    """From the first rank: the model is loaded."""

    args: ModelArgs


@dataclass(frozen=True)
class Step:
    """From the first rank, after a step: what it added to which requests, and how busy the ranks are now."""

    events: list[tuple[int, Event | Exception]]
    load: Load


@dataclass(frozen=True)
class Answer:
    """From the first rank: what a `Call` returned or raised."""

    number: int
    result: Any = None
    error: Exception | None = None


@dataclass(frozen=True)
class Failed:
    """From any rank, last of all: why it ends."""

    error: Exception


Report = Ready | Step | Answer | Failed


class Link:
    """A connection on which whole Python values travel; sending is safe from any thread.

    Values are pickled: both ends are processes of one command.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._sending = threading.Lock()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Any) -> None:
        """Send a value.

        Raises:
            EOFError: the other end is gone.
        """
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        try:
            with self._sending:
                self._socket.sendall(_LENGTH.pack(len(data)) + data)
        except OSError:
            raise EOFError("the other end of the connection is gone") from None

    def receive(self) -> Any:
        """Wait for the next value.

        Raises:
            EOFError: the other end is gone.
        """
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return pickle.loads(self._read(length))

    def wait(self, seconds: float | None) -> bool:
        """Whether something is there to `receive`, be it the end."""
        poll = select.poll()  # select() takes no descriptor above 1023
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(None if seconds is None else 1000 * seconds))

    def close(self) -> None:
        """End the connection; wakes whoever waits on either side."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, length: int) -> bytearray:
        data = bytearray(length)
        view, done = memoryview(data), 0
        while done < length:
            try:
                count = self._socket.recv_into(view[done:])
            except OSError:
                count = 0
            if not count:
                raise EOFError("the other end of the connection is gone")
            done += count
        return data


@dataclass(frozen=True)
class Freed:
    """What the ranks are to forget before they go on.

    Attributes:
        slots: whose sequences have ended.
        unclean: those of them whose keys and values may not be finite.
    """

    slots: list[int] = field(default_factory=list)
    unclean: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Read:
    """To every rank: read these tokens into these slots."""

    tokens: list[int]
    lengths: list[int]
    slots: list[int]
    freed: Freed
    all_logits: bool = False


@dataclass(frozen=True)
class Write:
    """To every rank: one more token for these slots, whose last tokens are these."""

    tokens: list[int]
    slots: list[int]
    freed: Freed


@dataclass(frozen=True)
class Invoke:
    """To every rank: call a method of the MetaModel."""

    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Stop:
    """To every rank: end."""


Command = Read | Write | Invoke | Stop


def sendable(error: Exception) -> Exception:
    """The error, or its text where it would not survive the journey."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
