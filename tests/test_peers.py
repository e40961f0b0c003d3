"""The ring in which ranks notice one another's death: here every rank is an object of one process."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from patience import PATIENCE

from accessory.launch import peers
from accessory.launch.launcher import Launch
from accessory.launch.peers import PeerWatch


class Ring:
    """The watches of so many ranks; what they said, as (rank, text); the codes with which they would have ended."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = dist.HashStore()
        self.said: list[tuple[int, str]] = []
        self.ended = threading.Event()
        monkeypatch.setattr(peers, "_GRACE", 0.2)
        monkeypatch.setattr(peers, "_EXPLAIN", 30.0)
        monkeypatch.setattr(peers.os, "_exit", self._exit)
        self.codes: list[int] = []
        self.watches = [self.watch(rank, size) for rank in range(size)]

    def watch(self, rank: int, size: int) -> PeerWatch:
        launch = Launch(launcher="torchrun", rank=rank, world_size=size, local_rank=rank, local_size=size)
        return PeerWatch(launch, self.store, say=lambda error: self.said.append((rank, str(error))))

    def _exit(self, code: int) -> None:
        self.codes.append(code)
        self.ended.set()


@contextlib.contextmanager
def entered(watches: list[PeerWatch]) -> Iterator[None]:
    with ThreadPoolExecutor(len(watches)) as pool:
        list(pool.map(PeerWatch.__enter__, watches))
    try:
        yield
    finally:
        for watch in watches:
            watch.leave()
        for watch in watches:
            watch.__exit__(None, None, None)


def die(watch: PeerWatch) -> None:
    """What the system does with a process's connections when it dies."""
    for connection in (watch._before, watch._behind):
        assert connection is not None
        connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(("size", "victim"), [(2, 0), (2, 1), (4, 0), (4, 2), (4, 3)])
def test_all_learn_of_a_death_and_one_says_it(size: int, victim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Ring(size, monkeypatch)
    others = [watch for rank, watch in enumerate(ring.watches) if rank != victim]
    with entered(ring.watches):
        assert not any(watch.explain(wait=False) for watch in others)
        ring.watches[victim]._over.set()  # it does not listen itself any more
        die(ring.watches[victim])
        assert all(watch.explain(wait=True) for watch in others)
        ((rank, text),) = ring.said
        assert rank == (victim + 1) % size
        assert text.startswith(f"rank {victim} on {socket.gethostname()} is gone")
        # Whoever does not end by itself is ended.
        assert ring.ended.wait(PATIENCE)
    assert set(ring.codes) == {1}


def test_two_deaths_at_once_reach_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Ring(5, monkeypatch)
    with entered(ring.watches):
        for victim in (1, 3):
            ring.watches[victim]._over.set()
        for victim in (1, 3):
            die(ring.watches[victim])
        assert all(ring.watches[rank].explain(wait=True) for rank in (0, 2, 4))
    assert {rank for rank, _ in ring.said} <= {2, 4}
    assert ring.said


def test_who_fails_with_words_of_its_own_ends_the_others_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Ring(3, monkeypatch)
    with entered(ring.watches):
        ring.watches[1].__exit__(RuntimeError, RuntimeError("own words"), None)
        assert all(ring.watches[rank].explain(wait=True) for rank in (0, 2))
    assert ring.said == []


def test_leaving_in_order_is_no_death(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Ring(3, monkeypatch)
    with entered(ring.watches):
        ring.watches[1].leave()
        ring.watches[1].__exit__(None, None, None)
        thread = ring.watches[2]._thread
        assert thread is not None
        thread.join(PATIENCE)
        assert not any(ring.watches[rank].explain(wait=False) for rank in (0, 2))
    assert not ring.said
    assert not ring.codes


def test_one_process_has_no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Ring(1, monkeypatch)
    with entered(ring.watches):
        assert not ring.watches[0].explain(wait=True)


def test_strangers_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Ring(2, monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ring.watches[0].__enter__)
        ring.store.wait(["accessory/peers/0"], timedelta(seconds=PATIENCE))
        place = json.loads(ring.store.get("accessory/peers/0"))
        for word in (b"", b"short", bytes(16)):
            with socket.create_connection((place["host"], place["port"])) as stranger:
                stranger.sendall(word)
        pool.submit(ring.watches[1].__enter__).result()
        first.result()
    assert not ring.watches[0].explain(wait=False)
    for watch in ring.watches:
        watch.leave()
    for watch in ring.watches:
        watch.__exit__(None, None, None)
    assert not ring.said


def test_ranks_that_cannot_reach_one_another_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Ring(3, monkeypatch)
    monkeypatch.setattr(peers, "_CONNECT", 0.5)
    with pytest.raises(OSError, match="rank 0 and its neighbours cannot reach one another"):
        ring.watches[0].__enter__()


def test_an_address_that_others_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peers.own_address("127.0.0.1") == (socket.AF_INET, "127.0.0.1", "127.0.0.1")
    several = {"launcher": "torchrun", "rank": 3, "world_size": 4, "local_rank": 1, "local_size": 2}
    # On rank 0's host, whose name may stand for the loopback, the others know it by that name.
    for address in ("127.0.1.1", "localhost"):
        assert peers.published_host(Launch(**several, address=address)) == address
    monkeypatch.setattr(peers, "own_address", lambda address: (socket.AF_INET, "10.0.0.7", "10.0.0.1"))
    assert peers.published_host(Launch(**several, address="head")) == "10.0.0.7"
    assert peers.published_host(Launch()) == "127.0.0.1"
