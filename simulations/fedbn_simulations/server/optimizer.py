"""Flower's server optimizers, applied to parameters only.

FedAvgM, FedAdam, FedYogi and FedAdagrad of ``flwr.serverapp.strategy`` treat every array as a parameter. Applied to a
whole state, they also update running variances, until some are negative. Here they receive only the parameters. Hsu,
Qi, Brown, 2019, https://arxiv.org/abs/1909.06335; Reddi et al., 2021, https://arxiv.org/abs/2003.00295
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvgM, FedYogi

from fedbn.config import Plan
from fedbn.federation.server import ServerStep
from fedbn.nn.roles import State


def server_step(plan: Plan) -> ServerStep | None:
    """The plan's server optimizer as a function with explicit state; None for the plain mean."""
    if plan.server_optimizer == "none":
        return None

    def step(round: int, old: State, mean: State, memory: State) -> tuple[State, State]:
        content = RecordDict({"arrays": _record(mean), "metrics": MetricRecord({"num-examples": 1})})
        with _errors_only():
            optimizer = _build_optimizer(plan)
            _restore_memory(optimizer, memory, list(mean))
            optimizer.configure_train(round, _record(old), ConfigRecord(), _NO_GRID)
            updated, _ = optimizer.aggregate_train(round, [Message(content, 0, "train")])
        if updated is None:
            raise RuntimeError("Flower's server optimizer returned no arrays")
        new = {k: torch.from_numpy(np.array(updated[k].numpy())).to(v.device, v.dtype) for k, v in old.items()}
        return new, _read_memory(optimizer)

    return step


_NO_GRID: Any = None
"""With ``fraction_train=0`` Flower's `configure_train` stores the current arrays and does not use the grid."""


@contextmanager
def _errors_only() -> Iterator[None]:
    """Suppress Flower's warning that the strategy samples no clients, which is intended here."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _build_optimizer(plan: Plan) -> Any:
    options: dict[str, Any] = {"fraction_train": 0.0, "fraction_evaluate": 0.0}
    if plan.server_optimizer == "fedavgm":
        return FedAvgM(server_learning_rate=plan.server_lr, server_momentum=0.9, **options)
    adaptive = {"fedadam": FedAdam, "fedyogi": FedYogi, "fedadagrad": FedAdagrad}
    return adaptive[plan.server_optimizer](eta=plan.server_lr, **options)


def _record(state: State) -> ArrayRecord:
    return ArrayRecord({k: Array(v.detach().cpu().numpy()) for k, v in state.items()})


def _read_memory(optimizer: Any) -> State:
    if isinstance(optimizer, FedAvgM):
        return {f"momentum/{i}": torch.from_numpy(v) for i, v in enumerate(optimizer.momentum_vector or [])}
    out: State = {}
    for name in ("m_t", "v_t"):
        out |= {f"{name}/{k}": torch.from_numpy(np.asarray(v)) for k, v in (getattr(optimizer, name) or {}).items()}
    return out


def _restore_memory(optimizer: Any, memory: State, order: list[str]) -> None:
    if not memory:
        return
    if isinstance(optimizer, FedAvgM):
        optimizer.momentum_vector = [memory[f"momentum/{i}"].numpy() for i in range(len(memory))]
        return
    for name in ("m_t", "v_t"):
        setattr(optimizer, name, {k: memory[f"{name}/{k}"].numpy() for k in order})
