"""How ranks come to the store of their run, and to no other."""

import logging
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from ranks import free_port

from accessory.launch import run_store as module
from accessory.launch.launcher import Launch
from accessory.launch.run_store import run_store


def launch(rank: int, port: int, **changes: Any) -> Launch:
    place = {"world_size": 2, "local_rank": rank, "local_size": 2, "port": port, "run": "7.0"}
    return Launch(launcher="slurm", rank=rank, **{**place, **changes})


@pytest.fixture
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(module, "_ANSWERS_WITHIN", 0.4)
    monkeypatch.setattr(module, "SAY_AFTER", 0.2)
    monkeypatch.setattr(module, "_NAME_PATIENCE", 0.4)
    monkeypatch.setattr(module, "ALL_THERE", timedelta(seconds=1))


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a program that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_ranks_share_a_store():
    port = free_port()
    found: list[dist.Store] = []
    # The second comes first, and waits.
    second = threading.Thread(target=lambda: found.append(run_store(launch(1, port))))
    second.start()
    first = run_store(launch(0, port))
    second.join()
    first.set("word", "said by the first")
    assert found[0].get("word") == b"said by the first"
    assert run_store(Launch()).add("alone", 1) == 1


@pytest.mark.usefixtures("impatient")
def test_a_taken_port(silent):
    with pytest.raises(OSError, match="another program has taken the port"):
        run_store(launch(0, silent))
    with pytest.raises(OSError, match="what listens there does not answer, so it is no rank of this run"):
        run_store(launch(1, silent))


@pytest.mark.usefixtures("impatient")
def test_another_runs_store():
    port = free_port()
    other = run_store(launch(0, port, run="6.0"))
    other.set("rank 0", "")
    with pytest.raises(OSError, match="another run listens there"):
        run_store(launch(1, port))
    assert run_store(launch(1, port, run="6.0")).get("rank 0") == b""


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("known", [True, False])
def test_nobody_listens(known, monkeypatch, caplog):
    def unknown_name(*arguments: Any, **settings: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(logging.getLogger("accessory"), "propagate", True)
    if not known:
        monkeypatch.setattr(socket, "create_connection", unknown_name)
    reason = "Connection refused" if known else "Name or service not known"
    with pytest.raises(OSError, match=rf"{reason}, after \d+ s"):
        run_store(launch(1, free_port()))
    (record,) = caplog.records
    assert record.getMessage().startswith("rank 1 waits for rank 0 to listen at 127.0.0.1:")
