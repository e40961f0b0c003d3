"""What the benchmarks ask of the machine that they run on."""

import re
import socket
from pathlib import Path


def cpu_name() -> str:
    """The processor as Linux names it."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), "unknown CPU")


def rss_anon(process: int | str = "self") -> int:
    """Bytes of private memory of a process, by its number; of this one."""
    match = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert match
    return int(match[1]) * 1024


def loopback_bytes() -> int:
    """Bytes that all processes of this machine have sent one another over TCP since it runs."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def free_port() -> int:
    """A port of this host that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
