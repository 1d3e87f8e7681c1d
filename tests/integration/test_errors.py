"""No content of an exception reaches the server from Ray workers and SuperNodes."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import replace

import pytest
import tomli_w

from fedbn.errors import UserError
from fedbn.federation.failures import LOG_VARIABLE
from fedbn.federation.run import Run, plan_for
from fedbn_simulations.engines.deployment import await_nodes, deployment
from fedbn_simulations.engines.ray import ray_session
from fedbn_simulations.flower.processes import HOST, free_port, script_path
from fedbn_simulations.flower.superlink import MODULES
from tests.exceptions import ERRORS, EXPECTED, SECRET, is_private
from tests.fedbn.scenarios.test_remote import SCENARIO, make_run, write_node_files
from tests.integration.error_server import NAMES, REPLIES
from tests.integration.test_deployment import short_run

ON_SUPERNODE = ["UserError", "class name", "unreadable", "exit"]
"""Exceptions that a SuperNode raises, each in a process of its own; workers of Ray raise all."""


def check_replies(directory, names):
    replies = json.loads((directory / REPLIES).read_text())
    assert replies.keys() == set(names)
    assert not is_private(replies)
    for name in replies.keys() & EXPECTED.keys():
        assert tuple(replies[name]) == EXPECTED[name]
    assert all(code >= 100 for name, (code, _) in replies.items() if name != "exit")


def check_files(directory, *logs):
    """No file of the SuperLink has private text, unlike the logs of the nodes."""
    assert any(is_private(log.read_text()) for log in logs)
    for path in directory.rglob("*"):
        if path.is_file() and path not in logs and path.suffix != ".py":
            assert not is_private(path.read_bytes().decode(errors="replace")), path


@pytest.fixture
def raising(monkeypatch, tmp_path):
    monkeypatch.setitem(MODULES, "fedbn_run_server.py", "tests.integration.error_server")
    monkeypatch.setitem(MODULES, "fedbn_run_client.py", "tests.integration.error_client")

    def execute(names, execute_run, run):
        (tmp_path / NAMES).write_text(json.dumps(names))
        with pytest.raises(UserError, match="cannot be read"):
            execute_run(run, out=tmp_path / "outcome")
        check_replies(tmp_path, names)

    return execute


@pytest.mark.ray
def test_ray_workers_send_no_content_of_exceptions(raising, mark, monkeypatch, tmp_path):
    log = tmp_path / "clients.log"
    monkeypatch.setenv(LOG_VARIABLE, str(log))
    with ray_session(actors=1) as execute:
        raising(list(ERRORS), execute, short_run("fedbn", 1))
    assert log.read_text().count("query.raise_error") == len(ERRORS)
    assert is_private(log.read_text())


@pytest.mark.slow
def test_supernode_sends_no_content_of_exceptions(raising, mark, tmp_path):
    with deployment(1) as link:
        raising(ON_SUPERNODE, link.execute, short_run("fedbn", 1))
        check_files(link.directory, link.log("supernode-0"))


def start_other_node(link, name, config):
    """Start a SuperNode with any node config."""
    command = [script_path("flower-supernode"), "--superlink", f"{HOST}:{link.port}", "--insecure"]
    link.start_process(name, [*command, "--host", HOST, "--port", str(free_port()), "--node-config", config])


@pytest.mark.slow
def test_supernodes_with_bad_data_and_partitions_are_left_out(mark, tmp_path):
    write_node_files(tmp_path)
    bad = tmp_path / f"{SECRET}.csv"
    bad.write_text(f"x0,x1,x2,x3,x4,x5,y\n1,2,3,4,5,{SECRET},0\n")
    run = make_run(SCENARIO, rounds=1)
    run = replace(run, plan=replace(run.plan, tolerate=0.7))
    with deployment(3, data=[tmp_path / "0.npz", bad, tmp_path / "2.npz"]) as link:
        start_other_node(link, "text", f'partition-id="{SECRET}" num-partitions=3')
        start_other_node(link, "rival", "partition-id=2 num-partitions=3")
        await_nodes(link, 5)
        link.wait = 60.0
        outcome = link.execute(run)
        texts = [failure.text for failure in outcome.failures]
        assert any(re.match(r"node \d+: UserError \(code 101", text) for text in texts)
        assert any("claim the same user, 2" in text for text in texts)
        assert any(text.startswith("train, user 1: UserError (code 101") for text in texts)
        assert not is_private(texts)
        check_files(link.directory, link.log("supernode-1"), link.log("text"))
    assert outcome.scores.keys() == {0}


@pytest.mark.slow
def test_deployment_ignores_node_with_other_key(mark, tmp_path):
    scenario = "digits8:users=2:unseen=0"
    run = Run(scenario, "fedbn", plan=plan_for(scenario, rounds=1, eval_every=1, global_test=20)).resolved()
    keys = tmp_path / "keys" / "keys.toml"
    with deployment(2, tls=True, keys=keys) as link:
        assert {path.name for path in keys.parent.iterdir()} == {
            "keys.toml",
            "node0",
            "node0.pub",
            "node1",
            "node1.pub",
        }
        other = link.certificates.node_key(7).with_suffix(".pub").read_text()
        table = tomllib.loads(keys.read_text()) | {"1": other}
        keys.write_text(tomli_w.dumps(table))
        link.wait = 15.0
        with pytest.raises(UserError, match=r"no node for users? (0, )?1 after 15 s.*without a user's key are ignored"):
            link.execute(run)
