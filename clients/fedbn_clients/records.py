"""Conversion of tensors, moments and scores to Flower records and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict

from fedbn.federation.cold_start import ClientStatistics
from fedbn.federation.metrics import Score
from fedbn.nn.roles import State
from fedbn.online.prior import LayerPrior
from fedbn.statistics.consensus import flatten, unflatten
from fedbn.statistics.moments import Moments
from fedbn_clients.jobs import is_batched
from fedbn_clients.serialization import LazyArrayRecord, pack, unpack


def arrays(state: State) -> ArrayRecord:
    """Convert named tensors to a record, preserving dtypes and zero-dimensional entries."""
    return ArrayRecord({k: pack(v) for k, v in state.items()})


def to_record_by_reference(state: State) -> ArrayRecord:
    """Convert named tensors to a record, by reference if the receiver is in the same process."""
    return LazyArrayRecord(state) if is_batched() else arrays(state)


def tensors(record: ArrayRecord, device: str = "cpu") -> State:
    """Convert a record to named tensors, which must not be modified."""
    if isinstance(record, LazyArrayRecord) and record.state is not None:
        return dict(record.state)
    return {k: unpack(array).to(device) for k, array in record.items()}


class Decoder:
    """Decodes records of the server once for all clients of a process that receive the same bytes."""

    def __init__(self) -> None:
        self._payload: list[bytes] = []
        self._state: State = {}

    def __call__(self, record: ArrayRecord, device: str) -> State:
        """Convert a record to named tensors, which must not be modified."""
        if isinstance(record, LazyArrayRecord) and record.state is not None:
            return record.state
        payload = [array.data for array in record.values()]
        same = len(payload) == len(self._payload) and all(a is b for a, b in zip(payload, self._payload, strict=True))
        if not same or list(record) != list(self._state):
            self._payload, self._state = payload, tensors(record, device)
        return self._state


def scores_to(scores: list[Score]) -> MetricRecord:
    """Convert scores to a record."""
    out: dict[str, int | float] = {}
    for score in scores:
        values = score.as_dict()
        prefix = f"{values.pop('row')}|{values.pop('column')}"
        out |= {f"{prefix}|{name}": value for name, value in values.items()}
    return MetricRecord(cast(dict, out))


def scores_from(record: MetricRecord) -> list[Score]:
    """Convert a record to scores, in order."""
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for key, value in record.items():
        row, column, name = key.split("|")
        cells.setdefault((row, column), {})[name] = cast(float, value)
    return [Score.from_dict({"row": row, "column": column, **values}) for (row, column), values in cells.items()]


def aggregates_to(aggregates: list[dict[str, Moments]]) -> RecordDict:
    """Convert aggregated moments to records, one per exchange."""
    return RecordDict({f"aggregate-{i}": arrays(flatten(a)) for i, a in enumerate(aggregates)})


def aggregates_from(content: RecordDict) -> list[dict[str, Moments]]:
    """Aggregated moments in the content of a message, in order."""
    names = sorted((k for k in content if k.startswith("aggregate-")), key=lambda k: int(k.split("-")[1]))
    return [unflatten(tensors(content.array_records[k])) for k in names]


def client_statistics_to(statistics: ClientStatistics) -> ArrayRecord:
    """Convert statistics of the clients to one record."""
    parts = {"mean": statistics.mean, "variance": statistics.variance, "between": statistics.between}
    parts |= {str(i): state for i, state in enumerate(statistics.clients)}
    return arrays({f"{part}|{k}": v for part, state in parts.items() for k, v in state.items()})


def client_statistics_from(record: ArrayRecord, device: str) -> ClientStatistics:
    """Convert a record to statistics of the clients."""
    parts: dict[str, State] = {"mean": {}, "variance": {}, "between": {}}
    for key, value in tensors(record, device).items():
        part, _, name = key.partition("|")
        parts.setdefault(part, {})[name] = value
    return ClientStatistics(parts.pop("mean"), parts.pop("variance"), parts.pop("between"), tuple(parts.values()))


def prior_to(prior: Mapping[str, LayerPrior]) -> ArrayRecord:
    """Convert the mean, variance and weight of a population prior to one record."""
    fields = ("mean", "var", "n0")
    return arrays({f"{path}|{name}": getattr(p, name) for path, p in prior.items() for name in fields})


def prior_from(record: ArrayRecord) -> dict[str, LayerPrior]:
    """The prior of a record of `prior_to`."""
    state = tensors(record)
    paths = dict.fromkeys(name.rpartition("|")[0] for name in state)
    return {path: LayerPrior(*(state[f"{path}|{name}"] for name in ("mean", "var", "n0"))) for path in paths}


def set_threads() -> None:
    """Set torch to one thread in all engines.

    Sums are rounded differently with another number of threads, so engines would no longer be bit-identical.
    """
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
