"""Logging that knows its rank.

Modules log through ``logging.getLogger(__name__)``. Programs call `setup_logging` once; then rank 0 speaks at
INFO and the other ranks only at WARNING, each of their lines marked with its rank.
"""

import logging
import sys
from pathlib import Path

from accessory.launch.launcher import Launch


def global_rank() -> int:
    """Rank of this process among those that a launcher started (0 where it was started alone)."""
    try:
        return Launch.find().rank
    except ValueError:
        return 0  # said where the ranks are joined


def setup_logging(rank: int | None = None, *, level: int = logging.INFO, file: Path | None = None) -> None:
    """Send the package's records to standard error; calling it again only changes the settings.

    Args:
        level: of the least that rank 0 says; the other ranks are silent below WARNING besides.
        file: a file to append rank 0's records to as well.
    """
    rank = global_rank() if rank is None else rank
    logger = logging.getLogger("accessory")
    logger.setLevel(level if rank == 0 else max(level, logging.WARNING))
    # What is true of the whole machine, or of files that all ranks read, is said by one rank.
    for name in ("kernels", "data", "text"):
        logging.getLogger(f"accessory.{name}").setLevel(logging.NOTSET if rank == 0 else logging.ERROR)
    mark = "" if rank == 0 else f"[rank {rank}] "
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    handlers[0].setFormatter(logging.Formatter(f"{mark}%(levelname)s: %(message)s"))
    if file is not None and rank == 0:
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
        handlers[1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
    for handler in logger.handlers:
        handler.close()
    logger.handlers[:] = handlers
    logger.propagate = False


def say_error(text: str) -> None:
    """One line on standard error as the log writes its own, also where no log is set up or it is told to be silent."""
    sys.stderr.write(f"ERROR: {text}\n")
    sys.stderr.flush()


def say_once(logger: logging.Logger, level: int, message: str) -> None:
    """Log ``message`` unless this process has logged the same text before."""
    if message not in _said:
        _said.add(message)
        logger.log(level, message)


_said: set[str] = set()
