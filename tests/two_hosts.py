"""Two network namespaces, joined by a pair of virtual network cards, as two hosts that share a file system."""

import functools
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from patience import PATIENCE
from ranks import run_command

ADDRESSES = ("10.99.0.1", "10.99.0.2")

# As root of a user namespace of its own; arguments: a shell command for each host. The first failure's code is
# returned, after the other command has ended.
_SCRIPT = f"""
set -eu
unshare --net sleep infinity & second=$!
trap 'kill $second' EXIT
while [ "$(readlink /proc/$second/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.02; done
there() {{ nsenter --target $second --net "$@"; }}
ip link add card1 type veth peer name card2
ip link set card2 netns $second
ip address add {ADDRESSES[0]}/24 dev card1
there ip address add {ADDRESSES[1]}/24 dev card2
ip link set lo up
ip link set card1 up
there ip link set lo up
there ip link set card2 up
bash -c "$1" & one=$!
there bash -c "$2" & two=$!
code=0
wait $one || code=$?
wait $two || code=$?
exit $code
"""


@functools.cache
def why_not() -> str:
    """Why this machine cannot make the two hosts; empty where it can."""
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            return f"there is no program {tool}"
    done = subprocess.run([*_namespace(), "true", "true"], capture_output=True, text=True)
    return "" if done.returncode == 0 else f"network namespaces cannot be made here ({done.stderr.strip()})"


def run_on_two_hosts(
    commands: Sequence[Sequence[str | Path]],
    environments: Sequence[Mapping[str, str]],
    *,
    cwd: Path,
    seconds: float = PATIENCE,
) -> subprocess.CompletedProcess[str]:
    """Run one command on each host, as `run_command` runs one."""
    lines = [
        "exec env " + shlex.join([*(f"{name}={value}" for name, value in variables.items()), *map(str, command)])
        for command, variables in zip(commands, environments, strict=True)
    ]
    return run_command([*_namespace(), *lines], cwd=cwd, seconds=seconds)


def _namespace() -> list[str]:
    return ["unshare", "--map-root-user", "--net", "bash", "-c", _SCRIPT, "two-hosts"]
