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
from torch.nn import functional as F

from fedbn.data.population import Examples, User
from fedbn.data.shift import rotate
from fedbn.errors import UserError, unknown
from fedbn.nn.inference import logits
from fedbn.nn.roles import statistics_layers
from fedbn.online.alignments import quaternions as so3
from fedbn.online.alignments.rotation import closest_rotation
from fedbn.online.drift.batched import BatchedMonitor
from fedbn.online.drift.detectors import detector
from fedbn.online.drift.signal import Floats, channel_means
from fedbn.online.fallback import FallbackModel
from fedbn.scenarios.base import scenario
from fedbn.seeds import generator
from fedbn.statistics.moments import Moments
from fedbn.statistics.recalibration import recalibrate
from fedbn.streams import stream
from fedbn_simulations.adaptation.cells import SOURCE
from fedbn_simulations.adaptation.source_model import SourceModel
from fedbn_simulations.service.model import ServedModel

ALIGNED, AUTO, CALIBRATED = "aligned", "auto", "calibrated"

ROTATION = "rotation:memory=40.0:b=1.0:every=1"
"""Estimates after every window, and forgets old windows."""

RULES = {
    "source": ("source", "the trained network; never adapts"),
    "DA-BN": ("dabn", "naive: the average of the last windows, whatever the activity"),
    ALIGNED: (ROTATION, "estimates how the sensor is turned, and turns the signal back"),
    AUTO: ("", ""),
    CALIBRATED: (ROTATION, "as source until you calibrate, then fixed at how these windows are turned and distributed"),
}
"""Name on the page -> text of the rule and short description; for `AUTO`, the federation decides both."""

ORDERS = {
    "recorded": ("natural", "as recorded"),
    "short": ("bouts:length=4", "changing every few windows"),
}
"""Orders of a recording: name -> stream and label. One activity alone does not show how a sensor is turned."""

TURN_AT, RECORD_AT, SWITCH_AT = 40, 60, 60
"""Windows at which presets act."""

TURN = (60.0, (0.0, 1.0, 0.0))
"""Degrees and axis of the turn in presets. While a person stands, gravity is along x, so the phone tips over."""

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

CRITERION = (
    "The person is the median of the unseen people by the source's accuracy on their earlier recordings, which are not "
    "played. The sensor is handed from the person who wears it least turned to the one who wears it most turned."
)
"""How the people of presets are chosen."""


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
        rules: the model with each rule of the page.
    """

    model: nn.Module
    users: Mapping[str, User]
    classes: Sequence[str]
    hop: float
    title: str
    scale: Floats
    rules: Mapping[str, ServedModel]

    @staticmethod
    def from_source(source: SourceModel, chosen: str, reason: str) -> Playground:
        """Create from a trained model and its unseen users.

        Args:
            source: the model.
            chosen: rule that the federation chose (`fedbn_simulations.adaptation.check.decide`).
            reason: why, one sentence.

        Raises:
            UserError: the page cannot show the data, or no user is held out.
        """
        spec = demo_scenario(source.run.scenario)
        users = {user.name: user for user in source.users("unseen")}
        hop = spec.window * (1 - spec.overlap) / SAMPLING_RATE
        scale = channel_means(source.source_windows).var(0)
        rules = {
            name: ServedModel.from_source(source, text or chosen, "" if text else reason)
            for name, (text, _) in RULES.items()
        }
        return Playground(source.model, users, source.ctx.population.classes, hop, spec.about, scale, rules)

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

    @cached_property
    def presets(self) -> dict[str, Preset]:
        """The presets, by name; `CRITERION` chooses their people."""
        earlier = {name: user.train for name, user in self.users.items()}
        right = {name: logits(self.model, own.x).argmax(1) == own.y for name, own in earlier.items()}
        accuracy = {name: float(values.double().mean()) for name, values in right.items()}
        ranked = sorted(self.users, key=lambda name: (accuracy[name], name))
        median = ranked[(len(ranked) - 1) // 2]
        turned_by = {name: float(so3.to_vector(self.placement(user.test)).norm()) for name, user in self.users.items()}
        first, other = min(self.users, key=turned_by.__getitem__), max(self.users, key=turned_by.__getitem__)
        turned = f"{TURN[0]:g}°"
        return {
            "worn": Preset(
                "A new user wears it turned",
                f"{median} wears the sensor turned by {turned} from the start. The rules are not informed.",
                median,
                {0: ("rotate", TURN)},
            ),
            "hand": Preset(
                "Hand it to someone else",
                f"After {SWITCH_AT} windows, {first} hands the sensor to {other}, who wears it turned by "
                f"{math.degrees(turned_by[other]):.0f}°.",
                first,
                {SWITCH_AT: ("switch", (other,))},
            ),
            "recalibrate": Preset(
                "Recalibrate",
                f"{median} wears the sensor turned by {turned}, and after {RECORD_AT} windows records one window of "
                "each activity. Watch the rule 'calibrated', which is the source until then.",
                median,
                {0: ("rotate", TURN), RECORD_AT: ("record_all", ())},
            ),
            "turn": Preset(
                "It turns in mid-stream",
                f"After {TURN_AT} windows, the sensor of {median} slips by {turned}.",
                median,
                {TURN_AT: ("rotate", TURN)},
            ),
        }

    def placement(self, data: Examples) -> Tensor:
        """The rotation ``[4]`` that moves a person's gravity in each activity onto the seen people's, from labels.

        Only the page knows it; no rule uses labels.
        """
        aligner = self.rules[ALIGNED].align
        assert aligner is not None
        z, prior = aligner.alignment.summaries(data.x, aligner.triples), aligner.prior
        known = [c for c in sorted(set(data.y.tolist())) if c >= 0 and prior.seen[c]]
        means = torch.stack([z[data.y == c, :3].mean(0) for c in known])
        # A small weight of the identity decides if the person has one activity only.
        return closest_rotation(prior.mean[known, :3], means, 0.01 * float(means.square().sum(1).mean()))

    @property
    def _auto(self) -> str:
        """Description of `AUTO`, with what the federation chose."""
        chosen = self.rules[AUTO].rule
        return "off: no rule helps the seen users, so the source answers" if chosen == SOURCE else f"chosen: {chosen}"

    def description(self) -> dict[str, Any]:
        """Information that the page needs to start."""
        return {
            "title": self.title,
            "people": {name: len(user.test) for name, user in self.users.items()},
            "classes": list(self.classes),
            "rules": {name: text for name, (_, text) in RULES.items()} | {AUTO: self._auto},
            "reason": self.rules[AUTO].reason,
            "orders": {name: label for name, (_, label) in ORDERS.items()},
            "presets": {name: {"title": p.title, "about": p.about} for name, p in self.presets.items()},
            "criterion": CRITERION,
            "layers": self.layers,
            "channels": self.shape[0],
            "hop": self.hop,
        }


@dataclass(frozen=True)
class Preset:
    """A story on the page: actions at fixed windows of a person's recording, with short activities.

    Attributes:
        title: label of the button.
        about: what happens, in one or two sentences.
        person: the first person.
        actions: window -> action and arguments of `Session`.
    """

    title: str
    about: str
    person: str
    actions: Mapping[int, tuple[str, tuple[Any, ...]]]


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
        order: name of an order (`ORDERS`).
        actions: actions at windows, as of a `Preset`.

    Raises:
        UserError: unknown name.
    """

    def __init__(
        self,
        playground: Playground,
        person: str,
        order: str = "recorded",
        actions: Mapping[int, tuple[str, tuple[Any, ...]]] | None = None,
    ) -> None:
        if order not in ORDERS:
            raise unknown("order", order, ORDERS)
        self.playground, self.order, self.actions = playground, order, dict(actions or {})
        self.followers = {name: served.follower(capacity=1) for name, served in playground.rules.items()}
        self.nets = {name: f.net if isinstance(f, FallbackModel) else f for name, f in self.followers.items()}
        self.monitor = BatchedMonitor(detector(DETECTOR), playground.scale, len(playground.classes), capacity=1)
        self.position = self.num_windows = 0
        self.num_correct = dict.fromkeys(RULES, 0)
        self.recent: dict[str, deque[bool]] = {name: deque(maxlen=RECENT) for name in RULES}
        self.degrees, self.axis = 0.0, torch.tensor([0.0, 0.0, 1.0])
        self.recorded: dict[int, Tensor] = {}
        self.switch(person)

    # ---------------------------------------------------------------- actions of the visitor

    def switch(self, person: str) -> None:
        """Hand the device to another person. The rules are not informed.

        Raises:
            UserError: unknown name.
        """
        self.person = self.playground.person(person)
        self.data = stream(ORDERS[self.order][0]).make_all([person], [self.person.test], 0)[0]
        self.position = 0
        self.recorded.clear()
        self._measure_statistics()

    def rotate(self, degrees: float, axis: Sequence[float] = (0.0, 0.0, 1.0)) -> None:
        """Rotate the sensor about an axis for all further windows.

        Raises:
            UserError: the angle is not between 0 and 180, or the axis has no direction.
        """
        if not 0 <= degrees <= 180:
            raise UserError(f"the angle must be 0 to 180 degrees, not {degrees:g}")
        direction = torch.tensor(axis, dtype=torch.float32)
        if direction.shape != (3,) or not 1e-3 < float(direction.norm()) < 1e3:
            raise UserError(f"the axis must have three coordinates that are not all 0, not {list(axis)}")
        self.degrees, self.axis = degrees, F.normalize(direction, dim=0)
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

    def record_all(self) -> dict[str, Any]:
        """Record one window of each class, and calibrate."""
        return [self.record(label) for label in sorted(set(self.person.train.y.tolist()))][-1]

    # ---------------------------------------------------------------- the stream

    @property
    def ended(self) -> bool:
        """Whether the recording has ended."""
        return self.position >= len(self.data)

    def step(self, limit: int) -> dict[str, Any]:
        """Process up to ``limit`` windows. Every rule predicts each window before learning from it."""
        steps: list[dict[str, Any]] = []
        while len(steps) < limit and not self.ended:
            steps.append(self._process_window())
        return {
            "steps": steps,
            "position": self.position,
            "total": len(self.data),
            "num_windows": self.num_windows,
            "accuracy": {
                name: {"all": self.num_correct[name] / max(1, self.num_windows), "recent": _mean(self.recent[name])}
                for name in RULES
            },
            "layers": self.positions(),
            "rotation": self.rotation(),
            "person": self.person.name,
            "degrees": self.degrees,
        }

    def _process_window(self) -> dict[str, Any]:
        event = ""
        if self.num_windows in self.actions:
            name, arguments = self.actions.pop(self.num_windows)
            getattr(self, name)(*arguments)
            event = _event(name, arguments)
        data, i = self.data, self.position
        x = self._rotated(data.x[i : i + 1])
        label = int(data.y[i])
        predicted = {}
        for name, follower in self.followers.items():
            posterior = follower.predict(x, [USER]).softmax(1)
            if name != CALIBRATED:
                follower.commit(posterior=posterior)
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
            "recent": {name: _mean(values) for name, values in self.recent.items()},
            "angle": self.rotation()["error"],
            "alarm": alarm,
            "event": event,
        }

    def rotation(self) -> dict[str, Any]:
        """The true rotation of the sensor, the estimated one, and the angle between them in degrees.

        The estimate turns windows onto the population. The person's own placement (`Playground.placement`) is not a
        rotation of the page, so it is removed.
        """
        bank = self.nets[ALIGNED].bank
        slot = bank.group([USER], create=False).slots
        found = so3.multiply(_inverse(bank.rows["align_value"][slot][0].double()), self._placement)
        true = so3.from_vector(self.axis.double() * math.radians(self.degrees))
        vector, error = so3.to_vector(found), so3.to_vector(so3.multiply(found, _inverse(true)))
        return {
            "degrees": round(float(vector.norm().rad2deg()), 1),
            "axis": [round(v, 2) for v in F.normalize(vector, dim=0).tolist()],
            "error": round(float(error.norm().rad2deg()), 1),
            "certainty": round(self.nets[ALIGNED].report(USER)["alignment"]["certainty"], 3),
            "true": self.degrees,
            "true_axis": [round(v, 2) for v in self.axis.tolist()],
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
        return rotate(self.axis, torch.tensor(math.radians(self.degrees)))(x) if self.degrees else x

    def _measure_statistics(self) -> None:
        """Compute the person's own statistics from the earlier recording at the current rotation."""
        own = recalibrate(copy.deepcopy(self.playground.model), self._rotated(self.person.train.x))
        self._population, self._own = (
            {path: _moments(layer.running_mean, layer.running_var) for path, layer in statistics_layers(model).items()}
            for model in (self.playground.model, own)
        )
        self._placement = self.playground.placement(self.person.test)


def _inverse(q: Tensor) -> Tensor:
    return q * torch.tensor([1.0, -1.0, -1.0, -1.0]).to(q)


def _event(action: str, arguments: Sequence[Any]) -> str:
    """An action of a preset in words."""
    match action:
        case "rotate":
            return f"the sensor is rotated by {arguments[0]:g}°"
        case "switch":
            return f"{arguments[0]} now has the device; the rules are not informed"
        case _:
            return "calibrated with one window of each activity"


def _moments(mean: Any, var: Any) -> Moments:
    return Moments.from_variance(1, mean, var)


def _mean(values: Sequence[bool] | deque[bool]) -> float:
    return sum(values) / max(1, len(values))
