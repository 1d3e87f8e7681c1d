"""Arrays are encoded and decoded as by Flower."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st

from fedbn.errors import UserError
from fedbn_clients.jobs import is_batched, run_batched
from fedbn_clients.records import Decoder, arrays, tensors, to_record_by_reference
from fedbn_clients.serialization import LazyArrayRecord, pack, unpack

DTYPES = (torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)


@given(st.lists(st.integers(0, 4), max_size=4), st.sampled_from(DTYPES), st.integers(0, 99))
def test_pack_writes_flower_bytes_and_unpack_restores_them(shape, dtype, seed):
    torch.manual_seed(seed)
    x = (100 * torch.randn(shape)).to(dtype)
    array = pack(x)
    actual, expected = ((a.data, a.dtype, a.shape, a.stype) for a in (array, Array(x.clone())))
    assert actual == expected
    restored = unpack(array)
    assert restored.dtype == dtype
    assert torch.equal(restored, x)


def test_pack_handles_non_contiguous_views():
    x = torch.randn(2, 3, 4, 5)
    for view in (x.contiguous(memory_format=torch.channels_last), x.transpose(0, 3), x[:, ::2], x[0, 0].T):
        assert torch.equal(unpack(pack(view)), view)
        assert np.array_equal(pack(view).numpy(), view)


def test_unpack_delegates_other_headers_to_flower():
    fortran = Array(np.asfortranarray(np.arange(6.0).reshape(2, 3)))
    assert torch.equal(unpack(fortran), torch.arange(6.0, dtype=torch.float64).view(2, 3))
    with pytest.raises(UserError, match="Unsupported serialization type"):
        unpack(Array("float32", (1,), "other", b"1234"))


def test_unpack_returns_a_copy():
    array = pack(torch.zeros(3))
    unpack(array).add_(1)
    assert torch.equal(unpack(array), torch.zeros(3))


def test_lazy_record_shares_its_tensors():
    state = {"a": torch.ones(2), "b": torch.tensor(3)}
    record = LazyArrayRecord(state)
    assert tensors(record)["a"] is state["a"]
    assert Decoder()(record, "cpu") is state
    copy = record.copy()
    assert copy is not record
    assert tensors(copy)["a"] is state["a"]


ACCESSES = {
    "get": lambda r: r["a"],
    "keys": lambda r: r.keys(),
    "values": lambda r: r.values(),
    "items": lambda r: r.items(),
    "in": lambda r: "a" in r,
    "len": lambda r: len(r),
    "iterate": lambda r: list(r),
    "equal": lambda r: r == arrays({"a": torch.ones(2)}),
    "print": lambda r: repr(r),
    "set": lambda r: r.__setitem__("b", pack(torch.zeros(1))),
    "delete": lambda r: r.__delitem__("a"),
    "count": lambda r: r.count_bytes(),
    "serialize": lambda r: r.deflate(),
}


@pytest.mark.parametrize("name", ACCESSES)
def test_lazy_record_behaves_like_array_record(name):
    state = {"a": torch.ones(2)}
    lazy, plain = LazyArrayRecord(state), arrays(state)
    assert isinstance(lazy, ArrayRecord)
    actual, expected = (as_list(ACCESSES[name](record)) for record in (lazy, plain))
    assert actual == expected or name == "serialize"  # the output contains the class name
    assert lazy.state is None
    assert lazy == plain
    assert state.keys() == {"a"}
    assert lazy.copy() == plain


def as_list(result):
    return list(result) if hasattr(result, "__iter__") and not isinstance(result, str | bytes) else result


def test_lazy_record_copy_is_independent():
    lazy = LazyArrayRecord({"a": torch.ones(2)})
    copy = lazy.copy()
    copy["a"] = pack(torch.zeros(2))
    assert torch.equal(tensors(lazy)["a"], torch.ones(2))
    assert torch.equal(tensors(copy)["a"], torch.zeros(2))


def test_records_are_lazy_only_in_batched_calls():
    assert not is_batched()
    assert not isinstance(to_record_by_reference({}), LazyArrayRecord)
    assert run_batched([lambda: isinstance(to_record_by_reference({}), LazyArrayRecord)], lambda jobs: []) == [True]
