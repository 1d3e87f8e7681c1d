"""Notice of apps that evaluate in training mode, in which running statistics have no effect."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fedbn.nn.roles import keeps_statistics


@contextmanager
def notice_training_mode(*, active: bool) -> Iterator[None]:
    """Log a warning if the app evaluates in training mode, in which BN ignores its running statistics."""
    if not active:
        yield
        return
    thread = threading.get_ident()

    def check(module: nn.Module, _inputs: Any) -> None:
        if module.training and keeps_statistics(module) and threading.get_ident() == thread:
            warn_once("evaluation runs in training mode, which ignores running statistics: call model.eval() before")

    with register_module_forward_pre_hook(check):
        yield


@lru_cache
def warn_once(text: str) -> None:
    """Log a warning of Flower's logger, once per process."""
    logging.getLogger("flwr").warning(text)
