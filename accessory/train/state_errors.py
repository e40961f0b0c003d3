"""What goes wrong with a training state on disk, in one line and of one type."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch.distributed.checkpoint.api import CheckpointException

from accessory.errors import CheckpointError
from accessory.launch.rendezvous import is_lost_peer

Result = TypeVar("Result")


def must_be_shared(folder: Path) -> None:
    """Raise OSError where another rank's folder is not there for this one."""
    if not folder.is_dir():
        raise OSError(f"{folder.parent} is not the same folder on all ranks: choose an output_dir that all hosts share")


def in_one_line(step: Callable[[], Result], what: str, remedy: str, damaged: Path | None = None) -> Result:
    """Run a step of DCP; its errors, of many types and many lines, become one line of one type.

    Raises:
        CheckpointError: the step failed, and ``damaged`` is the folder that it read.
        OSError: the step failed.
    """
    try:
        with torch.no_grad():
            return step()
    except (CheckpointException, Exception) as error:
        where = ""
        cause: BaseException = error
        if isinstance(error, CheckpointException) and error.failures:
            rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
            where = f" on rank {rank}"
        if is_lost_peer(cause):
            raise cause from None  # nothing is wrong with the folder
        text = next(iter(str(cause).strip().splitlines()), "")
        kind = OSError if damaged is None else CheckpointError
        raise kind(f"{what}{where} ({type(cause).__name__}: {text}): {remedy}") from None
