"""Traces: what a model predicted on a stream, window by window.

Of classification, the predictions are stored. Of other tasks, the values of the metrics are: outputs may be maps of
pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedbn.streams import FOREIGN, Stream
from fedbn.tasks import Task
from fedbn.tasks.classification import Classification

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ClassTrace:
    """Predicted classes.

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
    def of_logits(stream: Stream, outputs: Tensor, seconds: Floats | None = None) -> ClassTrace:
        """Trace from logits ``[n, classes]``."""
        logp = outputs.detach().double().cpu().log_softmax(1)
        y = stream.y.cpu()
        top = logp.max(1)
        nll = -logp.gather(1, y.clamp_min(0)[:, None])[:, 0]
        return ClassTrace(
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
    def values(self) -> Floats:
        """``[n]`` 1 for correct, 0 for wrong predictions, NaN if not scored."""
        return np.where(self.scored, (self.y == self.predicted).astype(float), np.nan)

    @property
    def higher_is_better(self) -> bool:
        """Whether higher `values` are better."""
        return True

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, eq=False)
class TaskTrace:
    """Values of a task's metrics.

    Attributes:
        user, digest, seconds: as in `ClassTrace`.
        values: ``[n]`` value of the task's `fedbn.tasks.Task.example_metric` for each window; NaN if not scored.
        losses: ``[n]`` loss of each window; NaN if not scored.
        metrics: value of each metric over all scored windows, with the loss. Undefined metrics are left out.
        higher_is_better: whether higher `values` are better.
    """

    user: str
    digest: str
    values: Floats
    losses: Floats
    seconds: Floats
    metrics: dict[str, float]
    higher_is_better: bool

    @staticmethod
    def of_outputs(stream: Stream, outputs: Tensor, task: Task, seconds: Floats | None = None) -> TaskTrace:
        """Trace from outputs ``[n, *output_shape]``."""
        outputs, y = outputs.detach().cpu(), stream.y.cpu()
        scored = y != FOREIGN if task.has_posterior else torch.ones(len(y), dtype=torch.bool)
        outputs, y = outputs[scored], y[scored]
        values, losses = torch.full((2, len(scored)), torch.nan, dtype=torch.float64)
        values[scored] = task.example_values(outputs, y).double()
        losses[scored] = task.losses(outputs.double(), y).double()
        return TaskTrace(
            stream.user,
            stream.digest,
            values.numpy(),
            losses.numpy(),
            np.full(len(values), np.nan) if seconds is None else seconds,
            task.evaluate(outputs, y),
            task.directions[task.example_metric],
        )

    @property
    def scored(self) -> NDArray[np.bool_]:
        """``[n]`` whether each window is scored."""
        return ~np.isnan(self.values)

    def __len__(self) -> int:
        return len(self.values)


Trace = ClassTrace | TaskTrace


def trace_of(stream: Stream, outputs: Tensor, task: Task, seconds: Floats | None = None) -> Trace:
    """Trace of a stream from outputs ``[n, *output_shape]``."""
    if type(task) is Classification:
        return ClassTrace.of_logits(stream, outputs, seconds)
    return TaskTrace.of_outputs(stream, outputs, task, seconds)
