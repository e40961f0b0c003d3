"""The steps of a finetuning run: through the epochs, saving and stopping as asked."""

import logging
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from accessory.data.collate import collate
from accessory.data.finetune_data import FinetuneData
from accessory.data.sampler import StepSampler
from accessory.errors import counted
from accessory.model.meta import MetaModel
from accessory.parallel.state import agreed, all_ranks, on_first
from accessory.text.forms import Form
from accessory.train.checkpointer import Checkpointer
from accessory.train.export import BEST, drop_older_models, export_checkpoint, model_due
from accessory.train.flops import flops_per_token, peak_flops
from accessory.train.interruption import Interruption, Stop
from accessory.train.metrics import StepMetrics, peak_memory_gib
from accessory.train.options import FinetuneOptions
from accessory.train.precision import COMPUTE_DTYPES, loss_scaler
from accessory.train.run_log import RunLog
from accessory.train.schedule import Schedule
from accessory.train.space import Plan
from accessory.train.trainer import MicroBatches, StepResult, train_step
from accessory.train.validation import Validation

logger = logging.getLogger(__name__)


class FinetuneLoop:
    """A model on its way through the data; every method is collective over all ranks.

    Attributes:
        form: in which the data ask, said of the models that are written.
        done: optimizer steps taken.
        end: optimizer steps after which the run is over.
    """

    def __init__(
        self,
        options: FinetuneOptions,
        model: MetaModel,
        optimizer: torch.optim.Optimizer,
        data: FinetuneData,
        held_out: FinetuneData | None,
        sampler: StepSampler,
        store: Checkpointer,
        form: Form | None = None,
    ) -> None:
        self.options, self.model, self.optimizer, self.form = options, model, optimizer, form
        self.data, self.sampler, self.store = data, sampler, store
        self.scaler = loss_scaler(options.precision, model.llma.state.device)
        self.dtype = COMPUTE_DTYPES[options.precision]
        per_epoch = sampler.steps_per_epoch
        total = per_epoch * options.epochs
        warmup = options.warmup_epochs * per_epoch
        self.validation = Validation(options, held_out, per_epoch=per_epoch)
        self.end = min(total, options.max_steps or total)
        self.schedule = Schedule(
            # A cosine goes on behind --max_steps, in a run that is resumed; a last fall ends where the run does.
            steps=self.end if options.schedule == "wsd" else total,
            lr=options.lr,
            min_lr=options.min_lr,
            warmup=warmup,
            shape=options.schedule,
            decay=options.decay_steps,
        )
        # A token sees half of its example's, and longer examples have more of them.
        seen = float((data.lengths.astype(float) ** 2).sum() / data.lengths.sum())
        self.flops_per_token = flops_per_token(model.llma.args, seen)
        self.peak_flops = peak_flops(model.llma.state.device, self.dtype)
        self.done = 0
        # Where the next step begins.
        self.epoch = self.step_of_epoch = 0

    def describe(self) -> str:
        """One line on the work ahead."""
        state, options = self.model.llma.state, self.options
        layout = f"dp {state.dp_size} ({options.data_parallel}) x mp {state.mp_size} ({self.model.llma.placement})"
        layout += f", experts over ep {state.ep.size}" if state.ep.size > 1 else ""
        begin = f"from step {self.done} " if self.done else ""
        epoch = f"{counted(self.sampler.steps_per_epoch, 'step')} of {self.sampler.global_batch} an epoch"
        return (
            f"{counted(len(self.data), 'example')}, {epoch}; "
            f"{begin}to step {self.end:,} on {layout}, {options.precision}, {state.device.type}"
        )

    def plan(self, output: Path) -> Plan:
        """What is still to be written in the run's folder."""
        return Plan.of(
            self.options,
            self.model,
            output,
            done=self.done,
            end=self.end,
            per_epoch=self.sampler.steps_per_epoch,
            itemsize=self.dtype.itemsize,
        )

    def resume(self, path: Path) -> None:
        """Go on from a training state.

        Raises:
            CheckpointError: of another model, or damaged.
            ValueError: saved with other data, seed or examples in a step.
        """
        progress = self.store.load(path, self.model, self.optimizer, seed=self.options.seed)
        position = agreed(self.store.world, lambda: self.sampler.resume(progress["sampler"]), progress)
        self.epoch, self.step_of_epoch = position
        self.done = progress["step"]
        if self.scaler is not None and progress["scaler"] is not None:
            self.scaler.load_state_dict(progress["scaler"])
        logger.info("resuming %s after step %d", path, self.done)
        before, now = progress.get("bias_update_rate", 0.0), self.options.bias_update_rate
        if bool(before) != bool(now):
            moves = "begin to move" if now else "stay as they are"
            logger.info("--bias_update_rate is %g and was %g: the correction biases %s", now, before, moves)
        if not self.validation.resume(progress.get("validation")) and self.store.world.is_first:
            logger.warning("the held-out data are others than before: best loss and --early_stop begin anew")
        self._end_where_given_up()
        name = self._model_due()
        # The run was stopped, or killed, before it came to that. Hosts may call the folder by other names.
        if name is not None and self._on_any_rank(path.parent == self.store.folder and not self._model(name).exists()):
            self._export(name)

    def run(self, log: RunLog, interruption: Interruption) -> Stop:
        """Take all steps up to the end; returns why it stopped before, which is said last: the log is closed then."""
        self._validate_where_due(log)
        last = time.perf_counter()
        for examples in self._upcoming():
            result, lr = self._step(examples)
            stop, memory = self._exchange(interruption)
            log.step(self._metrics(result, lr, time.perf_counter() - last, memory))
            if stop is not Stop.NO:
                interruption.saves = True
                self._save(asynchronous=False)
                log.close()
                if self.store.world.is_first:
                    logger.warning("%s", stop.describe(self.done, self.end, self.store.last_saved()))
                return stop
            self._validate_where_due(log)
            self._save_where_due()
            last = time.perf_counter()
        interruption.saves = True
        self.store.wait()
        log.close()
        logger.info(
            "done: %d of %d steps, models in %s%s", *(self.done, self.end, self.options.output_dir), self._ask()
        )
        return Stop.NO

    def _ask(self) -> str:
        """How the model of the last step is asked, for the end of a line; "" where it was written by a run before."""
        if (name := self._model_due()) is None or not self._model(name).exists():
            return ""
        options = self.options
        alone = options.only_save_trainable or options.quant is not None
        folders = [*(options.pretrained_path if alone else ()), str(Path(options.output_dir) / name)]
        return f'; ask the last by: accessory generate {" ".join(folders)} --prompt "..."'

    def _upcoming(self) -> Iterator[NDArray[np.int64]]:
        """The examples of each step that is left; the position moves on when the next one is asked for."""
        while self.done < self.end:
            steps = self.sampler.steps(self.epoch)
            while self.step_of_epoch < len(steps) and self.done < self.end:
                yield steps[self.step_of_epoch]
            if self.step_of_epoch == len(steps):
                self.epoch, self.step_of_epoch = self.epoch + 1, 0

    def _step(self, examples: NDArray[np.int64]) -> tuple[StepResult, float]:
        state, lr = self.model.llma.state, self.schedule(self.done)
        dealt = self.sampler.micro_batches(
            examples, dp_rank=state.dp_rank, dp_size=state.dp_size, accum=self.options.accum_iter
        )
        micro_batches: MicroBatches = [
            collate([[self.data[index] for index in self.sampler.row(row)] for row in rows]) for rows in dealt
        ]
        result = train_step(
            self.model,
            self.optimizer,
            micro_batches,
            lr=lr,
            clip_grad=self.options.clip_grad,
            scaler=self.scaler,
            bias_update_rate=self.options.bias_update_rate,
        )
        self.done += 1
        self.step_of_epoch += 1
        return result, lr

    def _on_any_rank(self, condition: bool) -> bool:
        found = torch.tensor([int(condition)], device=self.model.llma.state.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found.item())

    def _exchange(self, interruption: Interruption) -> tuple[Stop, float]:
        """Whether any rank was asked to stop, and the most memory that one has used."""
        device = self.model.llma.state.device
        own = torch.tensor([int(interruption.asked), peak_memory_gib(device)], dtype=torch.float64, device=device)
        dist.all_reduce(own, dist.ReduceOp.MAX)
        asked, memory = own.tolist()
        return Stop(int(asked)), memory

    def _metrics(self, result: StepResult, lr: float, seconds: float, memory: float) -> StepMetrics:
        state, peak, measured = self.model.llma.state, self.peak_flops, result._asdict()
        speed, learned = measured.pop("tokens") / seconds, measured.pop("learned") / seconds
        return StepMetrics(
            step=self.done,
            epoch=self.done / self.sampler.steps_per_epoch,
            lr=lr,
            tokens_per_s=speed,
            learned_per_s=learned,
            memory=memory,
            mfu=None if peak is None else speed * self.flops_per_token / (peak * state.dp_size * state.mp_size),
            **measured,
        )

    def _validate_where_due(self, log: RunLog) -> None:
        """Measure the held-out data; keep the best model, and end where there has been none for long, as asked.

        A run that is killed before the next save comes here again, with the same model and what it knew then.
        """
        if not self.validation.due(self.done, self.end):
            return
        measured, better = self.validation.evaluate(self.model, self.done)
        log.evaluation(self.done, self.done / self.sampler.steps_per_epoch, measured.numbers())
        if better and self.options.keep_best:
            self._write_model(BEST)
        self._end_where_given_up()

    def _end_where_given_up(self) -> None:
        if self.validation.gives_up and self.done < self.end:
            logger.info(
                "early end after step %d: no lower held-out loss than %.4f in %d evaluations",
                *(self.done, self.validation.best, self.validation.since),
            )
            self.end = self.done

    def _save_where_due(self) -> None:
        """Model and training state at the end, at epochs' ends and at intervals within one.

        The model first: a run that is killed between the two takes the steps again and writes the model anew.
        """
        name = self._model_due()
        if name is not None:
            self._export(name)
            self._save(asynchronous=self.done < self.end)

    def _model_due(self) -> str | None:
        """Name of the model to write after the last step, if any."""
        return model_due(self.options, done=self.done, end=self.end, per_epoch=self.sampler.steps_per_epoch)

    def _model(self, name: str) -> Path:
        return Path(self.options.output_dir) / name

    def _write_model(self, name: str) -> None:
        export_checkpoint(
            self.model,
            self._model(name),
            dtype=self.dtype,
            form=self.form,
            only_trainable=self.options.only_save_trainable,
            to=self.options.export_form,
        )

    def _export(self, name: str) -> None:
        self._write_model(name)
        keep_last, keep_models = self.options.keep_last, self.options.keep_models
        drop = partial(drop_older_models, self._model(name), keep_last=keep_last, keep_models=keep_models)
        # Not the store's world: an earlier state may still be on its way to the disk, and agrees over that one.
        on_first(all_ranks(), drop)

    def _save(self, *, asynchronous: bool) -> None:
        progress = {
            "step": self.done,
            "sampler": self.sampler.state(self.epoch, self.step_of_epoch),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "form": None if self.form is None else self.form.digest,
            "validation": self.validation.state(),
            "optimizer": self.options.optimizer,
            "bias_update_rate": self.options.bias_update_rate,
        }
        name = f"step-{self.done:08d}"
        self.store.save(self.model, self.optimizer, progress, name, asynchronous=asynchronous)
