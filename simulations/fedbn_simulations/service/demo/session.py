"""Sessions of the demo page: several rules adapt to the same stream of an unseen person.

Each visitor has a separate `Session`. Users of the service are not affected.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fedbn.data.population import User
from fedbn.data.shift import rotate
from fedbn.errors import UserError, unknown
from fedbn.nn.roles import statistics_layers
from fedbn.online import personalize
from fedbn.online.drift.batched import BatchedMonitor
from fedbn.online.drift.detectors import detector
from fedbn.online.drift.signal import Floats, channel_means
from fedbn.online.rules.base import rule
from fedbn.scenarios.base import scenario
from fedbn.seeds import generator
from fedbn.statistics.moments import Moments
from fedbn.statistics.recalibration import recalibrate
from fedbn_simulations.adaptation.source_model import SourceModel

RULES = {
    "source": ("source", "never adapts"),
    "DA-BN": ("dabn", "running moments, updated before use"),
    "gated": ("pseudo:n0=64:gate=0.9", "learns from confident windows; the population counts as 64 windows"),
    "calibrated": ("source", "same as source until calibration, then fixed at the person's statistics"),
}
"""Name on the page -> text of the rule and short description."""

SIGNAL_SAMPLES = 32
"""Number of samples of a window that are sent for plotting."""

RECENT = 50
"""Number of windows of the moving accuracy."""

SCENARIOS = ("hapt", "watch")

SAMPLING_RATE = 50.0
"""Sampling rate of both, in Hz."""

DETECTOR = "page-hinkley:threshold=15:delta=0.0"
"""For raw windows; chosen by ``python -m benchmarks.drift`` on later recordings of seen users."""

USER = "wearer"

AXIS = torch.tensor([0.0, 0.0, 1.0])
"""Rotations of the sensor are about its third axis."""


@dataclass(frozen=True)
class Playground:
    """Data shared by all sessions.

    Attributes:
        model: in evaluation mode.
        users: unseen users, by name.
        classes: class names.
        hop: seconds from one window to the next.
        title: description of the scenario.
        scale: ``[channels]`` variance of the channel means of seen users' windows.
    """

    model: nn.Module
    users: Mapping[str, User]
    classes: Sequence[str]
    hop: float
    title: str
    scale: Floats

    @staticmethod
    def from_source(source: SourceModel) -> Playground:
        """Create from a trained model and its unseen users.

        Raises:
            UserError: the page cannot show the data, or no user is held out.
        """
        spec = demo_scenario(source.run.scenario)
        users = {user.name: user for user in source.users("unseen")}
        hop = spec.window * (1 - spec.overlap) / SAMPLING_RATE
        scale = channel_means(source.source_windows).var(0)
        return Playground(source.model, users, source.ctx.population.classes, hop, spec.about, scale)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of a window."""
        return tuple(next(iter(self.users.values())).test.x.shape[1:])

    @property
    def layers(self) -> list[str]:
        """Paths of the layers with running statistics."""
        return list(statistics_layers(self.model))

    def person(self, name: str) -> User:
        """An unseen user.

        Raises:
            UserError: unknown name.
        """
        if name not in self.users:
            raise unknown("person", name, self.users)
        return self.users[name]

    def description(self) -> dict[str, Any]:
        """Information that the page needs to start."""
        return {
            "title": self.title,
            "people": {name: len(user.test) for name, user in self.users.items()},
            "classes": list(self.classes),
            "rules": {name: text for name, (_, text) in RULES.items()},
            "layers": self.layers,
            "channels": self.shape[0],
            "hop": self.hop,
        }


def demo_scenario(text: str) -> Any:
    """Parse a scenario and check that the page supports it.

    Raises:
        UserError: unknown, or not a scenario of motion recordings.
    """
    spec = scenario(text)
    if spec.name not in SCENARIOS:
        raise UserError(f"the page shows recordings of motion, not {spec.name!r}: choose {' or '.join(SCENARIOS)}")
    return spec


class Session:
    """Session of one visitor.

    Args:
        playground: shared by all sessions.
        person: name of the first person.

    Raises:
        UserError: unknown name.
    """

    def __init__(self, playground: Playground, person: str) -> None:
        self.playground = playground
        self.nets = {
            name: personalize(playground.model, rule(text), capacity=1, classes=len(playground.classes))
            for name, (text, _) in RULES.items()
        }
        self.monitor = BatchedMonitor(detector(DETECTOR), playground.scale, len(playground.classes), capacity=1)
        self.position = self.num_windows = 0
        self.num_correct = dict.fromkeys(RULES, 0)
        self.recent: dict[str, deque[bool]] = {name: deque(maxlen=RECENT) for name in RULES}
        self.degrees = 0.0
        self.recorded: dict[int, Tensor] = {}
        self.switch(person)

    # ---------------------------------------------------------------- actions of the visitor

    def switch(self, person: str) -> None:
        """Hand the device to another person. The rules are not informed.

        Raises:
            UserError: unknown name.
        """
        self.person = self.playground.person(person)
        self.position = 0
        self.recorded.clear()
        self._measure_statistics()

    def rotate(self, degrees: float) -> None:
        """Rotate the sensor for all further windows.

        Raises:
            UserError: the angle is not between -180 and 180.
        """
        if not -180 <= degrees <= 180:
            raise UserError(f"the angle must be -180 to 180 degrees, not {degrees:g}")
        self.degrees = degrees
        self.recorded.clear()
        self._measure_statistics()

    def record(self, label: int) -> dict[str, Any]:
        """Record one window of a class from the person's earlier recording. Calibrates after the last class.

        Raises:
            UserError: the earlier recording does not have this class.
        """
        earlier = self.person.train
        rows = (earlier.y == label).nonzero()[:, 0]
        if not len(rows):
            raise UserError("this person has no recording of this activity: choose another")
        draw = generator(0, "calibration", self.person.name, self.num_windows, label)
        row = rows[torch.randint(len(rows), (), generator=draw)]
        self.recorded[label] = self._rotated(earlier.x[row][None])
        missing = set(earlier.y.tolist()) - set(self.recorded)
        if not missing:
            labels = torch.tensor(list(self.recorded))
            self.nets["calibrated"].calibrate(torch.cat(list(self.recorded.values())), USER, labels)
            self.recorded.clear()
        return {"recorded": label, "missing": sorted(missing), "done": not missing}

    # ---------------------------------------------------------------- the stream

    @property
    def ended(self) -> bool:
        """Whether the recording has ended."""
        return self.position >= len(self.person.test)

    def step(self, limit: int) -> dict[str, Any]:
        """Process up to ``limit`` windows. Every rule predicts each window before learning from it."""
        steps: list[dict[str, Any]] = []
        while len(steps) < limit and not self.ended:
            steps.append(self._process_window())
        return {
            "steps": steps,
            "position": self.position,
            "total": len(self.person.test),
            "num_windows": self.num_windows,
            "accuracy": {
                name: {"all": self.num_correct[name] / max(1, self.num_windows), "recent": _mean(self.recent[name])}
                for name in RULES
            },
            "layers": self.positions(),
        }

    def _process_window(self) -> dict[str, Any]:
        data, i = self.person.test, self.position
        x = self._rotated(data.x[i : i + 1])
        label = int(data.y[i])
        predicted = {}
        for name, net in self.nets.items():
            posterior = net.predict(x, [USER]).softmax(1)
            net.commit(posterior=posterior)
            predicted[name] = int(posterior.argmax())
            self.num_correct[name] += predicted[name] == label
            self.recent[name].append(predicted[name] == label)
        self.position += 1
        self.num_windows += 1
        [(_, alarm)] = self.monitor.observe([USER], channel_means(x), [predicted["source"]])
        # Windows overlap by half, so only the second half is new.
        new = x[0, :, x.shape[2] // 2 :]
        signal = new[:, :: max(1, new.shape[1] // SIGNAL_SAMPLES)]
        return {
            "signal": [[round(v, 3) for v in channel] for channel in signal.tolist()],
            "label": label,
            "predicted": predicted,
            "alarm": alarm,
        }

    def positions(self) -> dict[str, list[float]]:
        """Position of each rule's statistics per layer, from 0 (population) to 1 (person).

        With 2-Wasserstein distances a to the population and b to the person, a / (a + b).
        """
        positions: dict[str, list[float]] = {}
        for name, net in self.nets.items():
            positions[name] = []
            for path, (mean, var) in net.statistics(USER).items():
                moments = _moments(mean, var)
                a, b = float(moments.w2(self._population[path])), float(moments.w2(self._own[path]))
                positions[name].append(round(a / (a + b), 3) if a + b > 0 else 0.0)
        return positions

    def _rotated(self, x: Tensor) -> Tensor:
        return rotate(AXIS, torch.tensor(math.radians(self.degrees)))(x) if self.degrees else x

    def _measure_statistics(self) -> None:
        """Compute the person's own statistics from the earlier recording at the current rotation."""
        own = recalibrate(copy.deepcopy(self.playground.model), self._rotated(self.person.train.x))
        self._population, self._own = (
            {path: _moments(layer.running_mean, layer.running_var) for path, layer in statistics_layers(model).items()}
            for model in (self.playground.model, own)
        )


def _moments(mean: Any, var: Any) -> Moments:
    return Moments.from_variance(1, mean, var)


def _mean(values: Sequence[bool] | deque[bool]) -> float:
    return sum(values) / max(1, len(values))
