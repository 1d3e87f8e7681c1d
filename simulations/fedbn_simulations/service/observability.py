"""Metrics and logs of the service."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from fedbn_simulations.service.batching import Batcher
from fedbn_simulations.service.users import UserStore

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """Prometheus metrics of one service."""

    def __init__(self, users: UserStore, batcher: Batcher) -> None:
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self.registry}
        ProcessCollector(**options)
        self.requests = Counter("fedbn_requests", "Requests by method and status", ["method", "status"], **options)
        self.seconds = Histogram("fedbn_request_seconds", "Duration of requests", buckets=BUCKETS, **options)
        self.frames = Counter("fedbn_frames", "Frames received on sockets", **options)
        gauges: dict[tuple[str, str], Callable[[], float]] = {
            ("fedbn_users_in_memory", "Users in memory"): lambda: users.num_in_memory,
            ("fedbn_windows_queued", "Windows in the queue"): lambda: batcher.queued,
            ("fedbn_bank_calls", "Calls of the bank"): lambda: batcher.num_calls,
            ("fedbn_windows", "Windows processed"): lambda: batcher.num_windows,
            ("fedbn_drift_alarms", "Alarms of drift detectors"): lambda: users.monitor.num_alarms,
            ("fedbn_damaged_states", "Stored states found damaged"): lambda: users.num_damaged,
            ("fedbn_store_failed", "1 while changes cannot be saved"): lambda: users.store_failed,
        }
        for (name, description), value in gauges.items():
            Gauge(name, description, **options).set_function(value)


class JsonLines(logging.Formatter):
    """One JSON object per line: time, level, logger, event, and the fields of the record."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr(verbose: bool) -> None:
    """Write structured logs of the service and of uvicorn to stderr; if ``verbose``, log every request."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("fedbn.service", logging.DEBUG if verbose else logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
