"""``python -m benchmarks.drift``: detection and false alarm rates of the drift detectors.

The service and the demo page each have a detector with its own signal and options.

One run on HAPT. The later recording of each person is played unchanged, with the sensor rotated halfway through, and
with another person's second half. The detectors' options were selected on the people who trained, by detection rate
minus false alarm rate. The people who did not train are reported separately.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedbn.data.packages import cache_dir
from fedbn.data.shift import rotate
from fedbn.nn.hooks import capture_inputs
from fedbn.nn.roles import statistics_layers
from fedbn.online.drift.batched import BatchedMonitor
from fedbn.online.drift.detectors import Detector, detector
from fedbn.online.drift.signal import Floats, channel_means
from fedbn_simulations.adaptation.source_model import SourceModel, train_source_model
from fedbn_simulations.adaptation.study import Study
from fedbn_simulations.report.documents import replace_block
from fedbn_simulations.results.formatting import markdown_table
from fedbn_simulations.service import users
from fedbn_simulations.service.demo import session as playground
from fedbn_simulations.storage.provenance import NUMERICS

DEGREES = (30, 60, 90)

Signal = Callable[[Tensor], Floats]
"""Channel means that a detector monitors, one row per window."""

AXIS = torch.tensor([0.0, 0.0, 1.0])
"""Axis of the rotated sensor."""


def changes(recordings: Sequence[Tensor]) -> Iterator[tuple[str, Tensor, int | None]]:
    """Name of each change, the windows that contain it, and the first window after it (None: no change)."""
    for own, other in zip(recordings, [*recordings[1:], recordings[0]], strict=True):
        at = len(own) // 2
        yield "false alarms", own, None
        for degrees in DEGREES:
            rotated = rotate(AXIS, torch.tensor(math.radians(degrees)))(own[at:])
            yield f"rotated by {degrees}°", torch.cat([own[:at], rotated]), at
        yield "another person", torch.cat([own[:at], other[at:]]), at


def alarms(source: SourceModel, x: Tensor, signal: Signal, variance: Floats, method: Detector) -> list[int]:
    """Windows at which the detector raises an alarm."""
    with torch.no_grad():
        predicted = source.model(x).argmax(1).tolist()
    monitor = BatchedMonitor(method, variance, len(source.ctx.population.classes), capacity=1)
    means = signal(x)
    return [t for t, label in enumerate(predicted) if monitor.observe(["one"], means[t : t + 1], [label])[0][1]]


def measure(source: SourceModel) -> list[dict[str, str]]:
    """One row per detector and group of people: how many changes were detected, and how many had false alarms."""
    path, layer = next(iter(statistics_layers(source.model).items()))

    def first_layer(x: Tensor) -> Floats:
        inputs: list[Tensor] = []
        with torch.no_grad(), capture_inputs({path: layer}, lambda _path, value: inputs.append(value)):
            source.model(x)
        return channel_means(inputs[0])

    layer_variance = torch.as_tensor(layer.running_var).double().numpy()
    window_variance = channel_means(source.source_windows).var(0)
    setups: dict[str, tuple[Signal, Floats, str]] = {
        "demo page": (channel_means, window_variance, playground.DETECTOR),
        "service": (first_layer, layer_variance, users.DETECTOR),
    }
    rows = []
    for name, (signal, variance, method) in setups.items():
        for group, label in (("seen", "trained"), ("unseen", "did not train")):
            detected: dict[str, list[bool]] = {}
            for change, x, at in changes([user.test.x for user in source.users(group)]):  # type: ignore[arg-type]
                raised = alarms(source, x, signal, variance, detector(method))
                detected.setdefault(change, []).append(any(t >= (at or 0) for t in raised))
            counts = {change: f"{sum(hits)} of {len(hits)}" for change, hits in detected.items()}
            rows.append({"detector": name, "people who": label, **counts})
    return rows


def main() -> int:
    """Measure, print the table and optionally update a document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drift", description=__doc__)
    parser.add_argument("--into", type=Path, help="also update the table of this document")
    args = parser.parse_args()
    study = Study.from_dict({"scenario": "hapt", "rules": ("source",), "seeds": 1})
    (run,) = study.resolved().runs()
    cache = cache_dir() / "served" / f"numerics-{NUMERICS}"
    table = markdown_table(measure(train_source_model(run, cache, "grid:stacked", lambda event: None)))
    print(table)
    if args.into:
        replace_block(args.into, "drift", table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
