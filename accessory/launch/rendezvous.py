"""Where the processes of a command meet: process groups made from what the launcher tells, and left together."""

import contextlib
import logging
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from accessory.errors import first_line, out_of_memory
from accessory.launch.launcher import Launch, report_failure
from accessory.launch.parent import LOOK_EVERY, Parent
from accessory.launch.peers import PeerWatch, own_address
from accessory.launch.placement import too_few_cards
from accessory.launch.run_store import ALL_THERE, SAY_AFTER, run_store
from accessory.parallel.state import ParallelState, check_device, on_all_ranks, raised_on_all_ranks

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_GET_ADDRESS = 0x8915  # SIOCGIFADDR of Linux

_CHECK_PORT = "see that the address can be reached and the port is free, or set MASTER_ADDR and MASTER_PORT"
_CHECK_CARD = "see that the hosts reach one another; GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME) may name the network card"

# What gloo, NCCL and the store say when a peer is gone; they raise plain RuntimeErrors.
_LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|socket (closed|timeout)|timed out|timeout|"
    r"gloo|nccl|tcpstore|"
    r"failed to (recv|send)|no route to host",
    re.IGNORECASE,
)


@contextlib.contextmanager
def process_group_of_launcher(
    device: str | None = None,
    *,
    say: Callable[[Exception], None],
    even_alone: bool = False,
    timeout: timedelta | None = None,
    watch_launcher: bool = True,
) -> Iterator[dist.ProcessGroup | None]:
    """Join the processes that torchrun or srun started, for the time of a command.

    With a GPU for every rank of this host the backend is nccl and the local rank chooses the card; otherwise, or
    where ``device`` is "cpu", it is gloo and the ranks compute on the CPU. An error that all ranks raise alike is
    given to ``say`` on rank 0, and the ranks leave together afterwards: the launcher ends the rest as soon as one
    has failed. When a rank dies, one of the others says so, and all of them end.

    Args:
        even_alone: a process started alone gets a group of itself; otherwise None.
        timeout: of collectives; None: torch's own.
        watch_launcher: end this process when the launcher is gone; False: the command sees to that itself.

    Raises:
        ValueError: ``device`` names one card, which ranks cannot share, or the launcher's variables are wrong.
        OSError: the ranks do not find one another.
        SystemExit: with code 1, after an error that was said.
    """
    launch = Launch.find()
    if launch.world_size == 1 and not even_alone:
        yield None
        return
    if device is not None and ":" in device and launch.world_size > 1:
        raise on_all_ranks(ValueError(f'device "{device}" is one card for all ranks; give "cuda" or "cpu" alone'))
    store = _meet(launch)
    joined = False
    with PeerWatch(launch, store, say=say) as peers, _ending_with_launcher(launch, peers, watch_launcher):
        try:
            _join(launch, store, device, timeout)
            joined = True
            yield dist.group.WORLD
            peers.leave()
        except Exception as error:
            lost = not joined or is_lost_peer(error)
            if raised_on_all_ranks(error):
                if launch.rank == 0:
                    say(error)
                report_failure(str(out_of_memory(error) or error))
                with contextlib.suppress(RuntimeError):
                    dist.barrier()
                peers.leave()
            elif not peers.explain(wait=lost):
                if not joined or not lost:
                    raise
                say(RuntimeError(f"the ranks have lost touch, so this one ends ({_brief(error)})"))
            report_failure("another rank was lost, so this one ended")
            raise SystemExit(1) from None
        finally:
            if joined:
                dist.destroy_process_group()


@contextlib.contextmanager
def _ending_with_launcher(launch: Launch, peers: PeerWatch, watch: bool) -> Iterator[None]:
    """Meanwhile a rank whose launcher is gone ends at once, as all of that launcher do; those of others follow."""
    over, parent = threading.Event(), Parent(launch)

    def look() -> None:
        while not over.wait(LOOK_EVERY):
            if parent.is_gone:
                peers.fail()
                if launch.local_rank == 0:
                    logger.error("the launcher is gone: leaving")
                os._exit(1)

    if watch and launch.world_size > 1:
        threading.Thread(target=look, name="launcher watch", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def refuse_together(why: str) -> None:
    """Meet the other ranks before ending over wrong arguments, which has been said.

    A launcher ends all ranks with the first one, so none may leave before rank 0 has spoken. A rank whose arguments
    are in order learns here, with its first collective, that another's are not.
    """
    with contextlib.suppress(OSError, SystemExit), process_group_of_launcher(say=lambda error: None) as group:
        ParallelState.from_group(group, "cpu").agree(ValueError(f"rank {Launch.find().rank}: {why}"))


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank ended or cannot be reached."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and bool(_LOST_PEER.search(str(error)))


def _meet(launch: Launch) -> dist.Store:
    """The store through which the ranks find one another, once all of them are there."""
    if launch.world_size > launch.local_size:
        _choose_interface(launch.address)
    os.environ.update(MASTER_ADDR=launch.address, MASTER_PORT=str(launch.port))
    with _explained(launch, _CHECK_PORT):
        store = run_store(launch)
    place = f"{launch.address}:{launch.port}"
    others = launch.world_size - 1
    waiting = threading.Timer(
        SAY_AFTER,
        lambda: logger.warning(
            "rank %d still waits at %s for the %d other processes: were all of them started?",
            *(launch.rank, place, others),
        ),
    )
    waiting.daemon = True
    if launch.local_rank == 0:
        waiting.start()
    try:
        with _explained(launch, _CHECK_PORT):
            # A launcher's own store is there before the ranks are.
            store.set(f"accessory/here/{launch.rank}", "")
            store.wait([f"accessory/here/{rank}" for rank in range(launch.world_size)], ALL_THERE)
    finally:
        waiting.cancel()
    return store


def _join(launch: Launch, store: dist.Store, device: str | None, timeout: timedelta | None) -> None:
    """Make the default process group."""
    # Where every task of SLURM sees the one card that is bound to it, all of them see one card.
    cards = torch.cuda.device_count()
    bound = launch.launcher == "slurm" and cards == 1
    on_gpus = device != "cpu" and cards > 0 and (cards >= launch.local_size or bound)
    if not on_gpus and (device == "cuda" or (device is None and cards > 0)):
        if device == "cuda":
            check_device(device)
            raise OSError(too_few_cards(launch.local_size))
        logger.warning("%d ranks on this host and %d GPUs: computing on the CPU", launch.local_size, cards)
    if on_gpus:
        torch.cuda.set_device(launch.local_rank % cards)
    with _explained(launch, _CHECK_CARD):
        dist.init_process_group(
            "nccl" if on_gpus else "gloo",
            store=dist.PrefixStore("accessory", store),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
        )


@contextlib.contextmanager
def _explained(launch: Launch, remedy: str) -> Iterator[None]:
    try:
        yield
    except (dist.DistError, OSError, RuntimeError) as error:
        raise OSError(
            f"rank {launch.rank} of {launch.world_size} cannot meet the others at {launch.address}:{launch.port} "
            f"({_brief(error)}): {remedy}"
        ) from None


def _brief(error: BaseException) -> str:
    return first_line(str(error), otherwise=type(error).__name__)


def _choose_interface(address: str) -> None:
    """Let gloo use the network interface that leads to rank 0.

    By itself it takes the one that the host's own name stands for, which on many hosts is the loopback.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or fcntl is None:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        _, own, _ = own_address(address)
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                request = struct.pack("256s", name.encode()[:15])
                if socket.inet_ntoa(fcntl.ioctl(probe, _GET_ADDRESS, request)[20:24]) == own:
                    os.environ["GLOO_SOCKET_IFNAME"] = name
                    return
