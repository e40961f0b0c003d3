"""Ranks that a process of ours starts on this host: how many, on which cards, in what environment, and their store."""

import contextlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from accessory.launch.launcher import PARENT_VARIABLE
from accessory.launch.threads import share, share_of
from accessory.parallel.state import check_device


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How many ranks there are, and where.

    Attributes:
        cards: their GPUs; None: those that they find, or the CPU.
        on_cpu: they compute on the CPU, and share its cores.
        master_addr, master_port: where they meet; None: a port that is free.
    """

    size: int
    cards: Sequence[int] | None = None
    on_cpu: bool = False
    master_addr: str = "127.0.0.1"
    master_port: int | None = None

    @classmethod
    def of(
        cls,
        ranks: int | None,
        gpu_ids: Sequence[int] | None,
        *,
        device: Any,
        master_addr: str = "127.0.0.1",
        master_port: int | None = None,
    ) -> Self:
        """Where so many ranks, or one for each of these cards, compute by the rules of `process_group_of_launcher`.

        Raises:
            ValueError: naming the argument; the device is not there for all of them.
        """
        if ranks is not None and (type(ranks) is not int or ranks < 1):
            raise ValueError(f"ranks must be a whole number of at least 1, not {ranks!r}")
        if gpu_ids is not None:
            _check_cards(gpu_ids, ranks)
        size = ranks or (1 if gpu_ids is None else len(gpu_ids))
        asked = None if device is None else check_device(device)
        count = torch.cuda.device_count()
        on_cpu = count < size if asked is None else asked.type == "cpu"
        if asked is not None and not on_cpu:
            if asked.index is not None and size > 1:
                raise ValueError(f"the device {asked} is one card, and there are {size} ranks: give the device cuda")
            if count < size:
                raise ValueError(too_few_cards(size))
        if gpu_ids is not None and not on_cpu and max(gpu_ids) >= count:
            raise ValueError(f"gpu_ids {list(gpu_ids)} go beyond the {count} GPUs of this machine, 0 to {count - 1}")
        return cls(
            size=size,
            cards=None if on_cpu else gpu_ids,
            on_cpu=on_cpu,
            master_addr=master_addr,
            master_port=master_port,
        )


def environments(placement: Placement) -> tuple[dist.Store, list[dict[str, str]]]:
    """The store at which the ranks meet, to be kept while they run, and what each of them inherits.

    Raises:
        OSError: the address is not this host's, or the port is taken.
    """
    store, port = _store(placement.master_addr, placement.master_port or 0)
    shared = environment_of(placement) | {
        "WORLD_SIZE": str(placement.size),
        "LOCAL_WORLD_SIZE": str(placement.size),
        "MASTER_ADDR": placement.master_addr,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    return store, [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(placement.size)]


def environment_of(placement: Placement) -> dict[str, str]:
    """What all ranks inherit, without another launcher's variables."""
    others = ("SLURM_", "TORCHELASTIC_", PARENT_VARIABLE)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(others)}
    share(environment, share_of(placement.size))
    if placement.cards is not None:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = seen.split(",") if seen else [str(card) for card in range(torch.cuda.device_count())]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[card] for card in placement.cards)
    root = str(Path(__file__).parents[2])
    found = environment.get("PYTHONPATH", "").split(os.pathsep)
    # The package may lie where only this program looks.
    if root not in found and not root.endswith("-packages"):
        environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, found)])
    return environment


def too_few_cards(ranks: int) -> str:
    """Why so many ranks of this host cannot have a GPU each, and what to do; of none `check_device` speaks."""
    cards = torch.cuda.device_count()
    return f"{ranks} ranks on this host and {cards} GPUs: start as many ranks as there are GPUs, or give the device cpu"


def _check_cards(gpu_ids: Sequence[int], ranks: int | None) -> None:
    known = isinstance(gpu_ids, Sequence) and all(type(card) is int and card >= 0 for card in gpu_ids)
    if not known or not gpu_ids or len(set(gpu_ids)) < len(gpu_ids):
        raise ValueError(f"gpu_ids must be the numbers of different cards, not {gpu_ids!r}")
    if ranks not in (None, len(gpu_ids)):
        raise ValueError(f"{ranks} ranks were asked for on {len(gpu_ids)} cards: give one of ranks and gpu_ids")


def _store(address: str, port: int) -> tuple[dist.Store, int]:
    """Serve a store; at an address of this host alone, so that nothing else can reach it."""
    with contextlib.ExitStack() as opened:
        try:
            family, kind, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
            listener = opened.enter_context(socket.socket(family, kind))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen()
        except OSError as error:
            raise OSError(
                f"the ranks cannot meet at {address}:{port} ({error.strerror}): give another master_port or master_addr"
            ) from None
        opened.pop_all()
    port = listener.getsockname()[1]
    store = dist.TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, port
