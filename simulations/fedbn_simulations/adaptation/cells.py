"""Cells of an adaptation study: run one, write it (predictions as parquet, measurements as JSON), read it."""

from __future__ import annotations

import hashlib
import io
import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from fedbn.federation.run import Run, plan_values, task_of
from fedbn.files import DamagedFile, read_json, write_atomically, write_json
from fedbn.nn.inference import logits
from fedbn.online import personalize
from fedbn.online.drift.monitor import DriftMonitor
from fedbn.online.fallback import FallbackModel
from fedbn.online.prequential import (
    ActiveLabeling,
    OnlineModel,
    balanced_oracle,
    follow,
    follow_blocks,
    metric_with_state,
    own_stream_oracle,
)
from fedbn.online.prequential_metrics import judge_alarms
from fedbn.online.rules.source import Source
from fedbn.online.traces import ClassTrace, TaskTrace, Trace
from fedbn.seeds import generator
from fedbn.streams import Stream
from fedbn.tasks import Task
from fedbn.tta import Adapter, Method
from fedbn_simulations.adaptation.methods import adaptation_method
from fedbn_simulations.adaptation.source_model import SourceModel, UserGroup
from fedbn_simulations.adaptation.warm_starts import start
from fedbn_simulations.storage.provenance import NUMERICS, check_numerics, code_digest

SOURCE = "source"
"""The rule that never adapts: the reference of all others."""

CLASS_COLUMNS = ("y", "predicted", "confidence", "nll", "seconds")
"""Stored fields of a `fedbn.online.traces.ClassTrace`."""

TASK_COLUMNS = ("values", "losses", "seconds")
"""Stored fields of a `fedbn.online.traces.TaskTrace`. Metrics of a user are stored in each of its rows."""

METRIC = "metric: "
"""Prefix of the columns of metrics."""

CHANGES = ("switch", "fault", "repair")
"""Events that a drift detector should notice. A gap in the stream need not change anything."""


@dataclass(frozen=True)
class Cell:
    """One rule with one start on one kind of stream, for all users of one seed.

    Attributes:
        run: the training run.
        users: ``unseen`` users, or ``seen`` users with their later recordings (for tuning).
        stream, start, rule: texts of plug-ins. The rules ``bound-own`` and ``bound-balanced`` are oracles.
        fold: with the check on seen users, the fold of them that is left out; empty otherwise.
    """

    run: Run
    users: UserGroup
    stream: str
    start: str
    rule: str
    fold: str = ""

    @property
    def id(self) -> str:
        """Digest of all fields."""
        values = asdict(self)
        values["run"]["plan"] = plan_values(self.run.plan)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


BOUNDS: dict[str, Callable[[nn.Module, Stream, int, Task], Trace]] = {
    "bound-own": lambda model, s, seed, task: own_stream_oracle(model, s, task),
    "bound-balanced": balanced_oracle,
}
"""Oracles: statistics of the whole stream, and of equally many of its windows from each class."""


def bounds_of(task: Task) -> list[str]:
    """Names of the oracles of a task; the one that uses classes is the last.

    >>> from fedbn.tasks import parse_task
    >>> bounds_of(parse_task("regression"))
    ['bound-own']
    """
    return [name for name in BOUNDS if task.has_posterior or name != "bound-balanced"]


def run_cell(cell: Cell, source: SourceModel) -> tuple[list[Trace], dict[str, Any]]:
    """Run one cell. Returns the traces of all users, and other measurements of the cell."""
    seed, task = cell.run.seed, source.ctx.task
    streams = source.streams(cell.stream, cell.users)
    facts: dict[str, Any] = {"bytes_per_user": None, "forgotten": None, "reset_exact": None, "includes_current": False}
    if cell.rule in BOUNDS:
        return [BOUNDS[cell.rule](source.model, s, seed, task) for s in streams], facts | {"includes_current": True}
    begin = start(cell.start)
    calibration = {
        u.name: begin.windows(u.train, generator(seed, "start", cell.start, u.name)) for u in source.users(cell.users)
    }
    chosen = adaptation_method(cell.rule)
    if isinstance(chosen.rule, Method):
        return _adapt_each(chosen.rule, source, streams, calibration, begin.n0, seed), facts | {
            "includes_current": chosen.rule.includes_current
        }
    prior = source.prior_for(chosen.rule)
    aligner, head = source.sums_for(chosen)
    net = personalize(source.model, chosen.rule, prior=prior, align=aligner, head=head)
    for name, windows in calibration.items():
        if windows is not None:
            net.calibrate(windows, user=name, then="freeze" if cell.rule == SOURCE else "adapt", n0=begin.n0)
    follower: OnlineModel = net
    if chosen.watch:
        follower = DriftMonitor(net, source.model, *chosen.watch)
    elif chosen.fallback:
        follower = FallbackModel(net, source.model)
    ask = ActiveLabeling(chosen.ask.budget) if chosen.ask else None
    traces = follow(follower, streams, ask, task)
    facts["includes_current"] = chosen.rule.includes_current
    if isinstance(follower, DriftMonitor):
        facts["alarms"] = [_alarms(follower.users[s.user].alarms, s) for s in streams]
    if isinstance(follower, FallbackModel):
        facts["fallback_windows"] = [follower.windows.get(s.user, 0) for s in streams]
    if ask is not None:
        facts["questions"] = {user: sum(counts) for user, counts in ask.labeled.items()}
    first = streams[0]
    data = source.source_test
    before = float(task.example_values(logits(source.model, data.x), data.y).nanmean())
    after = [metric_with_state(net, s.user, data, task) for s in streams]
    lost = before - sum(after) / len(after)
    facts["bytes_per_user"] = len(net.state(first.user).to_bytes())
    facts["forgotten"] = lost if task.directions[task.example_metric] else -lost
    net.reset(first.user)
    fresh = personalize(source.model, chosen.rule, prior=prior, align=aligner, head=head)
    outputs = [each.predict(first.x[:1], user=[first.user]) for each in (net, fresh)]
    facts["reset_exact"] = bool(torch.equal(*outputs))
    return traces, facts


def _alarms(alarms: Sequence[int], stream: Stream) -> dict[str, Any]:
    found = judge_alarms(alarms, [e.at for e in stream.events if e.kind in CHANGES], len(stream))
    return {"delays": found.delays, "missed": found.missed, "false_per_1000": found.false_per_1000}


def _adapt_each(
    chosen: Method,
    source: SourceModel,
    streams: Sequence[Stream],
    calibration: dict[str, Tensor | None],
    n0: float,
    seed: int,
) -> list[Trace]:
    traces = []
    for s in streams:
        windows, model = calibration[s.user], source.model
        if windows is not None:
            calibrated = personalize(model, Source(), capacity=1)
            calibrated.calibrate(windows, user=s.user, n0=n0)
            model = calibrated.export(s.user)
        adapter = Adapter(chosen, model, source.source_windows, seed)
        traces.append(follow_blocks(adapter, s, chosen.block, source.ctx.task))
    return traces


def write_cell(out: Path, cell: Cell, traces: Sequence[Trace], facts: dict[str, Any]) -> None:
    """Write the predictions, then the measurements. A cell with measurements is finished."""
    folder = out / "cells"
    tables = [{"user": t.user, "window": range(len(t))} | _columns(t) for t in traces]
    frame = pd.concat(map(pd.DataFrame, tables))
    predictions = frame.to_parquet(index=False)
    write_atomically(folder / f"{cell.id}.parquet", predictions)
    record = {"cell": asdict(cell), "numerics": NUMERICS, "code": code_digest()}
    record |= {"predictions": zlib.crc32(predictions), "digests": {t.user: t.digest for t in traces}, **facts}
    write_json(folder / f"{cell.id}.json", record)


def _columns(trace: Trace) -> dict[str, Any]:
    if isinstance(trace, ClassTrace):
        return {c: getattr(trace, c) for c in CLASS_COLUMNS}
    metrics = {f"{METRIC}{name}": value for name, value in trace.metrics.items()}
    return {c: getattr(trace, c) for c in TASK_COLUMNS} | metrics


def _trace(user: str, digest: str, part: pd.DataFrame, task: Task) -> Trace:
    if "predicted" in part:
        return ClassTrace(user, digest, *(part[c].to_numpy() for c in CLASS_COLUMNS))
    found = {c.removeprefix(METRIC): float(part[c].iloc[0]) for c in part if c.startswith(METRIC)}
    metrics = {name: value for name, value in found.items() if not math.isnan(value)}
    values, losses, seconds = (part[c].to_numpy() for c in TASK_COLUMNS)
    return TaskTrace(user, digest, values, losses, seconds, metrics, task.directions[task.example_metric])


def stored_cell(out: Path, cell: Cell, source: SourceModel) -> tuple[list[Trace], dict[str, Any]]:
    """Read a finished cell, or run and write it."""
    found = read_cell(out, cell)
    if found is None:
        found = run_cell(cell, source)
        write_cell(out, cell, *found)
    return found


def read_cell(out: Path, cell: Cell) -> tuple[list[Trace], dict[str, Any]] | None:
    """Read a finished cell; None if it is not finished or damaged.

    Raises:
        UserError: the cell was computed with other numerics.
    """
    path = out / "cells" / f"{cell.id}.json"
    if not path.exists():
        return None
    try:
        facts, predictions = read_json(path), path.with_suffix(".parquet").read_bytes()
    except (DamagedFile, FileNotFoundError):
        return None
    check_numerics(path, facts.get("numerics"))
    if zlib.crc32(predictions) != facts["predictions"]:
        return None
    frame = pd.read_parquet(io.BytesIO(predictions))
    task = task_of(cell.run)
    groups = frame.groupby("user", sort=False)
    return [_trace(str(user), facts["digests"][user], part, task) for user, part in groups], facts
