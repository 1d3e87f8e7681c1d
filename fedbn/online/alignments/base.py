r"""Base class of alignments: a label-free transformation of a user's input, before the network.

Where a rule on statistics follows how a user's features are distributed, an alignment undoes the cause, such as a
sensor that is worn in another orientation. Each window has a few *summaries* :math:`z`, some that the transformation
changes and some that it does not. Seen clients send sums of these summaries per class, with which the federation
describes each class k by a Gaussian :math:`N(\mu_k,\Sigma_k)`, after it has aligned the clients with each other.
For a new user, without labels, the transformation :math:`\theta` maximizes the penalized likelihood

.. math:: J(\theta)=\frac1b\sum_t n_t\log\sum_k N(\theta z_t;\mu_k,\Sigma_k)
          -\tfrac12\textstyle\sum_i\theta_i^2/s_i^2

over the cells t of a stream (`fedbn.online.alignments.cells`). :math:`s_i` is the spread between seen clients, and b
the number of successive windows that count as one independent window. The identity is always a candidate.

The sums are additive over clients, so secure aggregation can compute them. They take a few rounds, since clients turn
their sums by the means of the round before.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.nn.roles import State
from fedbn.online.alignments.cells import Array, insert, reduce
from fedbn.online.sums import LabeledWindows, SumsMethod, Triples, positive, sums_of_users
from fedbn.plugins import discover, parse, render

MARGIN = 1e-6
"""Smallest gain in J, in nats, for which a candidate replaces the identity."""

LARGEST = 10.0
"""Largest log likelihood ratio of one window, in nats, so that a single strange window does not decide."""

FOR = math.log(20)
"""Evidence for an alignment, in nats per independent window, from which it is used: odds of 20 to 1."""

AGAINST = math.log(20)
"""Evidence against an alignment, in nats per independent window, from which it is rejected: odds of 20 to 1."""

EVIDENCE_MEMORY = 50.0
"""Windows after which the weight of a window in the evidence has fallen to 1/e."""

CHANGED = math.log(1e4)
"""Evidence for a change of the device, in nats per independent window, from which a user starts again.

It outweighs the prior odds of a change that happens once in ten thousand windows, hours of recording.
"""

CONFIRMED = 50
"""Windows before which every search is full."""

FULL = 4
"""Later, one of so many searches is full; the others only follow the last parameters."""

STATE = ("n", "mean", "value", "count", "evidence", "recent")
"""Names of the tensors in the state of a user."""

MAX_CELLS = 16
"""Largest number of cells in a valid state, relative to that of the alignment; each one more costs a merge."""

LARGEST_PARAMETER = 1e3
"""Largest absolute parameter in a valid state."""

LARGEST_SUMMARY = 1e9
"""Largest absolute summary or evidence in a valid state."""


@dataclass(frozen=True)
class AlignmentPrior:
    """What the federation knows about the summaries.

    Attributes:
        mean: ``[K, D]`` mean of each class.
        cov: ``[K, D, D]`` covariance of each class.
        spread: ``[P]`` variance of the clients' transformations, in coordinates whose identity is 0.
        seen: ``[K]`` whether any client has the class; others are ignored.
    """

    mean: Tensor
    cov: Tensor
    spread: Tensor
    seen: Tensor

    @cached_property
    def precision(self) -> Tensor:
        """``[K, D, D]`` inverse covariances."""
        return torch.linalg.inv(self.cov)

    @cached_property
    def log_scale(self) -> Tensor:
        """``[K]`` logarithm of a class density at its mean, without constants; -inf for classes that nobody has."""
        return torch.where(self.seen, -0.5 * torch.linalg.slogdet(self.cov)[1], -torch.inf)

    @cached_property
    def scale(self) -> Tensor:
        """``[D]`` root mean variance within the classes."""
        return self.cov[self.seen].diagonal(dim1=1, dim2=2).mean(0).sqrt()


class Search(Protocol):
    """Search for the parameters of users; all tensors are float64."""

    def __call__(self, cells: tuple[Tensor, Tensor], last: Tensor, full: bool = True) -> Tensor:
        """Parameters ``[U, P]`` with the largest J among those found, the identity included.

        Args:
            cells: weights ``[U, M]`` and means ``[U, M, D]``.
            last: last parameters ``[U, P]``.
            full: whether to search far from the last parameters, too.
        """
        ...

    def likelihood(self, n: Tensor, z: Tensor, value: Tensor) -> Tensor:
        """The first term of J ``[U, S]`` for cells ``[U, M]``, ``[U, M, D]`` and parameters ``[U, S, P]``."""
        ...

    def objective(self, n: Tensor, z: Tensor, value: Tensor) -> Tensor:
        """J ``[U, S]``."""
        ...


@dataclass(frozen=True, kw_only=True)
class Alignment(SumsMethod):
    """Base class of alignments; fields are options.

    Attributes:
        name: name on the command line.
        about: one-line description.
        source: authors, year, link.
        cells: number M of cells that store a stream.
        every: windows between two estimates; later, a stream grows by about a tenth between two.
        b: successive windows that count as one independent window.
        memory: windows after which the weight of a window has fallen to 1/e; 0: all windows count equally.
        recent: last windows that are tested for a change (`Aligner.restart`); 0: no test.
    """

    about: ClassVar[str]
    source: ClassVar[str] = ""
    sum_rounds = 6

    cells: int = 32
    every: int = 5
    b: float = 8.0
    memory: float = 0.0
    recent: int = 16

    def __post_init__(self) -> None:
        for option, low in (("cells", 2), ("every", 1), ("b", 1e-3), ("memory", 0), ("recent", 0)):
            if not low <= (value := getattr(self, option)) < torch.inf:
                raise UserError(f"alignment {self.name!r}: {option}={value:g} is out of range; use {low:g} or more")

    @abstractmethod
    def identity(self, dims: int) -> Tensor:
        """Parameters ``[P]`` of the identity, for ``dims`` summaries."""

    @abstractmethod
    def summaries(self, x: Tensor, triples: Triples) -> Tensor:
        """Summaries ``[B, D]`` of windows ``[B, *shape]``, float64.

        Raises:
            UserError: the windows have another shape than the alignment needs.
        """

    @abstractmethod
    def limits(self, prior: AlignmentPrior) -> Any:
        """What `usable` needs of the prior, computed once."""

    @abstractmethod
    def usable(self, x: Tensor, z: Tensor, limits: Any, triples: Triples) -> Tensor:
        """Whether each window ``[B]`` with summaries ``z`` may be used for estimates. Saturated windows may not.

        Raises:
            UserError: the windows have another unit than those of the seen clients.
        """

    def informative(self, prior: AlignmentPrior) -> bool:
        """Whether the summaries of the classes determine a transformation at all; otherwise it is the identity."""
        return True

    def check(self, z: Tensor, prior: AlignmentPrior) -> None:
        """Check the summaries ``[n, D]`` of a seen client.

        Raises:
            UserError: they have another unit than those of the other clients.
        """

    @abstractmethod
    def transform(self, value: Tensor, z: Tensor) -> Tensor:
        """Summaries ``[n, D]`` of transformed windows, from those of the windows and parameters ``[P]``."""

    @abstractmethod
    def coordinates(self, value: Tensor) -> Tensor:
        """Coordinates of parameters ``[..., P]``, which are 0 for the identity."""

    @abstractmethod
    def register(self, prior: AlignmentPrior, means: Tensor, classes: Tensor) -> Tensor:
        """Parameters ``[P]`` that move a client's class means ``[C, D]`` of classes ``[C]`` to the prior's."""

    @abstractmethod
    def covariance(self, cov: Tensor, mean: Tensor) -> Tensor:
        """Regularized covariances of the classes ``[K, D, D]``."""

    @abstractmethod
    def spread(self, square: Tensor, cov: Tensor) -> Tensor:
        """Variance of the coordinates between clients ``[P]``, with a least one.

        Args:
            square: mean squared coordinates of the clients ``[P]``.
            cov: covariances of the classes.
        """

    @abstractmethod
    def estimator(self, prior: AlignmentPrior) -> Search:
        """Search for the parameters with the largest J."""

    @abstractmethod
    def apply(self, value: Tensor, x: Tensor, triples: Triples) -> Tensor:
        """Windows ``[B, *shape]``, each transformed by its row of parameters ``[B, P]``."""

    def valid(self, value: Tensor) -> bool:
        """Whether parameters ``[P]`` of a stored state are possible."""
        return bool((value.abs() <= LARGEST_PARAMETER).all())

    def report(self, value: Tensor) -> dict[str, Any]:
        """Parameters ``[P]`` for people."""
        return {"coordinates": self.coordinates(value).tolist()}

    # ---------------------------------------------------------------- what clients send

    def client_sums(self, model: nn.Module | None, data: LabeledWindows, received: State) -> State:
        """What a client sends in a round; the windows are aligned by the prior of the round before.

        The sums are: ``n`` ``[K]`` windows of each class, ``first`` ``[K, D]`` and ``second`` ``[K, D, D]`` sums of the
        summaries and of their outer products, ``clients`` ``[K]`` 1 for classes of this client, ``means`` ``[K, D]``
        its class means, ``square`` ``[P]`` squared coordinates of its transformation, and ``total``, which is 1.

        Raises:
            UserError: the windows have another shape or unit.
        """
        prior = AlignmentPrior(**received) if received else None
        z, one_hot = self.summaries(data.x, data.triples), data.one_hot
        if prior is not None:
            self.check(z, prior)
            usable = self.usable(data.x, z, self.limits(prior), data.triples)
            z, one_hot = z[usable], one_hot[usable]
        n = one_hot.sum(0)
        present = n > 0
        value = self.identity(z.shape[1]).to(z)
        if prior is not None and present.any():
            means = (one_hot.T @ z)[present] / n[present, None]
            known = prior.seen[present]
            value = self.register(prior, means[known], present.nonzero()[:, 0][known])
        z = self.transform(value, z)
        first = one_hot.T @ z
        return {
            "n": n,
            "first": first,
            "second": torch.einsum("nk,ni,nj->kij", one_hot, z, z),
            "clients": present.to(z),
            "means": torch.where(present[:, None], first / n.clamp_min(1)[:, None], 0.0),
            "square": self.coordinates(value).square(),
            "total": torch.ones((), dtype=z.dtype),
        }

    def from_sums(self, total: State) -> State:
        """The fields of the `AlignmentPrior` of a round.

        Raises:
            UserError: no client has a labeled window.
        """
        n, clients = total["n"], total["clients"]
        # Noise can make a count of 0 slightly positive; a class needs half a client.
        seen = (n > 0) & (clients > 0.5)
        if not seen.any():
            raise UserError(f"alignment {self.name!r} needs labeled windows of seen clients: none has any")
        mean = torch.where(seen[:, None], total["means"] / clients.clamp_min(0.5)[:, None], 0.0)
        size = torch.where(seen, n, 1.0)[:, None, None]
        cross = total["first"][:, :, None] * mean[:, None] / size
        cov = torch.where(seen[:, None, None], total["second"] / size - cross - cross.mT, 0.0)
        cov = self.covariance(positive(cov + mean[:, :, None] * mean[:, None]), mean)
        square = (total["square"] / total["total"].clamp_min(0.5)).clamp_min(0)
        return {"mean": mean, "cov": cov, "spread": self.spread(square, cov[seen]), "seen": seen}


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
            "align_value": self.identity[None].to(like),
            "align_count": like.new_zeros(1, 2),
            "align_evidence": like.new_zeros(1),
            "align_recent": like.new_zeros(1, self.alignment.recent, dims),
        }

    def apply(self, rows: Mapping[str, Tensor], slots: Tensor, x: Tensor) -> Tensor:
        """Windows ``[B, *shape]``, each aligned for the user in its row ``[B]`` of the tables.

        Windows stay as they are while the `evidence` for the user's alignment is below `FOR`.
        """
        value, supported = rows["align_value"][slots], rows["align_evidence"][slots] >= FOR
        return self.alignment.apply(torch.where(supported[:, None], value, self.identity.to(value)), x, self.triples)

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
        _scatter(rows["align_evidence"], slots, evidence + self._log_ratio(_gather(rows["align_value"], slots), z))
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
        for now, far in ((due & full, True), (due & ~full, False)):
            if now.any():
                self.estimate(rows, slots[torch.from_numpy(now).to(slots.device)], far)

    def evidence(self, rows: Mapping[str, Tensor], slots: Tensor) -> Tensor:
        r"""Log likelihood ratio of the alignment against the identity ``[U]``, in nats, for the users ``slots``.

        It is prequential (Dawid, 1984, *Statistical theory: the prequential approach*): each window is judged by the
        parameters before it, so that it is not optimistic. It forgets, and b windows count as one independent window:

        .. math:: \ell_t=\log\frac{\sum_k N(\theta_{t-1}z_t;\mu_k,\Sigma_k)}{\sum_k N(z_t;\mu_k,\Sigma_k)},\qquad
                  L_t=e^{-1/50}L_{t-1}+\tfrac1b\operatorname{clip}(\ell_t,-10,10).

        A negative value says that the user's windows fit the seen clients better without the alignment. It needs no
        labels. It cannot show that an alignment changes the meaning of windows that fit well in both ways.
        """
        return rows["align_evidence"][slots]

    def rejected(self, rows: Mapping[str, Tensor], slots: Tensor) -> Tensor:
        """Whether the `evidence` is against the alignment ``[U]``, for the users ``slots``."""
        return self.evidence(rows, slots) < -AGAINST

    def _log_ratio(self, value: Array, z: Tensor) -> Array:
        """Clipped log likelihood ratios ``[U]`` of windows ``[U, D]`` under parameters ``[U, P]``, divided by b."""
        identity = self.identity.numpy(force=True)
        moved = (value != identity).any(1)
        if not moved.any():
            return np.zeros(len(z))
        values = torch.from_numpy(np.stack([value, np.broadcast_to(identity, value.shape)], 1)).to(z)
        found = self.estimator.likelihood(z.new_ones(len(z), 1), z[:, None], values).numpy(force=True)
        limit = LARGEST / self.alignment.b
        return np.where(moved, (found[:, 0] - found[:, 1]).clip(-limit, limit), 0.0)

    def restart(self, rows: dict[str, Tensor], slots: Tensor) -> None:
        r"""Start again from the last W windows if the device has changed since then, in place.

        The test compares the transformation of all windows so far, :math:`\theta`, with the best one for the last W
        windows alone, :math:`\theta'`: a generalized likelihood ratio, with the prior of the latter. Users start again
        if :math:`J_W(\theta')-\ell_W(\theta)` is above `CHANGED`, where :math:`\ell` is J without its penalty. The
        `evidence` starts again, too, so that only later windows can prove the new transformation.

        Args:
            rows: tables of all users.
            slots: users ``[U]`` with more than W windows.
        """
        recent, value = (rows[name][slots].double() for name in ("align_recent", "align_value"))
        n = recent.new_ones(recent.shape[:2])
        found = self.estimator((n, recent), value)
        gain = self.estimator.objective(n, recent, found[:, None])
        gain -= self.estimator.likelihood(n, recent, value[:, None])
        changed = gain[:, 0] > CHANGED
        if not changed.any():
            return
        slots = slots[changed]
        last = n[changed].numpy(force=True), recent[changed].numpy(force=True)
        cells = reduce(last, self.alignment.cells, self.scale)
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
        state = {name: rows[f"align_{name}"][slot].detach().cpu() for name in STATE}
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
        """Whether a state has the right names, shapes and values; an empty one is a new user's."""
        if not state:
            return True
        cells, shape = len(state.get("n", ())), self.prior.mean.shape[1:]
        shapes = {"n": (cells,), "mean": (cells, *shape), "value": self.identity.shape, "count": (2,), "evidence": ()}
        shapes |= {"recent": (self.alignment.recent, *shape)}
        if {name: tuple(t.shape) for name, t in state.items()} != {name: tuple(s) for name, s in shapes.items()}:
            return False
        values = {name: t.double() for name, t in state.items()}
        counts = torch.cat([values["n"], values["count"]])
        others = torch.cat([values["mean"].flatten(), values["recent"].flatten(), values["evidence"][None]])
        return (
            cells <= MAX_CELLS * self.alignment.cells
            and bool(((counts >= 0) & (counts < 1e12)).all())
            and bool((values["n"] > 0).all())
            and bool((others.abs() <= LARGEST_SUMMARY).all())
            and self.alignment.valid(values["value"])
        )

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


def merge_states(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State with the cells of both; parameters and last windows are those of the state with more windows.

    The parameters change with the next estimate.
    """
    if not a or not b:
        return dict(a or b)
    larger = a if a["count"][0] >= b["count"][0] else b
    joint = {name: torch.cat([a[name], b[name].to(a[name])]) for name in ("n", "mean")}
    total = {name: a[name] + b[name].to(a[name]) for name in ("count", "evidence")}
    return joint | total | {name: larger[name] for name in ("value", "recent")}


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


def alignments() -> dict[str, type[Alignment]]:
    """All alignments, by name."""
    return discover("fedbn.online.alignments", Alignment)


def parse_alignment(text: str) -> Alignment:
    """Alignment from a text such as ``rotation:b=16``.

    Raises:
        UserError: unknown name or option (the closest one is suggested), or a value out of range.

    >>> parse_alignment("rotation:every=10").every
    10
    """
    return parse(text, "alignment", alignments())


def split_alignment(text: str) -> tuple[str, str]:
    """Alignment and rule of a text such as ``rotation+pseudo:n0=64``; each is empty if the text has none.

    >>> split_alignment("rotation:b=4+pseudo"), split_alignment("rotation"), split_alignment("pseudo")
    (('rotation:b=4', 'pseudo'), ('rotation', ''), ('', 'pseudo'))
    """
    first, _, rest = text.partition("+")
    return (first, rest) if first.split(":")[0] in alignments() else ("", text)
