"""Experiment trackers: log curves and final means of every run to TensorBoard, MLflow or Weights & Biases.

All trackers write to a local directory and use no online service. Their packages are optional (``fedbn[trackers]``) and
imported on demand. Trackers receive the same events as the progress bar and do not affect results.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from fedbn.errors import UserError, install_extra, unknown
from fedbn_simulations.experiments.tasks import Event, Task
from fedbn_simulations.flower.processes import GROUP_VARIABLE, ProcessGroup


class Tracker(ABC):
    """Base class of trackers. Runs are identified by their id and may interleave.

    Attributes:
        name: name for ``--track``.
        package: required package.
        starts_processes: whether the tracker starts processes; they end when this process ends, even if it is killed.
        created: topmost directory that was created for the tracker; None if its directory existed.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    starts_processes: ClassVar[bool] = False
    created: Path | None = None

    @abstractmethod
    def __init__(self, directory: Path) -> None:
        """Open an existing directory.

        Raises:
            ImportError: the package is not installed.
        """

    @abstractmethod
    def begin(self, run: str, settings: Mapping[str, Any]) -> None:
        """Start or resume a run; ``settings`` are flat."""

    @abstractmethod
    def log(self, run: str, step: int, values: Mapping[str, float]) -> None:
        """Log values of a run after a round."""

    @abstractmethod
    def end(self, run: str) -> None:
        """Mark a run as finished."""

    @abstractmethod
    def close(self) -> None:
        """Close the tracker; runs that have not ended are marked as interrupted."""


class TensorBoard(Tracker):
    """One folder per run; view with ``tensorboard --logdir DIR``."""

    name = "tensorboard"
    package = "tensorboard"

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open = lambda run: SummaryWriter(str(directory / run))
        self._runs: dict[str, Any] = {}

    def begin(self, run: str, settings: Mapping[str, Any]) -> None:
        self._runs[run] = self._open(run)
        self._runs[run].add_text("settings", "".join(f"- {k}: {v}\n" for k, v in settings.items()))

    def log(self, run: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._runs[run].add_scalar(name, value, step)

    def end(self, run: str) -> None:
        self._runs.pop(run).close()

    def close(self) -> None:
        for run in list(self._runs):
            self.end(run)


class MLflow(Tracker):
    """A local database; view with ``mlflow ui --backend-store-uri sqlite:///DIR/mlflow.db``."""

    name = "mlflow"
    package = "mlflow-skinny"

    def __init__(self, directory: Path) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=f"sqlite:///{directory.resolve() / 'mlflow.db'}")
        existing = self._client.get_experiment_by_name("fedbn")
        artifacts = (directory.resolve() / "artifacts").as_uri()
        self._experiment = existing.experiment_id if existing else self._client.create_experiment("fedbn", artifacts)
        self._runs: dict[str, str] = {}

    def begin(self, run: str, settings: Mapping[str, Any]) -> None:
        self._runs[run] = self._client.create_run(self._experiment, run_name=run).info.run_id
        for name, value in settings.items():
            self._client.log_param(self._runs[run], name, value)

    def log(self, run: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._runs[run], name, value, step=step)

    def end(self, run: str) -> None:
        self._client.set_terminated(self._runs.pop(run))

    def close(self) -> None:
        for run in self._runs.values():
            self._client.set_terminated(run, status="KILLED")


class WeightsAndBiases(Tracker):
    """Offline runs; upload with ``wandb sync``."""

    name = "wandb"
    package = "wandb"
    starts_processes = True

    def __init__(self, directory: Path) -> None:
        import wandb

        self._open = lambda run, settings: wandb.init(
            project="fedbn",
            name=run,
            config=dict(settings),
            dir=str(directory),
            mode="offline",
            reinit="create_new",  # runs interleave
            settings=wandb.Settings(silent=True),
        )
        self._runs: dict[str, Any] = {}

    def begin(self, run: str, settings: Mapping[str, Any]) -> None:
        self._runs[run] = self._open(run, settings)

    def log(self, run: str, step: int, values: Mapping[str, float]) -> None:
        self._runs[run].log(dict(values), step=step)

    def end(self, run: str) -> None:
        self._runs.pop(run).finish()

    def close(self) -> None:
        for run in self._runs.values():
            run.finish(exit_code=1)


TRACKERS: dict[str, type[Tracker]] = {t.name: t for t in (TensorBoard, MLflow, WeightsAndBiases)}


def open_tracker(text: str) -> Tracker:
    """Open a tracker given as ``tensorboard:DIR``; the directory is created.

    Raises:
        UserError: unknown tracker, missing or unwritable directory, or missing package.
    """
    name, _, path = text.partition(":")
    if name not in TRACKERS:
        raise unknown("tracker", name, TRACKERS)
    if not path:
        raise UserError(f"--track {text} has no directory: write {name}:DIR")
    directory = Path(path)
    tracker_class = TRACKERS[name]
    created = _first_missing(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tracker = tracker_class(directory)
    except (OSError, ImportError) as error:
        if created:
            shutil.rmtree(created, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"--track {text}: cannot write to {path}: {error.strerror or error}") from None
        raise UserError(
            f"--track {name} needs the package {tracker_class.package} ({error}): {install_extra('trackers')}"
        ) from None
    tracker.created = created
    return tracker


def _first_missing(directory: Path) -> Path | None:
    """The topmost directory that has to be created for ``directory``; None if it exists."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    return missing[-1] if missing else None


class Tracking:
    """Forwards the events of a comparison, and complete runs of other commands, to trackers.

    A context manager that closes the trackers. Directories that it created are removed if nothing was logged.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        """Open all trackers, each given as ``NAME:DIR``."""
        self._guard = ExitStack()
        texts = list(texts)
        if any(TRACKERS[name].starts_processes for text in texts if (name := text.partition(":")[0]) in TRACKERS):
            group = ProcessGroup(by_session=False)
            self._guard.enter_context(group.guarded())  # first, because the guardian is not in the group
            os.environ[GROUP_VARIABLE] = group.id  # inherited by all processes that are started from now on
            self._guard.callback(os.environ.pop, GROUP_VARIABLE, None)
        with self._guard:
            self.trackers = [open_tracker(text) for text in texts]
            self._guard = self._guard.pop_all()
        self.tasks: dict[str, Task] = {}
        self.logged_runs: set[str] = set()

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._guard:
            for tracker in self.trackers:
                tracker.close()
                if tracker.created and not self.logged_runs:
                    shutil.rmtree(tracker.created, ignore_errors=True)

    def started(self, title: str, tasks: Sequence[Task]) -> None:
        """Remember the runs of a batch of tasks."""
        self.tasks = {t.directory: t for t in tasks}

    def report(self, event: Event) -> None:
        """Log the values of a round or a run; runs that were already finished have no values and are skipped."""
        run = self.tasks[event.directory].run
        for tracker in self.trackers:
            if event.values and run.id not in self.logged_runs:
                tracker.begin(run.id, flatten(asdict(run)))
            if event.values:
                tracker.log(run.id, event.round, event.values)
            if event.ended and (event.values or run.id in self.logged_runs):
                tracker.end(run.id)
        if event.values:
            self.logged_runs.add(run.id)

    def log_run(self, run: str, settings: Mapping[str, Any], points: Mapping[int, Mapping[str, float]]) -> None:
        """Log a complete run to every tracker, without values that are not finite.

        Args:
            run: name of the run; unsupported characters in it and in names of values are replaced by hyphens.
            settings: flat settings.
            points: values by step.
        """
        name = _plain(run)
        for tracker in self.trackers:
            tracker.begin(name, settings)
            for step, values in points.items():
                tracker.log(name, step, {_plain(k): float(v) for k, v in values.items() if math.isfinite(v)})
            tracker.end(name)
        self.logged_runs.add(run)


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names.

    >>> flatten({"seed": 0, "plan": {"lr": 0.1}})
    {'seed': 0, 'plan.lr': 0.1}
    """
    flattened: dict[str, Any] = {}
    for name, value in values.items():
        flattened |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flattened
