"""Parsing of requests, encoding of answers, and errors.

Windows are JSON (``{"windows": [[[...]]]}``, nested lists of numbers) or concatenated raw little-endian float32, which
is several times smaller and faster to parse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import torch
from torch import Tensor

from fedbn.errors import UserError
from fedbn.online.validation import canonical_name

BINARY = "application/octet-stream"


class RequestError(UserError):
    """A rejected request. The text is returned to the caller.

    Args:
        status: HTTP status code.
        text: names the mistake and the fix.
        retry_after: seconds after which the same request may succeed; None if it never can.
    """

    def __init__(self, status: int, text: str, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.status, self.retry_after = status, retry_after


@dataclass(frozen=True)
class Answer:
    """Predictions for the windows of one request.

    Attributes:
        user: name of the user.
        predictions: ``[n, *output_shape]`` float32 (`fedbn.tasks.Task.predict`); probabilities ``[n, classes]`` for
            classification.
        distance: distance of the last window from earlier ones of its class (`fedbn.online.drift.monitor`); None while
            there are too few.
        alarm: whether the user's drift detector raised an alarm at one of these windows.
        alarms: number of alarms since the last calibration.
        class_counts: learned windows per predicted class; empty for tasks without classes.
        calibrated: whether the user's statistics were calibrated on own windows.
        held: identifiers of the windows stored until labels arrive.
        alignment: the user's alignment (`fedbn.online.alignments.aligner.Aligner.report`), and whether it was ``used``
            for these windows; None without one.
        saturated: number of windows that the sensor could not measure, which are not learned from.
    """

    user: str
    predictions: np.ndarray
    distance: float | None
    alarm: bool
    alarms: int
    class_counts: Sequence[float]
    calibrated: bool
    held: Sequence[str] = ()
    alignment: Mapping[str, Any] | None = None
    saturated: int = 0


def validate_name(user: str) -> str:
    """The name of a user in canonical form (`fedbn.online.validation.canonical_name`).

    Raises:
        RequestError: not a valid name, or one that a path cannot have.

    >>> validate_name("ann")
    'ann'
    """
    try:
        name = canonical_name(user)
    except UserError as error:
        raise RequestError(422, str(error)) from None
    if "/" in name or name in (".", ".."):
        raise RequestError(422, f"{name!r} is not a user's name here: use one without '/', other than '.' and '..'")
    return name


def parse_json(body: bytes, elements: int) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        body: of the request.
        elements: maximum number of elements, which is checked before they are expanded into objects.

    Raises:
        RequestError: not a JSON object, or too many elements.
    """
    if len(body) > elements and sum(map(body.count, (b",", b"[", b"{", b":"))) > elements:
        raise RequestError(413, "the body has more elements than the largest valid request: send fewer windows")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(400, f"the body is not JSON ({error}); raw float32 needs 'Content-Type: {BINARY}'") from None
    if not isinstance(value, dict):
        raise RequestError(400, 'the body must be a JSON object such as {"windows": [...]}')
    return value


def parse_windows(body: bytes, binary: bool, shape: tuple[int, ...], limit: int, elements: int) -> Tensor:
    """The windows ``[n, *shape]`` of a request, finite float32.

    Args:
        body: of the request.
        binary: whether the body is raw little-endian float32 rather than JSON.
        shape: shape of a window.
        limit: maximum number of windows per request.
        elements: maximum number of elements of JSON.

    Raises:
        RequestError: no windows, too many, another shape, or values that are not finite.

    >>> parse_windows(np.ones(6, "<f4").tobytes(), True, (2, 3), limit=4, elements=20).shape
    torch.Size([1, 2, 3])
    >>> parse_windows(b'{"windows": [[1, 2], [3, 4]]}', False, (2,), limit=4, elements=20).tolist()
    [[1.0, 2.0], [3.0, 4.0]]
    """
    if not binary:
        return windows_from_lists(parse_json(body, elements).get("windows"), shape, limit)
    size = 4 * math.prod(shape)
    if not body or len(body) % size:
        window = f"{size}, float32 little-endian, shape {list(shape)}"
        raise RequestError(422, f"{len(body)} bytes are not a whole number of windows: each has {window}")
    _check_number(len(body) // size, limit)
    return _checked(np.frombuffer(body, "<f4").astype(np.float32).reshape(-1, *shape))


def windows_from_lists(values: Any, shape: tuple[int, ...], limit: int) -> Tensor:
    """Convert nested lists to windows, as for `parse_windows`.

    Raises:
        RequestError: as for `parse_windows`.
    """
    if isinstance(values, list):
        _check_number(len(values), limit)
    try:
        windows: np.ndarray = np.array(values)
    except ValueError:  # lists of different lengths
        windows = np.zeros(0)
    if windows.shape[1:] != shape or not len(windows) or windows.dtype.kind not in "iuf":
        text = f'"windows" must be a list of one or more windows of numbers, each of shape {list(shape)}'
        raise RequestError(422, text)
    with np.errstate(over="ignore"):
        return _checked(windows.astype(np.float32))


def _check_number(n: int, limit: int) -> None:
    if n > limit:
        raise RequestError(413, f"{n} windows in one request; send at most {limit} at once")


def _checked(windows: np.ndarray) -> Tensor:
    if not np.isfinite(windows).all():
        raise RequestError(422, "windows contain NaN or Inf: leave those windows out or impute them")
    return torch.from_numpy(windows)


def parse_labels(values: Any, classes: Sequence[str]) -> list[int]:
    """Convert class names or indices to indices.

    Raises:
        RequestError: unknown classes, or the model has none.

    >>> parse_labels(["walking", 1], ["sitting", "walking"])
    [1, 1]
    """
    if not classes:
        raise RequestError(422, "the served model has no classes, so it cannot learn from labels: leave them out")
    index: Mapping[Any, int] = {name: i for i, name in enumerate(classes)}
    if not isinstance(values, list):
        raise RequestError(422, f'"labels" must be a list of classes, by name or 0 to {len(classes) - 1}')
    labels = [index.get(v, v) if isinstance(v, (str, int)) and not isinstance(v, bool) else None for v in values]
    for value, label in zip(values, labels, strict=True):
        if not isinstance(label, int) or not 0 <= label < len(classes):
            known = f"classes are {', '.join(classes)}, or 0 to {len(classes) - 1}"
            raise RequestError(422, f"unknown class {value!r}; {known}")
    return labels  # type: ignore[return-value]


def advice(answer: Answer, classes: Sequence[str]) -> dict[str, Any]:
    """Recommended action for the user: ``none``, ``check`` (the sensor), ``calibrate`` or ``recalibrate``.

    Statistics of few activities are harmful on the others, so the advice lists the classes with hardly any windows.

    >>> answer = Answer("ann", np.zeros((1, 2)), None, False, 0, [3.0, 0.0], False)
    >>> advice(answer, ["sitting", "walking"])["action"], advice(answer, ["sitting", "walking"])["classes"]
    ('calibrate', ['walking'])
    """
    if answer.saturated:
        counted = f"{answer.saturated} of {len(answer.predictions)} windows"
        text = f"the accelerometer is saturated in {counted}, which are not learned from: set a larger range"
        return {"action": "check", "classes": [], "text": text}
    if answer.alarms:
        record = "a window of each class" if classes else "some windows"
        text = f"the signal has changed since the last calibration: record {record} again"
        return {"action": "recalibrate", "classes": list(classes), "text": text}
    missing = [name for name, n in zip(classes, answer.class_counts, strict=True) if n < 1]
    if answer.calibrated or not missing:
        return {"action": "none", "classes": [], "text": ""}
    text = "statistics of a few classes mislead on the others: record a window of each of these"
    return {"action": "calibrate", "classes": missing, "text": text}


def encode_answer(answer: Answer, classes: Sequence[str]) -> bytes:
    """An answer as JSON; for tasks without classes, with the predictions of each window as ``outputs``."""
    answers: list[dict[str, Any]] = [{"outputs": p} for p in answer.predictions]
    if classes:
        best = zip(answer.predictions.argmax(1).tolist(), answer.predictions, strict=True)
        answers = [{"class": i, "name": classes[i], "probabilities": p} for i, p in best]
    content = {
        "user": answer.user,
        "answers": answers,
        "drift": {"distance": answer.distance, "alarm": answer.alarm, "alarms": answer.alarms},
        "advice": advice(answer, classes),
        "held": answer.held,
    }
    if answer.alignment is not None:
        content["alignment"] = answer.alignment
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
