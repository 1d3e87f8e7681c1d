"""Replies of clients are checked against their schemas before anything of them is used."""

from __future__ import annotations

import pytest
import torch

from clients.records import arrays
from fedbn.federation.setup import build_context
from simulations.server.validation import InvalidReply, ReplyValidator


@pytest.mark.parametrize(
    ("extra", "listed"),
    [("a", "a"), ("ab", "a, b"), ("cab", "a, b, c"), ("dcab", "a, b, c, ..."), ("edcab", "a, b, c, ...")],
)
def test_validator_lists_up_to_three_unexpected_names(extra, listed, small):
    validator = ReplyValidator(build_context(small("global-naive")))
    entries = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in validator.schemas.entries.items()}
    assert validator.entries(3, arrays(entries), {}).keys() == entries.keys()
    with pytest.raises(InvalidReply, match=f"^client 3 sent unexpected or missing entries: {listed}; its reply"):
        validator.entries(3, arrays(entries | {name: torch.zeros(1) for name in extra}), {})
