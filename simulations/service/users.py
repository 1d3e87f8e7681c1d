"""The users of a service: their statistics in the bank, their drift detectors, windows that wait for labels.

Nothing here knows of requests, and everything runs on one thread (`simulations.service.batching.Batcher`).
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
from fedbn.nn.hooks import inputs_of
from fedbn.nn.roles import statistics_layers
from fedbn.online import BNState, LayerPrior, SQLiteStore, personalize
from fedbn.online.drift.detectors import detector
from fedbn.online.rules.base import rule
from simulations.service.batching import Job
from simulations.service.drift import BatchedMonitor, channel_means
from simulations.service.schema import Answer, Refusal

DETECTOR = "page-hinkley:threshold=18:delta=0.02"
"""On activations of the first layer; chosen by ``python -m benchmarks.drift``, on seen people's later recordings."""


@dataclass(frozen=True)
class Limits:
    """What is kept in memory at most.

    Attributes:
        capacity: users at hand; the others are in the store.
        held: windows that wait for labels, of all users together; the oldest give way.
        windows: windows a request.
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
    """Users over one model.

    Args:
        model: in evaluation mode.
        shape: of one window.
        classes: their names.
        rule: text of the rule that follows users.
        prior: what users start from.
        store: where states are kept; None: in memory, until the service ends.
        drift: text of the detector.
        limits: of memory.

    Raises:
        UserError: unknown rule or detector, or the store holds users of another model or rule.
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
        bank = self.net.bank
        if (first := next(iter(bank.store), None)) is not None:
            BNState.from_bytes(bank.store[first], bank.model, bank.text)
        notice = detector(self.drift)
        notice.new()  # says now if the package that it needs is missing
        path, layer = next(iter(statistics_layers(self.net.model).items()))
        self._first = {path: layer}
        scale = torch.as_tensor(layer.running_var).double().numpy()
        self.watches = BatchedMonitor(notice, scale, len(self.classes), self.limits.capacity)
        self._held: OrderedDict[str, tuple[str, Tensor]] = OrderedDict()
        self._count = 0
        self._changed: set[str] = set()
        self._base: dict[str, bool] = {}

    # ---------------------------------------------------------------- windows

    def answer(self, jobs: Sequence[Job]) -> list[Answer | Exception]:
        """Answer jobs of different users and one kind in one call of the bank; `Work` of a batcher."""
        known = [self._known(job.user) for job in jobs]
        served = [job for job, fine in zip(jobs, known, strict=True) if fine]
        answers = iter(self._answer(served) if served else ())
        return [next(answers) if fine else _stranger(job.user) for job, fine in zip(jobs, known, strict=True)]

    def _answer(self, jobs: Sequence[Job]) -> list[Answer]:
        users = [job.user for job in jobs for _ in range(job.n)]
        looks: list[Tensor] = []
        with inputs_of(self._first, lambda _path, value: looks.append(value)):
            out = self.net.predict(torch.cat([job.windows for job in jobs]), users)
        posterior = out.softmax(1)
        learn = jobs[0].learn
        if learn:
            self.net.commit(posterior=posterior)
            self._changed.update(job.user for job in jobs)
        said = posterior.argmax(1).numpy()
        starts = np.cumsum([0, *(job.n for job in jobs)])
        seen = self._watch(jobs, starts, channel_means(looks[0]), said) if learn else {}
        bank = self.net.bank
        slots = [bank.slot[job.user] for job in jobs]
        met = bank.rows["classes"][slots].tolist()
        probabilities = posterior.float().numpy()
        return [
            Answer(
                user=job.user,
                probabilities=probabilities[start:end],
                distance=seen.get(job.user, (None, False))[0],
                alarm=seen.get(job.user, (None, False))[1],
                alarms=self.watches.of(job.user).alarms,
                met=classes,
                calibrated=self._calibrated(job.user, slot),
                held=[self._hold(job.user, window) for window in job.windows] if job.hold else (),
            )
            for job, start, end, slot, classes in zip(jobs, starts, starts[1:], slots, met, strict=False)
        ]

    def _watch(
        self, jobs: Sequence[Job], starts: np.ndarray, looks: np.ndarray, said: np.ndarray
    ) -> dict[str, tuple[float | None, bool]]:
        """Show the detectors the first windows of all jobs, then the second ones, ...: last distance, any alarm."""
        seen: dict[str, tuple[float | None, bool]] = {}
        for i in range(max(job.n for job in jobs)):
            ctx = [k for k, job in enumerate(jobs) if i < job.n]
            rows = starts[ctx] + i
            users = [jobs[k].user for k in ctx]
            for user, (distance, alarm) in zip(users, self.watches.see(users, looks[rows], said[rows]), strict=True):
                seen[user] = distance, alarm or seen.get(user, (None, False))[1]
        return seen

    def _calibrated(self, user: str, slot: int) -> bool:
        """Known for as long as nothing but windows comes, since comparing statistics takes time."""
        found = self._base.get(user)
        if found is None:
            found = self._base[user] = self.net.bank.calibrated(slot)
            if len(self._base) > 2 * self.limits.capacity:
                self._base = {user: found}
        return found

    def _anew(self, user: str) -> None:
        """A user's state was replaced."""
        self._base.pop(user, None)
        self.watches.forget(user)
        self._changed.add(user)

    def _hold(self, user: str, window: Tensor) -> str:
        self._count += 1
        name = str(self._count)
        self._held[name] = (user, window.clone())
        while len(self._held) > self.limits.held:
            self._held.popitem(last=False)
        return name

    def commit(self, user: str, labels: Mapping[str, int]) -> int:
        """Learn held windows with their labels, each once; how many.

        Raises:
            Refusal: unknown user, or a window that is not held (any more); nothing was learnt then.
        """
        self._require(user)
        for name in labels:
            if self._held.get(name, ("", None))[0] != user:
                raise Refusal(
                    404,
                    f"window {name!r} of {user!r} is not held (any more): send the windows to predict?hold=true again",
                )
        if labels:
            windows = torch.stack([self._held.pop(name)[1] for name in labels])
            self.learn(user, windows, list(labels.values()))
        return len(labels)

    def learn(self, user: str, windows: Tensor, labels: Sequence[int]) -> None:
        """Let a user's statistics follow labeled windows ``[n, *shape]``.

        Raises:
            Refusal: unknown user, or not one label a window.
        """
        self._require(user)
        if len(windows) != len(labels):
            raise Refusal(422, f"{len(windows)} windows and {len(labels)} labels: give one a window")
        self.net.predict(windows, user)
        self.net.commit(label=torch.tensor(labels))
        self._changed.add(user)

    def calibrate(self, user: str, windows: Tensor, labels: Sequence[int] | None, then: str) -> None:
        """Let a user start from statistics of its own windows (`fedbn.online.Personalized.calibrate`).

        Raises:
            Refusal: unknown user, or not one label a window.
        """
        self._require(user)
        self.net.calibrate(windows, user, None if labels is None else torch.tensor(labels), then)  # type: ignore[arg-type]
        self._anew(user)

    # ---------------------------------------------------------------- users

    def enroll(self, user: str) -> bool:
        """Make a user known; whether it was not before.

        Raises:
            Refusal: there is no store, and no room in memory.
        """
        if self._known(user):
            return False
        if self.store is None and self.at_hand >= self.limits.capacity:
            raise Refusal(
                507, f"{self.at_hand} users fill the memory and there is no --store: forget some, or give one"
            )
        self.net.bank.group([user], create=True)
        self._changed.add(user)
        return True

    def users(self, after: str, most: int) -> list[str]:
        """Names in alphabetical order, those behind ``after``."""
        return [u for u in self.net.users if u > after][:most]

    def report(self, user: str) -> dict[str, Any]:
        """How a user stands (`fedbn.online.Personalized.report`), with the classes met and alarms.

        Raises:
            Refusal: unknown user.
        """
        self._require(user)
        bank = self.net.bank
        bank.group([user], create=False)
        met = bank.rows["classes"][bank.slot[user]].tolist()
        return self.net.report(user) | {
            "classes": dict(zip(self.classes, met, strict=True)),
            "alarms": self.watches.of(user).alarms,
        }

    def snapshot(self, user: str) -> bytes:
        """A user's state (`fedbn.online.BNState.to_bytes`).

        Raises:
            Refusal: unknown user.
        """
        self._require(user)
        return self.net.state(user).to_bytes()

    def restore(self, user: str, data: bytes, *, merge: bool) -> None:
        """Give a user a state, or add the windows behind it to its own.

        Raises:
            UserError: damaged, or of another model or rule.
            Refusal: unknown user.
        """
        self._require(user)
        state = BNState.from_bytes(data, self.net.bank.model, self.net.bank.text)
        (self.net.merge if merge else self.net.load)(user, state)
        self._anew(user)

    def reset(self, user: str) -> None:
        """A user is as on the first day.

        Raises:
            Refusal: unknown user.
        """
        self._require(user)
        self.net.reset(user)
        self._anew(user)

    def forget(self, user: str) -> None:
        """Delete everything about a user, held windows and what is on disk included.

        Raises:
            Refusal: unknown user.
        """
        self._require(user)
        self.net.forget(user)
        self._anew(user)
        self._changed.discard(user)
        for name in [n for n, (whose, _) in self._held.items() if whose == user]:
            del self._held[name]

    def export(self, user: str) -> bytes:
        """Weights of a plain copy of the model with a user's statistics, as safetensors.

        Raises:
            Refusal: unknown user.
            UserError: the rule keeps no statistics.
        """
        self._require(user)
        state = self.net.export(user).state_dict()
        return safetensors.torch.save({name: t.contiguous() for name, t in state.items()})

    def keep(self, most: int | None = None) -> int:
        """Write users that changed since they were written to the store, in one transaction; how many are left.

        Args:
            most: users at once; None: all.
        """
        if self.store is None:
            return 0
        bank = self.net.bank
        # Whoever is no longer at hand was written when it went.
        at_hand = [u for u in self._changed if u in bank.slot]
        chosen = at_hand if most is None else at_hand[:most]
        self.store.write_all({u: bank.get(bank.slot[u]).to_bytes() for u in chosen})
        self._changed = set(at_hand[len(chosen) :])
        return len(self._changed)

    @property
    def at_hand(self) -> int:
        """Users in memory."""
        return len(self.net.bank.slot)

    def _known(self, user: str) -> bool:
        return user in self.net.bank.slot or user in self.net.bank.store

    def _require(self, user: str) -> None:
        if not self._known(user):
            raise _stranger(user)


def _stranger(user: str) -> Refusal:
    return Refusal(404, f"nobody is called {user!r} here: enroll the user first, PUT /v1/users/{user}")
