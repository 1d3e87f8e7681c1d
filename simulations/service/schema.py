"""What goes over the wire: windows in, answers out, and refusals.

Windows come as JSON (``{"windows": [[[...]]]}``, nested lists of numbers) or, several times smaller and cheaper to
read, as raw little-endian float32, one window after the other.
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

BINARY = "application/octet-stream"

LONGEST_NAME = 128
"""Characters of a user's name."""


class Refusal(UserError):
    """A request that is not served; the text goes to the caller.

    Args:
        status: of the HTTP response.
        text: names the mistake and the fix.
        wait: seconds after which the same request may succeed; None: never as it is.
    """

    def __init__(self, status: int, text: str, wait: float | None = None) -> None:
        super().__init__(text)
        self.status, self.wait = status, wait


@dataclass(frozen=True)
class Answer:
    """What is said about the windows of one request.

    Attributes:
        user: whose they are.
        probabilities: ``[n, classes]`` float32.
        distance: of the last window from those of its class before it (`fedbn.online.drift.monitor`); None while they
            are few.
        alarm: the user's drift detector spoke at one of these windows.
        alarms: how often it has spoken since the last calibration.
        met: a class -> windows learnt from that seem to be of it.
        calibrated: the user starts from statistics of its own.
        held: names under which the windows wait for labels.
    """

    user: str
    probabilities: np.ndarray
    distance: float | None
    alarm: bool
    alarms: int
    met: Sequence[float]
    calibrated: bool
    held: Sequence[str] = ()


def checked_name(user: str) -> str:
    """A user's name.

    Raises:
        Refusal: empty, too long, or with control characters.

    >>> checked_name("ann")
    'ann'
    """
    if not 0 < len(user) <= LONGEST_NAME or not user.isprintable():
        raise Refusal(422, f"a user's name is 1 to {LONGEST_NAME} printable characters")
    return user


def parsed(body: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        Refusal: it is none.
    """
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refusal(400, f"the body is no JSON ({error}); raw float32 needs 'Content-Type: {BINARY}'") from None
    if not isinstance(found, dict):
        raise Refusal(400, 'the body must be a JSON object such as {"windows": [...]}')
    return found


def windows_of(body: bytes, binary: bool, shape: tuple[int, ...], most: int) -> Tensor:
    """The windows ``[n, *shape]`` of a request, finite float32.

    Args:
        body: of the request.
        binary: raw little-endian float32 rather than JSON.
        shape: of one window.
        most: windows a request.

    Raises:
        Refusal: none, too many, another shape, or values that are not finite.

    >>> windows_of(np.ones(6, "<f4").tobytes(), True, (2, 3), most=4).shape
    torch.Size([1, 2, 3])
    >>> windows_of(b'{"windows": [[1, 2], [3, 4]]}', False, (2,), most=4).tolist()
    [[1.0, 2.0], [3.0, 4.0]]
    """
    return _raw(body, shape, most) if binary else listed(parsed(body).get("windows"), shape, most)


def _raw(body: bytes, shape: tuple[int, ...], most: int) -> Tensor:
    size = 4 * math.prod(shape)
    if not body or len(body) % size:
        raise Refusal(
            422, f"{len(body)} bytes are no whole windows: each has {size}, float32 little-endian, shape {list(shape)}"
        )
    return _fine(np.frombuffer(body, "<f4").astype(np.float32).reshape(-1, *shape), most)


def listed(values: Any, shape: tuple[int, ...], most: int) -> Tensor:
    """Windows from nested lists, as `windows_of`.

    Raises:
        Refusal: as `windows_of`.
    """
    found: np.ndarray
    try:
        found = np.asarray(values, np.float32)
    except (ValueError, TypeError):
        found = np.zeros(0)
    if found.shape[1:] != shape or not len(found):
        raise Refusal(422, f'"windows" must be a list of one or more windows of numbers, each of shape {list(shape)}')
    return _fine(found, most)


def _fine(found: np.ndarray, most: int) -> Tensor:
    if len(found) > most:
        raise Refusal(413, f"{len(found)} windows in one request; send at most {most} at once")
    if not np.isfinite(found).all():
        raise Refusal(422, "windows hold NaN or Inf: leave those windows out or impute them")
    return torch.from_numpy(found)


def labels_of(values: Any, classes: Sequence[str]) -> list[int]:
    """Class indices from indices or names.

    Raises:
        Refusal: unknown classes.

    >>> labels_of(["walking", 1], ["sitting", "walking"])
    [1, 1]
    """
    place: Mapping[Any, int] = {name: i for i, name in enumerate(classes)}
    if not isinstance(values, list):
        raise Refusal(422, f'"labels" must be a list of classes, by name or 0 to {len(classes) - 1}')
    found = [place.get(v, v) if isinstance(v, (str, int)) and not isinstance(v, bool) else None for v in values]
    for value, label in zip(values, found, strict=True):
        if not isinstance(label, int) or not 0 <= label < len(classes):
            raise Refusal(422, f"unknown class {value!r}; classes are {', '.join(classes)}, or 0 to {len(classes) - 1}")
    return found  # type: ignore[return-value]


def advice(answer: Answer, classes: Sequence[str]) -> dict[str, Any]:
    """What to do for the user, from what was met: ``none``, ``calibrate`` or ``recalibrate``.

    Statistics of few activities do harm on the others, so a user is asked for the classes that it has hardly shown.

    >>> told = Answer("ann", np.zeros((1, 2)), None, False, 0, [3.0, 0.0], False)
    >>> advice(told, ["sitting", "walking"])["action"], advice(told, ["sitting", "walking"])["classes"]
    ('calibrate', ['walking'])
    """
    if answer.alarms:
        why = "the signal has changed since the last calibration: record a window of each class again"
        return {"action": "recalibrate", "classes": list(classes), "text": why}
    unmet = [name for name, n in zip(classes, answer.met, strict=True) if n < 1]
    if answer.calibrated or not unmet:
        return {"action": "none", "classes": [], "text": ""}
    why = "statistics of a few classes mislead on the others: record a window of each of these"
    return {"action": "calibrate", "classes": unmet, "text": why}


def encoded(answer: Answer, classes: Sequence[str]) -> bytes:
    """An answer as JSON."""
    best = answer.probabilities.argmax(1).tolist()
    return orjson.dumps(
        {
            "user": answer.user,
            "answers": [
                {"class": i, "name": classes[i], "probabilities": p} for i, p in zip(best, answer.probabilities)
            ],
            "drift": {"distance": answer.distance, "alarm": answer.alarm, "alarms": answer.alarms},
            "advice": advice(answer, classes),
            "held": answer.held,
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )
