"""Metrics and logs of the service."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from simulations.service.batching import Batcher
from simulations.service.users import UserStore

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """Counters of one service, for Prometheus."""

    def __init__(self, users: UserStore, batcher: Batcher) -> None:
        self.registry = CollectorRegistry()
        more: dict[str, Any] = {"registry": self.registry}
        ProcessCollector(**more)
        self.requests = Counter("fedbn_requests", "Requests by kind and status", ["method", "status"], **more)
        self.seconds = Histogram("fedbn_request_seconds", "Time to answer", buckets=BUCKETS, **more)
        self.frames = Counter("fedbn_frames", "Frames received on sockets", **more)
        gauges: dict[tuple[str, str], Callable[[], float]] = {
            ("fedbn_users_at_hand", "Users in memory"): lambda: users.at_hand,
            ("fedbn_windows_waiting", "Windows in the queue"): lambda: batcher.waiting,
            ("fedbn_bank_calls", "Calls of the bank"): lambda: batcher.calls,
            ("fedbn_windows", "Windows answered"): lambda: batcher.done,
            ("fedbn_drift_alarms", "Alarms of drift detectors"): lambda: users.watches.spoken,
        }
        for (name, about), value in gauges.items():
            Gauge(name, about, **more).set_function(value)


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event, and what the caller says about it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "about", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr(verbose: bool) -> None:
    """Structured logs of the service and of its server; with ``verbose`` every request."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("fedbn.service", logging.DEBUG if verbose else logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
