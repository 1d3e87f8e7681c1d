"""Base class of tasks. A task is a value: everything below it is independent of classes and accuracy."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from fedbn.data.labels import encode_numbers
from fedbn.data.population import Population
from fedbn.errors import UserError
from fedbn.plugins import build, discover, parse, render, text_of
from fedbn.tasks.extra import is_higher_better, metric_name, metric_value


@dataclass(frozen=True)
class Task(ABC):
    """Base class of tasks; fields are options. Subclasses are in ``fedbn.tasks``, one per module.

    Targets ``y`` are ``[n, ...]``, outputs ``[n, *output_shape]``. The first axis of the output shape has the outputs
    (classes, labels, ...), and further axes are positions, such as pixels.

    Attributes:
        name: name on the command line.
        about: one-line description.
        metrics: names of the metrics, and whether higher is better. The first is the default of tables.
        metrics_are_shares: whether all its metrics are numbers from 0 to 1; other values in a client's reply are
            refused.
        example_metric: the metric that `example_values` computes, for learning curves over the windows of a stream.
        extra_metrics: further metrics, as ``package.module:function`` (`fedbn.tasks.extra`).
    """

    name: ClassVar[str]
    about: ClassVar[str]
    metrics: ClassVar[dict[str, bool]]
    metrics_are_shares: ClassVar[bool] = False
    example_metric: ClassVar[str] = "loss"

    _: KW_ONLY
    extra_metrics: tuple[str, ...] = ()

    @property
    def directions(self) -> dict[str, bool]:
        """All metrics, with the loss, and whether higher is better."""
        extra = {metric_name(text): is_higher_better(text) for text in self.extra_metrics}
        return {**self.metrics, **extra, "loss": False}

    @property
    def main_metric(self) -> str:
        """The metric of learning curves, and of tables if no other is chosen."""
        return next(iter(self.directions))

    @abstractmethod
    def output_shape(self, y: Tensor, classes: Sequence[str]) -> tuple[int, ...]:
        """Shape of the outputs of one example.

        Args:
            y: some targets ``[n, ...]``.
            classes: class names of the population; empty without classes.
        """

    @abstractmethod
    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Loss ``[n]`` of each example, which does not depend on the other examples."""

    @abstractmethod
    def scores(self, outputs: Tensor, y: Tensor) -> dict[str, float]:
        """Value of each metric over all examples. An undefined metric is left out."""

    def curve_scores(self, outputs: Tensor, y: Tensor) -> dict[str, float]:
        """The values of `scores` that are needed before the last round: the main metric, and what costs little more."""
        return self.scores(outputs, y)

    def example_values(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Value ``[n]`` of `example_metric` for each example, in double precision; its mean is the metric.

        NaN if it is undefined for an example.
        """
        return self.losses(outputs.double(), y)

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Mean loss of a batch."""
        return self.losses(outputs, y).mean()

    def stacked_losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Losses ``[K, B]`` of K clients, from outputs ``[K, outputs, B, *positions]`` and targets ``[K, B, ...]``."""
        k, _, batch = outputs.shape[:3]
        return self.losses(outputs.transpose(1, 2).flatten(0, 1), y.flatten(0, 1)).view(k, batch)

    def stacked_gradients(self, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """`stacked_losses`, and the gradient of their sum with respect to the outputs."""
        with torch.enable_grad():
            outputs = outputs.detach().requires_grad_()
            losses = self.stacked_losses(outputs, y)
            (gradient,) = torch.autograd.grad(losses.sum(), outputs)
        return losses.detach(), gradient

    def evaluate(self, outputs: Tensor, y: Tensor, *, final: bool = True) -> dict[str, float]:
        """Metrics, with the loss in double precision.

        Args:
            outputs: ``[n, *output_shape]``.
            y: targets ``[n, ...]``.
            final: whether to compute all metrics; otherwise, only those of `curve_scores`.
        """
        values = self.scores(outputs, y) if final else self.curve_scores(outputs, y)
        if final or not self.metrics:
            values = values | self.extra_scores(outputs, y)
        return {**values, "loss": float(self.loss(outputs.double(), y))}

    def extra_scores(self, outputs: Tensor, y: Tensor) -> dict[str, float]:
        """Value of each extra metric. An undefined metric is left out.

        Raises:
            UserError: a metric fails, or returns something else than a number.
        """
        values = {metric_name(text): metric_value(text, outputs, y) for text in self.extra_metrics}
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def with_metric(self, text: str) -> Self:
        """The task with one more metric.

        Raises:
            UserError: it cannot be imported or called, or the task has another metric with its name.
        """
        if text in self.extra_metrics:
            return self
        if (name := metric_name(text)) in self.directions:
            raise UserError(f"metric {text!r}: task {self.name!r} already has a metric {name!r}; rename the function")
        is_higher_better(text)
        return replace(self, extra_metrics=(*self.extra_metrics, text))

    def evaluate_users(
        self, outputs: Tensor, y: Tensor, n: Sequence[int], *, final: bool = True
    ) -> list[dict[str, float]]:
        """`evaluate` for K users, padded to the same number of examples.

        Args:
            outputs: ``[K, B, *output_shape]``.
            y: targets ``[K, B, ...]``.
            n: number of examples of each user; the remaining ones are padding.
            final: as in `evaluate`.
        """
        return [self.evaluate(outputs[i, :rows], y[i, :rows], final=final) for i, rows in enumerate(n)]

    def predict(self, outputs: Tensor) -> Tensor:
        """What a service returns for outputs ``[n, *output_shape]``, of the same shape; the outputs by default.

        Probabilities for tasks with logits, values in the units of the targets for regression.
        """
        return outputs

    def posterior(self, outputs: Tensor) -> Tensor | None:
        """Class probabilities ``[n, classes]`` of each example; None if an example does not have one class."""
        return None

    @property
    def is_cross_entropy(self) -> bool:
        """Whether the loss is the plain cross-entropy of one class per example."""
        return False

    @property
    def has_posterior(self) -> bool:
        """Whether an example has one class, so that rules can learn by class."""
        return type(self).posterior is not Task.posterior

    def check(self, y: Tensor, classes: Sequence[str]) -> str | None:
        """What is wrong with targets; None if they fit. Training with targets that fit must not fail."""
        return None

    def notices(self, population: Population) -> list[str]:
        """Notices about targets that fit but may surprise.

        Raises:
            UserError: nothing can be learned from them.
        """
        return []

    def fit(self, y: Tensor, classes: Sequence[str]) -> Task:
        """The task with the values that depend on the training targets of all seen users, such as class weights."""
        return self

    def encode(self, values: np.ndarray, name: str, classes: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
        """Targets and class names from the values of a file.

        Args:
            values: ``[n, ...]``.
            name: file name, for messages.
            classes: class names that the file has.
        """
        return encode_numbers(values, name), ()


def tasks() -> dict[str, type[Task]]:
    """All discovered tasks, by name."""
    return discover("fedbn.tasks", Task)


def parse_task(text: str) -> Task:
    """Parse a task such as ``regression:loss=huber``, or ``package.module:Class`` with options.

    Raises:
        UserError: unknown name or option, or a class that cannot be imported.

    >>> parse_task("classification:smoothing=0.1").smoothing
    0.1
    >>> parse_task("fedbn.tasks.regression:Regression:loss=mae") == parse_task("regression:loss=mae")
    True
    """
    return parse(text, "task", tasks(), Task)


def render_task(task: str | Task | type[Task]) -> str:
    """The shortest text that `parse_task` converts to a task.

    Raises:
        UserError: as `parse_task`, or another object.

    >>> render_task("regression:loss=mse"), render_task(parse_task("regression"))
    ('regression', 'regression')
    """
    text = text_of(task, "task", tasks(), Task)
    return render(parse_task(text)) if isinstance(task, str) else text


def check_targets(task: Task, y: Tensor, classes: Sequence[str], what: str) -> None:
    """Raise unless targets fit a task.

    Args:
        task: the task.
        y: targets ``[n, ...]``.
        classes: class names of the population.
        what: whose targets they are, for the message.

    Raises:
        UserError: they do not fit; a task that fits is suggested.
    """
    if (reason := task.check(y, classes)) is None:
        return
    fitting = [name for name, cls in tasks().items() if _fits(cls, y, classes)]
    advice = f"choose --task {' or '.join(fitting)}, or correct the targets" if fitting else "correct the targets"
    raise UserError(f"{what}: {reason}; {advice}")


def _fits(cls: type[Task], y: Tensor, classes: Sequence[str]) -> bool:
    try:
        return build(cls, {}, cls.name).check(y, classes) is None
    except Exception:  # a task of another package that needs options
        return False


def describe_targets(y: Tensor) -> str:
    """Shape of an example's targets and their type, for messages.

    >>> import torch
    >>> describe_targets(torch.zeros(5, 3))
    'float32 targets of shape [3]'
    """
    kind = str(y.dtype).removeprefix("torch.")
    return f"{kind} targets of shape {list(y.shape[1:])}" if y.dim() > 1 else f"one {kind} target per row"
