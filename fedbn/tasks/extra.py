"""Metrics of the user, in addition to those of a task: functions ``(outputs, y)`` and metrics of torchmetrics."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.objects import MEMORY, reference, resolve

Metric = Callable[[Tensor, Tensor], Any]


def metric_text(value: Any) -> str:
    """The text of a metric: its name, or the reference of an object.

    Args:
        value: a text; a function ``(outputs, y)`` of outputs ``[n, *output_shape]`` and targets ``[n, ...]`` that
            returns a number; or a metric of torchmetrics, or its class. An attribute ``higher_is_better`` is the
            direction; True without one.

    Raises:
        UserError: another object.

    >>> metric_text("accuracy"), metric_text(re.fullmatch)
    ('accuracy', 're:fullmatch')
    """
    if isinstance(value, str):
        return value
    if not callable(value):
        raise UserError(f"metric must be a text, a function (outputs, y) or a metric of torchmetrics, not {value!r}")
    return reference(value)


def metric_name(text: str) -> str:
    """Name of the metric with a reference, in tables.

    >>> metric_name("mine.metrics:within_two"), metric_name("memory:within_two-0123456789ab")
    ('within_two', 'within_two')
    """
    module, _, name = text.partition(":")
    name = name.rpartition("-")[0] if module == MEMORY else name.rpartition(".")[2]
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def is_higher_better(text: str) -> bool:
    """Direction of the metric with a reference."""
    return getattr(_resolve(text), "higher_is_better", None) is not False


def metric_value(text: str, outputs: Tensor, y: Tensor) -> float:
    """Value of the metric with a reference; NaN where it is undefined.

    Raises:
        UserError: it raises an error, or returns something else than a number.
    """
    metric = _resolve(text)
    try:
        if inspect.isclass(metric):
            metric = metric()
        elif isinstance(metric, nn.Module):  # metrics of torchmetrics accumulate
            metric = copy.deepcopy(metric)
        value = metric(outputs, y)
    except Exception as error:  # a user's function may raise anything
        raise UserError(
            f"metric {text!r} fails on outputs of shape {list(outputs.shape)} and targets of shape {list(y.shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"metric {text!r} must return a number, not a {type(value).__name__}") from None


def _resolve(text: str) -> Any:
    found = resolve(text, "metric")
    if not callable(found):
        raise UserError(f"metric {text!r} is a {type(found).__name__}, which cannot be called: name a function")
    return found
