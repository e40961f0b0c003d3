"""Logging that knows its rank.

Modules log through ``logging.getLogger(__name__)``. Programs call `setup_logging` once; then rank 0 speaks at
INFO and the other ranks only at WARNING, each of their lines marked with its rank.
"""

import logging
import os
import sys


def global_rank() -> int:
    """Rank of this process among those that torchrun started (0 where it was started alone)."""
    value = os.environ.get("RANK", "")
    return int(value) if value.isdigit() else 0


def setup_logging(rank: int | None = None) -> None:
    """Send the package's records to standard error; calling it again only changes the rank."""
    rank = global_rank() if rank is None else rank
    logger = logging.getLogger("accessory")
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    # What is true of the whole machine is said by one rank.
    logging.getLogger("accessory.kernels").setLevel(logging.NOTSET if rank == 0 else logging.ERROR)
    mark = "" if rank == 0 else f"[rank {rank}] "
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{mark}%(levelname)s: %(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False


def say_once(logger: logging.Logger, level: int, message: str) -> None:
    """Log ``message`` unless this process has logged the same text before."""
    if message not in _said:
        _said.add(message)
        logger.log(level, message)


_said: set[str] = set()
