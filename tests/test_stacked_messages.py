"""Arrays are written and read as Flower does it, only faster."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st

from clients.npy import pack, unpack

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
    with pytest.raises(TypeError, match="Unsupported serialization type"):
        unpack(Array("float32", (1,), "other", b"1234"))


def test_what_is_read_can_be_written_to_without_changing_the_message():
    array = pack(torch.zeros(3))
    unpack(array).add_(1)
    assert torch.equal(unpack(array), torch.zeros(3))
