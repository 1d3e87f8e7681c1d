"""Sums over the labeled windows of seen clients, from which alignments and matched heads are estimated.

A method asks every seen client for named sums, float64, in one or more rounds. They are additive over clients, so
secure aggregation can compute their totals. In a federation they are Flower messages
(`fedbn.federation.labeled_sums`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedbn.nn.roles import State

Triples = tuple[tuple[int, int, int], ...]
"""Channels of the axes x, y, z of each sensor of one device. The first is an accelerometer that measures gravity."""


@dataclass(frozen=True)
class LabeledWindows:
    """Labeled windows of one seen client.

    Attributes:
        x: windows ``[n, *shape]``.
        y: labels ``[n]``.
        classes: number of classes K.
        triples: channels of the sensors' axes; empty if there are none.
    """

    x: Tensor
    y: Tensor
    classes: int
    triples: Triples = ()

    @property
    def one_hot(self) -> Tensor:
        """Labels as ``[n, K]`` zeros and ones, float64."""
        return nn.functional.one_hot(self.y, self.classes).double()


class SumsMethod(ABC):
    """What is estimated from sums over seen clients.

    Attributes:
        name: name on the command line.
        sum_rounds: number of rounds in which clients send sums.
        window_sums: names of sums over windows. Under clipping, they are divided by the client's number of windows, so
            that clients have equal weight.
    """

    name: ClassVar[str]
    sum_rounds: ClassVar[int] = 1
    window_sums: ClassVar[tuple[str, ...]] = ("n", "first", "second")

    @abstractmethod
    def client_sums(self, model: nn.Module | None, data: LabeledWindows, received: State) -> State:
        """The sums of one client.

        Args:
            model: the served model in evaluation mode; None for methods that do not need it.
            data: the client's labeled windows.
            received: result of the round before; empty in the first.

        Raises:
            UserError: the model or the windows do not fit the method.
        """

    @abstractmethod
    def from_sums(self, total: State) -> State:
        """Result of a round from the sums over all clients. It is sent to the clients with the next round.

        Raises:
            UserError: no client has a labeled window.
        """


def add_sums(messages: Sequence[State]) -> State:
    """Sums over clients, added in their order.

    >>> add_sums([{"n": torch.ones(2)}, {"n": torch.ones(2)}])
    {'n': tensor([2., 2.])}
    """
    total = dict(messages[0])
    for message in messages[1:]:
        total = {name: total[name] + message[name] for name in total}
    return total


def exchange_sums(method: SumsMethod, exchange: Callable[[int, State], State]) -> State:
    """The result of all rounds of a method.

    Args:
        method: the method.
        exchange: returns the sums over all clients of a round, from its number, which starts at 0, and the result of
            the round before.
    """
    received: State = {}
    for number in range(method.sum_rounds):
        received = method.from_sums(exchange(number, received))
    return received


def sums_of_users(method: SumsMethod, model: nn.Module | None, users: Sequence[LabeledWindows]) -> State:
    """The result of all rounds of a method over users whose data are in this process.

    Raises:
        UserError: no users, or as the method.
    """

    def exchange(_number: int, received: State) -> State:
        return add_sums([method.client_sums(model, user, received) for user in users])

    return exchange_sums(method, exchange)


def positive(matrix: Tensor) -> Tensor:
    """Symmetric matrices ``[..., D, D]`` with negative eigenvalues, which noise can cause, replaced by 0.

    >>> positive(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    tensor([[1., 0.],
            [0., 0.]])
    """
    matrix = (matrix + matrix.mT) / 2
    values, vectors = torch.linalg.eigh(matrix)
    if bool((values >= 0).all()):
        return matrix
    return vectors @ torch.diag_embed(values.clamp_min(0)) @ vectors.mT
