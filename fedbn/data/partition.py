"""Deal the pooled data of all seen users out to other clients: IID, label skew, quantity skew.

Training and test rows are dealt apart, so what was held out stays held out. Test rows follow the training labels
client by client: *own test* has the client's own label mix. Unseen users stay who they are.

The schemes are those of flwr-datasets, applied to an index so that no data are copied. Ours step in where theirs
cannot: IID (theirs cuts without shuffling, so on sorted data each client gets one class) and Dirichlet where
theirs gives up (hundreds of clients, or a small alpha).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from fedbn.data.population import Examples, Population, User
from fedbn.errors import UserError
from fedbn.plugins import parse, render
from fedbn.seeds import key, numpy_generator

Indices = list[np.ndarray]


@dataclass(frozen=True)
class Rows:
    """What a scheme may look at: label and source user of every pooled training row."""

    label: np.ndarray
    user: np.ndarray


class Partition(ABC):
    """A scheme; fields are its options.

    Attributes:
        name: what the command line calls it.
        about: one line for lists.
    """

    name: ClassVar[str]
    about: ClassVar[str]

    @abstractmethod
    def split(self, rows: Rows, seed: int) -> Indices | None:
        """Row indices of each client; None leaves users as they are."""


@dataclass(frozen=True)
class Natural(Partition):
    """Users as they are."""

    name = "natural"
    about = "users as they are: the real skew"

    def split(self, rows: Rows, seed: int) -> None:
        return None


@dataclass(frozen=True)
class Grouped(Partition):
    """Users merged: several real users behind one client, the mixed-domain case."""

    name = "grouped"
    about = "several real users behind one client (size users each)"
    size: int = 2

    def split(self, rows: Rows, seed: int) -> Indices:
        if not 1 <= self.size <= len(np.unique(rows.user)):
            raise UserError(f"grouped: size={self.size} users a client, but there are {len(np.unique(rows.user))}")
        users = numpy_generator(seed, "partition", "grouped").permutation(np.unique(rows.user))
        groups = np.array_split(users, -(-len(users) // self.size))
        return [np.flatnonzero(np.isin(rows.user, g)) for g in groups]


@dataclass(frozen=True)
class Iid(Partition):
    """Rows dealt at random, equally many to each client."""

    name = "iid"
    about = "rows dealt at random: no skew"
    clients: int = 20

    def split(self, rows: Rows, seed: int) -> Indices:
        order = numpy_generator(seed, "partition", "iid").permutation(len(rows.label))
        return list(np.array_split(order, self.clients))


@dataclass(frozen=True)
class Dirichlet(Partition):
    """Each class is dealt by proportions drawn from Dirichlet(alpha): small alpha, strong label skew.

    Hsu, Qi, Brown, 2019, https://arxiv.org/abs/1909.06335

    Attributes:
        alpha: concentration.
        clients: how many.
        least: rows that every client has at least.
    """

    name = "dirichlet"
    about = "label skew: class proportions drawn from Dirichlet(alpha)"
    alpha: float = 0.5
    clients: int = 20
    least: int = 10

    def split(self, rows: Rows, seed: int) -> Indices:
        if not self.alpha > 0:
            raise UserError(f"dirichlet: alpha must be positive, not {self.alpha}")
        if self.least * self.clients > len(rows.label):
            raise UserError(
                f"dirichlet: {self.clients} clients with at least {self.least} rows need {self.least * self.clients}, "
                f"there are {len(rows.label)}: fewer clients or a smaller least"
            )
        if self.clients <= 100:
            from flwr_datasets.partitioner import DirichletPartitioner

            theirs = DirichletPartitioner(
                self.clients,
                "label",
                self.alpha,
                min_partition_size=self.least,
                self_balancing=False,
                seed=key(seed, "partition") % 2**32,
            )
            with contextlib.suppress(ValueError):  # it gives up after ten attempts to reach `least`
                return _dealt(theirs, rows, self.clients)
        return self._ours(rows, seed)

    def _ours(self, rows: Rows, seed: int) -> Indices:
        draw = numpy_generator(seed, "partition", "dirichlet")
        hands: list[list[int]] = [[] for _ in range(self.clients)]
        for label in np.unique(rows.label):
            members = draw.permutation(np.flatnonzero(rows.label == label))
            counts = shares(draw.dirichlet(np.full(self.clients, self.alpha)), len(members))
            for hand, part in zip(hands, np.split(members, np.cumsum(counts)[:-1]), strict=True):
                hand.extend(part.tolist())
        for hand in hands:
            while len(hand) < self.least:
                hand.append(max(hands, key=len).pop())
        return [np.array(h, dtype=np.int64) for h in hands]


@dataclass(frozen=True)
class Pathological(Partition):
    """Every client holds a fixed number of classes."""

    name = "pathological"
    about = "label skew: each client holds only a few classes"
    classes: int = 2
    clients: int = 20

    def split(self, rows: Rows, seed: int) -> Indices:
        present = len(np.unique(rows.label))
        if not 1 <= self.classes <= present:
            raise UserError(f"pathological: classes={self.classes} a client, but there are 1 to {present}")
        if self.classes * self.clients < present:
            raise UserError(
                f"pathological: {self.clients} clients with {self.classes} classes each leave some of the {present} "
                "classes with nobody: more clients or classes"
            )
        from flwr_datasets.partitioner import PathologicalPartitioner

        theirs = PathologicalPartitioner(
            self.clients,
            "label",
            self.classes,
            class_assignment_mode="first-deterministic",
            seed=key(seed, "partition") % 2**32,
        )
        return _dealt(theirs, rows, self.clients)


@dataclass(frozen=True)
class Shard(Partition):
    """Rows sorted by label, cut into shards, some shards to each client.

    McMahan et al., 2017, https://arxiv.org/abs/1602.05629
    """

    name = "shard"
    about = "label skew: label-sorted shards, some to each client"
    shards: int = 2
    clients: int = 20

    def split(self, rows: Rows, seed: int) -> Indices:
        if not 1 <= self.shards * self.clients <= len(rows.label):
            raise UserError(f"shard: {self.shards * self.clients} shards of {len(rows.label)} rows are impossible")
        from flwr_datasets.partitioner import ShardPartitioner

        theirs = ShardPartitioner(
            self.clients, "label", num_shards_per_partition=self.shards, seed=key(seed, "partition") % 2**32
        )
        return _dealt(theirs, rows, self.clients)


class _Sized(Partition):
    """Base of schemes that skew quantity alone: rows at random, so many to each client."""

    clients: int

    @abstractmethod
    def make(self) -> Any:
        """Their partitioner, which cuts contiguously."""

    def split(self, rows: Rows, seed: int) -> Indices:
        order = numpy_generator(seed, "partition", self.name).permutation(len(rows.label))
        shuffled = Rows(rows.label[order], rows.user[order])
        return [order[i] for i in _dealt(self.make(), shuffled, self.clients)]


@dataclass(frozen=True)
class Linear(_Sized):
    """Client i gets rows in proportion to i."""

    name = "linear"
    about = "quantity skew: sizes grow linearly"
    clients: int = 20

    def make(self) -> Any:
        from flwr_datasets.partitioner import LinearPartitioner

        return LinearPartitioner(self.clients)


@dataclass(frozen=True)
class Square(_Sized):
    """Client i gets rows in proportion to the square of i."""

    name = "square"
    about = "quantity skew: sizes grow quadratically"
    clients: int = 20

    def make(self) -> Any:
        from flwr_datasets.partitioner import SquarePartitioner

        return SquarePartitioner(self.clients)


@dataclass(frozen=True)
class Exponential(_Sized):
    """Client i gets rows in proportion to exp(i)."""

    name = "exponential"
    about = "quantity skew: sizes grow exponentially"
    clients: int = 6

    def make(self) -> Any:
        from flwr_datasets.partitioner import ExponentialPartitioner

        return ExponentialPartitioner(self.clients)


@dataclass(frozen=True)
class Size(_Sized):
    """Sizes as given."""

    name = "size"
    about = "quantity skew: sizes as given, e.g. size:sizes=100+200+400"
    sizes: tuple[int, ...] = ()

    @property
    def clients(self) -> int:  # type: ignore[override]
        """How many sizes were given."""
        return len(self.sizes)

    def make(self) -> Any:
        from flwr_datasets.partitioner import SizePartitioner

        return SizePartitioner(list(self.sizes))

    def split(self, rows: Rows, seed: int) -> Indices:
        if not self.sizes or min(self.sizes) < 1 or sum(self.sizes) > len(rows.label):
            raise UserError(
                f"size: sizes={'+'.join(map(str, self.sizes)) or '(none)'} must be positive and sum to at most "
                f"{len(rows.label)}"
            )
        return super().split(rows, seed)


def partitions() -> dict[str, type[Partition]]:
    """All schemes, by name."""
    schemes: list[Any] = [Natural, Grouped, Iid, Dirichlet, Pathological, Shard, Linear, Square, Exponential, Size]
    return {s.name: s for s in schemes}


def parse_partition(text: str) -> str:
    """The shortest text of the scheme that ``text`` names.

    >>> parse_partition("dirichlet:alpha=0.1:clients=20")
    'dirichlet:alpha=0.1'

    Raises:
        UserError: unknown scheme or option.
    """
    return render(parse(text, "partition", partitions()))


def shares(proportions: np.ndarray, total: int) -> np.ndarray:
    """``total`` things in these proportions, in whole numbers (largest remainder).

    >>> shares(np.array([1.0, 1.0, 2.0]), 5).tolist()
    [1, 1, 3]
    """
    exact = proportions / proportions.sum() * total
    counts = np.floor(exact).astype(np.int64)
    for i in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[i] += 1
    return counts


def digest(indices: Indices) -> str:
    """Sha256 of who got what."""
    text = ";".join(",".join(map(str, i.tolist())) for i in indices)
    return hashlib.sha256(text.encode()).hexdigest()


def _dealt(theirs: Any, rows: Rows, clients: int) -> Indices:
    """The row indices that one of flwr-datasets' partitioners gives each client."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with (
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(action="ignore"),
        ):
            theirs.dataset = datasets.Dataset.from_dict(
                {"index": np.arange(len(rows.label)), "label": rows.label.astype(np.int64)}
            )
            out = []
            for i in range(clients):
                part = theirs.load_partition(i).with_format("numpy")
                out.append(np.asarray(part["index"][:], dtype=np.int64))
            return out
    finally:
        if not bars:
            datasets.enable_progress_bars()


def repartition(population: Population, text: str, seed: int) -> Population:
    """Deal the seen users' rows out anew.

    Args:
        population: users as loaded.
        text: a scheme, e.g. ``dirichlet:alpha=0.1:clients=20``.
        seed: of the run.

    Raises:
        UserError: unknown scheme, impossible numbers, a client without rows.
    """
    scheme = parse(text or "natural", "partition", partitions())
    if isinstance(scheme, Natural):
        return population
    seen = [population.users[i] for i in population.seen]
    train, source = _pooled([u.train for u in seen])
    test, _ = _pooled([u.test for u in seen])
    clients = getattr(scheme, "clients", 1)
    if not isinstance(scheme, Size) and not 1 <= clients <= len(train):
        raise UserError(f"{scheme.name}: {clients} clients of {len(train)} training rows; choose 1 to {len(train)}")
    try:
        indices = [np.sort(i) for i in scheme.split(Rows(train.y.numpy(), source), seed) or ()]
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{render(scheme)} is impossible for {len(train)} training rows: {error}") from None
    for i, mine in enumerate(indices):
        if len(mine) < 2:
            raise UserError(
                f"{render(scheme)} leaves client {i} with {len(mine)} training rows of {len(train)}: fewer clients, or "
                "a milder skew"
            )
    tests = matching(train.y.numpy(), indices, test.y.numpy(), len(population.classes), seed)
    domains = {u.domain for u in seen}
    users = [
        User(
            f"client{i:04d}",
            domains.copy().pop() if len(domains) == 1 else "mixed",
            train.take(torch.from_numpy(mine)),
            test.take(torch.from_numpy(theirs)),
        )
        for i, (mine, theirs) in enumerate(zip(indices, tests, strict=True))
    ]
    away = [population.users[i] for i in population.unseen]
    return Population(
        (*users, *away),
        tuple(range(len(users), len(users) + len(away))),
        population.classes,
        f"{scheme.about}; made by {render(scheme)} from the pooled data of {len(seen)} users ({population.skew})",
        population.sources | {"partition": digest(indices)},
    )


def _pooled(parts: list[Examples]) -> tuple[Examples, np.ndarray]:
    """All rows, recordings numbered apart, and the source user of each."""
    marked = [Examples(p.x, p.y, p.recording + 1000 * i) for i, p in enumerate(parts)]
    return Examples.concat(marked), np.concatenate([np.full(len(p), i) for i, p in enumerate(parts)])


def matching(train: np.ndarray, indices: Indices, test: np.ndarray, classes: int, seed: int) -> Indices:
    """Test rows for each client, class by class in proportion to its share of the class in training.

    A client too small for a whole test row of any class gets one of its commonest class, which another client
    may have too.
    """
    counts = np.stack([np.bincount(train[i], minlength=classes) for i in indices])
    draw = numpy_generator(seed, "partition", "test")
    hands: list[list[int]] = [[] for _ in indices]
    for label in range(classes):
        members = draw.permutation(np.flatnonzero(test == label))
        if counts[:, label].sum() == 0:
            continue
        cuts = np.cumsum(shares(counts[:, label].astype(float), len(members)))[:-1]
        for hand, part in zip(hands, np.split(members, cuts), strict=True):
            hand.extend(part.tolist())
    for hand, mine in zip(hands, counts, strict=True):
        if not hand:
            common = np.flatnonzero(np.isin(test, np.argmax(mine)))
            hand.append(int(draw.choice(common if len(common) else len(test))))
    return [np.sort(np.array(h, dtype=np.int64)) for h in hands]
