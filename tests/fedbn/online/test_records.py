from __future__ import annotations

import random
import zlib

import pytest
import torch
from torch import nn

from fedbn.errors import UserError
from fedbn.models.har_cnn import HarCNN
from fedbn.online import personalize, population_prior, source_prior
from fedbn.online.records import DamagedRecordError
from fedbn.online.rules.base import rules
from tests.helpers import mostly_slow


def network(seed=0):
    torch.manual_seed(seed)
    return HarCNN((3, 16), 4).eval()


def data(n, seed=0):
    return torch.randn(n, 3, 16, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def prior_of(rule, model):
    if rule.requires == "n0":
        return population_prior(model, [data(4, seed) for seed in range(3)])
    if rule.requires == "class_mean":
        return source_prior(model, data(8), torch.arange(8) % 4, 4)
    return None


@pytest.fixture
def net():
    net = personalize(network(), "pseudo:n0=2", capacity=2)
    net(data(2), user=["ann", "bob"])
    net.flush()
    return net


@pytest.mark.parametrize("name", [name for name, rule in rules().items() if rule.requires in ("", "n0", "class_mean")])
@pytest.mark.parametrize("calibrated", mostly_slow([False, True], True))
def test_record_restores_every_bit(name, calibrated):
    model = network()
    net = personalize(model, name, prior_of(rules()[name], model))
    if calibrated:
        net.calibrate(data(4), "ann", then="adapt")
    for seed in range(3):
        net(data(1, seed), user="ann")
    net.flush()
    other = personalize(model, name, prior_of(rules()[name], model), store=net.bank.store)
    x = data(2, 9)
    assert torch.equal(other.predict(x, user="ann"), net.predict(x, user="ann"))
    assert other.state("ann").to_bytes() == net.state("ann").to_bytes()
    other(x[:1], user="ann")
    net(x[:1], user="ann")
    assert other.state("ann").to_bytes() == net.state("ann").to_bytes()


def test_damaged_record_is_rejected_and_affects_no_other_user(net):
    record, bank = net.bank.store["ann"], net.bank
    draw = random.Random(0)
    damages = [record[:-1], record[:20], b"", b"\n" * 40, record + b"x"]
    for _ in range(200):
        bit = draw.randrange(8 * len(record))
        flipped = bytearray(record)
        flipped[bit // 8] ^= 1 << bit % 8
        damages.append(bytes(flipped))
    reopened = personalize(network(), "pseudo:n0=2", capacity=2, store=bank.store)
    for damaged in damages:
        bank.store["ann"] = damaged
        with pytest.raises(DamagedRecordError, match="the stored state"):
            reopened.predict(data(1), user="ann")
        assert torch.equal(reopened.predict(data(1), user="bob"), net.predict(data(1), user="bob"))
    assert bank.store["ann"] == damages[-1], "a damaged record is not overwritten"
    bank.store["ann"] = record
    assert torch.equal(reopened.predict(data(1), user="ann"), net.predict(data(1), user="ann"))


def test_record_with_a_valid_checksum_but_bad_values_is_rejected(net):
    records = net.bank.records
    rows = {name: t.clone() for name, t in net.bank.rows.items()}
    rows["mean"][1, 0, 3] = torch.nan
    [record] = records.pack(rows, torch.tensor([1]))
    with pytest.raises(DamagedRecordError, match="not finite"):
        records.unpack(record)
    body = net.bank.store["ann"][:-4] + b"\0" * 4
    with pytest.raises(DamagedRecordError, match="another size"):
        records.unpack(body + zlib.crc32(body).to_bytes(4, "little"))


def test_record_of_another_origin_is_rejected(net):
    record = net.bank.store["ann"]
    for other, message in (
        (personalize(network(1), "pseudo:n0=2"), "belongs to model"),
        (personalize(network(), "ema"), "belongs to rule 'pseudo:n0=2.0', not 'ema'"),
        (personalize(network().double(), "pseudo:n0=2"), "belongs to model"),
        (personalize(network(), "pseudo:n0=2").double(), "values of type <f4, not <f8"),
    ):
        with pytest.raises(UserError, match=message):
            other.bank.records.unpack(record)
    body = record[:-4].replace(b'"format":1', b'"format":9')
    with pytest.raises(UserError, match="format 9, this program reads 1"):
        net.bank.records.unpack(body + zlib.crc32(body).to_bytes(4, "little"))


def test_flush_writes_only_users_that_changed(net):
    store = net.bank.store
    store.clear()
    net.predict(data(1), user="ann")
    net.flush()
    assert not store
    net(data(1), user="ann")
    net.flush()
    assert list(store) == ["ann"]
    net(data(2, 1), user=["cem", "dan"])  # evicts both, who have not changed since
    assert list(store) == ["ann"]
    net(data(2, 1), user=["ann", "eve"])  # evicts both, who have changed
    assert sorted(store) == ["ann", "cem", "dan"]


def test_parts_without_windows_follow_a_new_prior():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    net = personalize(model, "pseudo")
    net.bank.group(["ann"], create=True)
    net.flush()
    prior = population_prior(model, [torch.randn(4, 3) + 1, torch.randn(4, 3) - 1])
    moved = personalize(model, "pseudo", prior, store=net.bank.store)
    x = torch.ones(2, 3)
    assert torch.equal(moved.predict(x, user="ann"), moved.predict(x, user="new"))
    assert not torch.equal(moved.predict(x, user="ann"), net.predict(x, user="ann"))
