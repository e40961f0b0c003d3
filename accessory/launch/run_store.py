"""The store through which the ranks of a run find one another: rank 0 serves it, or torchrun does."""

import logging
import os
import queue
import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from accessory.launch.launcher import Launch

logger = logging.getLogger(__name__)

# How long ranks wait for one another to start, maybe on other hosts.
ALL_THERE = timedelta(minutes=30)
# After so many seconds a process says for whom it waits.
SAY_AFTER = 15.0
# A host's name may be unknown for a moment.
_NAME_PATIENCE = 60.0
# Whoever listens and does not answer as this run's store within so many seconds is somebody else.
_ANSWERS_WITHIN = 20.0
_LOOK_EVERY = 0.2


def run_store(launch: Launch) -> dist.Store:
    """The store of a run; waits for rank 0, and for no other rank.

    torch's own client waits without end for an answer of whatever listens at its port, and takes another run's store
    for its own. So a rank first waits until something listens, and leaves if that is not rank 0 of this run.

    Raises:
        OSError: rank 0 does not listen, or cannot since the port is taken, or another program does.
    """
    if launch.launcher == "alone":
        return dist.HashStore()
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = launch.rank == 0 and not by_torchrun
    if not serves:
        _wait_for_listener(launch)
    store = dist.PrefixStore(f"accessory/{launch.run}", _open(launch, serves=serves))
    # Torchrun's port is its own; another may be one that several runs have come to.
    if serves:
        store.set("rank 0", "")
    elif not by_torchrun:
        try:
            store.wait(["rank 0"], timedelta(seconds=_ANSWERS_WITHIN))
        except dist.DistError:
            raise OSError("another run listens there") from None
    return store


def _wait_for_listener(launch: Launch) -> None:
    """Return as soon as something listens at the run's address."""
    start, said = time.monotonic(), False
    while True:
        try:
            socket.create_connection((launch.address, launch.port), timeout=5).close()
            return
        except OSError as error:
            waited = time.monotonic() - start
            if waited > (_NAME_PATIENCE if isinstance(error, socket.gaierror) else ALL_THERE.total_seconds()):
                raise OSError(f"{error.strerror or error}, after {waited:.0f} s") from None
        # The second rank speaks too: it may share its host with a first one that is gone.
        if waited > SAY_AFTER and not said and (launch.local_rank == 0 or launch.rank == 1):
            place = f"{launch.address}:{launch.port}"
            logger.warning("rank %d waits for rank 0 to listen at %s: was it started?", launch.rank, place)
            said = True
        time.sleep(_LOOK_EVERY)


def _open(launch: Launch, *, serves: bool) -> dist.Store:
    """Serve the store, or come to it."""
    outcome: queue.Queue[dist.Store | Exception] = queue.Queue()

    def connect() -> None:
        try:
            store = dist.TCPStore(
                launch.address,
                launch.port,
                launch.world_size,
                serves,
                timeout=timedelta(seconds=_ANSWERS_WITHIN),
                wait_for_workers=False,
                multi_tenant=True,
            )
            outcome.put(store)
        except (dist.DistError, RuntimeError, ValueError) as error:
            outcome.put(error)

    # In a thread, since nothing ends its wait for an answer.
    threading.Thread(target=connect, name="run store", daemon=True).start()
    try:
        found = outcome.get(timeout=2 * _ANSWERS_WITHIN)
    except queue.Empty:
        raise OSError("what listens there does not answer, so it is no rank of this run") from None
    if isinstance(found, Exception):
        raise OSError("another program has taken the port") if "EADDRINUSE" in str(found) else found
    found.set_timeout(ALL_THERE)
    return found
