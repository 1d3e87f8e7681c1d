"""Owners of the arrays that a Flower app exchanges, for a normalization strategy that is applied from outside the app.

From outside, a strategy can define who owns an entry and how the server aggregates statistics. It cannot replace
layers, change local training or add exchanges to it, so strategies that do are refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import nn

from fedbn.errors import UserError
from fedbn.nn.roles import Role, State
from fedbn.strategies.base import NormStrategy
from fedbn.strategies.base import strategy as parse_strategy
from fedbn.strategies.ownership import LOCAL, Ownership

ModelFn = Callable[[], nn.Module]
"""Builds the app's network: a function without arguments, or its class."""

AVAILABLE = ("owners", "prepare_model", "aggregate_statistics", "sync_statistics", "load_statistics", "notices")
"""Hooks of `NormStrategy` that do not need control over an app's training."""

ARRAYS = "arrays"
"""Flower's default name of the record with the model."""

NORMALIZATION = (Role.AFFINE, Role.STATISTICS, Role.COUNTER)
"""Roles of the entries of batch normalization layers."""

_lock = threading.Lock()


@dataclass(frozen=True)
class Entries:
    """Entries of an app's network under a strategy.

    Attributes:
        strategy: the strategy.
        ownership: ownership of the entries.
        parameters: names of the parameters, in the model's order.
        dtypes: dtype of each entry.
    """

    strategy: NormStrategy
    ownership: Ownership
    parameters: tuple[str, ...]
    dtypes: Mapping[str, torch.dtype]

    def names(self, record: ArrayRecord) -> dict[str, str]:
        """The entry of the model for each key of a record.

        Arrays without names, as of a ``NumPyClient``, are the model's state or its parameters, in their order, or those
        outside of normalization layers, as of an app that applies FedBN by itself.

        Raises:
            UserError: arrays that the model does not have, or whose positions do not identify them.
        """
        keys, known = list(record), self.ownership.roles
        if all(k in known for k in keys):
            return {k: k for k in keys}
        if not all(k.isdigit() for k in keys):
            odd = ", ".join([k for k in keys if k not in known][:3])
            raise UserError(f"the message has arrays that the model does not have ({odd}): pass the app's own model_fn")
        outside = [name for name, role in known.items() if role not in NORMALIZATION]
        for names in (list(known), list(self.parameters), outside):
            if len(names) == len(keys):
                self._check_shapes(dict(zip(names, record.values(), strict=True)), everything=names is outside)
                return dict(zip(keys, names, strict=True))
        raise UserError(
            f"the message has {len(keys)} arrays without names, but the model has {len(known)} entries and "
            f"{len(self.parameters)} parameters: send the arrays of the whole state_dict(), or all parameters()"
        )

    def _check_shapes(self, arrays: Mapping[str, Array], *, everything: bool) -> None:
        for name, array in arrays.items():
            # Decoding is cheap for the small entries of normalization layers; they are what a strategy changes.
            if everything or self.ownership.owner(name) is LOCAL or self.ownership.roles[name] is Role.STATISTICS:
                shape, expected = tuple(array.numpy().shape), self.ownership.shapes[name]
                if shape != expected:
                    raise UserError(
                        f"the array at the position of {name} has shape {list(shape)}, not {list(expected)}: send the "
                        "arrays in the order of state_dict()"
                    )


def resolve_strategy(strategy: NormStrategy | str) -> NormStrategy:
    """Parse a strategy and check that it can be applied from outside an app.

    Raises:
        UserError: an unknown strategy, or one that needs control over local training.
    """
    strategy = parse_strategy(strategy) if isinstance(strategy, str) else strategy
    hooks = [h for h, v in vars(NormStrategy).items() if not h.startswith("_") and callable(v)]
    overridden = [h for h in hooks if getattr(type(strategy), h) is not getattr(NormStrategy, h)]
    if inside := [h for h in overridden if h not in AVAILABLE]:
        reason = f"needs control over local training ({inside[0]})"
    elif strategy.is_centralized:
        reason = "trains on all clients' data at one place"
    else:
        return strategy
    raise UserError(
        f"strategy {strategy.name!r} {reason}, so it cannot be applied from outside an app: choose fedbn, silobn, "
        "global-pooled, ..., or run it with fedbn compare"
    )


@lru_cache(maxsize=32)
def _entries(model_fn: ModelFn, strategy: NormStrategy) -> Entries:
    model = build(model_fn)
    before = [type(m) for m in model.modules()]
    prepared = strategy.prepare_model(model)
    if prepared is not model or [type(m) for m in model.modules()] != before:
        raise UserError(
            f"strategy {strategy.name!r} replaces layers of the model, which cannot be done from outside an app: let "
            "the app's function return strategy.prepare_model(model), and use no mod"
        )
    dtypes = {k: v.dtype for k, v in model.state_dict().items()}
    parameters = tuple(name for name, _ in model.named_parameters())
    return Entries(strategy, Ownership.of(model, strategy), parameters, dtypes)


def entries(model_fn: ModelFn, strategy: NormStrategy) -> Entries:
    """Entries of an app's network under a strategy. The network is built once per process.

    Raises:
        UserError: the strategy replaces layers, or does not apply to the network.
    """
    with _lock:
        return _entries(model_fn, strategy)


def build(model_fn: ModelFn, state: State | None = None) -> nn.Module:
    """Build an app's network without changing the random numbers that the app draws, and load a state."""
    with torch.random.fork_rng(devices=[]):
        model = model_fn()
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model_fn must return a torch.nn.Module, not {type(model).__name__}: only PyTorch networks have strategies"
        )
    if state is not None:
        model.load_state_dict(state)
    return model


def model_record(content: RecordDict) -> tuple[str, ArrayRecord | None]:
    """Name and arrays of the record with the model; None if the content has no arrays.

    Raises:
        UserError: several records of arrays, none of them called ``arrays``.
    """
    records = {name: record for name, record in content.array_records.items() if "_empty" not in record}
    if len(records) > 1 and ARRAYS not in records:
        raise UserError(
            f"the message has {len(records)} records of arrays ({', '.join(records)}): call the one with the model "
            f"{ARRAYS!r}"
        )
    name = ARRAYS if ARRAYS in records else next(iter(records), ARRAYS)
    record = records.get(name)
    return name, record or None
