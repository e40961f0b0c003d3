"""Where a run's numbers go besides log.jsonl, each place behind the same three calls; none is imported unasked.

The runs that Weights & Biases and MLflow know are noted in the output folder, so that a resumed run goes on in them.
"""

import io
import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from accessory.files import write_json

# In the output folder: for each tracker the run in which a resumed one goes on; what a tracker keeps there itself.
RUNS, EVENTS, WANDB, MLFLOW = "trackers.json", "tensorboard", "wandb", "mlflow"


class Tracker(Protocol):
    """Takes a run's numbers and pictures.

    Attributes:
        patient: what could not be written waits for the next call; another one is given up when a call fails.
    """

    patient: bool

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Finite numbers of a step, by name."""

    def add_picture(self, step: int, tag: str, png: bytes) -> None:
        """A PNG of a step."""

    def close(self) -> None:
        """The run is over, or stops here."""


class WandbRun:
    """A run of Weights & Biases, by the user's own settings (WANDB_PROJECT, WANDB_MODE=offline, ...)."""

    patient = False

    def __init__(self, folder: Path, *, first_step: int, settings: Mapping[str, Any]) -> None:
        # Standard output stays ours, and rank 0 does not wait for ever for a login or a network.
        for name, value in (("CONSOLE", "off"), ("LOGIN_TIMEOUT", "60"), ("FINISH_TIMEOUT", "120")):
            os.environ.setdefault(f"WANDB_{name}", value)
        import wandb

        own = _known_run(folder, "wandb", first_step) or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            dir=folder,
            id=own,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", "accessory"),
            name=os.environ.get("WANDB_NAME", folder.name),
        )
        self._run.config.update(dict(settings), allow_val_change=True)
        # Its own count of steps never goes back, as that of a run which is resumed does.
        self._run.define_metric("*", step_metric="step")
        self._picture = wandb.Image
        _note_run(folder, "wandb", own)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def add_picture(self, step: int, tag: str, png: bytes) -> None:
        from PIL import Image

        with Image.open(io.BytesIO(png)) as picture:
            self._run.log({"step": step, tag: self._picture(picture)})

    def close(self) -> None:
        self._run.finish()


class MlflowRun:
    """A run of MLflow, on the user's server (MLFLOW_TRACKING_URI), else in a database in the output folder."""

    patient = False

    def __init__(self, folder: Path, *, first_step: int, settings: Mapping[str, Any]) -> None:
        # By default each call to a server that is down takes minutes.
        for name, value in (("MAX_RETRIES", "2"), ("TIMEOUT", "20")):
            os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
        import mlflow
        from mlflow.entities import Metric, Param

        local = not mlflow.is_tracking_uri_set()
        uri = f"sqlite:///{folder / MLFLOW}.db" if local else mlflow.get_tracking_uri()
        self._client, self._metric = mlflow.MlflowClient(tracking_uri=uri), Metric
        known = _known_run(folder, "mlflow", first_step)
        if known is not None:
            self._run = known
            self._client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "accessory")
        found = self._client.get_experiment_by_name(name)
        files = (folder / MLFLOW).as_uri() if local else None
        experiment = self._client.create_experiment(name, files) if found is None else found.experiment_id
        self._run = self._client.create_run(experiment, run_name=folder.name).info.run_id
        self._client.log_batch(self._run, params=[Param(key, str(value)[:500]) for key, value in settings.items()])
        _note_run(folder, "mlflow", self._run)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(
            self._run, metrics=[self._metric(tag, value, now, step) for tag, value in scalars.items()]
        )

    def add_picture(self, step: int, tag: str, png: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"step-{step:08d}.png"
            file.write_bytes(png)
            self._client.log_artifact(self._run, str(file), tag)

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _event_file(folder: Path, *, first_step: int, settings: Mapping[str, Any]) -> Tracker:
    from accessory.train.event_file import EventFile

    return EventFile(folder / EVENTS, first_step=first_step)


class Kind(NamedTuple):
    """A kind of tracker: the package that it takes, and what opens one."""

    package: str
    open: Callable[..., Tracker]


TRACKERS: dict[str, Kind] = {
    "tensorboard": Kind("tensorboard", _event_file),
    "wandb": Kind("wandb", WandbRun),
    "mlflow": Kind("mlflow", MlflowRun),
}


def open_tracker(name: str, folder: Path, *, first_step: int, settings: Mapping[str, Any]) -> Tracker:
    """Begin to track a run, or go on.

    Args:
        name: of TRACKERS.
        folder: the run's output folder, absolute.
        first_step: steps taken before; 0: a new run, whatever the folder holds.
        settings: the run's options, to be shown beside its numbers.

    Raises:
        Exception: of any kind that the package has.
    """
    return TRACKERS[name].open(folder, first_step=first_step, settings=settings)


def refuse_absent(names: Sequence[str]) -> None:
    """Raise ValueError where a tracker is asked for whose package is not there."""
    for name in names:
        package = TRACKERS[name].package
        if find_spec(package) is None:
            raise ValueError(f"--log_to {name} needs a package that is not installed: pip install {package}")


def _runs(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / RUNS).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return {}


def _known_run(folder: Path, name: str, first_step: int) -> str | None:
    return _runs(folder).get(name) if first_step else None


def _note_run(folder: Path, name: str, run: str) -> None:
    write_json(folder / RUNS, {**_runs(folder), name: run})
