r"""Predict, then learn, and only then look at the label: how well a rule follows streams, for whom, and at what cost.

Every window is predicted with what was known before it, so a stream tests and teaches at once (Dawid, 1984,
*Statistical theory: the prequential approach*). Means hide people, so next to the mean stand the worst tenth, and the
share of users who are *harmed*: more than a point below the source model, which does nothing.

Two bounds are measured on the same windows: statistics of the user's own whole stream (AdaBN, without labels), and of
as many windows of each class (with labels). On label-correlated streams they differ widely, and the first may be worse
than the source.
"""

from __future__ import annotations

import copy
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
from fedbn.seeds import generator
from fedbn.statistics.recalibration import recalibrate
from fedbn.streams import FOREIGN, Stream

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Follower(Protocol):
    """What follows many users at once: ``predict`` never learns, ``commit`` learns from the rows predicted last."""

    def predict(self, x: Tensor, user: Sequence[str]) -> Tensor: ...

    def commit(self, posterior: Tensor | None = None) -> Any: ...


@dataclass(frozen=True, eq=False)
class Trace:
    """What a rule said on one stream, window by window.

    Attributes:
        user: whose stream.
        digest: of the stream; traces are compared only where it is the same.
        y: ``[n]`` labels, `fedbn.streams.FOREIGN` where a window is not scored.
        predicted: ``[n]`` classes.
        confidence: ``[n]`` probability given to the class predicted.
        nll: ``[n]`` minus the log-probability of the label, in nats; NaN where not scored.
        seconds: ``[n]`` time to predict and learn, an equal share of its call each.
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
        """From logits ``[n, classes]``."""
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
        """``[n]`` which windows count."""
        return np.asarray(self.y != FOREIGN)

    @property
    def correct(self) -> Floats:
        """``[n]`` 1 where right, 0 where wrong, NaN where not scored."""
        return np.where(self.scored, (self.y == self.predicted).astype(float), np.nan)


# ---------------------------------------------------------------- following


@dataclass
class Ask:
    """Active requests: ask a user what they are doing when it seems to be what was confirmed least often.

    A question is put when the predicted class has, among all classes, the fewest confirmed windows of this user, and
    at most ``budget`` times a user. What is answered takes the place of the posterior that is learnt from.

    Attributes:
        budget: questions a user answers.
        confirmed: user -> class -> windows confirmed so far.

    >>> ask = Ask(budget=5)
    >>> certain = torch.tensor([1.0, 0.0])
    >>> first = ask.about("ann", certain, label=0)
    >>> ask.about("ann", certain, label=0) is certain  # class 1 is the one to ask for now
    True
    """

    budget: int
    confirmed: dict[str, list[int]] = field(default_factory=dict)

    def about(self, user: str, posterior: Tensor, label: int) -> Tensor:
        """The posterior ``[classes]`` to learn from: as it is, or the label's where the user was asked."""
        counts = self.confirmed.setdefault(user, [0] * len(posterior))
        wanted = counts[int(posterior.argmax())] == min(counts)
        if label == FOREIGN or not wanted or sum(counts) >= self.budget:
            return posterior
        counts[label] += 1
        return torch.zeros_like(posterior).index_fill(0, torch.tensor(label, device=posterior.device), 1.0)


def follow(net: Follower, streams: Sequence[Stream], ask: Ask | None = None) -> list[Trace]:
    """Many users side by side: window t of all streams in one call, whatever their lengths.

    Args:
        net: keeps one state for each name; its own softmax is what it learns from.
        streams: of users with different names.
        ask: gets labels of single windows, after they are predicted; None: no label is ever seen.

    Returns:
        One trace a stream, in their order.

    Raises:
        ValueError: a user has two streams.
    """
    names = [s.user for s in streams]
    if len(set(names)) < len(names):
        raise ValueError(f"one stream a user, not {names}")
    said: list[list[Tensor]] = [[] for _ in streams]
    spent: list[list[float]] = [[] for _ in streams]
    for t in range(max(map(len, streams))):
        present = [i for i, s in enumerate(streams) if t < len(s)]
        rows = torch.stack([streams[i].x[t] for i in present])
        began = time.perf_counter()
        out = net.predict(rows, user=[names[i] for i in present])
        posterior = out.softmax(1)
        if ask is not None:
            labeled = zip(present, posterior, strict=True)
            posterior = torch.stack([ask.about(names[i], p, int(streams[i].y[t])) for i, p in labeled])
        net.commit(posterior=posterior)
        took = (time.perf_counter() - began) / len(present)
        for i, row in zip(present, out, strict=True):
            said[i].append(row)
            spent[i].append(took)
    return [Trace.of(s, torch.stack(o), np.array(sec)) for s, o, sec in zip(streams, said, spent, strict=True)]


def follow_blocks(step: Callable[[Tensor], Tensor], stream: Stream, block: int) -> Trace:
    """One user, ``block`` windows at a time, by a function that answers and learns in one.

    For methods that cannot take a single window. Whether a window is inside the statistics it is normalized by is the
    method's affair (`fedbn.tta.Method.includes_current`).

    Args:
        step: windows ``[b, *shape]`` to logits ``[b, classes]``.
        stream: what it meets.
        block: windows a call; the last may hold fewer, but a lone one joins those before: it has no batch statistics.
    """
    said: list[Tensor] = []
    spent: list[float] = []
    parts = list(stream.x.split(block))
    if len(parts) > 1 and len(parts[-1]) == 1 < block:
        parts[-2:] = [torch.cat(parts[-2:])]
    for rows in parts:
        began = time.perf_counter()
        said.append(step(rows).detach())
        spent += [(time.perf_counter() - began) / len(rows)] * len(rows)
    return Trace.of(stream, torch.cat(said), np.array(spent))


# ---------------------------------------------------------------- bounds


def source(model: nn.Module, stream: Stream) -> Trace:
    """The model as it is, never moved."""
    return Trace.of(stream, logits(model, stream.x))


def own_stream_oracle(model: nn.Module, stream: Stream) -> Trace:
    """Statistics of the user's whole stream, used from its first window on (AdaBN, Li et al. 2016); no labels."""
    return Trace.of(stream, logits(recalibrate(copy.deepcopy(model), stream.x), stream.x))


def balanced_oracle(model: nn.Module, stream: Stream, seed: int) -> Trace:
    """Statistics of equally many windows of each class of the stream, as many as the rarest has; labels are used."""
    chosen = balanced(stream.y, generator(seed, "balanced oracle", stream.user))
    return Trace.of(stream, logits(recalibrate(copy.deepcopy(model), stream.x[chosen]), stream.x))


def balanced(y: Tensor, draw: torch.Generator, most: int | None = None) -> Tensor:
    """Rows with equally many of each class that occurs: as the rarest has, and at most ``most``.

    >>> y = torch.tensor([0, 0, 0, 1, 1, -1])
    >>> y[balanced(y, torch.Generator())].tolist()
    [0, 0, 1, 1]
    """
    labels = y.cpu()
    rows = [(labels == c).nonzero()[:, 0] for c in labels.unique().tolist() if c != FOREIGN]
    each = min(min(map(len, rows)), most if most is not None else len(labels))
    return torch.cat([r[torch.randperm(len(r), generator=draw)[:each]].sort().values for r in rows])


# ---------------------------------------------------------------- measures of one user


# ---------------------------------------------------------------- measures over users


def _side_by_side(traces: Sequence[Trace], like: Sequence[Trace]) -> Floats:
    """``[users, windows]`` of right and wrong, NaN where there is nothing to score."""
    if [t.digest for t in traces] != [t.digest for t in like]:
        raise ValueError("traces of different streams cannot be compared")
    out = np.full((len(traces), max(len(t.y) for t in traces)), np.nan)
    for row, trace in zip(out, traces, strict=True):
        row[: len(trace.y)] = trace.correct
    return out


# ---------------------------------------------------------------- state and cost


def accuracy_with_state(net: Follower, user: str, data: Examples, chunk: int = 256) -> float:
    """Accuracy on ``data`` with one user's statistics, which stay as they are: on source data, what was forgotten."""
    parts = zip(data.x.split(chunk), data.y.split(chunk), strict=True)
    right = sum(int((net.predict(x, user=[user] * len(x)).argmax(1) == y).sum()) for x, y in parts)
    return right / len(data)
