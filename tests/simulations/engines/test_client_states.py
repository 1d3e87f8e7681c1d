"""What clients keep goes to files where it would take too much memory, and nothing else changes."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest
import torch
from flwr.app import RecordDict

from clients.app import app as client_app
from clients.records import arrays
from clients.serialization import LazyArrayRecord
from fedbn.errors import UserError
from fedbn.federation.run import Run, plan_for
from simulations.engines import client_states
from simulations.engines.client_states import ClientStates, available, size
from simulations.engines.execute import execute
from simulations.engines.grid import InProcessGrid
from simulations.server.nodes import ClientError
from tests.helpers import same


@pytest.fixture
def little(monkeypatch):
    """So little memory that everything goes to files."""
    monkeypatch.setattr(client_states, "available", lambda: 1)


def run_of(strategy, rounds=3, **plan):
    plan = plan_for("digits8", rounds=rounds, optimizer_state="keep", **plan)
    return Run("digits8", strategy, model="mlp", partition="dirichlet:alpha=1:clients=4", plan=plan)


@pytest.mark.parametrize("strategy", ["fedbn", "local", "fedbn+scaffold", "silobn+ditto"])
@pytest.mark.parametrize("engine", ["grid", "grid:stacked"])
def test_a_run_on_files_has_the_same_bits(strategy, engine, little, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING, logger="simulations.engines.client_states"):
        on_files = execute(run_of(strategy), engine)
    assert re.search(r"what \d clients keep, .* GB, is more than 50% of the memory left: it goes to files", caplog.text)
    monkeypatch.setattr(client_states, "available", lambda: 10**12)
    in_memory = execute(run_of(strategy), engine)
    assert same(on_files.server.state, in_memory.server.state)
    assert on_files.client_states.keys() == in_memory.client_states.keys()
    assert all(same(on_files.client_states[u], in_memory.client_states[u]) for u in in_memory.client_states)
    assert on_files.scores == in_memory.scores


def kept(states, node, **tensors):
    records = RecordDict({"client_state": LazyArrayRecord(tensors)})
    states.keep(node, records)
    return records["client_state"].state


def mapped(tensor):
    """Whether a tensor's memory is that of a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(n, 16) for n in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return "fedbn-clients-" in line
    return False


def test_tensors_of_all_kinds_lie_in_files(little):
    states = ClientStates(3)
    given = {"w": torch.randn(3, 5), "n": torch.tensor(7), "e": torch.zeros(0), "b": torch.tensor([True, False])}
    given["t"] = torch.randn(4, 2).T
    found = kept(states, 0, **given)
    assert same(found, given)
    assert all(mapped(v) for v in found.values() if v.numel())
    assert all(v.data_ptr() % 64 == 0 for v in found.values() if v.numel())


def test_what_a_client_had_may_be_kept_under_another_name(little):
    states = ClientStates(1)
    first = kept(states, 0, now=torch.ones(9), before=torch.zeros(9))
    second = kept(states, 0, now=torch.full((9,), 2.0), before=first["now"])
    assert second["before"].tolist() == [1.0] * 9
    third = kept(states, 0, now=torch.full((9,), 3.0), before=second["now"])
    assert (third["now"].tolist(), third["before"].tolist()) == ([3.0] * 9, [2.0] * 9)


def test_places_are_used_again_and_what_has_not_changed_stays(little):
    states = ClientStates(2)
    places = set()
    for value in range(6):
        found = kept(states, 0, w=torch.full((9,), float(value)))
        places.add(found["w"].data_ptr())
        assert kept(states, 0, **found)["w"].data_ptr() == found["w"].data_ptr()
    assert len(places) == 2


@pytest.mark.parametrize("mine", [0, 1])
def test_what_is_somebody_else_s_is_copied(mine, little):
    states = ClientStates(4)
    had = [kept(states, i, w=torch.full((9,), float(i)))["w"] for i in range(2)]
    found = kept(states, mine, w=had[1 - mine])["w"]
    assert found.data_ptr() != had[1 - mine].data_ptr()
    assert found.tolist() == had[1 - mine].tolist()


def test_a_state_may_change_its_size(little):
    states = ClientStates(2)
    kept(states, 0, w=torch.ones(9))
    assert kept(states, 0, w=torch.ones(9), m=torch.full((99,), 2.0))["m"].sum() == 198
    assert kept(states, 1, w=torch.ones(9))["w"].sum() == 9


def test_many_share_a_file_and_files_have_no_names(little, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    states = ClientStates(50)
    found = [kept(states, i, w=torch.full((9,), float(i))) for i in range(50)]
    assert [f["w"][0].item() for f in found] == [*range(50)]
    assert not [*tmp_path.iterdir()]
    files = {line.split()[-2] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line}
    assert len(files) == 1


def test_memory_that_suffices_is_left_alone(monkeypatch):
    monkeypatch.setattr(client_states, "available", lambda: 2 * 10 * 128)
    for nodes, on_disk in ((10, False), (11, True)):
        states = ClientStates(nodes)
        assert mapped(kept(states, 0, w=torch.ones(16), n=torch.tensor(1))["w"]) == on_disk


def test_messages_that_were_unpacked_are_left_alone(little):
    states, records = ClientStates(1), RecordDict({"client_state": arrays({"w": torch.ones(2)})})
    states.keep(0, records)
    assert states.on_disk is None


def test_no_room_is_said_before_anything_is_written(little, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.statvfs_result((0,) * 10) and type("U", (), {"free": 9})())
    with pytest.raises(ClientError, match="has no room for what . clients keep, .* name a larger place in TMPDIR"):
        execute(run_of("fedbn"), "grid")


def test_a_disk_that_fills_up_is_said(little, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(UserError, match="no room for what clients keep .*No space left.* name a larger one in TMPDIR"):
        kept(ClientStates(2), 0, w=torch.ones(3))


def test_sizes():
    assert size({"a": torch.zeros(17), "b": torch.zeros((), dtype=torch.int64), "c": torch.zeros(0)}) == 128 + 64
    assert 10**6 < available() < 10**14


def test_memory_where_linux_is_not(tmp_path, monkeypatch):
    free = available()
    monkeypatch.setattr(client_states, "INFO", tmp_path / "meminfo")
    assert free < available() < 10**14
    monkeypatch.delattr("os.sysconf_names")
    assert available() > 10**17


def test_a_grid_has_room_for_its_nodes():
    assert InProcessGrid(client_app, 3, {})._states.nodes == 3
