"""Python client of the HTTP service (``fedbn serve``), without further packages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

import numpy as np
from numpy.typing import ArrayLike

from fedbn.errors import UserError


class Client:
    """A connection to one service.

    Args:
        url: its address, which ``fedbn serve`` prints.
        token: the token of the service, if it requires one.
        enroll: create a user that the service does not know, on its first windows.
        timeout: seconds to wait for an answer.

    >>> Client("http://127.0.0.1:8000/").url
    'http://127.0.0.1:8000'
    """

    def __init__(self, url: str, *, token: str = "", enroll: bool = False, timeout: float = 30.0) -> None:
        self.url = url.rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"{url!r} is not the address of a service: write http://HOST:PORT or https://HOST:PORT")
        self.token, self.enrolls, self.timeout = token, enroll, timeout

    def model(self) -> dict[str, Any]:
        """The served model: shape of a window, task, classes, rule and limits."""
        return self._json("GET", "/v1/model")

    def enroll(self, user: str) -> bool:
        """Create a user; False if the user exists."""
        return bool(self._json("PUT", _path(user))["new"])

    def observe(self, user: str, windows: ArrayLike) -> dict[str, Any]:
        """Predict windows ``[n, channels, time]``, then update the user's statistics."""
        return self._windows(user, "/observe", {"windows": _lists(windows)})

    def predict(self, user: str, windows: ArrayLike) -> dict[str, Any]:
        """Predict windows ``[n, channels, time]`` without an update."""
        return self._windows(user, "/predict", {"windows": _lists(windows)})

    def calibrate(
        self, user: str, windows: ArrayLike, labels: Sequence[str] | None = None, then: str = "adapt"
    ) -> None:
        """Calibrate on a recording; afterwards ``adapt`` or ``freeze``."""
        named = {} if labels is None else {"labels": list(labels)}
        self._windows(user, "/calibrate", {"windows": _lists(windows), "then": then} | named)

    def report(self, user: str) -> dict[str, Any]:
        """Summary of a user: windows, classes, drift, distance of each layer."""
        return self._json("GET", _path(user))

    def reset(self, user: str) -> None:
        """Restore a user's initial state."""
        self._json("POST", _path(user) + "/reset")

    def delete(self, user: str) -> None:
        """Delete all data of a user."""
        self._json("DELETE", _path(user))

    def _windows(self, user: str, action: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._json("POST", _path(user) + action, body)
        except UserError as error:
            if not self.enrolls or not isinstance(error.__cause__, HTTPError) or error.__cause__.code != 404:
                raise
        self.enroll(user)
        return self._json("POST", _path(user) + action, body)

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a request; empty if the service has nothing to say.

        Raises:
            UserError: the service cannot be reached, or refuses the request; the text is the service's own.
        """
        headers = {"authorization": f"Bearer {self.token}"} if self.token else {}
        if body is not None:
            headers["content-type"] = "application/json"
        content = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, content, headers, method=method)
        try:
            with urlopen(request, timeout=self.timeout) as answer:
                text = answer.read()
        except HTTPError as error:
            try:
                reason = json.loads(error.read())["error"]
            except (ValueError, KeyError, TypeError):
                reason = f"answered {error.code} {error.reason}"
            raise UserError(f"{self.url}: {reason}") from error
        except (URLError, OSError) as error:
            raise UserError(
                f"{self.url} does not answer ({getattr(error, 'reason', error)}): start it with fedbn serve"
            ) from error
        return dict(json.loads(text)) if text else {}


def _path(user: str) -> str:
    return f"/v1/users/{quote(user, safe='')}"


def _lists(windows: ArrayLike) -> Any:
    return np.asarray(windows, dtype=np.float32).tolist()
