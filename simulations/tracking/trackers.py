"""Experiment trackers: curves and final means of every run, to TensorBoard, MLflow or Weights & Biases.

All write to a directory on this machine and ask no service. Their packages are optional (``fedbn[trackers]``) and
imported when a tracker is asked for. A tracker sees what the progress bars see; it decides nothing.
"""

from __future__ import annotations

import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from fedbn.errors import UserError, unknown
from simulations.experiments.tasks import Event, Task


class Tracker(ABC):
    """Where numbers of runs go; runs are told apart by their id and may interleave.

    Attributes:
        name: what ``--track`` calls it.
        package: what must be installed.
    """

    name: ClassVar[str]
    package: ClassVar[str]

    @abstractmethod
    def __init__(self, directory: Path) -> None:
        """Open ``directory``, which exists.

        Raises:
            ImportError: the package is not installed.
        """

    @abstractmethod
    def begin(self, run: str, settings: Mapping[str, Any]) -> None:
        """A run begins, or goes on; ``settings`` are flat."""

    @abstractmethod
    def log(self, run: str, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a run after a round."""

    @abstractmethod
    def end(self, run: str) -> None:
        """A run is finished."""

    @abstractmethod
    def close(self) -> None:
        """No more runs; those that have not ended were interrupted."""


class TensorBoard(Tracker):
    """One folder a run, as ``tensorboard --logdir DIR`` reads it."""

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
    """A local database, as ``mlflow ui --backend-store-uri sqlite:///DIR/mlflow.db`` reads it."""

    name = "mlflow"
    package = "mlflow-skinny"

    def __init__(self, directory: Path) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=f"sqlite:///{directory.resolve() / 'mlflow.db'}")
        known = self._client.get_experiment_by_name("fedbn")
        artifacts = (directory.resolve() / "artifacts").as_uri()
        self._experiment = known.experiment_id if known else self._client.create_experiment("fedbn", artifacts)
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
    """Offline runs, which ``wandb sync`` can upload later."""

    name = "wandb"
    package = "wandb"

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


def tracker(text: str) -> Tracker:
    """Open what a text such as ``tensorboard:DIR`` names; the directory is made.

    Raises:
        UserError: unknown tracker, no directory or none that can be written, or the package is missing.
    """
    name, colon, place = text.partition(":")
    if name not in TRACKERS:
        raise unknown("tracker", name, TRACKERS)
    if not colon or not place:
        raise UserError(f"--track {text}: say where to, as {name}:DIR")
    directory = Path(place)
    kind = TRACKERS[name]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return kind(directory)
    except OSError as error:
        raise UserError(f"--track {text}: cannot write to {place}: {error.strerror or error}") from None
    except ImportError as error:
        raise UserError(
            f"--track {name} needs the package {kind.package} ({error}): pip install 'fedbn[trackers]'"
        ) from None


class Tracking:
    """Passes the events of a comparison, and whole runs of other commands, on to trackers.

    It is a context, because files want closing.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        """Open every tracker named; the first that cannot be opened raises."""
        self.trackers = [tracker(text) for text in texts]
        self.tasks: dict[str, Task] = {}
        self.begun: set[str] = set()

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self.trackers:
            one.close()

    def started(self, title: str, tasks: Sequence[Task]) -> None:
        """A batch of tasks begins."""
        self.tasks = {t.directory: t for t in tasks}

    def report(self, event: Event) -> None:
        """A round or a run is done; runs that were finished before have no values and are passed over."""
        run = self.tasks[event.directory].run
        for one in self.trackers:
            if event.values and run.id not in self.begun:
                one.begin(run.id, flat(asdict(run)))
            if event.values:
                one.log(run.id, event.round, event.values)
            if event.ended and (event.values or run.id in self.begun):
                one.end(run.id)
        if event.values:
            self.begun.add(run.id)

    def tell(self, run: str, settings: Mapping[str, Any], points: Mapping[int, Mapping[str, float]]) -> None:
        """Tell every tracker a whole run that is finished; what is no finite number is left out.

        Args:
            run: its name; here and in names of values, characters that not every tracker takes become hyphens.
            settings: flat.
            points: step -> values.
        """
        name = _plain(run)
        for one in self.trackers:
            one.begin(name, settings)
            for step, values in points.items():
                one.log(name, step, {_plain(k): float(v) for k, v in values.items() if math.isfinite(v)})
            one.end(name)


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names.

    >>> flat({"seed": 0, "plan": {"lr": 0.1}})
    {'seed': 0, 'plan.lr': 0.1}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found
