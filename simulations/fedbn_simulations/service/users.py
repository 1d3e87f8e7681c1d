"""Users of a service: their statistics in the bank, their drift detectors, and windows held until labels arrive.

Independent of HTTP. All calls must come from a single thread (`fedbn_simulations.service.batching.Batcher`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from fedbn.data.sensors import SensorLimits
from fedbn.errors import UserError
from fedbn.nn.hooks import capture_inputs
from fedbn.nn.roles import statistics_layers
from fedbn.online import Aligner, BNState, LayerPrior, MatchedHead, SQLiteStore
from fedbn.online.drift.batched import BatchedMonitor
from fedbn.online.drift.detectors import detector
from fedbn.online.drift.signal import channel_means
from fedbn.online.fallback import FallbackModel
from fedbn.online.prequential import CLASSIFICATION
from fedbn.online.records import DamagedRecordError
from fedbn.tasks import Task
from fedbn_simulations.adaptation.methods import served_rule
from fedbn_simulations.service.batching import Job
from fedbn_simulations.service.durability import Journal
from fedbn_simulations.service.held import HeldWindows
from fedbn_simulations.service.model import ServedModel
from fedbn_simulations.service.schema import Answer, RequestError

T = TypeVar("T")

DETECTOR = "page-hinkley:threshold=18:delta=0.02"
"""For activations of the first layer; chosen by ``python -m benchmarks.drift`` on later recordings of seen users."""

START_CHECKED = 100
"""Records that are read when a store is opened, to find out whether it belongs to the model and the rule."""


@dataclass(frozen=True)
class Limits:
    """Memory limits.

    Attributes:
        capacity: users in memory; the others are in the store.
        held: windows held for labels, over all users; the oldest of the user with the most are dropped.
        windows: windows per request.
    """

    capacity: int = 4096
    held: int = 1024
    windows: int = 256

    def __post_init__(self) -> None:
        for name in ("capacity", "held", "windows"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")

    def elements(self, shape: tuple[int, ...]) -> int:
        """Largest number of elements of a valid JSON body with windows of a shape or with labels."""
        return 2 * self.windows * math.prod(shape) + 2 * max(self.windows, self.held) + 64


@dataclass
class UserStore:
    """All users of one model.

    Args:
        model: in evaluation mode.
        shape: shape of a window.
        classes: class names; empty for tasks without classes.
        rule: text of the rule that follows users, with optional alignment, matched head and fallback
            (`fedbn_simulations.adaptation.methods.served_rule`).
        prior: initial statistics of users.
        store: database of states; if None, states are lost when the service ends.
        drift: text of the drift detector.
        limits: memory limits.
        task: the task of the model.
        outputs: names of the outputs, for clients; those of the classes by default.
        align: the alignment of the rule, if it has one.
        head: the matched head of the rule, if it has one.
        reason: why this rule, one sentence for clients.
        sensors: limits of the windows of a worn sensor; None if they are not known.

    Attributes:
        journal: changes on their way to the store; None without one.

    Raises:
        UserError: unknown rule or detector, a rule that needs classes for a task without them, the model mixes the
            windows of a batch, or the store has users of another model or rule.
    """

    model: nn.Module
    shape: tuple[int, ...]
    classes: Sequence[str]
    rule: str = "source"
    prior: Mapping[str, LayerPrior] | None = None
    store: SQLiteStore | None = None
    drift: str = DETECTOR
    limits: Limits = field(default_factory=Limits)
    task: Task = CLASSIFICATION
    outputs: Sequence[str] = ()
    align: Aligner | None = None
    head: MatchedHead | None = None
    reason: str = ""
    sensors: SensorLimits | None = None

    def __post_init__(self) -> None:
        self.outputs = self.outputs or self.classes
        self.rule = served_rule(self.rule).text
        self.journal = None if self.store is None else Journal(self.store)
        classes = len(self.classes) or None
        served = ServedModel(
            self.model,
            self.shape,
            tuple(self.classes),
            self.prior or {},
            self.task,
            tuple(self.outputs),
            self.rule,
            self.align,
            self.head,
        )
        self.follower = served.follower(self.limits.capacity, self.journal)
        self.fallback = self.follower if isinstance(self.follower, FallbackModel) else None
        self.net = self.follower.net if isinstance(self.follower, FallbackModel) else self.follower
        self._damaged: set[str] = set()
        self._check_store()
        # The first prediction checks that the model does not mix windows. It must not see windows of requests.
        windows = torch.randn(2, *self.shape, generator=torch.Generator().manual_seed(0))
        self.net.predict(windows, "initial check")
        drift_detector = detector(self.drift)
        path, layer = next(iter(statistics_layers(self.net.model).items()))
        self._first_layer = {path: layer}
        scale = torch.as_tensor(layer.running_var).double().numpy()
        self.monitor = BatchedMonitor(drift_detector, scale, classes or 1, self.limits.capacity)
        self.held = HeldWindows(self.limits.held)
        self._calibrated_cache: dict[str, bool] = {}

    # ---------------------------------------------------------------- windows

    def answer(self, jobs: Sequence[Job]) -> list[Answer | Exception]:
        """Answer jobs of different users and one type in one call of the bank; the handler of a `Batcher`.

        A job that cannot be answered gets an error and changes nothing; the others are answered as without it.
        """
        answers: dict[str, Answer | Exception] = {}
        for job in jobs:
            try:
                self._require(job.user)
                self._require_valid(job.windows)
            except UserError as error:
                answers[job.user] = error
        if valid := [job for job in jobs if job.user not in answers]:
            answers |= self._answer(valid)
        self.flush()
        return [answers[job.user] for job in jobs]

    def _answer(self, jobs: Sequence[Job]) -> dict[str, Answer | Exception]:
        users = [job.user for job in jobs for _ in range(job.n)]
        activations: list[Tensor] = []
        try:
            with capture_inputs(self._first_layer, lambda _path, value: activations.append(value)):
                out = self.follower.predict(torch.cat([job.windows for job in jobs]), users)
        except Exception as error:  # a model may raise anything
            if len(jobs) == 1:
                return {jobs[0].user: error}
            middle = len(jobs) // 2
            return self._answer(jobs[:middle]) | self._answer(jobs[middle:])
        finite = self.net.usable() & out.reshape(len(out), -1).isfinite().all(1)
        usable = [bool(rows.all()) for rows in finite.split([job.n for job in jobs])]
        if not all(usable):
            text = "these windows are too large: the numbers of the network overflow; check the unit of the signals"
            rejected: dict[str, Answer | Exception] = {
                job.user: RequestError(422, text) for job, ok in zip(jobs, usable, strict=True) if not ok
            }
            rest = [job for job in jobs if job.user not in rejected]
            return rejected | (self._answer(rest) if rest else {})
        posterior = self.task.posterior(out)
        learn = jobs[0].learn
        saturated = self._saturated(jobs)
        if learn:
            self.follower.commit(posterior=posterior, weight=None if saturated is None else 1 - saturated)
        predicted = np.zeros(len(out), int) if posterior is None else posterior.argmax(1).numpy()
        starts = np.cumsum([0, *(job.n for job in jobs)])
        drift = self._detect_drift(jobs, starts, channel_means(activations[-1]), predicted) if learn else {}
        bank, aligner = self.net.bank, self.net.bank.aligner
        slots = [bank.slot[job.user] for job in jobs]
        class_counts = bank.rows["classes"][slots].tolist()
        predictions = self.task.predict(out).float().numpy()
        by_source = set() if self.fallback is None else set(self.fallback.windows)
        if self.fallback is not None:
            self.fallback.windows.clear()
        return {
            job.user: Answer(
                user=job.user,
                predictions=predictions[start:end],
                distance=drift.get(job.user, (None, False))[0],
                alarm=drift.get(job.user, (None, False))[1],
                alarms=self.monitor.user(job.user).num_alarms,
                class_counts=counts,
                calibrated=self._is_calibrated(job.user, slot),
                held=[self.held.add(job.user, window) for window in job.windows] if job.hold else (),
                alignment=None
                if aligner is None
                else aligner.report(bank.rows, slot) | {"used": job.user not in by_source},
                saturated=0 if saturated is None else int(saturated[start:end].sum()),
            )
            for job, start, end, slot, counts in zip(jobs, starts, starts[1:], slots, class_counts, strict=False)
        }

    def _require_valid(self, windows: Tensor) -> None:
        if self.sensors is not None and (problem := self.sensors.problem(windows)):
            raise RequestError(422, problem)

    def _saturated(self, jobs: Sequence[Job]) -> Tensor | None:
        """1 for each saturated window ``[n]`` of all jobs; they are not learned from. None if there is none."""
        if self.sensors is None:
            return None
        found = self.sensors.saturated(torch.cat([job.windows for job in jobs])).float()
        return found if found.any() else None

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

    def commit(self, user: str, labels: Mapping[str, int]) -> int:
        """Learn held windows with their labels, each once, and return their number.

        Raises:
            RequestError: unknown user, or a window that is not or no longer held. Nothing is learned in that case.
        """
        self._require(user)
        if labels:
            self.learn(user, self.held.stack(user, list(labels)), list(labels.values()))
            self.held.remove(user, list(labels))
        return len(labels)

    def learn(self, user: str, windows: Tensor, labels: Sequence[int]) -> None:
        """Update a user's statistics with labeled windows ``[n, *shape]``.

        Raises:
            RequestError: unknown user, not one label per window, or windows in another unit.
        """
        self._require(user)
        self._require_valid(windows)
        if len(windows) != len(labels):
            raise RequestError(422, f"{len(windows)} windows and {len(labels)} labels: give one label per window")
        self.net.predict(windows, user)
        self.net.commit(label=torch.tensor(labels))

    def calibrate(self, user: str, windows: Tensor, labels: Sequence[int] | None, then: str) -> None:
        """Initialize a user's statistics from own windows (`fedbn.online.Personalized.calibrate`).

        Raises:
            RequestError: unknown user, not one label per window, or windows in another unit.
        """
        self._require(user)
        self._require_valid(windows)
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
        return True

    def users(self, after: str, limit: int) -> list[str]:
        """Up to ``limit`` names in alphabetical order, starting after ``after``."""
        names = {u for u in self.net.bank.slot if u > after}
        if self.journal is not None:
            names.update(self.journal.page(after, limit))
        return sorted(names)[:limit]

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
            UserError: the state is damaged, not valid, or of another model or rule. Nothing changes.
            RequestError: unknown user.
        """
        self._require(user, replace=not merge)
        state = BNState.from_bytes(data, self.net.bank.model, self.net.bank.rule_text)
        self.net.bank.check(state)
        self._discard_damaged(user)
        (self.net.merge if merge else self.net.load)(user, state)
        self._state_replaced(user)

    def reset(self, user: str) -> None:
        """Restore a user's initial state.

        Raises:
            RequestError: unknown user.
        """
        self._require(user, replace=True)
        self._discard_damaged(user)
        self.net.reset(user)
        self._state_replaced(user)

    def forget(self, user: str) -> None:
        """Delete all data of a user, including held windows and the store.

        Raises:
            RequestError: unknown user.
        """
        self._require(user, replace=True)
        self._damaged.discard(user)
        self.net.bank.drop(user)
        self._state_replaced(user)
        self.held.remove(user)

    def export(self, user: str) -> bytes:
        """Weights of a plain copy of the model with a user's statistics, as safetensors.

        Raises:
            RequestError: unknown user.
            UserError: the rule has no statistics.
        """
        self._require(user)
        state = self.net.export(user).state_dict()
        return safetensors.torch.save({name: t.contiguous() for name, t in state.items()})

    # ---------------------------------------------------------------- store

    def change(self, function: Callable[[], T]) -> T:
        """Call a function that changes users, and put the changes into the journal."""
        try:
            return function()
        finally:
            self.flush()

    def flush(self) -> None:
        """Put the users that have changed into the journal."""
        if self.journal is not None:
            self.net.flush()

    def require_writable(self) -> None:
        """Check that changes can be written to the store at present.

        Raises:
            StoreError: they cannot.
        """
        if self.journal is not None:
            self.journal.require_writable()

    @property
    def store_failed(self) -> bool:
        """Whether the last changes could not be written."""
        return self.journal is not None and self.journal.failure is not None

    @property
    def num_damaged(self) -> int:
        """Number of users whose stored state was found damaged, and was not replaced since."""
        return len(self._damaged)

    @property
    def num_in_memory(self) -> int:
        """Number of users in memory."""
        return len(self.net.bank.slot)

    def _check_store(self) -> None:
        """Raise an error if the store has states of another model or rule, or none that can be read."""
        if self.store is None:
            return
        damaged: DamagedRecordError | None = None
        for user in self.store.page("", START_CHECKED):
            try:
                self.net.bank.records.unpack(self.store[user])
                return
            except DamagedRecordError as error:
                damaged = error
        if damaged:
            raise UserError(f"no state in store {self.store.file} can be read ({damaged}): use another store")

    def _exists(self, user: str) -> bool:
        return user in self.net.bank.slot or user in self.net.bank.store

    def _require(self, user: str, *, replace: bool = False) -> None:
        """Load a user; if its state will be replaced, it need not be readable.

        Raises:
            RequestError: unknown user, or its stored state is damaged.
        """
        if user in self.net.bank.slot:
            return
        if user not in self.net.bank.store:
            raise RequestError(404, f"unknown user {user[:128]!r}: enroll the user first, PUT /v1/users/NAME")
        try:
            self.net.bank.group([user], create=False)
        except DamagedRecordError as error:
            self._damaged.add(user)
            if not replace:
                raise RequestError(
                    409, f"{error}: restore a snapshot of {user!r}, reset the user to start again, or delete the user"
                ) from None

    def _discard_damaged(self, user: str) -> None:
        if user in self._damaged:
            self._damaged.discard(user)
            if user not in self.net.bank.slot:
                del self.net.bank.store[user]
