"""`compare`, `adapt`, `federate` and `load`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from fedbn.errors import UserError
from fedbn.federation.run import option_text
from fedbn.models.base import model_text
from fedbn.online.rules.base import rule_text
from fedbn.personalization.treatment import treatment_text
from fedbn.scenarios.base import scenario_text
from fedbn.tasks import parse_task, render_task
from fedbn.tasks.extra import metric_text
from fedbn_simulations.adaptation.methods import adaptation_text
from fedbn_simulations.adaptation.results import metric_of, users_frame, write
from fedbn_simulations.adaptation.study import Study, run_study
from fedbn_simulations.adaptation.tracking import log_study, tasks
from fedbn_simulations.api.results import AdaptationResult, ComparisonResult, FederationResult
from fedbn_simulations.engines.execute import check_engine, execute
from fedbn_simulations.experiments.compare import compare as run_comparison
from fedbn_simulations.experiments.experiment import Experiment
from fedbn_simulations.experiments.options import DEFAULT_STRATEGIES
from fedbn_simulations.experiments.tasks import CHECKPOINT, Task, run_task
from fedbn_simulations.storage.checkpoint import load_outcome
from fedbn_simulations.storage.provenance import NUMERICS
from fedbn_simulations.tracking.progress import Observers, ProgressBar
from fedbn_simulations.tracking.trackers import Tracking


def compare(
    data: Any,
    strategies: Any = DEFAULT_STRATEGIES,
    *,
    tune: Mapping[str, Iterable[Any]] | None = None,
    engine: str = "grid:stacked",
    workers: int | None = 1,
    out: str | Path | None = None,
    track: Iterable[str] = (),
    progress: bool = True,
    **options: Any,
) -> ComparisonResult:
    """Compare normalization strategies on the same users, seeds and budget, as ``fedbn compare`` does.

    Finished runs are stored: the same call reads them again, and resumes after an interruption, also in another
    process. Objects are identified by their content; those that modules define, by their qualified name and options.

    Args:
        data: a `fedbn.Population`, a dictionary with a training and a test Dataset for each user, a function that
            returns one of these, or a scenario such as ``"hapt:unseen=10"`` or ``"files:path=walks.csv"``.
        strategies: one or several strategies and personalization methods: texts such as ``"groupnorm:groups=4"``,
            objects or classes. The first is the reference.
        tune: values of options of the plan to choose from for each strategy, on validation data of training users, such
            as ``{"lr": [0.01, 0.1], "optimizer": ["sgd", "adamw"]}``. Every combination is tried.
        engine: as ``--engine``. Ray imports all objects, so they must be texts, or classes and functions of modules.
        workers: processes; None for one per core. A script that asks for more than one needs
            ``if __name__ == "__main__":`` around its code, and a notebook must import its classes from modules.
        out: directory; None for one below ``results`` that is named after the options.
        track: such as ``tensorboard:DIR`` (`fedbn_simulations.tracking.trackers`).
        progress: show a progress bar on standard error.
        **options: any other field of `fedbn_simulations.experiments.experiment.Experiment` or `fedbn.config.Plan`,
            such as ``seeds=5`` or ``seeds=[3, 7]``, ``task="regression"``, ``metric="mae"``,
            ``partition="dirichlet:alpha=0.1"``, ``privacy="clip=1"`` or ``rounds=30``. ``model`` can also be
            a factory, a class or a `torch.nn.Module`, which starts every run with its current weights; ``task``,
            ``metric``, ``rule``, ``optimizer`` and ``augment`` can also be objects.

    Raises:
        UserError: before anything runs, for whatever can be checked then.
    """
    options["tune"] = {
        name: tuple(str(option_text(name, value)) for value in values) for name, values in (tune or {}).items()
    }
    experiment = _experiment(data, _listed(strategies, treatment_text), options)
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
    return ComparisonResult.load(place)


def load(directory: str | Path, metric: str = "") -> ComparisonResult:
    """Read the directory of a comparison. Unfinished runs are skipped and counted.

    Args:
        directory: results directory.
        metric: the metric to display, such as ``macro_f1``; the comparison's by default.

    Raises:
        UserError: the directory holds no comparison, is damaged, or has no finished run.
    """
    return ComparisonResult.load(directory, metric)


def federate(
    data: Any,
    strategy: Any = "fedavg",
    *,
    seed: int = 0,
    engine: str = "grid",
    out: str | Path | None = None,
    **options: Any,
) -> FederationResult:
    """Train and evaluate one strategy with one seed: one run of `compare`.

    Args:
        data: as in `compare`.
        strategy: as in `compare`.
        seed: seed of the unseen users, initial weights, sampling and shuffling.
        engine: as ``--engine``; ``reference`` is a readable loop, without Flower.
        out: directory for the result, from which the same call resumes; None to keep it in memory.
        **options: as in `compare`, except options about several strategies or seeds.

    Raises:
        UserError: as in `compare`.
    """
    experiment = _experiment(data, (treatment_text(strategy),), options | {"seeds": (seed,)})
    run = experiment.run(experiment.strategies[0], seed)
    check_engine(engine, [run])
    if out is None:
        return FederationResult(run, execute(run, engine))
    task = Task(run, str(Path(out) / "runs" / run.id))
    run_task(task, engine, lambda event: None)
    return FederationResult(run, load_outcome(Path(task.directory) / CHECKPOINT, run))


def adapt(
    data: Any,
    rules: Any = ("auto",),
    *,
    out: str | Path | None = None,
    track: Iterable[str] = (),
    **options: Any,
) -> AdaptationResult:
    """Adapt a trained model online to users it has never seen, as ``fedbn adapt`` does.

    Args:
        data: as in `compare`.
        rules: one or several rules and test-time methods: texts such as ``"pseudo:n0=64"`` or ``"tent"``, objects or
            classes. The federation chooses ``"auto"`` (`fedbn_simulations.adaptation.check`). The source model, which
            never adapts, is always included.
        out: directory; None for one below ``results`` that is named after the options.
        track: as in `compare`.
        **options: any other field of `fedbn_simulations.adaptation.study.Study` or `fedbn.config.Plan`, such as
            ``streams=["natural"]``, ``starts=["cold", "recording"]``, ``seeds=3`` or ``rounds=30``. ``strategies`` and
            ``model`` can also be objects, as in `compare`.

    Raises:
        UserError: before anything runs, for whatever can be checked then.
    """
    if "strategies" in options:
        options["strategies"] = _listed(options["strategies"], treatment_text)
    texts = _texts(data, options) | {"rules": _listed(rules, adaptation_text)}
    wanted = Study.from_dict(texts)
    place = Path(out) if out is not None else _place(f"adapt-{wanted.scenario}", repr(wanted))
    with Tracking(track) as tracking:
        tracking.started("training", tasks(wanted, place))
        done, results, decisions = run_study(wanted, place, report=tracking.report)
        found = write(place, done, results, "", decisions)
        log_study(tracking, done, results, found)
    reasons = tuple(decision.reason for decision in decisions.values())
    return AdaptationResult(found, users_frame(results), place, metric_of(done).name, reasons)


def _experiment(data: Any, strategies: tuple[str, ...], options: dict[str, Any]) -> Experiment:
    values = _texts(data, options) | {"strategies": strategies}
    return Experiment.from_dict(values).resolved()


def _texts(data: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The data and the options, with texts in the place of objects."""
    found = dict(options)
    texts = {"model": model_text, "rule": rule_text, "task": render_task, "metric": metric_text}
    for name, to_text in texts.items():
        if found.get(name) is not None:
            found[name] = to_text(found[name])
    if not isinstance(found.get("seeds", 1), (int, str)):
        found["seeds"] = tuple(found["seeds"])
    task = found.get("task")
    return found | {"scenario": scenario_text(data, parse_task(task) if task else None)}


def _listed(values: Any, to_text: Callable[[Any], str]) -> tuple[str, ...]:
    """The texts of one or several objects."""
    several = isinstance(values, Iterable) and not isinstance(values, (str, type))
    if several and isinstance(values, dict):
        raise UserError("give a list of strategies or rules, not a dictionary")
    return tuple(to_text(value) for value in (values if several else (values,)))


def _place(scenario: str, settings: Any) -> Path:
    """Default results directory: the same settings and numerics always map to the same directory."""
    digest = hashlib.sha256(json.dumps([settings, NUMERICS], sort_keys=True).encode()).hexdigest()[:8]
    return Path("results") / f"{scenario.partition(':')[0]}-{digest}"


def _console(shown: bool) -> Console:
    return Console(stderr=True, quiet=not shown)
