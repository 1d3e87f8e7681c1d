"""Flower strategies that aggregate the statistics of normalization layers by this project's strategies.

Flower's strategies treat every array as a weight: running variances are averaged without the variance between clients,
counters become floating-point numbers, server optimizers take steps on variances, and noise makes them negative.
`normalization` passes only parameters through a strategy.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    Strategy,
)

from fedbn.errors import UserError
from fedbn.nn.roles import Role
from fedbn.strategies.base import NormStrategy, Progress, Update
from fedbn.strategies.ownership import LOCAL
from fedbn_clients.entries import Entries, ModelFn, entries, model_record, resolve_strategy
from fedbn_simulations.flower.calibration import synchronize

S = TypeVar("S", bound=Strategy)

NOISY = (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)

MetricsFunction = Callable[[list[RecordDict], str], MetricRecord]


def normalization(strategy: S, model_fn: ModelFn, norms: NormStrategy | str) -> S:
    """Copy of a Flower strategy in which a normalization strategy decides about statistics and local entries.

    Parameters that travel pass through the Flower strategy. Statistics that travel are aggregated by the normalization
    strategy, over the replies that the Flower strategy selects and with its weights. Local entries and counters keep
    the values of the initial arrays, with which new clients start. The clients need
    ``mods=[fedbn_clients.mods.normalization(model_fn, norms)]``.

    Args:
        strategy: a strategy of ``flwr.serverapp.strategy``, also with a wrapper for differential privacy.
        model_fn: function or class that builds the app's network.
        norms: the normalization strategy, such as ``global-pooled``.

    Returns:
        An object of a subclass of the strategy's class.

    Raises:
        UserError: a strategy of the former interface, one that is wrapped already, a normalization strategy that cannot
            be applied from outside an app, or statistics that would travel without the strategy's noise.

    >>> from flwr.serverapp.strategy import FedAdam
    >>> from fedbn.models.small_cnn import SmallCNN
    >>> strategy = normalization(FedAdam(), lambda: SmallCNN((1, 8, 8), 10), "global-pooled")
    >>> isinstance(strategy, FedAdam)
    True
    """
    if not isinstance(strategy, Strategy):
        raise UserError(
            f"{type(strategy).__name__} is not a strategy of flwr.serverapp.strategy: use one of them, or apply fedbn, "
            "silobn or mtfl with fedbn_clients.mods.normalization alone"
        )
    table = entries(model_fn, resolve_strategy(norms))
    chain = strategy_chain(strategy)
    if any(isinstance(s, _NormalizedStrategy) for s in chain):
        raise UserError("the strategy is wrapped by normalization already: wrap it once, outside all other wrappers")
    noisy = next((s for s in chain if isinstance(s, NOISY)), None)
    if noisy is not None and table.ownership.shared_statistics:
        raise UserError(
            f"strategy {table.strategy.name!r} sends clients' statistics, which {type(noisy).__name__} does not "
            "protect: choose one whose statistics stay local, such as silobn or fedbn"
        )
    copies = [copy.copy(s) for s in chain]
    for outer, inner in pairwise(copies):
        cast(Any, outer).strategy = inner
    wrapped, core = cast(Any, copies[0]), cast(Any, copies[-1])
    selection = _Selection(getattr(core, "train_metrics_aggr_fn", None))
    if selection.function is not None:
        core.train_metrics_aggr_fn = selection
    weighted_by = getattr(core, "weighted_by_key", "num-examples")
    cls = type(strategy)
    wrapped.__class__ = type(cls.__name__, (_NormalizedStrategy, cls), {"__module__": cls.__module__})
    wrapped._norms = _Norms(table, model_fn, selection, weighted_by)
    return cast(S, wrapped)


def strategy_chain(strategy: Strategy) -> list[Strategy]:
    """A strategy and the strategies that it wraps, from outside to inside."""
    inner = getattr(strategy, "strategy", None)
    return [strategy, *(strategy_chain(inner) if isinstance(inner, Strategy) else [])]


@dataclass
class _Selection:
    """Function for metrics that records which replies a strategy aggregates; Krum, for example, selects some.

    Attributes:
        function: the strategy's own function.
        selected: the replies of the last call; None before it.
    """

    function: MetricsFunction | None
    selected: list[RecordDict] | None = None

    def __call__(self, contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
        self.selected = list(contents)
        return cast(MetricsFunction, self.function)(contents, weighted_by_key)


@dataclass
class _Norms:
    """What a `_NormalizedStrategy` needs besides the attributes of the Flower strategy.

    Attributes:
        table: entries of the model.
        model_fn: builds the network.
        selection: replies that the strategy aggregates.
        weighted_by: name of the metric with a reply's weight.
        received: the arrays at the start of the round.
        returned: the arrays at the end of the previous round.
        grid: grid of the current round.
    """

    table: Entries
    model_fn: ModelFn
    selection: _Selection
    weighted_by: str
    received: ArrayRecord = field(default_factory=ArrayRecord)
    returned: ArrayRecord | None = None
    grid: Grid | None = None


@dataclass(frozen=True)
class _Reply:
    """A client's reply before the strategy aggregates it: its content, node, and all arrays by the model's names."""

    content: RecordDict
    node: int
    arrays: Mapping[str, Array]


class _NormalizedStrategy(Strategy):
    """Mixin that is put before the class of a Flower strategy."""

    _norms: _Norms

    def start(self, *args: Any, **kwargs: Any) -> Any:
        """Run the strategy's own loop."""
        table = self._norms.table
        if kwargs.get("evaluate_fn") is not None and any(_is_local(table, name) for name in table.ownership.roles):
            _log.warning(
                "normalization: under %s, local entries of the server's model have their initial values, so its "
                "evaluation at the server means little; under fedbn-seeded they have the clients' mean",
                table.strategy.name,
            )
        return super().start(*args, **kwargs)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the strategy configure a round of parameters; send all arrays.

        Raises:
            UserError: another wrapper has changed entries that do not pass through the strategy.
        """
        norms = self._norms
        names = norms.table.names(arrays)
        if server_round > 1 and norms.returned is not None:
            _require_unchanged(norms.table, names, norms.returned, arrays)
        norms.received, norms.grid = arrays, grid
        parameters = ArrayRecord({k: a for k, a in arrays.items() if _passes(norms.table, names[k])})
        messages = list(super().configure_train(server_round, parameters, config, grid))  # type: ignore[safe-super]
        for message in messages:
            key, sent = model_record(message.content)
            complete = ArrayRecord({k: sent[k] if sent and k in sent else a for k, a in arrays.items()})
            message.content = RecordDict({**message.content, key: complete})
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let the strategy aggregate the parameters, and aggregate the statistics of the replies that it selects."""
        norms = self._norms
        names = norms.table.names(norms.received)
        replies = list(replies)
        separated = [_separate(norms, names, reply) for reply in replies if reply.has_content()]
        norms.selection.selected = None
        new, metrics = super().aggregate_train(server_round, replies)  # type: ignore[safe-super]
        if new is None:
            return new, metrics
        chosen = _selected([r for r in separated if r is not None], norms.selection.selected)
        aggregated = _aggregate_statistics(norms, names, chosen, server_round)
        if missing := [k for k, n in names.items() if _passes(norms.table, n) and k not in new]:
            raise _incomplete(missing[0])
        complete = {
            k: new[k] if _passes(norms.table, n) else aggregated.get(n, norms.received[k]) for k, n in names.items()
        }
        norms.returned = ArrayRecord({k: _with_dtype(a, norms.received[k]) for k, a in complete.items()})
        if norms.table.strategy.syncs_statistics:
            nodes = [r.node for r in chosen]
            norms.returned = synchronize(cast(Grid, norms.grid), norms.returned, norms.table, norms.model_fn, nodes)
        return norms.returned, metrics


_log = logging.getLogger("flwr")


def _passes(table: Entries, name: str) -> bool:
    """Whether an entry passes through the Flower strategy."""
    return table.ownership.owner(name) is not LOCAL and table.ownership.roles[name] is not Role.STATISTICS


def _is_local(table: Entries, name: str) -> bool:
    """Whether clients have their own, unsent values of an entry other than a counter."""
    return table.ownership.owner(name) is LOCAL and table.ownership.roles[name] is not Role.COUNTER


def _require_unchanged(table: Entries, names: Mapping[str, str], returned: ArrayRecord, arrays: ArrayRecord) -> None:
    for key, name in names.items():
        if not _passes(table, name) and key in returned and returned[key].data != arrays[key].data:
            raise UserError(
                f"{key} has been changed outside of normalization, for example by noise: apply normalization to the "
                "outermost strategy, as in normalization(DifferentialPrivacy...(strategy), model_fn, ...)"
            )


def _separate(norms: _Norms, names: Mapping[str, str], reply: Message) -> _Reply | None:
    """Leave only parameters in a reply; returns what it had. None if the strategy will reject the reply."""
    records = reply.content.array_records
    if len(records) != 1 or len(reply.content.metric_records) != 1:
        return None
    key, record = next(iter(records.items()))
    everything = {names[k]: a for k, a in record.items() if k in names}
    if set(everything) == set(names.values()):
        _warn_without_mod(norms, names, everything)
    reply.content[key] = ArrayRecord(
        {k: a for k, a in record.items() if k not in names or _passes(norms.table, names[k])}
    )
    return _Reply(reply.content, reply.metadata.src_node_id, everything)


def _warn_without_mod(norms: _Norms, names: Mapping[str, str], arrays: Mapping[str, Array]) -> None:
    for key, name in names.items():
        if _is_local(norms.table, name) and arrays[name].data != norms.received[key].data:
            _log.warning(
                "normalization: a client sent its own value of %s, which stays local under %s; give its ClientApp "
                "mods=[normalization(...)], as the last mod of each function",
                name,
                norms.table.strategy.name,
            )
            return


def _incomplete(name: str) -> UserError:
    return UserError(f"a client's reply lacks {name}: let the app return all arrays that it received")


def _selected(replies: Sequence[_Reply], selected: list[RecordDict] | None) -> list[_Reply]:
    if selected is None:
        return list(replies)
    identities = {id(content) for content in selected}
    return [r for r in replies if id(r.content) in identities]


def _tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(array.numpy())


def _aggregate_statistics(
    norms: _Norms, names: Mapping[str, str], replies: Sequence[_Reply], server_round: int
) -> dict[str, Array]:
    """New statistics entries by the model's names."""
    table = norms.table
    traveling = set(table.ownership.shared_statistics)
    statistics = [name for name in names.values() if name in traveling]
    if not statistics or not replies:
        return {}
    if missing := [name for r in replies for name in statistics if name not in r.arrays]:
        raise _incomplete(missing[0])
    metrics = [next(iter(r.content.metric_records.values())) for r in replies]
    weights = [float(cast(float, m.get(norms.weighted_by, 1.0))) for m in metrics]
    updates = [
        Update(i, {name: _tensor(r.arrays[name]) for name in statistics}, int(weight), 0.0)
        for i, (r, weight) in enumerate(zip(replies, weights, strict=True))
    ]
    old = {names[k]: _tensor(a) for k, a in norms.received.items() if names[k] in traveling}
    progress = Progress(server_round, server_round)
    new = table.strategy.aggregate_statistics(updates, weights, statistics, old, progress)
    return {name: Array(value.numpy()) for name, value in new.items()}


def _with_dtype(array: Array, like: Array) -> Array:
    value, dtype = array.numpy(), like.numpy().dtype
    return array if value.dtype == dtype else Array(value.astype(dtype))
