"""One visitor of the page: a person the model has never seen, several rules that follow the same stream.

Everybody who opens the page has a `Session` of their own; the service's users are not touched.
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
from fedbn.data.shift import turn
from fedbn.errors import UserError, unknown
from fedbn.nn.roles import statistics_layers
from fedbn.online import personalize
from fedbn.online.drift.detectors import detector
from fedbn.online.rules.base import rule
from fedbn.scenarios.base import scenario
from fedbn.seeds import generator
from fedbn.statistics.moments import Moments
from fedbn.statistics.recalibration import recalibrate
from simulations.adaptation.source_model import SourceModel
from simulations.service.drift import BatchedMonitor, Floats, channel_means

RULES = {
    "source": ("source", "never adapts"),
    "DA-BN": ("dabn", "running moments, updated before use"),
    "gated": ("pseudo:n0=64:gate=0.9", "learns from windows it is sure of; the population counts as 64 windows"),
    "calibrated": ("source", "as source, until you calibrate: then fixed at your own statistics"),
}
"""What follows the stream: name on the page -> rule, and what it does in a few words."""

DRAWN = 32
"""Samples of a window that are sent to be drawn."""

RECENT = 50
"""Windows of the moving accuracy."""

SCENARIOS = ("hapt", "watch")

SAMPLING = 50.0
"""Samples a second of both."""

DETECTOR = "page-hinkley:threshold=15:delta=0.0"
"""On the windows themselves; chosen by ``python -m benchmarks.drift``, on seen people's later recordings."""

WHO = "wearer"

AXIS = torch.tensor([0.0, 0.0, 1.0])
"""The sensor is turned about its third axis."""


@dataclass(frozen=True)
class Playground:
    """What all sessions share.

    Attributes:
        model: in evaluation mode.
        users: those it has never seen.
        classes: names.
        hop: seconds from one window to the next.
        title: of the scenario.
        spread: ``[channels]`` variance of the channel means of seen people's windows.
    """

    model: nn.Module
    users: Mapping[str, User]
    classes: Sequence[str]
    hop: float
    title: str
    spread: Floats

    @staticmethod
    def of(source: SourceModel) -> Playground:
        """Of a trained model and the people it meets.

        Raises:
            UserError: data that the page cannot show, or nobody is held out.
        """
        chosen = shown(source.run.scenario)
        users = {user.name: user for user in source.users("unseen")}
        hop = chosen.window * (1 - chosen.overlap) / SAMPLING
        spread = channel_means(source.source_windows).var(0)
        return Playground(source.model, users, source.ctx.population.classes, hop, chosen.about, spread)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of a window."""
        return tuple(next(iter(self.users.values())).test.x.shape[1:])

    @property
    def layers(self) -> list[str]:
        """Paths of the layers with statistics."""
        return list(statistics_layers(self.model))

    def person(self, name: str) -> User:
        """One of the people.

        Raises:
            UserError: there is nobody of that name.
        """
        if name not in self.users:
            raise unknown("person", name, self.users)
        return self.users[name]

    def about(self) -> dict[str, Any]:
        """What the page must know before it begins."""
        return {
            "title": self.title,
            "people": {name: len(user.test) for name, user in self.users.items()},
            "classes": list(self.classes),
            "rules": {name: what for name, (_, what) in RULES.items()},
            "layers": self.layers,
            "channels": self.shape[0],
            "hop": self.hop,
        }


def shown(text: str) -> Any:
    """The scenario that a text names, if the page can show it.

    Raises:
        UserError: unknown, or no recordings of motion.
    """
    chosen = scenario(text)
    if chosen.name not in SCENARIOS:
        raise UserError(f"the page shows recordings of motion, not {chosen.name!r}: choose {' or '.join(SCENARIOS)}")
    return chosen


class Session:
    """One visitor.

    Args:
        playground: what is shared.
        person: whose stream begins.

    Raises:
        UserError: there is nobody of that name.
    """

    def __init__(self, playground: Playground, person: str) -> None:
        self.shared = playground
        self.nets = {
            name: personalize(playground.model, rule(text), capacity=1, classes=len(playground.classes))
            for name, (text, _) in RULES.items()
        }
        self.watches = BatchedMonitor(detector(DETECTOR), playground.spread, len(playground.classes), capacity=1)
        self.at = self.met = 0
        self.right = dict.fromkeys(RULES, 0)
        self.recent: dict[str, deque[bool]] = {name: deque(maxlen=RECENT) for name in RULES}
        self.degrees = 0.0
        self.recorded: dict[int, Tensor] = {}
        self.switch(person)

    # ---------------------------------------------------------------- what the visitor does

    def switch(self, person: str) -> None:
        """Somebody else takes the device; no rule is told.

        Raises:
            UserError: there is nobody of that name.
        """
        self.person = self.shared.person(person)
        self.at = 0
        self.recorded.clear()
        self._measure()

    def rotate(self, degrees: float) -> None:
        """Turn the sensor, from now on.

        Raises:
            UserError: no angle from -180 to 180.
        """
        if not -180 <= degrees <= 180:
            raise UserError(f"an angle is from -180 to 180 degrees, not {degrees:g}")
        self.degrees = degrees
        self.recorded.clear()
        self._measure()

    def record(self, label: int) -> dict[str, Any]:
        """One window of a class from the person's earlier recording; with the last class, calibrate.

        Raises:
            UserError: the person has never been recorded in this class.
        """
        earlier = self.person.train
        rows = (earlier.y == label).nonzero()[:, 0]
        if not len(rows):
            raise UserError("this person was never recorded in this activity")
        draw = generator(0, "calibration", self.person.name, self.met, label)
        row = rows[torch.randint(len(rows), (), generator=draw)]
        self.recorded[label] = self._turned(earlier.x[row][None])
        missing = set(earlier.y.tolist()) - set(self.recorded)
        if not missing:
            labels = torch.tensor(list(self.recorded))
            self.nets["calibrated"].calibrate(torch.cat(list(self.recorded.values())), WHO, labels)
            self.recorded.clear()
        return {"recorded": label, "missing": sorted(missing), "done": not missing}

    # ---------------------------------------------------------------- what the stream does

    @property
    def ended(self) -> bool:
        """Whether the recording is over."""
        return self.at >= len(self.person.test)

    def step(self, most: int) -> dict[str, Any]:
        """The next windows, each answered by every rule before it learns from it."""
        steps = []
        for _ in range(most):
            if self.ended:
                break
            steps.append(self._one())
        return {
            "steps": steps,
            "at": self.at,
            "of": len(self.person.test),
            "met": self.met,
            "accuracy": {
                name: {"all": self.right[name] / max(1, self.met), "recent": _mean(self.recent[name])} for name in RULES
            },
            "layers": self.positions(),
        }

    def _one(self) -> dict[str, Any]:
        data, at = self.person.test, self.at
        x = self._turned(data.x[at : at + 1])
        truth = int(data.y[at])
        said = {}
        for name, net in self.nets.items():
            posterior = net.predict(x, [WHO]).softmax(1)
            net.commit(posterior=posterior)
            said[name] = int(posterior.argmax())
            self.right[name] += said[name] == truth
            self.recent[name].append(said[name] == truth)
        self.at += 1
        self.met += 1
        [(_, alarm)] = self.watches.see([WHO], channel_means(x), [said["source"]])
        # Windows overlap by half: the second half is what is new.
        new = x[0, :, x.shape[2] // 2 :]
        drawn = new[:, :: max(1, new.shape[1] // DRAWN)]
        return {
            "signal": [[round(v, 3) for v in channel] for channel in drawn.tolist()],
            "truth": truth,
            "said": said,
            "alarm": alarm,
        }

    def positions(self) -> dict[str, list[float]]:
        """Where each rule's statistics are in each layer, from 0 at the population to 1 at the person's own.

        With 2-Wasserstein distances a to the population and b to the person, a / (a + b).
        """
        found: dict[str, list[float]] = {}
        for name, net in self.nets.items():
            found[name] = []
            for path, (mean, var) in net.statistics(WHO).items():
                ctx = _moments(mean, var)
                a, b = float(ctx.w2(self._population[path])), float(ctx.w2(self._own[path]))
                found[name].append(round(a / (a + b), 3) if a + b > 0 else 0.0)
        return found

    def _turned(self, x: Tensor) -> Tensor:
        return turn(AXIS, torch.tensor(math.radians(self.degrees)))(x) if self.degrees else x

    def _measure(self) -> None:
        """The person's own statistics, on the earlier recording and with the sensor as it is."""
        own = recalibrate(copy.deepcopy(self.shared.model), self._turned(self.person.train.x))
        self._population, self._own = (
            {path: _moments(layer.running_mean, layer.running_var) for path, layer in statistics_layers(model).items()}
            for model in (self.shared.model, own)
        )


def _moments(mean: Any, var: Any) -> Moments:
    return Moments.from_variance(1, mean, var)


def _mean(values: Sequence[bool] | deque[bool]) -> float:
    return sum(values) / max(1, len(values))
