"""The folder of a run: held by one run at a time, never a second one's by accident, gone where nothing came of it."""

import contextlib
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from accessory.config import read_json
from accessory.files import locked, make_folders, remove_empty, remove_leftovers
from accessory.log import setup_logging
from accessory.text.form_files import META_NAME
from accessory.train.export import BEST, export_name, left_aside
from accessory.train.run_log import LINES, PICTURE
from accessory.train.shelf import Shelf

logger = logging.getLogger(__name__)

LOCK, LOG, OPTIONS = ".lock", "output.log", "options.json"
# How many seconds a restarted run waits for the ranks of the one before, which may be writing their last checkpoint.
PATIENCE = 900.0


class OutputFolder:
    """The folder of a run, while it is held.

    Attributes:
        begun: the run has come to its first step. One that ends before leaves nothing behind.
    """

    def __init__(self, folder: Path, made: Sequence[Path]) -> None:
        self.begun = False
        self._folders, self._lock = made, folder / LOCK
        states = folder / Shelf.CHECKPOINTS
        # In the order in which they can be removed.
        self._made = [
            path for path in (folder / LOG, folder / OPTIONS, states / Shelf.BEGUN, states) if not path.exists()
        ]

    def tidy(self) -> None:
        """Remove what a run without steps has written; what was there before, or is not its own, stays."""
        setup_logging(0)  # which closes the log
        for path in self._made:
            if not path.is_dir():
                path.unlink(missing_ok=True)
        remove_empty(self._made)

    def tidy_before_the_end(self) -> None:
        """The same where the process is about to end without unwinding anything."""
        if not self.begun:
            self.tidy()
            self._lock.unlink(missing_ok=True)
            remove_empty(self._folders)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[OutputFolder]:
    """Make the folder, hold its lock, remove what a killed run has left half-written, and log into it; for one rank.

    The lock goes with the process, however that ends.

    Raises:
        OSError: the folder cannot be written to; another run holds it, and still did after 15 minutes.
    """
    made: list[Path] = []
    with contextlib.ExitStack() as stack:
        # Once the lock is given back: where another run waits for it the folder is not empty.
        stack.callback(remove_empty, made)
        alone = _lock(folder, stack, made)
        run = OutputFolder(folder, made)
        try:
            setup_logging(0, file=folder / LOG)
            if alone:
                _remove_leftovers(folder)
            yield run
        except BaseException:
            if not run.begun:
                run.tidy()
            raise


def _lock(folder: Path, stack: contextlib.ExitStack, made: list[Path]) -> bool:
    """Make the folder, noting in ``made`` what was not there, and take its lock; False where there are no locks."""
    waits = partial(
        logger.warning, "another run still writes to %s: waiting for it, %.0f minutes at most", folder, PATIENCE / 60
    )
    try:
        while True:
            made[:] = make_folders(folder)
            with contextlib.suppress(FileNotFoundError):  # a run that was refused has taken its folder away
                return stack.enter_context(locked(folder / LOCK, on_wait=waits, patience=PATIENCE, remove=True))
    except TimeoutError:
        raise OSError(
            f"another run is writing to output_dir {folder}: wait for it, stop it, or choose another"
        ) from None
    except OSError as error:
        reason = f"{type(error).__name__}: {error}"
        raise OSError(
            f"output_dir {folder} cannot be written to ({reason}): choose a folder that you may write to"
        ) from None


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed run has left of its own; other commands may be writing into its folder now."""
    states = Shelf(folder / Shelf.CHECKPOINTS)
    left = [*left_aside(folder), *states.half_written()]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    for file in (folder / OPTIONS, folder / LINES, folder / PICTURE, states.folder / Shelf.LATEST):
        left += remove_leftovers(file)
    if left:
        names = ", ".join(str(path.relative_to(folder)) for path in left)
        logger.info("removed what an interrupted run had not finished in %s: %s", folder, names)


def refuse_earlier_run(folder: Path) -> None:
    """See that a run which begins anew finds nothing of an earlier one.

    Raises:
        FileExistsError: there are checkpoints or models.
    """
    states, models = (
        sorted((path for name in names for path in folder.glob(name)), key=lambda path: path.stat().st_mtime_ns)
        for names in ([f"{Shelf.CHECKPOINTS}/[!.]*/{Shelf.INDEX}"], [f"epoch*/{META_NAME}", f"{BEST}/{META_NAME}"])
    )
    if not states and not models:
        return
    newest = f"newest model {models[-1].parent.name}" if models else "no model"
    anew = "choose another --output_dir, or remove it"
    if not states:
        what, way_out = f"models of an earlier run without its training states ({newest})", anew
    elif (ended := _ended(folder, states[-1])) is not None:
        what, way_out = f"a finished run ({ended}, {newest})", anew
    else:
        what = f"a run that was stopped ({states[-1].parent.name}, {newest})"
        way_out = "go on with it by --auto_resume, or choose another --output_dir"
    raise FileExistsError(f"output_dir {folder} holds {what}: {way_out}")


def _ended(folder: Path, state: Path) -> str | None:
    """How long a finished run was whose last state this is; None where it is not finished, or nobody can tell."""
    try:
        told, progress = read_json(folder / OPTIONS), read_json(state)["progress"]
        steps, position = progress["step"], progress["sampler"]
        epoch, step = position["epoch"], position["step"]
        whole = step * position["global_batch"] >= position["examples"]
        model = export_name(epoch, None if whole else step * told["accum_iter"])
        if not (folder / model / META_NAME).exists():  # stopped before it was written
            return None
        if epoch + whole >= told["epochs"]:
            return f"{epoch + whole} epochs"
        if steps >= (told["max_steps"] or math.inf):
            return f"{steps} steps"
        given_up = told.get("early_stop") and progress["validation"]["since"] >= told["early_stop"]
        return f"early, after {steps} steps" if given_up else None
    except (KeyError, OSError, TypeError, ValueError):  # of a version before, or not ours
        return None
