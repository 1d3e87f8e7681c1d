from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fedbn.errors import UserError
from fedbn.federation.failures import ClientError
from fedbn_simulations.flower import superlink
from fedbn_simulations.flower.superlink import FlowerRunError, SuperLink
from fedbn_simulations.server.validation import InvalidReply


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


@pytest.mark.parametrize("part", ["Simulation", "ServerApp"])
@pytest.mark.parametrize("kind", [UserError, ClientError, InvalidReply, ValueError])
def test_failure_recognizes_user_errors(part, kind, tmp_path):
    link, cause = SuperLink(tmp_path), "no node for user 1\nafter 5 s"
    link.log("run-1").write_text(f"Traceback\n{kind.__module__}.{kind.__qualname__}: {cause}\n")
    failure = link._failure("run-1", "finished:failed", f"{part} failed with exception: {cause}")
    assert type(failure) is (FlowerRunError if kind is ValueError else kind)
    assert str(failure).startswith(cause) == (kind is not ValueError)


def test_flwr_command_has_a_time_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(superlink, "COMMAND_SECONDS", 0.1)
    monkeypatch.setattr(superlink, "script_path", lambda name: str(tmp_path / name))
    (tmp_path / "flwr").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "flwr").chmod(0o700)
    (tmp_path / "superlink.log").write_text("busy")
    with pytest.raises(FlowerRunError, match="flwr list did not end within 0.1 s\nbusy"):
        SuperLink(tmp_path).flwr("list")
