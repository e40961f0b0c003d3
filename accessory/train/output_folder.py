"""The folder of a run: held by one run at a time, and never a second run's by accident."""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from accessory.train.shelf import Shelf

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK = ".lock"
# How long a restarted run waits for the ranks of the one before, which may be writing their last checkpoint.
PATIENCE = 90.0


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; it goes with the process, however that ends. For one rank of the run.

    Raises:
        OSError: another run holds it, and still did after 90 seconds.
    """
    if fcntl is None:
        yield
        return
    with (folder / LOCK).open("a") as file:
        end = time.monotonic() + PATIENCE
        said = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise OSError(
                        f"another run is writing to output_dir {folder}: wait for it, stop it, or choose another"
                    ) from None
                if not said:
                    logger.warning("another run still writes to %s: waiting for it", folder)
                said = True
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        yield


def refuse_earlier_run(folder: Path) -> None:
    """See that a run which begins anew finds nothing of an earlier one.

    Raises:
        FileExistsError: there are checkpoints or models.
    """
    states = sorted((folder / Shelf.CHECKPOINTS).glob(f"[!.]*/{Shelf.INDEX}"))
    models = sorted(folder.glob("epoch*/meta.json"))
    for found in (*states, *models):
        raise FileExistsError(
            f"output_dir {folder} holds an earlier run ({found.parent.name}): "
            "go on with it by --auto_resume, or choose another output_dir"
        )
