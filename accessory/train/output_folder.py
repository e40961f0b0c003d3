"""The folder of a run: held by one run at a time, and never a second run's by accident."""

import contextlib
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from accessory.files import locked
from accessory.train.shelf import Shelf

logger = logging.getLogger(__name__)

LOCK = ".lock"
# How many seconds a restarted run waits for the ranks of the one before, which may be writing their last checkpoint.
PATIENCE = 900.0


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; it goes with the process, however that ends. For one rank of the run.

    Raises:
        OSError: another run holds it, and still did after 15 minutes.
    """
    waits = partial(logger.warning, "another run still writes to %s: waiting for it", folder)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / LOCK, on_wait=waits, patience=PATIENCE))
        except TimeoutError:
            raise OSError(
                f"another run is writing to output_dir {folder}: wait for it, stop it, or choose another"
            ) from None
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
