from __future__ import annotations

import pytest
import torch

from clients.records import arrays
from fedbn.federation.setup import build_context
from simulations.server.validation import InvalidReply, expected_entries, validate_entries


@pytest.mark.parametrize(
    ("extra", "listed"),
    [("a", "a"), ("ab", "a, b"), ("cab", "a, b, c"), ("dcab", "a, b, c, ..."), ("edcab", "a, b, c, ...")],
)
def test_validate_entries_lists_up_to_three_unexpected_names(extra, listed, small):
    ctx = build_context(small("global-naive"))
    entries = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in expected_entries(ctx).items()}
    assert validate_entries(ctx, 3, arrays(entries)).keys() == entries.keys()
    with pytest.raises(InvalidReply, match=f"^client 3 sent unexpected or missing entries: {listed}; its reply"):
        validate_entries(ctx, 3, arrays(entries | {name: torch.zeros(1) for name in extra}))
