"""How much memory a device has for the ranks that compute on it."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch


class DeviceMemory(NamedTuple):
    """A device's memory; ranks that find an equal one share it.

    Attributes:
        name: for messages.
        place: tells it from others of the run.
        bytes: in all, whoever has them now.
    """

    name: str
    place: str
    bytes: int


def device_memory(device: torch.device) -> DeviceMemory:
    """That of this rank's card, or for the CPU what the host, or a control group on it, lets its processes have."""
    host = socket.gethostname()
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return DeviceMemory(f"a GPU ({card.name})", f"{host} {card.uuid}", card.total_memory)
    return DeviceMemory(f"host {host}", f"{host} {_control_groups(Path('/'))}", host_memory())


def host_memory(root: Path = Path("/")) -> int:
    """Bytes that the processes of this one's control groups may have together: the host's, or the least limit of these.

    Limits are those of the memory controller: memory.max of version 2 (the kernel's admin-guide/cgroup-v2.rst), and
    memory.limit_in_bytes of version 1 (admin-guide/cgroup-v1/memory.rst), of the group itself and of those around it.

    Args:
        root: where proc and sys lie.
    """
    own = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([own, *_limits(root)])


def _limits(root: Path) -> Iterator[int]:
    # "0::/a/b" is a group of version 2, "4:memory:/a/b" one of version 1. A container may see itself as the root.
    mounted = root / "sys/fs/cgroup"
    for line in _control_groups(root).splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            base, name = mounted, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = mounted / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = base / path.strip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # "max"; the root of version 2 has no such file
                yield int((folder / name).read_text())
            if folder == base:
                break


def _control_groups(root: Path) -> str:
    try:
        return (root / "proc/self/cgroup").read_text()
    except OSError:  # a system without them
        return ""
