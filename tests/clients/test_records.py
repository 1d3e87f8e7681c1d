from __future__ import annotations

import torch

from fedbn.federation.cold_start import ClientStatistics
from fedbn.statistics.moments import Moments
from fedbn_clients.jobs import run_batched
from fedbn_clients.records import (
    Decoder,
    aggregates_from,
    aggregates_to,
    arrays,
    client_statistics_from,
    client_statistics_to,
    tensors,
    to_record_by_reference,
)
from fedbn_clients.serialization import LazyArrayRecord
from tests.helpers import same


def test_aggregates_keep_their_order_beyond_ten():
    aggregates = [{"bn": Moments.of(torch.full((i + 1, 2), float(i)))} for i in range(12)]
    received = aggregates_from(aggregates_to(aggregates))
    assert [float(a["bn"].n) for a in received] == list(range(1, 13))
    assert [a["bn"].mean.tolist() for a in received] == [[i, i] for i in range(12)]


def test_client_statistics_round_trip():
    clients = tuple({"a|b.mean": torch.full((2,), float(i)), "var": torch.ones(1)} for i in range(12))
    between = {"a|b.mean": torch.ones(2, dtype=torch.float64)}
    statistics = ClientStatistics({"a|b.mean": torch.ones(2)}, {"var": torch.zeros(1)}, between, clients)
    received = client_statistics_from(client_statistics_to(statistics), "cpu")
    for name in ("mean", "variance", "between"):
        assert same(getattr(received, name), getattr(statistics, name))
    assert all(same(a, b) for a, b in zip(received.clients, clients, strict=True))
    assert client_statistics_from(client_statistics_to(statistics.without_clients), "cpu").clients == ()


def test_records_are_passed_by_reference_only_in_a_batch():
    state = {"w": torch.ones(2)}
    record = to_record_by_reference(state)
    assert not isinstance(record, LazyArrayRecord)
    assert same(tensors(record), state)
    (batched,) = run_batched([lambda: to_record_by_reference(state)], lambda jobs: [job.run() for job in jobs])
    assert tensors(batched)["w"] is state["w"]
    assert tensors(batched) is not state, "a change of the result must not change the record"
    assert batched["w"].shape == (2,)
    assert same(tensors(batched), state), "after the conversion to arrays"


def test_decoder_decodes_equal_bytes_once():
    decode = Decoder()
    record = arrays({"w": torch.ones(2), "v": torch.zeros(3)})
    first = decode(record, "cpu")
    assert same(first, {"w": torch.ones(2), "v": torch.zeros(3)})
    assert decode(record.copy(), "cpu") is first
    changed = record.copy()
    changed["v"] = arrays({"v": torch.ones(3)})["v"]
    assert decode(changed, "cpu")["v"].tolist() == [1, 1, 1]
    assert list(decode(record, "cpu")) == ["w", "v"]
    assert list(decode(arrays({"w": torch.ones(2)}), "cpu")) == ["w"]
    renamed = record.copy()
    renamed["u"] = renamed["v"]
    del renamed["v"]
    decode(record, "cpu")
    assert list(decode(renamed, "cpu")) == ["w", "u"]
