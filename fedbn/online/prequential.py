r"""Prequential evaluation: each window of a stream is predicted before the model learns from it.

A stream is test and training data at the same time (Dawid, 1984, *Statistical theory: the prequential approach*).
Because means hide individual users, `fedbn.online.prequential_metrics` also reports the worst tenth and the share of
*harmed* users, for whom the task's metric is worse than that of the source model without adaptation.

Two oracles use the same windows: statistics of the user's whole stream (AdaBN, without labels), and, for tasks with
classes, of equally many windows of each class (with labels). On label-correlated streams they differ widely, and the
first may be worse than the source.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedbn.data.population import Examples
from fedbn.nn.inference import logits
from fedbn.nn.plain import copy_model
from fedbn.online.traces import Trace, trace_of
from fedbn.seeds import generator
from fedbn.statistics.recalibration import recalibrate
from fedbn.streams import FOREIGN, Stream
from fedbn.tasks import Task
from fedbn.tasks.classification import Classification

CLASSIFICATION = Classification()


class OnlineModel(Protocol):
    """Model for many users: ``predict`` does not change it, ``commit`` learns from the last predicted rows."""

    def predict(self, x: Tensor, user: Sequence[str]) -> Tensor: ...

    def commit(self, posterior: Tensor | None = None) -> Any: ...


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


def follow(
    net: OnlineModel,
    streams: Sequence[Stream],
    labeling: ActiveLabeling | None = None,
    task: Task = CLASSIFICATION,
) -> list[Trace]:
    """Evaluate the streams of many users in parallel, with window t of all streams in one call.

    Args:
        net: model with one state per user. It learns from its own class probabilities, if the task has any.
        streams: streams of different users, of any lengths.
        labeling: provides labels of single windows after their prediction, for tasks with classes; None: labels are not
            used.
        task: the task, which defines the metrics.

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
        posterior = task.posterior(out)
        if labeling is not None and posterior is not None:
            rows_of = zip(active, posterior, strict=True)
            posterior = torch.stack([labeling.query(names[i], p, int(streams[i].y[t])) for i, p in rows_of])
        net.commit(posterior=posterior)
        duration = (time.perf_counter() - start) / len(active)
        for i, row in zip(active, out, strict=True):
            outputs[i].append(row)
            seconds[i].append(duration)
    return [
        trace_of(s, torch.stack(o), task, np.array(sec)) for s, o, sec in zip(streams, outputs, seconds, strict=True)
    ]


def follow_blocks(step: Callable[[Tensor], Tensor], stream: Stream, block: int, task: Task = CLASSIFICATION) -> Trace:
    """Evaluate one stream in blocks, with a function that predicts and learns in one call.

    For methods that cannot process single windows. Whether a window is part of the statistics that normalize it depends
    on the method (`fedbn.tta.Method.includes_current`).

    Args:
        step: maps windows ``[b, *shape]`` to outputs ``[b, *output_shape]``.
        stream: stream of one user.
        block: windows per call. The last block may be smaller. A single last window is added to the block before,
            because it has no batch statistics.
        task: the task, which defines the metrics.
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
    return trace_of(stream, torch.cat(outputs), task, np.array(seconds))


# ---------------------------------------------------------------- baseline and oracles


def source_baseline(model: nn.Module, stream: Stream, task: Task = CLASSIFICATION) -> Trace:
    """The source model without adaptation."""
    return trace_of(stream, logits(model, stream.x), task)


def own_stream_oracle(model: nn.Module, stream: Stream, task: Task = CLASSIFICATION) -> Trace:
    """Oracle with the statistics of the user's whole stream (AdaBN, Li et al. 2016); no labels."""
    return trace_of(stream, logits(recalibrate(copy_model(model), stream.x), stream.x), task)


def balanced_oracle(model: nn.Module, stream: Stream, seed: int, task: Task = CLASSIFICATION) -> Trace:
    """Oracle with the statistics of equally many windows of each class of the stream; uses labels."""
    rows = balanced_rows(stream.y, generator(seed, "balanced oracle", stream.user))
    return trace_of(stream, logits(recalibrate(copy_model(model), stream.x[rows]), stream.x), task)


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


def metric_with_state(
    net: OnlineModel, user: str, data: Examples, task: Task = CLASSIFICATION, chunk: int = 256
) -> float:
    """Mean of the task's `fedbn.tasks.Task.example_metric` with one user's statistics, without updates.

    On source data it measures forgetting.
    """
    parts = zip(data.x.split(chunk), data.y.split(chunk), strict=True)
    values = [task.example_values(net.predict(x, user=[user] * len(x)), y) for x, y in parts]
    return float(torch.cat(values).nanmean())
