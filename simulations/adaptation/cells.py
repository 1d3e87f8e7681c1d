"""Cells of an adaptation study: run one, write it (predictions as parquet, measurements as JSON), read it."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from fedbn.federation.run import Run
from fedbn.files import DamagedFile, read_json, write_atomically, write_json
from fedbn.nn.inference import logits
from fedbn.online import personalize
from fedbn.online.drift.monitor import DriftMonitor
from fedbn.online.prequential import (
    ActiveLabeling,
    Trace,
    accuracy_with_state,
    balanced_oracle,
    follow,
    follow_blocks,
    own_stream_oracle,
)
from fedbn.online.prequential_metrics import judge_alarms
from fedbn.online.rules.source import Source
from fedbn.seeds import generator
from fedbn.streams import Stream
from fedbn.tta import Adapter, Method
from simulations.adaptation.methods import adaptation_method
from simulations.adaptation.source_model import SourceModel, UserGroup
from simulations.adaptation.warm_starts import start
from simulations.storage.provenance import NUMERICS, check_numerics, code_digest

SOURCE = "source"
"""The rule that never adapts: the reference of all others."""

COLUMNS = ("y", "predicted", "confidence", "nll", "seconds")
"""Stored fields of a trace."""

CHANGES = ("switch", "fault", "repair")
"""Events that a drift detector should notice. A gap in the stream need not change anything."""


@dataclass(frozen=True)
class Cell:
    """One rule with one start on one kind of stream, for all users of one seed.

    Attributes:
        run: the training run.
        users: ``unseen`` users, or ``seen`` users with their later recordings (for tuning).
        stream, start, rule: texts of plug-ins. The rules ``bound-own`` and ``bound-balanced`` are oracles.
    """

    run: Run
    users: UserGroup
    stream: str
    start: str
    rule: str

    @property
    def id(self) -> str:
        """Digest of all fields."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


BOUNDS: dict[str, Callable[[nn.Module, Stream, int], Trace]] = {
    "bound-own": lambda model, s, seed: own_stream_oracle(model, s),
    "bound-balanced": balanced_oracle,
}
"""Oracles: statistics of the whole stream, and of equally many of its windows from each class."""


def run_cell(cell: Cell, source: SourceModel) -> tuple[list[Trace], dict[str, Any]]:
    """Run one cell. Returns the traces of all users, and other measurements of the cell."""
    seed = cell.run.seed
    streams = source.streams(cell.stream, cell.users)
    facts: dict[str, Any] = {"bytes_per_user": None, "forgotten": None, "reset_exact": None, "includes_current": False}
    if cell.rule in BOUNDS:
        return [BOUNDS[cell.rule](source.model, s, seed) for s in streams], facts | {"includes_current": True}
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
    net = personalize(source.model, chosen.rule, prior=prior)
    for name, windows in calibration.items():
        if windows is not None:
            net.calibrate(windows, user=name, then="freeze" if cell.rule == SOURCE else "adapt", n0=begin.n0)
    follower = DriftMonitor(net, source.model, *chosen.watch) if chosen.watch else net
    ask = ActiveLabeling(chosen.ask.budget) if chosen.ask else None
    traces = follow(follower, streams, ask)
    facts["includes_current"] = chosen.rule.includes_current
    if isinstance(follower, DriftMonitor):
        facts["alarms"] = [_alarms(follower.users[s.user].alarms, s) for s in streams]
    if ask is not None:
        facts["questions"] = {user: sum(counts) for user, counts in ask.labeled.items()}
    first = streams[0]
    before = float((logits(source.model, source.source_test.x).argmax(1) == source.source_test.y).double().mean())
    after = [accuracy_with_state(net, s.user, source.source_test) for s in streams]
    facts["bytes_per_user"] = len(net.state(first.user).to_bytes())
    facts["forgotten"] = before - sum(after) / len(after)
    net.reset(first.user)
    fresh = personalize(source.model, chosen.rule, prior=prior).predict(first.x[:1], user=[first.user])
    facts["reset_exact"] = bool(torch.equal(net.predict(first.x[:1], user=[first.user]), fresh))
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
        traces.append(follow_blocks(adapter, s, chosen.block))
    return traces


def write_cell(out: Path, cell: Cell, traces: Sequence[Trace], facts: dict[str, Any]) -> None:
    """Write the predictions, then the measurements. A cell with measurements is finished."""
    folder = out / "cells"
    tables = [{"user": t.user, "window": range(len(t.y))} | {c: getattr(t, c) for c in COLUMNS} for t in traces]
    frame = pd.concat(map(pd.DataFrame, tables))
    predictions = frame.to_parquet(index=False)
    write_atomically(folder / f"{cell.id}.parquet", predictions)
    record = {"cell": asdict(cell), "numerics": NUMERICS, "code": code_digest()}
    record |= {"predictions": zlib.crc32(predictions), "digests": {t.user: t.digest for t in traces}, **facts}
    write_json(folder / f"{cell.id}.json", record)


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
    traces = [
        Trace(str(user), facts["digests"][user], *(part[c].to_numpy() for c in COLUMNS))
        for user, part in frame.groupby("user", sort=False)
    ]
    return traces, facts
