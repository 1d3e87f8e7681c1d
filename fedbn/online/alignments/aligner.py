"""An alignment with the prior of a federation, for the users of a bank: what it stores of each, and how it learns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fedbn.errors import UserError
from fedbn.online.alignments.base import Alignment, AlignmentPrior, Search, parse_alignment
from fedbn.online.alignments.cells import Array, insert, reduce
from fedbn.online.alignments.evidence import AGAINST, EVIDENCE_MEMORY, FOR, changes, log_ratios
from fedbn.online.alignments.states import STATE, is_valid
from fedbn.online.sums import LabeledWindows, Triples, sums_of_users
from fedbn.plugins import render

CONFIRMED = 50
"""Windows before which every search is full."""

FULL = 4
"""Later, one of so many searches is full; the others only follow the last parameters."""


@dataclass(frozen=True)
class Aligner:
    """An alignment with the prior of a federation. It keeps one row of each of its tables per user.

    Attributes:
        alignment: the alignment.
        prior: of the federation.
        triples: channels of the sensors' axes.
    """

    alignment: Alignment
    prior: AlignmentPrior
    triples: Triples = ()

    @cached_property
    def estimator(self) -> Search:
        """Search for parameters with this prior."""
        return self.alignment.estimator(self.prior)

    @cached_property
    def limits(self) -> Any:
        """Limits of usable windows."""
        return self.alignment.limits(self.prior)

    @cached_property
    def identity(self) -> Tensor:
        """Parameters ``[P]`` of the identity."""
        return self.alignment.identity(self.prior.mean.shape[1])

    @cached_property
    def scale(self) -> Array:
        """``[D]`` unit of each summary in distances between cells."""
        return cast("Array", self.prior.scale.numpy(force=True))

    @cached_property
    def informative(self) -> bool:
        """Whether the summaries of the classes determine a transformation."""
        return self.alignment.informative(self.prior)

    @property
    def values_per_user(self) -> int:
        """Numbers in the state of a user, with M (D + 1) for the cells. In float32, each has four bytes."""
        return sum(table.numel() for table in self.start(torch.zeros(1)).values())

    def to(self, function: Callable[[Tensor], Tensor]) -> Aligner:
        """Copy with every tensor of the prior replaced by ``function(tensor)``, in float64."""
        tensors = {f.name: function(getattr(self.prior, f.name)) for f in fields(self.prior)}
        wide = {name: t if t.dtype is torch.bool else t.double() for name, t in tensors.items()}
        return replace(self, prior=AlignmentPrior(**wide))

    def start(self, like: Tensor) -> dict[str, Tensor]:
        """Tables of one new user, with the type and device of ``like``.

        ``align_n`` ``[1, M]`` and ``align_mean`` ``[1, M, D]`` are cells, ``align_value`` ``[1, P]`` the parameters,
        ``align_count`` ``[1, 2]`` the windows learned from and those that were not usable, ``align_evidence`` ``[1]``
        the `evidence`, and ``align_recent`` ``[1, W, D]`` the summaries of the last windows, the latest at the end.
        """
        size, dims = self.alignment.cells, self.prior.mean.shape[1]
        return {
            "align_n": like.new_zeros(1, size),
            "align_mean": like.new_zeros(1, size, dims),
            "align_value": self.identity[None].to(like, copy=True),
            "align_count": like.new_zeros(1, 2),
            "align_evidence": like.new_zeros(1),
            "align_recent": like.new_zeros(1, self.alignment.recent, dims),
        }

    def apply(self, rows: Mapping[str, Tensor], slots: Tensor, x: Tensor) -> Tensor:
        """Windows ``[B, *shape]``, each aligned for the user in its row ``[B]`` of the tables.

        Windows stay as they are while the `evidence` for the user's alignment is below `FOR`.
        """
        supported = _gather(rows["align_evidence"], slots) >= FOR
        if not supported.any():
            return x
        identity, value = self.identity.numpy(force=True), _gather(rows["align_value"], slots)
        used = torch.from_numpy(np.where(supported[:, None], value, identity)).to(slots.device)
        return self.alignment.apply(used, x, self.triples)

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Summaries ``[B, D]`` of windows, and whether each may be used ``[B]``.

        Raises:
            UserError: the windows have another shape or unit.
        """
        z = self.alignment.summaries(x, self.triples)
        return z, self.alignment.usable(x, z, self.limits, self.triples) & self.informative

    def learn(self, rows: dict[str, Tensor], slots: Tensor, z: Tensor, usable: Tensor, weight: Tensor) -> None:
        """Update the tables of different users ``slots`` ``[U]`` with one window each, in place.

        Args:
            rows: tables of all users.
            slots: the users.
            z: ``[U, D]`` summaries.
            usable: ``[U]`` whether each window may be used, as `measure` returns it.
            weight: ``[U]`` weights of the windows; those with weight 0 are left out.
        """
        offered, trusted = (weight > 0).numpy(force=True), usable.numpy(force=True)
        count = _gather(rows["align_count"], slots)
        count[:, 0] += offered & trusted
        count[:, 1] += offered & ~trusted
        _scatter(rows["align_count"], slots, count)
        chosen = offered & trusted
        if not chosen.all():
            keep = torch.from_numpy(chosen).to(slots.device)
            slots, z, weight, count = slots[keep], z[keep], weight[keep], count[chosen]
        if not len(slots):
            return
        evidence = _gather(rows["align_evidence"], slots) * math.exp(-1 / EVIDENCE_MEMORY)
        identity, value = self.identity.numpy(force=True), _gather(rows["align_value"], slots)
        evidence = evidence + log_ratios(self.estimator, self.alignment.b, identity, value, z)
        _scatter(rows["align_evidence"], slots, evidence)
        n, mean = (_gather(rows[name], slots) for name in ("align_n", "align_mean"))
        if self.alignment.memory:
            n *= math.exp(-1 / self.alignment.memory)
        n, mean = insert((n, mean), z.numpy(force=True), weight.numpy(force=True), self.scale)
        _scatter(rows["align_n"], slots, n)
        _scatter(rows["align_mean"], slots, mean)
        learned, size, recent = count[:, 0], n.sum(1), _gather(rows["align_recent"], slots)
        last = np.concatenate([recent[:, 1:], z.numpy(force=True)[:, None].astype(recent.dtype)], 1)
        _scatter(rows["align_recent"], slots, last[:, : recent.shape[1]])
        tested = (learned % self.alignment.every == 0) & (size > self.alignment.recent)
        if self.alignment.recent and tested.any():
            self.restart(rows, slots[torch.from_numpy(tested).to(slots.device)])
            size = _gather(rows["align_n"], slots).sum(1)
        due, full = self._due(learned, size)
        if not due.any():
            return
        for now, far in ((due & full, True), (due & ~full, False)):
            if now.any():
                self.estimate(rows, slots[torch.from_numpy(now).to(slots.device)], far)

    def evidence(self, rows: Mapping[str, Tensor], slots: Tensor) -> Tensor:
        """Log likelihood ratio of the alignment against the identity ``[U]``, in nats, for the users ``slots``.

        See `fedbn.online.alignments.evidence`.
        """
        return rows["align_evidence"][slots]

    def rejected(self, rows: Mapping[str, Tensor], slots: Tensor) -> Tensor:
        """Whether the `evidence` is against the alignment ``[U]``, for the users ``slots``."""
        return self.evidence(rows, slots) < -AGAINST

    def restart(self, rows: dict[str, Tensor], slots: Tensor) -> None:
        """Start again from the last W windows if the device has changed (`changes`), in place.

        The `evidence` starts again, too, so that only later windows can prove the new transformation.

        Args:
            rows: tables of all users.
            slots: users ``[U]`` with more than W windows.
        """
        recent, value = (rows[name][slots].double() for name in ("align_recent", "align_value"))
        changed, found = changes(self.estimator, recent, value)
        if not changed.any():
            return
        slots, last = slots[changed], recent[changed].numpy(force=True)
        cells = reduce((np.ones(last.shape[:2]), last), self.alignment.cells, self.scale)
        for name, new in zip(("align_n", "align_mean"), cells, strict=True):
            _scatter(rows[name], slots, new)
        rows["align_value"][slots] = found[changed].to(rows["align_value"])
        rows["align_evidence"][slots] = 0.0

    def _due(self, learned: Array, size: Array) -> tuple[Array, Array]:
        """Whether users get an estimate, and whether by a full search, after so many windows and of so many ``[U]``."""
        interval = np.maximum(2 ** np.floor(np.log2(size / 10)), self.alignment.every)
        return learned % interval == 0, (size < CONFIRMED) | (learned % (FULL * interval) == 0)

    def estimate(self, rows: dict[str, Tensor], slots: Tensor, full: bool = True) -> None:
        """Estimate the parameters of the users ``slots`` from their cells, in place."""
        cells = rows["align_n"][slots].double(), rows["align_mean"][slots].double()
        value = self.estimator(cells, rows["align_value"][slots].double(), full)
        rows["align_value"][slots] = value.to(rows["align_value"])

    def follow(self, x: Tensor, like: Tensor) -> dict[str, Tensor]:
        """Tables of one user after the windows ``[n, *shape]`` in this order, with an estimate at the end.

        Raises:
            UserError: the windows have another shape or unit.
        """
        rows, slot = self.start(like), torch.zeros(1, dtype=torch.long, device=like.device)
        z, usable = self.measure(x)
        for row in range(len(x)):
            self.learn(rows, slot, z[row : row + 1], usable[row : row + 1], like.new_ones(1))
        self.estimate(rows, slot)
        return rows

    # ---------------------------------------------------------------- states of users

    def get(self, rows: Mapping[str, Tensor], slot: int) -> dict[str, Tensor]:
        """The state of a user as a value: used cells, parameters and counts."""
        used = rows["align_n"][slot] > 0
        state = {name: rows[f"align_{name}"][slot].detach().cpu().clone() for name in STATE}
        return state | {name: state[name][used.cpu()] for name in ("n", "mean")}

    def put(self, rows: dict[str, Tensor], slot: int, state: Mapping[str, Tensor]) -> None:
        """Write the state of a user. Cells beyond the number of this alignment are merged."""
        for name, value in self.start(rows["align_n"]).items():
            rows[name][slot] = value[0]
        if not state:
            return
        n, mean = (state[name][None].to(rows["align_n"]).numpy(force=True) for name in ("n", "mean"))
        n, mean = reduce((n, mean), self.alignment.cells, self.scale)
        for name, value in {**state, "n": torch.from_numpy(n[0]), "mean": torch.from_numpy(mean[0])}.items():
            rows[f"align_{name}"][slot] = value.to(rows["align_n"])

    def check(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a state has the right names, shapes and values (`is_valid`)."""
        return is_valid(state, self.alignment, self.prior.mean.shape[1])

    def report(self, rows: Mapping[str, Tensor], slot: int) -> dict[str, Any]:
        """Parameters of a user for people, and the numbers of windows learned from and not usable.

        The parameters are in use if the `evidence` is at least `FOR`.
        ``certainty`` is the probability that the user's last windows are aligned windows of the seen clients' classes
        rather than such windows as they are, from the `evidence` and equal prior odds.
        """
        learned, unusable = rows["align_count"][slot].tolist()
        value = rows["align_value"][slot].detach().cpu()
        evidence = rows["align_evidence"][slot]
        counts = {"learned": learned, "unusable": unusable, "evidence": float(evidence)}
        sure = {"certainty": float(evidence.sigmoid())}
        return {"alignment": render(self.alignment), **counts, **sure, **self.alignment.report(value)}


def fit_alignment(
    alignment: Alignment | str, users: Sequence[tuple[Tensor, Tensor]], classes: int, triples: Triples = ()
) -> Aligner:
    """Estimate the prior of an alignment from seen users.

    Args:
        alignment: the alignment, as an object or a text such as ``rotation:b=16``.
        users: windows ``[n, *shape]`` and labels ``[n]`` of each seen user.
        classes: number of classes K.
        triples: channels of the sensors' axes, as of a scenario; not needed by every alignment.

    Raises:
        UserError: no users or labels, or windows of another shape or unit.

    >>> x = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1) + 0.1 * torch.randn(20, 3, 8)
    >>> aligner = fit_alignment("rotation", [(x, torch.zeros(20, dtype=torch.long))], 2, ((0, 1, 2),))
    >>> aligner.prior.seen.tolist()
    [True, False]
    """
    chosen = parse_alignment(alignment) if isinstance(alignment, str) else alignment
    if not users:
        raise UserError(f"alignment {chosen.name!r} needs labeled windows of seen users: pass at least one user")
    data = [LabeledWindows(x, y, classes, triples) for x, y in users]
    return Aligner(chosen, AlignmentPrior(**sums_of_users(chosen, None, data)), triples)


def _gather(table: Tensor, slots: Tensor) -> Array:
    """Copy of the rows ``slots``. On a CPU, NumPy is faster for a few rows."""
    if table.device.type == "cpu":
        return cast("Array", table.numpy()[slots.numpy()])
    return cast("Array", table[slots].numpy(force=True))


def _scatter(table: Tensor, slots: Tensor, value: Array) -> None:
    """Write the rows ``slots``."""
    if table.device.type == "cpu":
        table.numpy()[slots.numpy()] = value
    else:
        table[slots] = torch.from_numpy(value).to(table)
