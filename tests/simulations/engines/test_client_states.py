"""Client states move to files if they need too much memory, without a change of the results."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest
import torch
from flwr.app import RecordDict

from fedbn.errors import UserError
from fedbn.federation.run import Run, plan_for
from fedbn_clients.app import app as client_app
from fedbn_clients.records import arrays
from fedbn_clients.serialization import LazyArrayRecord
from fedbn_simulations.engines import client_states
from fedbn_simulations.engines.client_states import ClientStates, available_memory, state_bytes
from fedbn_simulations.engines.execute import execute
from fedbn_simulations.engines.grid import InProcessGrid
from tests.helpers import same


@pytest.fixture
def low_memory(monkeypatch):
    """Too little memory for any state, so that all states go to files."""
    monkeypatch.setattr(client_states, "available_memory", lambda: 1)


def run_of(strategy, rounds=3, **plan):
    plan = plan_for("digits8", rounds=rounds, optimizer_state="keep", **plan)
    return Run("digits8", strategy, model="mlp", partition="dirichlet:alpha=1:clients=4", plan=plan)


@pytest.mark.parametrize(
    ("engine", "strategy"),
    [
        ("grid", "fedbn+scaffold"),
        ("grid:stacked", "silobn+ditto"),
        *(pytest.param("grid", name, marks=pytest.mark.slow) for name in ("fedbn", "local", "silobn+ditto")),
        *(pytest.param("grid:stacked", name, marks=pytest.mark.slow) for name in ("fedbn", "local", "fedbn+scaffold")),
    ],
)
def test_run_with_states_on_disk_is_bit_identical(engine, strategy, low_memory, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING, logger="fedbn_simulations.engines.client_states"):
        on_files = execute(run_of(strategy), engine)
    warning = r"the states of \d clients need .* GB, more than 50% of the available memory: using files in"
    assert re.search(warning, caplog.text)
    monkeypatch.setattr(client_states, "available_memory", lambda: 10**12)
    in_memory = execute(run_of(strategy), engine)
    assert same(on_files.server.state, in_memory.server.state)
    assert on_files.client_states.keys() == in_memory.client_states.keys()
    assert all(same(on_files.client_states[u], in_memory.client_states[u]) for u in in_memory.client_states)
    assert on_files.scores == in_memory.scores


def store(states, node, **tensors):
    records = RecordDict({"client_state": LazyArrayRecord(tensors)})
    states.store(node, records)
    return records["client_state"].state


def is_mapped(tensor):
    """Whether a tensor is in a memory-mapped file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(n, 16) for n in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return "fedbn-clients-" in line
    return False


def test_client_states_map_tensors_of_all_dtypes(low_memory):
    states = ClientStates(3)
    state = {"w": torch.randn(3, 5), "n": torch.tensor(7), "e": torch.zeros(0), "b": torch.tensor([True, False])}
    state["t"] = torch.randn(4, 2).T
    stored = store(states, 0, **state)
    assert same(stored, state)
    assert all(is_mapped(v) for v in stored.values() if v.numel())
    assert all(v.data_ptr() % 64 == 0 for v in stored.values() if v.numel())


def test_client_states_keep_renamed_tensors(low_memory):
    states = ClientStates(1)
    first = store(states, 0, now=torch.ones(9), before=torch.zeros(9))
    second = store(states, 0, now=torch.full((9,), 2.0), before=first["now"])
    assert second["before"].tolist() == [1.0] * 9
    third = store(states, 0, now=torch.full((9,), 3.0), before=second["now"])
    assert (third["now"].tolist(), third["before"].tolist()) == ([3.0] * 9, [2.0] * 9)


def test_client_states_reuse_blocks(low_memory):
    states = ClientStates(2)
    blocks = set()
    for value in range(6):
        stored = store(states, 0, w=torch.full((9,), float(value)))
        blocks.add(stored["w"].data_ptr())
        assert store(states, 0, **stored)["w"].data_ptr() == stored["w"].data_ptr()
    assert len(blocks) == 2


@pytest.mark.parametrize("node", [0, 1])
def test_client_states_copy_tensors_of_other_nodes(node, low_memory):
    states = ClientStates(4)
    previous = [store(states, i, w=torch.full((9,), float(i)))["w"] for i in range(2)]
    stored = store(states, node, w=previous[1 - node])["w"]
    assert stored.data_ptr() != previous[1 - node].data_ptr()
    assert stored.tolist() == previous[1 - node].tolist()


def test_client_states_can_change_size(low_memory):
    states = ClientStates(2)
    store(states, 0, w=torch.ones(9))
    assert store(states, 0, w=torch.ones(9), m=torch.full((99,), 2.0))["m"].sum() == 198
    assert store(states, 1, w=torch.ones(9))["w"].sum() == 9


def test_client_states_share_one_unlinked_file(low_memory, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    states = ClientStates(50)
    stored = [store(states, i, w=torch.full((9,), float(i))) for i in range(50)]
    assert [f["w"][0].item() for f in stored] == [*range(50)]
    assert not [*tmp_path.iterdir()]
    files = {line.split()[-2] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line}
    assert len(files) == 1


def test_client_states_stay_in_memory_if_they_fit(monkeypatch):
    monkeypatch.setattr(client_states, "available_memory", lambda: 2 * 10 * 128)
    for nodes, on_disk in ((10, False), (11, True)):
        states = ClientStates(nodes)
        assert is_mapped(store(states, 0, w=torch.ones(16), n=torch.tensor(1))["w"]) == on_disk


def test_client_states_ignore_decoded_records(low_memory):
    states, records = ClientStates(1), RecordDict({"client_state": arrays({"w": torch.ones(2)})})
    states.store(0, records)
    assert states.on_disk is None


def test_client_states_check_disk_space_first(low_memory, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.statvfs_result((0,) * 10) and type("U", (), {"free": 9})())
    message = "the states of . clients need .* GB, but .* has only .* GB: set TMPDIR to a larger disk"
    with pytest.raises(UserError, match=message):
        execute(run_of("fedbn"), "grid")


def test_client_states_report_full_disk(low_memory, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(UserError, match="no space for client states .*No space left.* set TMPDIR to a larger disk"):
        store(ClientStates(2), 0, w=torch.ones(3))


def test_state_bytes_are_aligned():
    assert state_bytes({"a": torch.zeros(17), "b": torch.zeros((), dtype=torch.int64), "c": torch.zeros(0)}) == 128 + 64
    assert 10**6 < available_memory() < 10**14


def test_available_memory_without_meminfo(tmp_path, monkeypatch):
    free = available_memory()
    monkeypatch.setattr(client_states, "MEMINFO", tmp_path / "meminfo")
    assert free < available_memory() < 10**14
    monkeypatch.delattr("os.sysconf_names")
    assert available_memory() > 10**17


def test_grid_passes_number_of_nodes_to_client_states():
    assert InProcessGrid(client_app, 3, {})._states.nodes == 3
