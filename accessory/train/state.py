"""Training state on disk: saved beside the training steps, complete or not at all, for any number of ranks.

A checkpoint is a folder in the run's output folder. torch.distributed.checkpoint (DCP) writes the tensors, each
once and whole however it is sharded, so that other ranks can read it; state.json holds the plain values, the
model's sizes and the length of every file. A small file, ``latest``, names the checkpoint to go on from.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from accessory.config import ModelArgs, read_json
from accessory.errors import CheckpointError
from accessory.files import sync, write_json
from accessory.model.meta import MetaModel
from accessory.parallel.state import ParallelState, agreed
from accessory.train.shelf import Shelf
from accessory.train.snapshot import (
    check_same_model,
    copied,
    over_all_ranks,
    prime,
    restore_rng,
    rng_state,
    seed_rank,
    tensors_of,
)
from accessory.train.state_errors import Writing, in_one_line, must_be_shared

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# A rank that has written its part, or needs no tokenising, waits for the slowest one; a death is noticed at once.
_PATIENCE = timedelta(hours=8)


class StateStore:
    """The checkpoints of a run. Every method is collective over all ranks, and raises on all of them alike.

    Attributes:
        folder: where the checkpoints lie, on a file system that all ranks share.
        world: all ranks as one group, whose members may wait for one another for hours. While a state is being
            written it belongs to that; `wait` before it is used otherwise.
    """

    def __init__(
        self,
        output_dir: str | Path,
        state: ParallelState,
        *,
        keep_last: int | None = None,
        without_frozen: bool = False,
    ) -> None:
        """Make the folder, and see that it can be written to.

        Args:
            keep_last: how many checkpoints stay; None: all.
            without_frozen: leave out what does not train; the model must have it already when a state is loaded.

        Raises:
            ValueError: keep_last is not positive.
            OSError: the folder cannot be written, or is not the same one on all ranks.
        """
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}: keep at least 1, or None for all")
        self.folder = Path(output_dir).absolute()
        self._shelf, self._state, self._keep_last = Shelf(self.folder), state, keep_last
        self._without_frozen = without_frozen
        # Saves run in a thread beside training steps, whose collectives theirs must not meet.
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self.world = over_all_ranks(state, self._group)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._saved = ""
        make = partial(self._shelf.aside, "probe")
        where = f"output_dir {self.folder} cannot be written to"
        probe, _ = self._on_first(partial(in_one_line, make, where, "choose a folder that you may write to"))
        try:
            agreed(self.world, partial(must_be_shared, probe))
        finally:
            self._discard(probe)

    def save(
        self,
        model: MetaModel,
        optimizer: torch.optim.Optimizer,
        progress: dict[str, Any],
        name: str,
        *,
        asynchronous: bool = True,
    ) -> None:
        """Save model, optimizer, the ranks' random states and ``progress`` in the folder ``name``.

        Waits for the save before this one, whose failure has been said and is no reason not to try again. Where an
        earlier run has left a folder of this name, the new one gets a number behind it; what this store has saved
        last is not saved again.

        Args:
            progress: plain JSON values, the same on every rank: step, epoch, sampler and scaler state, ...
            asynchronous: return once the tensors are copied to memory; they are written while training goes on.

        Raises:
            OSError: this save failed; earlier checkpoints are untouched.
            TypeError: progress holds something else than JSON values.
        """
        with suppress(OSError):
            self.wait()
        if name == self._saved:
            return
        sizes = {"dp_size": self._state.dp_size, "mp_size": self._state.mp_size}
        record = {"torch": torch.__version__, **sizes, "args": model.llma.args.to_dict(), "progress": progress}
        record = agreed(self.world, lambda: json.loads(json.dumps(record)), (name, progress))
        aside, final = self._on_first(partial(self._shelf.aside, name))

        def stage() -> tuple[dict[str, Tensor], dict[str, Any]]:
            must_be_shared(aside)
            tensors = tensors_of(model, optimizer, without_frozen=self._without_frozen)
            return copied(tensors) if asynchronous else tensors, rng_state(self._state.device)

        try:
            tensors, rng = agreed(self.world, stage)
        except BaseException:
            self._discard(aside)
            raise
        self._say(f"checkpoint {final}: writing")
        write = partial(self._write, tensors, rng, record, aside, final)
        self._saved = name
        if asynchronous:
            self._pending = self._thread.submit(self._saying_at_once, write)
        else:
            write()

    def wait(self) -> None:
        """Wait until an asynchronous save is on disk.

        Raises:
            OSError: it failed; earlier checkpoints are untouched.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish what is under way and give the process group back; raises as `wait`."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            dist.destroy_process_group(self._group)

    def latest(self) -> Path | None:
        """The checkpoint to go on from: what ``latest`` names, else the newest complete one; None without any.

        Half-written folders are ignored, with a warning.
        """
        self.wait()
        return self._on_first(self._shelf.latest)

    def last_saved(self) -> Path | None:
        """The folder that ``latest`` names now, on whichever rank and thread asks; None without any."""
        return self._shelf.named()

    def locate(self, path: str | Path) -> Path:
        """The checkpoint at a path that a user gave: one itself, or the last of another run's folder.

        Raises:
            CheckpointError: there is none.
        """
        return self._on_first(partial(Shelf.locate, Path(path).absolute()))

    def check(self, path: Path, args: ModelArgs) -> dict[str, Any]:
        """See that a checkpoint is complete and of a model of these sizes; returns its record, with ``progress``.

        Raises:
            CheckpointError: names the folder and the field.
        """

        def check() -> dict[str, Any]:
            reason = Shelf.incomplete(path)
            if reason:
                raise CheckpointError(f"{path} is no complete checkpoint ({reason}): resume from another one")
            content = read_json(path / Shelf.INDEX)
            check_same_model(path, content["args"], args)
            return content

        return agreed(self.world, check, path.name)

    def load(
        self, path: str | Path, model: MetaModel, optimizer: torch.optim.Optimizer, *, seed: int = 0
    ) -> dict[str, Any]:
        """Fill model, optimizer and the rank's random state from a checkpoint; returns its ``progress``.

        The ranks and the experts' placement may be others than those of the save; the random states then begin
        anew from seed and rank, which is said. Learning rate, betas and weight decay stay those of ``optimizer``.
        DCP's index is a pickle: resume only from folders that you trust.

        Raises:
            CheckpointError: incomplete, damaged, or of a model of other sizes; names the folder and the field.
        """
        self.wait()
        path = Path(path).absolute()

        def prepare() -> dict[str, Tensor]:
            stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
            frozen = {f"model.{name}" for name, own in model.named_parameters() if not own.requires_grad}
            prime(optimizer, empty=not any(key.startswith("optimizer.") for key in stored))
            # A frozen weight that the state leaves out stays as it was built.
            return tensors_of(model, optimizer, without_frozen=not frozen <= stored.keys())

        def explained(step: Callable[[], Result]) -> Result:
            return in_one_line(step, f"{path} cannot be read", "resume from another one", path)

        record = self.check(path, model.llma.args)
        # A rank that fails before the collectives of DCP must not leave the others in them.
        tensors = agreed(self.world, partial(explained, prepare))
        read = partial(dcp.load, tensors, checkpoint_id=path, process_group=self._group)
        agreed(self.world, partial(explained, read))
        same = (record["dp_size"], record["mp_size"]) == (self._state.dp_size, self._state.mp_size)
        if same:
            file = path / f"rng.{self.world.mp_rank}.pt"
            agreed(self.world, lambda: restore_rng(torch.load(file, weights_only=True), self._state.device))
        else:
            seed_rank(seed, self.world.mp_rank)
            self._say(
                f"{path} was saved at dp {record['dp_size']}, mp {record['mp_size']}, and is resumed at dp "
                f"{self._state.dp_size}, mp {self._state.mp_size}: random states begin anew from seed {seed} and rank"
            )
        progress: dict[str, Any] = record["progress"]
        return progress

    def _write(
        self, tensors: dict[str, Tensor], rng: dict[str, Any], record: dict[str, Any], aside: Path, final: Path
    ) -> None:
        start, rank = time.monotonic(), self.world.mp_rank
        writing = Writing(aside, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))

        def write() -> dict[str, int]:
            """Returns the lengths of the files that this rank wrote."""
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(aside), process_group=self._group)
            torch.save(rng, aside / f"rng.{rank}.pt")
            sync(aside / f"rng.{rank}.pt")
            names = [f"rng.{rank}.pt", *(path.name for path in aside.glob(f"__{rank}_*"))]
            return {name: (aside / name).stat().st_size for name in [*names, *([".metadata"] if rank == 0 else [])]}

        def finish(lengths: list[dict[str, int]]) -> None:
            files = {name: length for own in lengths for name, length in own.items()}
            write_json(aside / Shelf.INDEX, {**record, "files": files})
            self._say(f"checkpoint {final}: renaming")
            self._shelf.publish(aside, final, keep_last=self._keep_last)

        def explained(step: Callable[[], Result]) -> Result:
            remedy = "free space, or choose another output_dir; earlier checkpoints are untouched"
            return in_one_line(step, f"checkpoint {final} cannot be written", remedy, writing=writing)

        try:
            own = agreed(self.world, partial(explained, write))
            lengths: list[dict[str, int]] = [{} for _ in range(self.world.mp_size)]
            dist.all_gather_object(lengths, own, group=self._group)
            self._on_first(partial(explained, partial(finish, lengths)))
        except BaseException:
            self._saved = ""
            self._discard(aside)
            raise
        self._say(f"checkpoint {final}: saved in {time.monotonic() - start:.1f} s")

    def _saying_at_once(self, write: Callable[[], None]) -> None:
        """Write beside the steps of training, in which nobody waits for the outcome."""
        try:
            write()
        except OSError as error:
            if self.world.is_first:
                logger.error("%s; training goes on, and the next save is tried", error)
            raise

    def _on_first(self, step: Callable[[], Result]) -> Result:
        """What rank 0 alone does, its result or its error on every rank."""
        values: list[Any] = [agreed(self.world, lambda: step() if self.world.is_first else None)]
        dist.broadcast_object_list(values, src=0, group=self._group)
        result: Result = values[0]
        return result

    def _discard(self, aside: Path) -> None:
        if self.world.is_first:
            shutil.rmtree(aside, ignore_errors=True)

    def _say(self, message: str) -> None:
        if self.world.is_first:
            logger.info(message)
