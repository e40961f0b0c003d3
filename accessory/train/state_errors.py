"""What goes wrong with a training state on disk, in one line and of one type."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch.distributed.checkpoint.api import CheckpointException

from accessory.errors import CheckpointError, first_line, shown_bytes
from accessory.files import no_room
from accessory.launch.rendezvous import is_lost_peer

Result = TypeVar("Result")


def must_be_shared(folder: Path) -> None:
    """Raise OSError where another rank's folder is not there for this one."""
    if not folder.is_dir():
        raise OSError(f"{folder.parent} is not the same folder on all ranks: choose an output_dir that all hosts share")


@dataclass(frozen=True)
class Writing:
    """What is being written, for the message of a disk that is full: where, and how many bytes it will have."""

    folder: Path
    size: int

    def refused(self, error: BaseException) -> str | None:
        """Why there was no room for it, and how much it takes; None where the error is about something else."""
        reason = no_room(error, self.folder)
        if reason is None:
            return None
        # What is written of it is about to be removed.
        written = sum(file.stat().st_size for file in self.folder.glob("*"))
        free = shutil.disk_usage(self.folder).free + written
        return f"{reason}; it takes over {shown_bytes(self.size)}, and {shown_bytes(free)} are free"


def in_one_line(
    step: Callable[[], Result],
    what: str,
    remedy: str,
    damaged: Path | None = None,
    *,
    writing: Writing | None = None,
) -> Result:
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
        reason = None if writing is None else writing.refused(cause)
        if reason is None:
            reason = f"{type(cause).__name__}: {first_line(str(cause), otherwise='')}"
        kind = OSError if damaged is None else CheckpointError
        raise kind(f"{what}{where} ({reason}): {remedy}") from None
