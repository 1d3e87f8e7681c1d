"""Users of a service: their statistics in the bank, their drift detectors, and windows held until labels arrive.

Independent of HTTP. All calls must come from a single thread (`simulations.service.batching.Batcher`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.nn.hooks import capture_inputs
from fedbn.nn.roles import statistics_layers
from fedbn.online import BNState, LayerPrior, SQLiteStore, personalize
from fedbn.online.drift.batched import BatchedMonitor
from fedbn.online.drift.detectors import detector
from fedbn.online.drift.signal import channel_means
from fedbn.online.rules.base import rule
from simulations.service.batching import Job
from simulations.service.schema import Answer, RequestError

DETECTOR = "page-hinkley:threshold=18:delta=0.02"
"""For activations of the first layer; chosen by ``python -m benchmarks.drift`` on later recordings of seen users."""


@dataclass(frozen=True)
class Limits:
    """Memory limits.

    Attributes:
        capacity: users in memory; the others are in the store.
        held: windows held for labels, over all users; the oldest are dropped.
        windows: windows per request.
    """

    capacity: int = 4096
    held: int = 1024
    windows: int = 256

    def __post_init__(self) -> None:
        for name in ("capacity", "held", "windows"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")


@dataclass
class UserStore:
    """All users of one model.

    Args:
        model: in evaluation mode.
        shape: shape of a window.
        classes: class names.
        rule: text of the rule that updates users' statistics.
        prior: initial statistics of users.
        store: database of states; if None, states are lost when the service ends.
        drift: text of the drift detector.
        limits: memory limits.

    Raises:
        UserError: unknown rule or detector, the model mixes the windows of a batch, or the store has users of another
            model or rule.
    """

    model: nn.Module
    shape: tuple[int, ...]
    classes: Sequence[str]
    rule: str = "pseudo:n0=64"
    prior: Mapping[str, LayerPrior] | None = None
    store: SQLiteStore | None = None
    drift: str = DETECTOR
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self.net = personalize(
            self.model, rule(self.rule), self.prior, self.limits.capacity, store=self.store, classes=len(self.classes)
        )
        windows = torch.randn(2, *self.shape, generator=torch.Generator().manual_seed(0))
        self.net.predict(windows, ["", ""])  # fails early if the model mixes the windows of a batch
        bank = self.net.bank
        if (first := next(iter(bank.store), None)) is not None:
            BNState.from_bytes(bank.store[first], bank.model, bank.rule_text)
        drift_detector = detector(self.drift)
        path, layer = next(iter(statistics_layers(self.net.model).items()))
        self._first_layer = {path: layer}
        scale = torch.as_tensor(layer.running_var).double().numpy()
        self.monitor = BatchedMonitor(drift_detector, scale, len(self.classes), self.limits.capacity)
        self._held: OrderedDict[str, tuple[str, Tensor]] = OrderedDict()
        self._num_held = 0
        self._changed: set[str] = set()
        self._calibrated_cache: dict[str, bool] = {}

    # ---------------------------------------------------------------- windows

    def answer(self, jobs: Sequence[Job]) -> list[Answer | Exception]:
        """Answer jobs of different users and one type in one call of the bank; the handler of a `Batcher`."""
        valid = [job for job in jobs if self._exists(job.user)]
        answers = {answer.user: answer for answer in self._answer(valid)} if valid else {}
        return [answers.get(job.user) or _unknown_user(job.user) for job in jobs]

    def _answer(self, jobs: Sequence[Job]) -> list[Answer]:
        users = [job.user for job in jobs for _ in range(job.n)]
        activations: list[Tensor] = []
        with capture_inputs(self._first_layer, lambda _path, value: activations.append(value)):
            out = self.net.predict(torch.cat([job.windows for job in jobs]), users)
        posterior = out.softmax(1)
        learn = jobs[0].learn
        if learn:
            self.net.commit(posterior=posterior)
            self._changed.update(job.user for job in jobs)
        predicted = posterior.argmax(1).numpy()
        starts = np.cumsum([0, *(job.n for job in jobs)])
        drift = self._detect_drift(jobs, starts, channel_means(activations[0]), predicted) if learn else {}
        bank = self.net.bank
        slots = [bank.slot[job.user] for job in jobs]
        class_counts = bank.rows["classes"][slots].tolist()
        probabilities = posterior.float().numpy()
        return [
            Answer(
                user=job.user,
                probabilities=probabilities[start:end],
                distance=drift.get(job.user, (None, False))[0],
                alarm=drift.get(job.user, (None, False))[1],
                alarms=self.monitor.user(job.user).num_alarms,
                class_counts=counts,
                calibrated=self._is_calibrated(job.user, slot),
                held=[self._hold(job.user, window) for window in job.windows] if job.hold else (),
            )
            for job, start, end, slot, counts in zip(jobs, starts, starts[1:], slots, class_counts, strict=False)
        ]

    def _detect_drift(
        self, jobs: Sequence[Job], starts: np.ndarray, means: np.ndarray, predicted: np.ndarray
    ) -> dict[str, tuple[float | None, bool]]:
        """Last distance and any alarm per user. The detectors get the first windows of all jobs, then the second."""
        drift: dict[str, tuple[float | None, bool]] = {}
        for i in range(max(job.n for job in jobs)):
            active = [k for k, job in enumerate(jobs) if i < job.n]
            rows = starts[active] + i
            users = [jobs[k].user for k in active]
            results = self.monitor.observe(users, means[rows], predicted[rows])
            for user, (distance, alarm) in zip(users, results, strict=True):
                drift[user] = distance, alarm or drift.get(user, (None, False))[1]
        return drift

    def _is_calibrated(self, user: str, slot: int) -> bool:
        """Cached until the state is replaced, since comparing statistics takes time."""
        calibrated = self._calibrated_cache.get(user)
        if calibrated is None:
            calibrated = self._calibrated_cache[user] = self.net.bank.calibrated(slot)
            if len(self._calibrated_cache) > 2 * self.limits.capacity:
                self._calibrated_cache = {user: calibrated}
        return calibrated

    def _state_replaced(self, user: str) -> None:
        """Discard what was derived from a user's old state."""
        self._calibrated_cache.pop(user, None)
        self.monitor.forget(user)
        self._changed.add(user)

    def _hold(self, user: str, window: Tensor) -> str:
        self._num_held += 1
        name = str(self._num_held)
        self._held[name] = (user, window.clone())
        while len(self._held) > self.limits.held:
            self._held.popitem(last=False)
        return name

    def commit(self, user: str, labels: Mapping[str, int]) -> int:
        """Learn held windows with their labels, each once, and return their number.

        Raises:
            RequestError: unknown user, or a window that is not or no longer held. Nothing is learned in that case.
        """
        self._require(user)
        for name in labels:
            if self._held.get(name, ("", None))[0] != user:
                raise RequestError(
                    404, f"window {name!r} of {user!r} is not (or no longer) held: send it to predict?hold=true again"
                )
        if labels:
            windows = torch.stack([self._held.pop(name)[1] for name in labels])
            self.learn(user, windows, list(labels.values()))
        return len(labels)

    def learn(self, user: str, windows: Tensor, labels: Sequence[int]) -> None:
        """Update a user's statistics with labeled windows ``[n, *shape]``.

        Raises:
            RequestError: unknown user, or not one label per window.
        """
        self._require(user)
        if len(windows) != len(labels):
            raise RequestError(422, f"{len(windows)} windows and {len(labels)} labels: give one label per window")
        self.net.predict(windows, user)
        self.net.commit(label=torch.tensor(labels))
        self._changed.add(user)

    def calibrate(self, user: str, windows: Tensor, labels: Sequence[int] | None, then: str) -> None:
        """Initialize a user's statistics from own windows (`fedbn.online.Personalized.calibrate`).

        Raises:
            RequestError: unknown user, or not one label per window.
        """
        self._require(user)
        self.net.calibrate(windows, user, None if labels is None else torch.tensor(labels), then)  # type: ignore[arg-type]
        self._state_replaced(user)

    # ---------------------------------------------------------------- users

    def enroll(self, user: str) -> bool:
        """Create a user if needed, and return whether it is new.

        Raises:
            RequestError: memory is full and there is no store.
        """
        if self._exists(user):
            return False
        if self.store is None and self.num_in_memory >= self.limits.capacity:
            raise RequestError(
                507, f"{self.num_in_memory} users fill the memory and there is no --store: delete some, or give one"
            )
        self.net.bank.group([user], create=True)
        self._changed.add(user)
        return True

    def users(self, after: str, limit: int) -> list[str]:
        """Up to ``limit`` names in alphabetical order, starting after ``after``."""
        return [u for u in self.net.users if u > after][:limit]

    def report(self, user: str) -> dict[str, Any]:
        """Summary of a user (`fedbn.online.Personalized.report`) with learned windows per class and alarms.

        Raises:
            RequestError: unknown user.
        """
        self._require(user)
        bank = self.net.bank
        bank.group([user], create=False)
        class_counts = bank.rows["classes"][bank.slot[user]].tolist()
        return self.net.report(user) | {
            "classes": dict(zip(self.classes, class_counts, strict=True)),
            "alarms": self.monitor.user(user).num_alarms,
        }

    def snapshot(self, user: str) -> bytes:
        """A user's state (`fedbn.online.BNState.to_bytes`).

        Raises:
            RequestError: unknown user.
        """
        self._require(user)
        return self.net.state(user).to_bytes()

    def restore(self, user: str, data: bytes, *, merge: bool) -> None:
        """Replace a user's state, or merge another state into it.

        Raises:
            UserError: the state is damaged, or of another model or rule.
            RequestError: unknown user.
        """
        self._require(user)
        state = BNState.from_bytes(data, self.net.bank.model, self.net.bank.rule_text)
        (self.net.merge if merge else self.net.load)(user, state)
        self._state_replaced(user)

    def reset(self, user: str) -> None:
        """Restore a user's initial state.

        Raises:
            RequestError: unknown user.
        """
        self._require(user)
        self.net.reset(user)
        self._state_replaced(user)

    def forget(self, user: str) -> None:
        """Delete all data of a user, including held windows and the store.

        Raises:
            RequestError: unknown user.
        """
        self._require(user)
        self.net.forget(user)
        self._state_replaced(user)
        self._changed.discard(user)
        for name in [n for n, (owner, _) in self._held.items() if owner == user]:
            del self._held[name]

    def export(self, user: str) -> bytes:
        """Weights of a plain copy of the model with a user's statistics, as safetensors.

        Raises:
            RequestError: unknown user.
            UserError: the rule has no statistics.
        """
        self._require(user)
        state = self.net.export(user).state_dict()
        return safetensors.torch.save({name: t.contiguous() for name, t in state.items()})

    def save(self, limit: int | None = None) -> int:
        """Write changed users to the store in one transaction, and return how many are left.

        Args:
            limit: maximum number of users; None means all.
        """
        if self.store is None:
            return 0
        bank = self.net.bank
        # Evicted users were written on eviction.
        changed = [u for u in self._changed if u in bank.slot]
        selected = changed if limit is None else changed[:limit]
        self.store.write_all({u: bank.get(bank.slot[u]).to_bytes() for u in selected})
        self._changed = set(changed[len(selected) :])
        return len(self._changed)

    @property
    def num_in_memory(self) -> int:
        """Number of users in memory."""
        return len(self.net.bank.slot)

    def _exists(self, user: str) -> bool:
        return user in self.net.bank.slot or user in self.net.bank.store

    def _require(self, user: str) -> None:
        if not self._exists(user):
            raise _unknown_user(user)


def _unknown_user(user: str) -> RequestError:
    return RequestError(404, f"unknown user {user!r}: enroll the user first, PUT /v1/users/{user}")
