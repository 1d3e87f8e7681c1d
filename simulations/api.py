"""The Python face of the commands: `compare`, `study` and `load`, exported as ``fedbn.compare`` and so on.

Results come back as objects that show themselves in a notebook and turn into tables by ``.to_pandas()``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from simulations.adaptation.results import users_frame, write
from simulations.adaptation.study import run_study, study_from
from simulations.adaptation.tracking import tasks, tell
from simulations.experiments.compare import compare as run_comparison
from simulations.experiments.experiment import DEFAULT_STRATEGIES, GRID, Experiment
from simulations.results.comparison import Comparison
from simulations.storage.provenance import NUMERICS
from simulations.tracking.progress import Bars, Watchers
from simulations.tracking.trackers import Tracking


def compare(
    scenario: str,
    strategies: Iterable[str] = DEFAULT_STRATEGIES,
    *,
    seeds: int = 3,
    model: str = "",
    partition: str = "natural",
    shift: str = "",
    device: str = "cpu",
    tune: bool | Sequence[float] = False,
    engine: str = "grid:stacked",
    workers: int | None = 1,
    out: str | Path | None = None,
    track: Iterable[str] = (),
    progress: bool = True,
    **plan: Any,
) -> Comparison:
    """Compare treatments of normalization on the same users, seeds and budget, as ``fedbn compare`` does.

    What is finished is kept: the same call again reads it, after an interruption it goes on.

    Args:
        scenario: such as ``hapt`` or ``hapt:unseen=10``; your own data are ``files:path=...``.
        strategies: such as ``fedbn`` or ``groupnorm:groups=4``; the first is the reference.
        seeds: how many paired seeds.
        model: built-in name or ``package.module:factory``; empty: the scenario's.
        partition: how seen users' data are dealt anew.
        shift: feature shift between users; empty: none.
        device: ``cpu``, ``cuda``, ...
        tune: choose each strategy's learning rate on validation data, of the usual grid or of these.
        engine: as ``--engine``.
        workers: processes; None: one a core. A script that asks for more than one needs
            ``if __name__ == "__main__":`` around what it does.
        out: directory; None: one below ``results`` that is named after the settings.
        track: such as ``tensorboard:DIR`` (`simulations.tracking.trackers`).
        progress: show a progress bar on standard error.
        **plan: fields of `fedbn.config.Plan`, such as ``rounds=30``.

    Raises:
        UserError: before anything runs, for whatever can be known then.
    """
    experiment = Experiment.from_dict(
        {
            "scenario": scenario,
            "strategies": tuple(strategies),
            "seeds": seeds,
            "model": model,
            "partition": partition,
            "shift": shift,
            "device": device,
            "tune": (GRID if tune else ()) if isinstance(tune, bool) else tuple(tune),
            "plan": plan,
        }
    ).resolved()
    place = Path(out) if out is not None else _place(experiment.scenario, [experiment.to_dict(), engine])
    with Bars(_console(progress)) as bars, Tracking(track) as tracking:
        watchers = Watchers(bars, tracking)
        run_comparison(
            experiment,
            place,
            engine=engine,
            workers=workers,
            report=watchers.report,
            started=watchers.started,
        )
    return Comparison.load(place)


def load(directory: str | Path) -> Comparison:
    """Read a comparison's directory; unfinished runs are skipped and counted.

    Raises:
        UserError: it is no comparison, is damaged, or holds no finished run.
    """
    return Comparison.load(directory)


@dataclass(frozen=True, repr=False)
class StudyResult:
    """What `study` found.

    Attributes:
        frame: one line a stream and rule: accuracy with its interval over people, harm, regret, cost.
        users: one line a person, seed, stream and rule.
        directory: where everything is.
    """

    frame: pd.DataFrame
    users: pd.DataFrame
    directory: Path

    def to_pandas(self) -> pd.DataFrame:
        """The summary, one line a stream and rule."""
        return self.frame

    def __repr__(self) -> str:
        return f"{self._headline()}\n{self._shown().to_string(index=False)}"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self._headline())}</p>{self._shown().to_html(index=False)}"

    def _headline(self) -> str:
        return f"Online rules on the streams of {self.frame['users'].max()} people never seen in training"

    def _shown(self) -> pd.DataFrame:
        columns = ["stream", "rule", "accuracy", "low", "high", "worst_decile", "harmed", "gain", "p_adjusted"]
        return self.frame[columns].round(3)


def study(
    scenario: str,
    rules: Iterable[str] = ("pseudo",),
    *,
    streams: Iterable[str] = ("natural", "iid"),
    starts: Iterable[str] = ("cold",),
    strategies: Sequence[str] = ("global-naive",),
    seeds: int = 2,
    model: str = "",
    partition: str = "natural",
    shift: str = "",
    device: str = "cpu",
    tune: bool = False,
    out: str | Path | None = None,
    track: Iterable[str] = (),
    **plan: Any,
) -> StudyResult:
    """Let rules follow the streams of people the model has never seen, as ``fedbn adapt`` does.

    Args:
        scenario: whose people.
        rules: such as ``pseudo:n0=64`` or ``tent``; the source, which never adapts, is always there.
        streams: kinds of stream.
        starts: what a person gives beforehand: ``cold``, ``recording``, ``classes:k=3``.
        strategies: treatments of normalization in training.
        seeds: each trains a model and holds out other people.
        model: as in `compare`.
        partition: as in `compare`.
        shift: as in `compare`.
        device: as in `compare`.
        tune: of rules that differ in options alone keep the best on seen users' later data.
        out: directory; None: one below ``results`` that is named after the settings.
        track: as in `compare`.
        **plan: fields of `fedbn.config.Plan`.

    Raises:
        UserError: before anything runs, for whatever can be known then.
    """
    wanted = study_from(
        {
            "scenario": scenario,
            "rules": tuple(rules),
            "streams": tuple(streams),
            "starts": tuple(starts),
            "strategies": tuple(strategies),
            "seeds": seeds,
            "model": model,
            "partition": partition,
            "shift": shift,
            "device": device,
            "tune": tune,
        },
        **plan,
    )
    place = Path(out) if out is not None else _place(f"adapt-{scenario}", repr(wanted))
    with Tracking(track) as tracking:
        tracking.started("training", tasks(wanted, place))
        kept, results = run_study(wanted, place, report=tracking.report)
        found = write(place, kept, results, "")
        tell(tracking, kept, results, found)
    return StudyResult(found, users_frame(results), place)


def _place(scenario: str, settings: Any) -> Path:
    """Default results directory: the same settings and numerics always map to the same directory."""
    digest = hashlib.sha256(json.dumps([settings, NUMERICS], sort_keys=True).encode()).hexdigest()[:8]
    return Path("results") / f"{scenario.partition(':')[0]}-{digest}"


def _console(shown: bool) -> Console:
    return Console(stderr=True, quiet=not shown)
