r"""A classifier that matches the statistics with which a model is served: the *matched head*.

Clients train under the statistics of their own batches, and the model is served with averaged statistics, so the last
layer was never trained on the features :math:`f` that it receives. In one round without gradients, clients send sums of
these features, from which the server computes linear discriminant analysis (Fisher, 1936,
https://doi.org/10.1111/j.1469-1809.1936.tb02137.x) with a shrunken covariance (Friedman, 1989,
https://doi.org/10.1080/01621459.1989.10478752):

.. math::
    \mu_k=\frac{\sum_{y=k}f}{n_k},\quad S=\frac1n\Big(\sum ff^\top-\sum_k n_k\mu_k\mu_k^\top\Big),\quad
    S_\lambda=(1-\lambda)S+\lambda\tfrac{\mathrm{tr}S}{D}I,\\
    \log p_h(k\mid f)=f^\top S_\lambda^{-1}\mu_k-\tfrac12\mu_k^\top S_\lambda^{-1}\mu_k+\log\tfrac{n_k}{n}+c .

The answer is :math:`\log p=w\log p_h(k\mid f_0)+\log p_R`, with the features :math:`f_0` under the served statistics,
which do not adapt, and the probabilities :math:`p_R` of the adapted network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.nn.hooks import capture_inputs
from fedbn.nn.roles import State, head_layer
from fedbn.online.sums import LabeledWindows, SumsMethod, positive, sums_of_users
from fedbn.plugins import parse
from fedbn.statistics.recalibration import CHUNK

RARE = 1e-9
"""Smallest share of a class."""


@dataclass(frozen=True)
class Matched(SumsMethod):
    """Options of the matched head.

    Attributes:
        weight: weight w of its log probabilities relative to the network's; ``inf`` uses the head alone.
        shrink: share lambda of a multiple of the identity in the covariance.
    """

    name = "matched"
    about = "linear discriminant analysis of features under the served statistics, mixed with the network"
    source = "proposed by this project, after Fisher 1936 and Friedman 1989"

    weight: float = 0.1
    shrink: float = 0.05

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise UserError(f"'matched': weight={self.weight:g} is out of range; use 0 or more, or inf")
        if not 0 < self.shrink <= 1:
            raise UserError(f"'matched': shrink={self.shrink:g} is out of range; use more than 0 and at most 1")

    def client_sums(self, model: nn.Module | None, data: LabeledWindows, received: State) -> State:
        """The counts ``n`` ``[K]``, class sums ``first`` ``[K, D]`` and ``second`` ``[D, D]`` of a client's features.

        Raises:
            UserError: the model's last layer is not linear.
        """
        assert model is not None
        features, one_hot = served_features(model, data.x).double(), data.one_hot
        return {"n": one_hot.sum(0), "first": one_hot.T @ features, "second": features.T @ features}

    def from_sums(self, total: State) -> State:
        """The weight ``[K, D]`` and bias ``[K]`` of the head, float64.

        Raises:
            UserError: no client has a labeled window.
        """
        n, first, second = total["n"].clamp_min(0), total["first"], total["second"]
        if not n.sum() > 0:
            raise UserError("head 'matched' needs labeled windows of seen clients: none has any")
        mean = torch.where(n[:, None] > 0, first / n.clamp_min(1e-12)[:, None], 0.0)
        cov = positive((second - (n[:, None] * mean).T @ mean) / n.sum())
        # A tiny multiple of the identity makes features that never vary invertible.
        scale = (cov.trace() / len(cov)).clamp_min(1e-12)
        cov = (1 - self.shrink) * cov + self.shrink * scale * torch.eye(len(cov)).to(cov)
        weight = torch.linalg.solve(cov, mean.T).T
        bias = -0.5 * (mean * weight).sum(1) + (n / n.sum()).clamp_min(RARE).log()
        return {"weight": weight, "bias": bias}


@dataclass(frozen=True)
class MatchedHead:
    """A matched head with the sums of a federation.

    Attributes:
        options: options of the head.
        weight: ``[K, D]``.
        bias: ``[K]``.
    """

    options: Matched
    weight: Tensor
    bias: Tensor

    def mix(self, features: Tensor, logits: Tensor) -> Tensor:
        """Unnormalized log probabilities ``[B, K]`` of the answer, from features ``[B, D]`` and adapted ``logits``."""
        own = nn.functional.linear(features, self.weight.to(features), self.bias.to(features)).log_softmax(1)
        w = self.options.weight
        return own if w == math.inf else w * own.to(logits) + logits.log_softmax(1)

    def to(self, function: Callable[[Tensor], Tensor]) -> MatchedHead:
        """Copy with every tensor replaced by ``function(tensor)``."""
        return replace(self, weight=function(self.weight), bias=function(self.bias))


def fit_matched_head(
    model: nn.Module, users: Sequence[tuple[Tensor, Tensor]], classes: int, options: Matched | str = "matched"
) -> MatchedHead:
    """Compute the matched head from seen users.

    Args:
        model: the served model; it is set to evaluation mode.
        users: windows ``[n, *shape]`` and labels ``[n]`` of each seen user.
        classes: number of classes K.
        options: options, as an object or a text such as ``matched:weight=0.2``.

    Raises:
        UserError: no users or labels, or the model's last layer is not linear.

    >>> _ = torch.manual_seed(0)
    >>> model, y = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)), torch.arange(2).repeat(20)
    >>> head = fit_matched_head(model, [(torch.randn(40, 2) + 3 * y[:, None], y)], 2)
    >>> head.mix(torch.tensor([[3.0, 3.0]]), torch.zeros(1, 2)).argmax().item()
    1
    """
    chosen = parse_matched(options) if isinstance(options, str) else options
    if not users:
        raise UserError("head 'matched' needs labeled windows of seen users: pass at least one user")
    data = [LabeledWindows(x, y, classes) for x, y in users]
    return MatchedHead(chosen, **sums_of_users(chosen, model, data))


@contextmanager
def record_features(model: nn.Module) -> Iterator[list[Tensor]]:
    """Context manager that lists the input ``[B, D]`` of the model's last layer in each pass.

    Raises:
        UserError: the model's last layer is not linear.
    """
    path, layer = head_layer(model)
    if not isinstance(layer, nn.Linear):
        raise UserError(
            "head 'matched' replaces a linear last layer, and this model has none: leave it out, or use a model that "
            "ends with torch.nn.Linear"
        )
    found: list[Tensor] = []
    with capture_inputs({path: layer}, lambda _path, value: found.append(value.detach())):
        yield found


def served_features(model: nn.Module, x: Tensor) -> Tensor:
    """Inputs ``[n, D]`` of the last layer in evaluation mode.

    Raises:
        UserError: the model's last layer is not linear, or it runs several times or on several positions.
    """
    model.eval()
    with torch.no_grad(), record_features(model) as found:
        for rows in x.split(CHUNK):
            model(rows)
    features = torch.cat(found)
    if features.shape[:-1] != (len(x),):
        raise UserError("head 'matched' needs one vector of features per window: leave it out for this model")
    return features


def parse_matched(text: str) -> Matched:
    """Options from a text such as ``matched:weight=0.2``.

    Raises:
        UserError: unknown option, or a value out of range.
    """
    return parse(text, "head", {Matched.name: Matched})


def split_head(text: str) -> tuple[str, str]:
    """Rule and head of a text such as ``rotation+pseudo+matched``; each is empty if the text has none.

    >>> split_head("rotation+pseudo+matched:weight=1"), split_head("matched"), split_head("pseudo")
    (('rotation+pseudo', 'matched:weight=1'), ('', 'matched'), ('pseudo', ''))
    """
    first, _, last = text.rpartition("+")
    return (first, last) if last.split(":")[0] == Matched.name else (text, "")
