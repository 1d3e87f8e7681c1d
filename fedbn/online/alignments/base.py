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

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.nn.roles import State
from fedbn.online.sums import LabeledWindows, SumsMethod, Triples, positive
from fedbn.plugins import discover, parse

MARGIN = 1e-6
"""Smallest gain in J, in nats, for which a candidate replaces the identity."""

LARGEST_PARAMETER = 1e3
"""Largest absolute parameter in a valid state."""


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

    def bound(self, n: Tensor, z: Tensor) -> Tensor:
        """A number ``[U]`` that J does not exceed for these cells, whatever the parameters."""
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
        recent: last windows that are tested for a change (`fedbn.online.alignments.evidence.changes`); 0: no test.
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
