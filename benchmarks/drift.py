"""``python -m benchmarks.drift``: which changes the alarms of service and page notice, and how often they are wrong.

One run on HAPT. Everybody's later recording is played as it is, with the sensor turned at half time, and with somebody
else's second half. The detectors' options were chosen on the people who trained, by the share of changes noticed less
the share of people with a false alarm; the people who did not train are shown beside.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedbn.data.packages import cache_dir
from fedbn.data.shift import turn
from fedbn.nn.hooks import inputs_of
from fedbn.nn.roles import statistics_layers
from fedbn.online.drift.detectors import Detector, detector
from simulations.adaptation.source_model import SourceModel, train_source_model
from simulations.adaptation.study import study_from
from simulations.report.documents import markdown, replace_block
from simulations.service import users as people
from simulations.service.demo import session as playground
from simulations.service.drift import BatchedMonitor, Floats, channel_means
from simulations.storage.provenance import NUMERICS

DEGREES = (30, 60, 90)

Look = Callable[[Tensor], Floats]


def changes(recordings: Sequence[Tensor]) -> Iterator[tuple[str, Tensor, int | None]]:
    """What happens, the windows with it, and the first window after it; None: nothing happens."""
    for mine, other in zip(recordings, [*recordings[1:], recordings[0]], strict=True):
        at = len(mine) // 2
        yield "false alarms", mine, None
        for degrees in DEGREES:
            turned = turn(playground.AXIS, torch.tensor(math.radians(degrees)))(mine[at:])
            yield f"turned by {degrees}°", torch.cat([mine[:at], turned]), at
        yield "somebody else", torch.cat([mine[:at], other[at:]]), at


def alarms(source: SourceModel, x: Tensor, look: Look, spread: Floats, notice: Detector) -> list[int]:
    """After which windows the detector speaks."""
    with torch.no_grad():
        said = source.model(x).argmax(1).tolist()
    watches = BatchedMonitor(notice, spread, len(source.ctx.population.classes), capacity=1)
    looks = look(x)
    return [t for t, label in enumerate(said) if watches.see(["one"], looks[t : t + 1], [label])[0][1]]


def measure(source: SourceModel) -> list[dict[str, str]]:
    """One line an alarm and kind of people: how many of them were noticed, and had false alarms."""
    path, layer = next(iter(statistics_layers(source.model).items()))

    def first(x: Tensor) -> Floats:
        seen: list[Tensor] = []
        with torch.no_grad(), inputs_of({path: layer}, lambda _path, value: seen.append(value)):
            source.model(x)
        return channel_means(seen[0])

    scale = torch.as_tensor(layer.running_var).double().numpy()
    spread = channel_means(source.source_windows).var(0)
    kinds: dict[str, tuple[Look, Floats, str]] = {
        "page": (channel_means, spread, playground.DETECTOR),
        "service": (first, scale, people.DETECTOR),
    }
    lines = []
    for name, (look, variance, notice) in kinds.items():
        for who, told in (("seen", "trained"), ("unseen", "did not train")):
            found: dict[str, list[bool]] = {}
            for what, x, at in changes([user.test.x for user in source.users(who)]):  # type: ignore[arg-type]
                spoken = alarms(source, x, look, variance, detector(notice))
                found.setdefault(what, []).append(any(t >= (at or 0) for t in spoken))
            shares = {what: f"{sum(noticed)} of {len(noticed)}" for what, noticed in found.items()}
            lines.append({"alarm of the": name, "people who": told, **shares})
    return lines


def main() -> int:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drift", description=__doc__)
    parser.add_argument("--into", type=Path, help="also put the table into this document, between its markers")
    chosen = parser.parse_args()
    study = study_from({"scenario": "hapt", "rules": ("source",), "seeds": 1})
    (run,) = study.resolved().runs()
    place = cache_dir() / "served" / f"numerics-{NUMERICS}"
    table = markdown(measure(train_source_model(run, place, "grid:stacked", lambda event: None)))
    print(table)
    if chosen.into:
        replace_block(chosen.into, "drift", table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
