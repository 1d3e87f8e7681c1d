from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from simulations.flower.superlink import SuperLink


@pytest.mark.parametrize(
    ("certificates", "tls"),
    [
        (None, {"insecure": True}),
        (SimpleNamespace(root=Path("/c/root.pem")), {"root-certificates": str(Path("/c/root.pem"))}),
    ],
)
def test_flower_config_names_only_this_superlink(certificates, tls):
    config = SuperLink._flower_config(SimpleNamespace(port=9093, certificates=certificates))
    assert config == {"superlink": {"default": "fedbn", "fedbn": {"address": "127.0.0.1:9093"} | tls}}
