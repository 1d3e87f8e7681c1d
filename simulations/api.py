"""Python API of the commands: `compare`, `study` and `load`, exported as ``fedbn.compare`` and so on.

Results are objects that display in a notebook and convert to tables with ``.to_pandas()``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from fedbn.federation.run import option_text
from simulations.adaptation.results import users_frame, write
from simulations.adaptation.study import Study, run_study
from simulations.adaptation.tracking import log_study, tasks
from simulations.experiments.compare import compare as run_comparison
from simulations.experiments.experiment import Experiment
from simulations.experiments.options import DEFAULT_STRATEGIES
from simulations.results.comparison import Comparison
from simulations.storage.provenance import NUMERICS
from simulations.tracking.progress import Observers, ProgressBar
from simulations.tracking.trackers import Tracking


def compare(
    scenario: str,
    strategies: Iterable[str] = DEFAULT_STRATEGIES,
    *,
    tune: Mapping[str, Iterable[Any]] | None = None,
    engine: str = "grid:stacked",
    workers: int | None = 1,
    out: str | Path | None = None,
    track: Iterable[str] = (),
    progress: bool = True,
    **options: Any,
) -> Comparison:
    """Compare normalization strategies on the same users, seeds and budget, as ``fedbn compare`` does.

    Finished runs are stored: the same call reads them again, and resumes after an interruption.

    Args:
        scenario: such as ``hapt`` or ``hapt:unseen=10``; ``files:path=...`` for your own data.
        strategies: such as ``fedbn`` or ``groupnorm:groups=4``; the first is the reference.
        tune: values of options of the plan to choose from for each strategy, on validation data of training users, such
            as ``{"lr": [0.01, 0.1], "optimizer": ["sgd", "adamw"]}``. Every combination is tried.
        engine: as ``--engine``.
        workers: processes; None for one per core. A script that asks for more than one needs
            ``if __name__ == "__main__":`` around its code.
        out: directory; None for one below ``results`` that is named after the options.
        track: such as ``tensorboard:DIR`` (`simulations.tracking.trackers`).
        progress: show a progress bar on standard error.
        **options: any other field of `simulations.experiments.experiment.Experiment` or `fedbn.config.Plan`, such as
            ``seeds=5``, ``task="regression"``, ``metric="mae"``, ``partition="dirichlet:alpha=0.1"``,
            ``privacy="clip=1"`` or ``rounds=30``.

    Raises:
        UserError: before anything runs, for whatever can be checked then.
    """
    options |= {"scenario": scenario, "strategies": tuple(strategies)}
    options["tune"] = {
        name: tuple(str(option_text(name, value)) for value in values) for name, values in (tune or {}).items()
    }
    experiment = Experiment.from_dict(options).resolved()
    place = Path(out) if out is not None else _place(experiment.scenario, [experiment.to_dict(), engine])
    with ProgressBar(_console(progress)) as bar, Tracking(track) as tracking:
        observers = Observers(bar, tracking)
        run_comparison(
            experiment,
            place,
            engine=engine,
            workers=workers,
            report=observers.report,
            started=observers.started,
        )
    return Comparison.load(place)


def load(directory: str | Path, metric: str = "") -> Comparison:
    """Read the directory of a comparison. Unfinished runs are skipped and counted.

    Args:
        directory: results directory.
        metric: the metric to display, such as ``macro_f1``; the comparison's by default.

    Raises:
        UserError: the directory holds no comparison, is damaged, or has no finished run.
    """
    return Comparison.load(directory, metric)


@dataclass(frozen=True, eq=False, repr=False)
class StudyResult:
    """Result of `study`.

    Attributes:
        frame: one row per stream and rule: accuracy with its interval over users, harm, regret, cost.
        users: one row per user, seed, stream and rule.
        directory: directory of all results.
    """

    frame: pd.DataFrame
    users: pd.DataFrame
    directory: Path

    def to_pandas(self) -> pd.DataFrame:
        """The summary, one row per stream and rule."""
        return self.frame

    def __repr__(self) -> str:
        return f"{self._headline()}\n{self._shown().to_string(index=False)}"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self._headline())}</p>{self._shown().to_html(index=False)}"

    def _headline(self) -> str:
        return f"Online rules on the streams of {self.frame['users'].max()} users not seen in training"

    def _shown(self) -> pd.DataFrame:
        columns = ["stream", "rule", "accuracy", "low", "high", "worst_decile", "harmed", "gain", "p_adjusted"]
        return self.frame[columns].round(3)


def study(
    scenario: str,
    rules: Iterable[str] = ("pseudo",),
    *,
    out: str | Path | None = None,
    track: Iterable[str] = (),
    **options: Any,
) -> StudyResult:
    """Adapt a trained model online to users it has never seen, as ``fedbn adapt`` does.

    Args:
        scenario: as in `compare`.
        rules: such as ``pseudo:n0=64`` or ``tent``; the source model, which never adapts, is always included.
        out: directory; None for one below ``results`` that is named after the options.
        track: as in `compare`.
        **options: any other field of `simulations.adaptation.study.Study` or `fedbn.config.Plan`, such as
            ``streams=["natural"]``, ``starts=["cold", "recording"]``, ``seeds=3`` or ``rounds=30``.

    Raises:
        UserError: before anything runs, for whatever can be checked then.
    """
    wanted = Study.from_dict(options | {"scenario": scenario, "rules": tuple(rules)})
    place = Path(out) if out is not None else _place(f"adapt-{scenario}", repr(wanted))
    with Tracking(track) as tracking:
        tracking.started("training", tasks(wanted, place))
        done, results = run_study(wanted, place, report=tracking.report)
        found = write(place, done, results, "")
        log_study(tracking, done, results, found)
    return StudyResult(found, users_frame(results), place)


def _place(scenario: str, settings: Any) -> Path:
    """Default results directory: the same settings and numerics always map to the same directory."""
    digest = hashlib.sha256(json.dumps([settings, NUMERICS], sort_keys=True).encode()).hexdigest()[:8]
    return Path("results") / f"{scenario.partition(':')[0]}-{digest}"


def _console(shown: bool) -> Console:
    return Console(stderr=True, quiet=not shown)
