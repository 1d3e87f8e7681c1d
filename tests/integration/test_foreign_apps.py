"""Apps in the shapes of Flower's templates: the same results in this process as in Flower's Ray simulation."""

from __future__ import annotations

import pytest
import torch

from fedbn_simulations.engines.ray import federation_config
from fedbn_simulations.engines.simulation import run_app
from fedbn_simulations.flower.apps import FlowerApp
from fedbn_simulations.flower.processes import ProcessGroup
from fedbn_simulations.flower.superlink import SuperLink
from tests.helpers import ROOT, same

MESSAGES = ROOT / "tests" / "apps" / "messages"


def final_state(run, in_order, out):
    run(f"in-order={str(in_order).lower()} out='{out}' num-server-rounds=3")
    return torch.load(out)


@pytest.mark.ray
def test_run_app_matches_ray(tmp_path, mark):
    """Equal bits if the server aggregates in a fixed order; otherwise equal up to the order of summation."""
    processes = ProcessGroup()
    with processes.workspace() as directory:
        link = SuperLink(directory, ("--simulation",), processes=processes)
        link.start()
        settings = ("--federation-config", federation_config(4, 2, "cpu"), "--run-config")
        for in_order in (True, False):
            on_ray = final_state(lambda c: link.run_app(MESSAGES, *settings, c), in_order, tmp_path / "ray.pt")
            in_process = final_state(
                lambda c: run_app(FlowerApp.read(MESSAGES), 4, [c]), in_order, tmp_path / "in_process.pt"
            )
            if in_order:
                assert same(on_ray, in_process)
            for name in in_process:
                torch.testing.assert_close(on_ray[name], in_process[name], rtol=1e-4, atol=1e-5)
