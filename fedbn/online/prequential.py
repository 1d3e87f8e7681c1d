r"""Prequential evaluation: each window of a stream is predicted before the model learns from it.

A stream is test and training data at the same time (Dawid, 1984, *Statistical theory: the prequential approach*).
Because means hide individual users, `fedbn.online.prequential_metrics` also reports the worst tenth and the share of
*harmed* users, whose accuracy is more than a percentage point below that of the source model without adaptation.

Two oracles use the same windows: statistics of the user's whole stream (AdaBN, without labels), and of equally many
windows of each class (with labels). On label-correlated streams they differ widely, and the first may be worse than
the source.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedbn.data.population import Examples
from fedbn.nn.inference import logits
from fedbn.nn.plain import copy_model
from fedbn.seeds import generator
from fedbn.statistics.recalibration import recalibrate
from fedbn.streams import FOREIGN, Stream

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class OnlineModel(Protocol):
    """Model for many users: ``predict`` does not change it, ``commit`` learns from the last predicted rows."""

    def predict(self, x: Tensor, user: Sequence[str]) -> Tensor: ...

    def commit(self, posterior: Tensor | None = None) -> Any: ...


@dataclass(frozen=True, eq=False)
class Trace:
    """Predictions on one stream, by window.

    Attributes:
        user: user of the stream.
        digest: digest of the stream; only traces with the same digest can be compared.
        y: ``[n]`` labels; `fedbn.streams.FOREIGN` for windows that are not scored.
        predicted: ``[n]`` classes.
        confidence: ``[n]`` probability of the predicted class.
        nll: ``[n]`` negative log-likelihood of the label, in nats; NaN if not scored.
        seconds: ``[n]`` time to predict and learn; the time of a call is divided equally among its windows.
    """

    user: str
    digest: str
    y: Ints
    predicted: Ints
    confidence: Floats
    nll: Floats
    seconds: Floats

    @staticmethod
    def of(stream: Stream, outputs: Tensor, seconds: Floats | None = None) -> Trace:
        """Trace from logits ``[n, classes]``."""
        logp = outputs.detach().double().cpu().log_softmax(1)
        y = stream.y.cpu()
        top = logp.max(1)
        nll = -logp.gather(1, y.clamp_min(0)[:, None])[:, 0]
        return Trace(
            stream.user,
            stream.digest,
            y.numpy(),
            top.indices.numpy(),
            top.values.exp().numpy(),
            nll.where(y != FOREIGN, torch.nan).numpy(),
            np.full(len(y), np.nan) if seconds is None else seconds,
        )

    @property
    def scored(self) -> NDArray[np.bool_]:
        """``[n]`` whether each window is scored."""
        return np.asarray(self.y != FOREIGN)

    @property
    def correct(self) -> Floats:
        """``[n]`` 1 for correct, 0 for wrong predictions, NaN if not scored."""
        return np.where(self.scored, (self.y == self.predicted).astype(float), np.nan)


# ---------------------------------------------------------------- evaluation


@dataclass
class ActiveLabeling:
    """Active learning: query the label if the predicted class has the fewest labeled windows of this user.

    There are at most ``budget`` queries per user. A queried label replaces the posterior in the update.

    Attributes:
        budget: maximum number of queries per user.
        labeled: number of labeled windows of each class, by user.

    >>> labeling = ActiveLabeling(budget=5)
    >>> certain = torch.tensor([1.0, 0.0])
    >>> first = labeling.query("ann", certain, label=0)
    >>> labeling.query("ann", certain, label=0) is certain  # now only class 1 would be queried
    True
    """

    budget: int
    labeled: dict[str, list[int]] = field(default_factory=dict)

    def query(self, user: str, posterior: Tensor, label: int) -> Tensor:
        """Posterior ``[classes]`` to learn from: unchanged, or one-hot if the label was queried."""
        counts = self.labeled.setdefault(user, [0] * len(posterior))
        is_rarest = counts[int(posterior.argmax())] == min(counts)
        if label == FOREIGN or not is_rarest or sum(counts) >= self.budget:
            return posterior
        counts[label] += 1
        return torch.zeros_like(posterior).index_fill(0, torch.tensor(label, device=posterior.device), 1.0)


def follow(net: OnlineModel, streams: Sequence[Stream], labeling: ActiveLabeling | None = None) -> list[Trace]:
    """Evaluate the streams of many users in parallel, with window t of all streams in one call.

    Args:
        net: model with one state per user. It learns from its own softmax.
        streams: streams of different users, of any lengths.
        labeling: provides labels of single windows after their prediction; None: labels are not used.

    Returns:
        One trace per stream, in the same order.

    Raises:
        ValueError: a user has two streams.
    """
    names = [s.user for s in streams]
    if len(set(names)) < len(names):
        raise ValueError(f"each user must have one stream, got {names}")
    outputs: list[list[Tensor]] = [[] for _ in streams]
    seconds: list[list[float]] = [[] for _ in streams]
    for t in range(max(map(len, streams))):
        active = [i for i, s in enumerate(streams) if t < len(s)]
        rows = torch.stack([streams[i].x[t] for i in active])
        start = time.perf_counter()
        out = net.predict(rows, user=[names[i] for i in active])
        posterior = out.softmax(1)
        if labeling is not None:
            rows_of = zip(active, posterior, strict=True)
            posterior = torch.stack([labeling.query(names[i], p, int(streams[i].y[t])) for i, p in rows_of])
        net.commit(posterior=posterior)
        duration = (time.perf_counter() - start) / len(active)
        for i, row in zip(active, out, strict=True):
            outputs[i].append(row)
            seconds[i].append(duration)
    return [Trace.of(s, torch.stack(o), np.array(sec)) for s, o, sec in zip(streams, outputs, seconds, strict=True)]


def follow_blocks(step: Callable[[Tensor], Tensor], stream: Stream, block: int) -> Trace:
    """Evaluate one stream in blocks, with a function that predicts and learns in one call.

    For methods that cannot process single windows. Whether a window is part of the statistics that normalize it depends
    on the method (`fedbn.tta.Method.includes_current`).

    Args:
        step: maps windows ``[b, *shape]`` to logits ``[b, classes]``.
        stream: stream of one user.
        block: windows per call. The last block may be smaller. A single last window is added to the block before,
            because it has no batch statistics.
    """
    outputs: list[Tensor] = []
    seconds: list[float] = []
    parts = list(stream.x.split(block))
    if len(parts) > 1 and len(parts[-1]) == 1 < block:
        parts[-2:] = [torch.cat(parts[-2:])]
    for rows in parts:
        start = time.perf_counter()
        outputs.append(step(rows).detach())
        seconds += [(time.perf_counter() - start) / len(rows)] * len(rows)
    return Trace.of(stream, torch.cat(outputs), np.array(seconds))


# ---------------------------------------------------------------- baseline and oracles


def source_baseline(model: nn.Module, stream: Stream) -> Trace:
    """The source model without adaptation."""
    return Trace.of(stream, logits(model, stream.x))


def own_stream_oracle(model: nn.Module, stream: Stream) -> Trace:
    """Oracle with the statistics of the user's whole stream (AdaBN, Li et al. 2016); no labels."""
    return Trace.of(stream, logits(recalibrate(copy_model(model), stream.x), stream.x))


def balanced_oracle(model: nn.Module, stream: Stream, seed: int) -> Trace:
    """Oracle with the statistics of equally many windows of each class of the stream; uses labels."""
    rows = balanced_rows(stream.y, generator(seed, "balanced oracle", stream.user))
    return Trace.of(stream, logits(recalibrate(copy_model(model), stream.x[rows]), stream.x))


def balanced_rows(y: Tensor, draw: torch.Generator, limit: int | None = None) -> Tensor:
    """Rows with equally many of each class: as many as the rarest class has, and at most ``limit``.

    >>> y = torch.tensor([0, 0, 0, 1, 1, -1])
    >>> y[balanced_rows(y, torch.Generator())].tolist()
    [0, 0, 1, 1]
    """
    labels = y.cpu()
    rows = [(labels == c).nonzero()[:, 0] for c in labels.unique().tolist() if c != FOREIGN]
    n = min(min(map(len, rows)), limit if limit is not None else len(labels))
    return torch.cat([r[torch.randperm(len(r), generator=draw)[:n]].sort().values for r in rows])


def accuracy_with_state(net: OnlineModel, user: str, data: Examples, chunk: int = 256) -> float:
    """Accuracy on ``data`` with one user's statistics, without updates. On source data it measures forgetting."""
    parts = zip(data.x.split(chunk), data.y.split(chunk), strict=True)
    correct = sum(int((net.predict(x, user=[user] * len(x)).argmax(1) == y).sum()) for x, y in parts)
    return correct / len(data)
