"""Noticing at once that another process of a run has died, whatever this one is doing.

The ranks form a ring of TCP connections: each listens to the rank before it and speaks to the one behind it. A rank
that leaves says so. When a process dies without a word, the system closes its connections; the rank behind it hears
the end of the stream, says once for all who is lost, and the number goes around the ring. Collectives alone do not
tell: a rank that tokenises takes part in none, and others may wait for a rank that itself waits for the dead one.
"""

import contextlib
import ipaddress
import json
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from accessory.launch.launcher import Launch

# Seconds for the ring to close, once all ranks are known to be there.
_CONNECT = 50.0
# A rank that knows of a loss may so long try to end by itself.
_GRACE = 10.0
# How long a failed collective waits for the ring to explain it.
_EXPLAIN = 5.0
# A host that lost power closes nothing: it is asked after 10 s of silence, then every 5 s, and given up after 7 times.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 7}

# What is known of a rank that ended without a word. An error would have been told, also one about memory.
HOW_RANKS_GO = "ended by a signal, or its host cut off"

_WORD = struct.Struct(">i")  # the number of a lost rank, or
_FAREWELL = -1


class PeerWatch:
    """While entered, ends this process soon after another rank was lost; for one process, nothing.

    Args:
        store: through which the ranks tell one another their addresses.
        say: is given the error on the one rank that noticed first.
    """

    def __init__(self, launch: Launch, store: dist.Store, *, say: Callable[[Exception], None]) -> None:
        self._launch, self._store, self._say = launch, store, say
        self._before: socket.socket | None = None
        self._behind: socket.socket | None = None
        self._name_before = ""
        self._thread: threading.Thread | None = None
        self._lost, self._over = threading.Event(), threading.Event()
        self._left = False

    def __enter__(self) -> Self:
        if self._launch.world_size > 1:
            try:
                self._connect()
            except (OSError, RuntimeError) as error:  # a store's errors are RuntimeErrors
                self._close()
                where = f"rank {self._launch.rank} and its neighbours cannot reach one another"
                raise OSError(f"{where} ({error}): see that the hosts may open connections to each other") from None
            self._thread = threading.Thread(target=self._listen, name="peer watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self.fail()  # unless it left in order
        self._close()

    def leave(self) -> None:
        """Say that this rank is about to end as it should."""
        self._tell(_FAREWELL)

    def fail(self) -> None:
        """Say that this rank is about to end, and the others must too; they need not say why."""
        self._tell(self._launch.rank)

    def explain(self, *, wait: bool) -> bool:
        """Whether a rank is known to be lost, of which all other errors are but consequences.

        Args:
            wait: an error looks like it: wait a moment for the news.
        """
        return self._lost.wait(_EXPLAIN if wait and self._thread is not None else 0.0)

    def _connect(self) -> None:
        rank, size = self._launch.rank, self._launch.world_size
        family, own = listening_address(self._launch)
        key = secrets.token_bytes(16)
        with socket.create_server(own, family=family) as server:
            place = {"host": published_host(self._launch), "port": server.getsockname()[1], "key": key.hex()}
            self._store.set(_name(rank), json.dumps({**place, "name": socket.gethostname()}))
            behind = self._place_of((rank + 1) % size)
            self._name_before = self._place_of((rank - 1) % size)["name"]
            self._behind = socket.create_connection((behind["host"], behind["port"]), timeout=_CONNECT)
            self._behind.sendall(bytes.fromhex(behind["key"]))
            self._before = accepted(server, key)
        self._before.settimeout(None)
        self._before.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEP_ALIVE.items():
            if hasattr(socket, option):  # not everywhere
                self._before.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def _place_of(self, rank: int) -> dict[str, Any]:
        self._store.wait([_name(rank)], timedelta(seconds=_CONNECT))
        place: dict[str, Any] = json.loads(self._store.get(_name(rank)))
        return place

    def _listen(self) -> None:
        assert self._before is not None
        try:
            word = self._before.recv(_WORD.size, socket.MSG_WAITALL)
        except OSError:
            word = b""
        if self._over.is_set():
            return
        before = (self._launch.rank - 1) % self._launch.world_size
        lost = _WORD.unpack(word)[0] if len(word) == _WORD.size else before
        if lost == _FAREWELL:
            return
        self._tell(lost)
        # A launcher of ours sees how a rank ends, and says it.
        if len(word) < _WORD.size and self._launch.parent is None:
            self._say(RuntimeError(f"rank {lost} on {self._name_before} is gone ({HOW_RANKS_GO}): the others end too"))
        self._lost.set()
        if not self._over.wait(_GRACE):
            os._exit(1)

    def _tell(self, word: int) -> None:
        """Speak to the rank behind, once."""
        if self._left or self._behind is None:
            return
        self._left = True
        with contextlib.suppress(OSError):
            self._behind.sendall(_WORD.pack(word))

    def _close(self) -> None:
        connections = [connection for connection in (self._before, self._behind) if connection is not None]
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes the thread
        if self._thread is not None:
            self._thread.join()
        for connection in connections:
            connection.close()


def own_address(address: str) -> tuple[socket.AddressFamily, str, str]:
    """Address family; this host's address on the interface that leads to ``address``; and what that resolves to."""
    family, kind, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing
        return family, str(probe.getsockname()[0]), str(target[0])


def listening_address(launch: Launch) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """Where a rank may listen for the others: on a single host at its loopback; port 0."""
    if launch.world_size == launch.local_size:
        return socket.AF_INET, ("127.0.0.1", 0)
    return own_address(launch.address)[0], ("", 0)


def published_host(launch: Launch) -> str:
    """Where the other ranks find this one."""
    if launch.world_size == launch.local_size:
        return "127.0.0.1"
    _, own, target = own_address(launch.address)
    # On rank 0's host its name may stand for the loopback; the others reach it by that name.
    return launch.address if own == target or ipaddress.ip_address(own).is_loopback else own


def accepted(server: socket.socket, key: bytes) -> socket.socket:
    """The connection of the rank before; strangers, who do not know the key, are turned away."""
    server.settimeout(_CONNECT)
    while True:
        connection, _ = server.accept()
        connection.settimeout(5.0)
        with contextlib.suppress(OSError):
            if secrets.compare_digest(connection.recv(len(key), socket.MSG_WAITALL), key):
                return connection
        connection.close()


def _name(rank: int) -> str:
    return f"accessory/peers/{rank}"
