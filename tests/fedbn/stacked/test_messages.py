"""Arrays are written and read as Flower does it, only faster."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st

from clients.jobs import is_batched, run_batched
from clients.records import Decoder, arrays, tensors, to_record_by_reference
from clients.serialization import LazyArrayRecord, pack, unpack
from fedbn.errors import UserError

KINDS = (torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)


@given(st.lists(st.integers(0, 4), max_size=4), st.sampled_from(KINDS), st.integers(0, 99))
def test_bytes_are_flowers_and_come_back(shape, kind, seed):
    torch.manual_seed(seed)
    x = (100 * torch.randn(shape)).to(kind)
    array = pack(x)
    flowers = Array(x.clone())
    assert (array.data, array.dtype, array.shape, array.stype) == tuple(
        getattr(flowers, n) for n in ("data", "dtype", "shape", "stype")
    )
    back = unpack(array)
    assert back.dtype == kind
    assert torch.equal(back, x)


def test_views_in_another_order_keep_their_values():
    x = torch.randn(2, 3, 4, 5)
    for view in (x.contiguous(memory_format=torch.channels_last), x.transpose(0, 3), x[:, ::2], x[0, 0].T):
        assert torch.equal(unpack(pack(view)), view)
        assert np.array_equal(pack(view).numpy(), view)


def test_other_bytes_are_left_to_flower():
    fortran = Array(np.asfortranarray(np.arange(6.0).reshape(2, 3)))
    assert torch.equal(unpack(fortran), torch.arange(6.0, dtype=torch.float64).view(2, 3))
    with pytest.raises(UserError, match="Unsupported serialization type"):
        unpack(Array("float32", (1,), "other", b"1234"))


def test_what_is_read_can_be_written_to_without_changing_the_message():
    array = pack(torch.zeros(3))
    unpack(array).add_(1)
    assert torch.equal(unpack(array), torch.zeros(3))


def test_held_tensors_are_handed_over_as_they_are():
    state = {"a": torch.ones(2), "b": torch.tensor(3)}
    record = LazyArrayRecord(state)
    assert tensors(record)["a"] is state["a"]
    assert Decoder()(record, "cpu") is state
    copy = record.copy()
    assert copy is not record
    assert tensors(copy)["a"] is state["a"]


LOOKS = {
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


@pytest.mark.parametrize("name", LOOKS)
def test_a_held_record_is_an_ordinary_one_to_whoever_looks(name):
    state = {"a": torch.ones(2)}
    held, plain = LazyArrayRecord(state), arrays(state)
    assert isinstance(held, ArrayRecord)
    assert list_of(LOOKS[name](held)) == list_of(LOOKS[name](plain)) or name == "serialize"  # it names its class
    assert held.state is None
    assert held == plain
    assert state.keys() == {"a"}
    assert held.copy() == plain


def list_of(result):
    return list(result) if hasattr(result, "__iter__") and not isinstance(result, str | bytes) else result


def test_what_is_written_to_a_copy_stays_there():
    held = LazyArrayRecord({"a": torch.ones(2)})
    copy = held.copy()
    copy["a"] = pack(torch.zeros(2))
    assert torch.equal(tensors(held)["a"], torch.ones(2))
    assert torch.equal(tensors(copy)["a"], torch.zeros(2))


def test_only_calls_made_together_hand_over_by_reference():
    assert not is_batched()
    assert not isinstance(to_record_by_reference({}), LazyArrayRecord)
    assert run_batched([lambda: isinstance(to_record_by_reference({}), LazyArrayRecord)], lambda jobs: []) == [True]
