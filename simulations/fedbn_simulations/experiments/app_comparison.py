"""Compare normalization strategies in a user's Flower app, with its own training, data and metrics."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import shutil
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fedbn.errors import UserError, unknown
from fedbn.files import DamagedFile, locked, read_json
from fedbn.plugins import render
from fedbn.strategies.base import strategy as parse_strategy
from fedbn_simulations.experiments.app_runs import FILES, LOG, AppRun, directions, execute_app, settings_of
from fedbn_simulations.flower.apps import FlowerApp
from fedbn_simulations.flower.normalized import normalized
from fedbn_simulations.flower.processes import kill_worker, prepare_worker
from fedbn_simulations.results.files import write_comparison, write_run
from fedbn_simulations.storage.provenance import NUMERICS, code_digest, versions

ENGINE = "app"

SETTINGS = {
    "app": "another app",
    "digest": "other files of the app",
    "model": "another model",
    "num_supernodes": "another number of nodes",
    "run_config": "another run-config",
}
"""What all runs of a comparison have in common, in the words of an error."""


@dataclass(frozen=True)
class AppExperiment:
    """A comparison of strategies in an app.

    Attributes:
        app: directory of the app.
        strategies: strategies; the first is the reference.
        seeds: number of seeds.
        model: reference of the app's model; None: that of its pyproject.toml.
        num_supernodes: number of nodes; None: the app's default.
        run_config: overrides of the app's run-config.
        metric: the app's metric to display; empty: an accuracy if there is one.
    """

    app: Path
    strategies: tuple[str, ...]
    seeds: int = 3
    model: str | None = None
    num_supernodes: int | None = None
    run_config: tuple[str, ...] = ()
    metric: str = ""

    def runs(self) -> list[AppRun]:
        """Every strategy with every seed; seeds are outermost, so that an interrupted comparison has complete seeds.

        Raises:
            UserError: the app, a strategy or an option is not valid.
        """
        app = FlowerApp.read(self.app)
        app.run_config(self.run_config)
        names = [render(parse_strategy(s)) for s in self.strategies]
        if twice := {n for n in names if names.count(n) > 1}:
            raise UserError(f"strategies given twice: {', '.join(sorted(twice))}")
        for name in names:
            with normalized(app, self.model, name):
                pass
        common = (str(app.directory), digest_files(app.directory), self.model, self.num_supernodes, self.run_config)
        return [AppRun(*common, strategy=name, seed=seed) for seed in range(self.seeds) for name in names]


def compare_app(
    experiment: AppExperiment,
    out: Path | None = None,
    *,
    workers: int | None = None,
    command: str = "",
    report: Callable[[AppRun, dict[str, Any]], None] = lambda run, result: None,
) -> Path:
    """Run an app under each strategy and with each seed, or the runs that are not finished, and write the results.

    Args:
        experiment: what to compare.
        out: results directory; None: one below ``results`` with the name of the app.
        workers: number of processes; None: one per core.
        command: command that reproduces the comparison, for the record.
        report: called with each run and its result when it is finished.

    Returns:
        The results directory.

    Raises:
        UserError: invalid settings, before anything runs; or a run that failed.
    """
    runs = experiment.runs()
    app = FlowerApp.read(experiment.app)
    out = out or Path("results") / app.name
    with locked(out):
        _require_equal_settings(out, runs[0])
        write_comparison(out, _meta(experiment, app, runs, command, []))
        pending = [run for run in runs if not _is_finished(_path(out, run), run)]
        _execute(pending, out, workers or os.cpu_count() or 1, report)
        results = [read_json(_path(out, run)) for run in runs]
        write_comparison(out, _meta(experiment, app, runs, command, results))
    return out


def digest_files(directory: Path) -> str:
    """Digest of the Python and TOML files of an app, without those in hidden directories such as ``.venv``."""
    digest = hashlib.sha256()
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for path in sorted(Path(folder, name) for name in names if name.endswith((".py", ".toml"))):
            digest.update(str(path.relative_to(directory)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run_id(run: AppRun) -> str:
    """Name of the directory of a run: equal runs of equal files have the same."""
    return hashlib.sha256(repr(run).encode()).hexdigest()[:12]


def _require_equal_settings(out: Path, run: AppRun) -> None:
    """Raise `UserError` if a directory has results with other settings or files of the app, which would be mixed."""
    wanted = settings_of(run)
    for path in sorted((out / "runs").glob("*/result.json")):
        with suppress(DamagedFile):  # it is computed again
            found = read_json(path).get("run", {})
            if changed := [SETTINGS[name] for name in SETTINGS if found.get(name) != wanted[name]]:
                raise UserError(
                    f"{out} has results with {' and '.join(changed)}, which cannot be compared with new ones: choose "
                    "another --out, or delete it"
                )


def _path(out: Path, run: AppRun) -> Path:
    return out / "runs" / run_id(run) / "result.json"


def _is_finished(path: Path, run: AppRun) -> bool:
    """Whether there is a result of these numerics; a damaged one is computed again."""
    try:
        return path.exists() and read_json(path).get("numerics") == NUMERICS
    except DamagedFile:
        return False


def _execute(runs: Sequence[AppRun], out: Path, workers: int, report: Callable[[AppRun, dict[str, Any]], None]) -> None:
    """Execute runs in worker processes, in which each run imports the app anew; the first error stops all."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(workers, len(runs))), context, initializer=_start_worker) as pool:
        futures = {pool.submit(execute_run, run, out): run for run in runs}
        try:
            for future in as_completed(futures):
                report(futures[future], future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list((pool._processes or {}).values()):
                kill_worker(process)
            raise


def _start_worker() -> None:
    prepare_worker()
    torch.set_num_threads(1)


def execute_run(run: AppRun, out: Path) -> dict[str, Any]:
    """Execute a run and write its result and its log.

    Raises:
        UserError: the run failed; the message names the log.
    """
    path = _path(out, run).with_name(LOG)
    files = path.with_name(FILES)
    shutil.rmtree(files, ignore_errors=True)  # of an interrupted run
    files.mkdir(parents=True)
    with path.open("w", encoding="utf-8") as log:
        try:
            result = execute_app(run, log, files)
        except Exception as error:
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            traceback.print_exc(file=log)
            raise UserError(f"{run.strategy}, seed {run.seed}: {reason} (log: {path})") from None
    with suppress(OSError):  # the app has written files
        files.rmdir()
    write_run(out, run_id(run), result)
    return result


def _meta(
    experiment: AppExperiment, app: FlowerApp, runs: Sequence[AppRun], command: str, results: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    strategies = list(dict.fromkeys(run.strategy for run in runs))
    metrics = directions(dict.fromkeys(name for result in results for name in result["metrics"]))
    if experiment.metric and results and experiment.metric not in metrics:
        raise unknown("metric", experiment.metric, metrics)
    return {
        "title": f"{app.name}: {len(strategies)} normalization strategies",
        "scenario": app.name,
        "strategies": strategies,
        "seeds": list(range(experiment.seeds)),
        "columns": ["aggregated"],
        "metrics": metrics,
        "metric": experiment.metric or next(iter(metrics), ""),
        "settings": app.run_config(experiment.run_config) | {"model": experiment.model or app.model, "engine": ENGINE},
        "versions": versions(),
        "numerics": NUMERICS,
        "code": code_digest(),
        "sources": {"files of the app": runs[0].digest},
        "command": command,
        "classes": [],
        "skew": f"app {app.name}, with its own data and training",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "notices": _notices(results),
        "app": str(app.directory),
        "engine": ENGINE,
    }


def _notices(results: Sequence[dict[str, Any]]) -> list[str]:
    """Notices about all runs."""
    if not results:
        return []
    notices = ["The metrics are those of the app, in the last evaluation of every client."]
    by_strategy: dict[str, list[Any]] = {}
    for result in results:
        by_strategy.setdefault(result["strategy"], []).append(result["evaluations"])
    if any(len(found) > 1 and all(_is_close(found[0], other) for other in found) for found in by_strategy.values()):
        notices.append(
            "Different seeds give equal results, so the app sets its own seed: add seed to its run-config and use it."
        )
    return notices


def _is_close(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> bool:
    """Whether evaluations differ by not more than rounding errors of the training."""
    pairs = [(x[name], y.get(name)) for x, y in zip(a, b, strict=False) for name in x if isinstance(x[name], float)]
    return all(y is not None and math.isclose(x, y, rel_tol=1e-3, abs_tol=1e-6) for x, y in pairs)
