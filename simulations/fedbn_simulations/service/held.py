"""Windows that are held until their labels arrive."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from fedbn_simulations.service.schema import RequestError


class HeldWindows:
    """Windows of users, by identifier. Only their user can use them.

    Args:
        limit: number of windows over all users. Beyond it, the oldest window of the user with the most is dropped.

    >>> held = HeldWindows(2)
    >>> [held.add(user, torch.ones(1)) for user in ("ann", "ann", "bob")], list(held.of("ann")), list(held.of("bob"))
    (['1', '2', '3'], ['2'], ['3'])
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._number = self._size = 0
        self._windows: dict[str, OrderedDict[str, Tensor]] = {}

    def add(self, user: str, window: Tensor) -> str:
        """Hold a window, and return its identifier."""
        self._number += 1
        name = str(self._number)
        self._windows.setdefault(user, OrderedDict())[name] = window.clone()
        self._size += 1
        if self._size > self.limit:
            most = max(self._windows, key=lambda owner: len(self._windows[owner]))
            self.remove(most, [next(iter(self._windows[most]))])
        return name

    def of(self, user: str) -> dict[str, Tensor]:
        """The windows of a user."""
        return self._windows.get(user, OrderedDict())

    def stack(self, user: str, names: Sequence[str]) -> Tensor:
        """Windows ``[n, *shape]`` of a user, which stay held.

        Raises:
            RequestError: a window is not held.
        """
        windows = self.of(user)
        for name in names:
            if name not in windows:
                text = f"window {name[:32]!r} is not (or no longer) held: send it to predict?hold=true again"
                raise RequestError(404, text)
        return torch.stack([windows[name] for name in names])

    def remove(self, user: str, names: Sequence[str] | None = None) -> None:
        """Drop windows of a user; None: all."""
        windows = self.of(user)
        for name in list(windows) if names is None else names:
            del windows[name]
            self._size -= 1
        if not windows:
            self._windows.pop(user, None)
