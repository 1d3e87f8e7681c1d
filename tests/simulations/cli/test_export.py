from __future__ import annotations

import torch

from fedbn.models.har_cnn import HarCNN
from fedbn.online import personalize
from fedbn_simulations.cli.export import _adapted
from tests.helpers import same


def test_adapted_model_learns_from_rows_one_by_one():
    torch.manual_seed(0)
    model, rows = HarCNN((3, 16), 4).eval(), torch.randn(5, 3, 16) * 2 + 1
    net = personalize(model, "ema:rate=0.3")
    for row in rows:
        net(row[None], user="user")
    adapted = _adapted(model, "ema:rate=0.3", rows)
    assert same(adapted.state_dict(), net.export("user").state_dict())
    assert not same(adapted.state_dict(), model.state_dict())
