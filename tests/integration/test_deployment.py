"""Flower's deployment engine matches the grid bit by bit and leaves no process behind, however it ends."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.cli.app import app as flwr_app
from flwr.common.config import parse_config_args
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode
from typer.main import get_command
from typer.testing import CliRunner

from benchmarks import endurance
from fedbn.errors import UserError
from fedbn.federation.run import Run, plan_for
from fedbn.federation.server import Outcome, RoundMetrics, Server
from fedbn.federation.setup import build_context
from fedbn_clients.config import run_from_config
from fedbn_simulations.cli.app import app
from fedbn_simulations.engines.deployment import CHECKPOINT, Deployment, deploy, deployment, differences
from fedbn_simulations.flower.certificates import make_certificates
from fedbn_simulations.flower.processes import GROUP_VARIABLE, ProcessGroup, free_port
from fedbn_simulations.flower.superlink import FlowerRunError, SuperLink
from fedbn_simulations.server.keys import read_keys
from fedbn_simulations.storage.checkpoint import load_outcome
from tests.fedbn.scenarios.test_remote import SCENARIO, make_run, run_on_nodes, write_node_files
from tests.helpers import wait_until
from tests.integration.processes import kill_server_of, marked

COMPOSE = Path(__file__).parents[2] / "compose.yaml"


def short_run(strategy, rounds):
    plan = plan_for("digits8", rounds=rounds, eval_every=rounds, global_test=60)
    return Run("digits8:users=3:unseen=1", strategy, plan=plan).resolved()


@pytest.mark.slow
def test_deployment_with_tls_matches_grid(mark):
    """The resumed run below tests a deployment without TLS."""
    messages = []
    result = deploy(short_run("silobn", 1), tls=True, notify=messages.append, sums=("image", "matched"))
    assert result.differences == ()
    assert len(result.deployed.curve) == 1
    assert list(result.deployed.sums) == ["image", "matched"]
    assert result.deployed.scores.keys() == {0, 1, 2}
    assert "with TLS, node authentication and users bound to keys" in messages[0]
    assert messages[1].startswith("3 SuperNodes are online")


@pytest.mark.slow
def test_deployment_with_data_files_matches_grid(mark, tmp_path):
    write_node_files(tmp_path)
    files, run = [tmp_path / f"{user}.npz" for user in range(3)], make_run(SCENARIO, rounds=1)
    with deployment(3, data=files) as link:
        deployed = link.execute(run)
    assert differences(deployed, run_on_nodes(run, lambda user: files[user])) == ()
    assert {s.row for scores in deployed.scores.values() for s in scores} == {"own"}


@pytest.mark.slow
def test_deployment_rejects_unregistered_node(mark, tmp_path):
    processes = ProcessGroup()
    try:
        certificates = make_certificates(tmp_path / "certificates")
        link = SuperLink(tmp_path, ("--enable-supernode-auth",), certificates, processes)
        link.start()
        command = [str(Path(sys.executable).parent / "flower-supernode"), "--superlink", f"127.0.0.1:{link.port}"]
        command += ["--port", str(free_port()), "--root-certificates", str(certificates.root), *certificates.options()]
        command += ["--auth-supernode-private-key", str(certificates.node_key(0))]
        link.start_process("unregistered", command)
        processes.started["unregistered"].wait(120)
        with pytest.raises(FlowerRunError, match=r"(?s)Flower's unregistered has exited.*Failed to activate SuperNode"):
            link.check()
    finally:
        processes.stop()


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_deployment_leaves_nothing_behind(signum, mark):
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from fedbn_simulations.cli.app import app\napp(['deploy', '--rounds', '50'])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(marked(mark, "supernode")) >= 3)
    homes = {Path(e["FLWR_HOME"]).parent for e in marked(mark).values() if "FLWR_HOME" in e}
    assert len(homes) == 1
    process.send_signal(signum)
    time.sleep(0.5)
    process.send_signal(signum)  # as impatient users do
    _, output = process.communicate(timeout=120)
    # The second signal can arrive when the process has stopped everything and is exiting.
    assert process.returncode in {signal.SIGINT: (130, -signum), signal.SIGTERM: (143, -signum)}[signum]
    assert "SuperLink on" in output
    assert not any(home.exists() for home in homes)


@pytest.mark.slow
def test_killed_deployment_leaves_nothing_behind(mark):
    command = [sys.executable, "-m", "fedbn", "deploy", "digits8:users=3:unseen=1", "--rounds", "50"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(marked(mark, "supernode")) >= 3)
    (home,) = {Path(e["FLWR_HOME"]).parent for e in marked(mark).values() if "FLWR_HOME" in e}
    process.kill()
    process.wait()
    assert wait_until(lambda: not marked(mark))
    assert not home.exists()


def test_group_does_not_include_the_session_of_its_owner():
    group = ProcessGroup()
    with subprocess.Popen(["sleep", "90"], env={**os.environ, GROUP_VARIABLE: group.id}) as process:
        assert group.live_pids() == [process.pid]
        group.stop()
        assert process.wait() == -signal.SIGTERM


def test_group_by_environment_does_not_follow_sessions():
    """A process of the group shares the session of a process that is not in it, such as a shell."""
    group = ProcessGroup(by_session=False)
    code = (
        "import os, subprocess, sys\n"
        f"child = subprocess.Popen(['sleep', '90'], env={{**os.environ, {GROUP_VARIABLE!r}: {group.id!r}}})\n"
        "print(child.pid, flush=True)\n"
        "print(child.wait(), flush=True)\n"
        "sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **pipes) as shell:
        child = int(shell.stdout.readline())
        assert group.live_pids() == [child]
        group.stop()
        assert int(shell.stdout.readline()) == -signal.SIGTERM
        shell.communicate("")
    assert shell.returncode == 0


@pytest.mark.slow
def test_processes_of_a_killed_owner_are_stopped(tmp_path):
    """The group has a process that ignores SIGTERM and one in another session."""
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from fedbn_simulations.flower.processes import ProcessGroup\n"
        "group = ProcessGroup()\n"
        "child = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(90)'\n"
        "with group.workspace() as directory:\n"
        "    for name, command in (('deaf', [sys.executable, '-c', child]), ('other', ['setsid', 'sleep', '90'])):\n"
        "        group.start(name, command, directory / name, os.environ)\n"
        "    time.sleep(0.5)\n"
        "    print(directory, group.id, flush=True)\n"
        "    time.sleep(90)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        directory, group = owner.stdout.readline().split()
        assert len(ProcessGroup(id=group).live_pids()) == 2
        owner.kill()
    assert wait_until(lambda: not ProcessGroup(id=group).live_pids())
    assert wait_until(lambda: not Path(directory).exists())


def test_second_interrupt_does_not_stop_cleanup(mark, tmp_path):
    """The second interrupt arrives while the stack unwinds or while processes are being stopped."""
    code = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from fedbn_simulations.flower.processes import temporary_workspace\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def stop():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('stopped', flush=True)\n"
        "with temporary_workspace(stop) as directory:\n"
        "    print(directory, flush=True)\n"
        "    try:\n"
        "        os.kill(os.getpid(), getattr(signal, sys.argv[1]))\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
    )
    for name, returncodes in (("SIGINT", (130, -2)), ("SIGTERM", (143,))):
        done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, timeout=60)
        directory, output = done.stdout.split()
        assert output == "stopped"
        assert not Path(directory).exists()
        assert done.returncode in returncodes


@pytest.mark.slow
def test_deployment_resumes_after_server_kill(mark, tmp_path):
    run = short_run("fedbn", 2)
    checkpoint = tmp_path / CHECKPOINT
    kill_server_of(lambda: deploy(run, out=tmp_path), mark, "flwr-serverapp", checkpoint)
    assert len(load_outcome(checkpoint, run).curve) == 1
    messages = []
    result = deploy(run, out=tmp_path, notify=messages.append)
    assert "of 2 rounds; resuming" in messages[0]
    assert "without TLS" in messages[1]
    assert result.differences == ()
    assert len(result.deployed.curve) == 2
    assert result.deployed.scores.keys() == {0, 1, 2}


@pytest.mark.slow
def test_endurance_run_survives_node_kill(mark, tmp_path):
    out = tmp_path / "endurance.json"
    options = ["--minutes", "0", "--every", "0", "--rounds", "2", "--kills", "1", "--out", str(out)]
    assert endurance.main(options) == 0
    result = json.loads(out.read_text())
    assert [kill["killed"] for kill in result["kills"]] == ["supernode-0"]
    assert [(run["rounds"], run["submissions"], run["differences"]) for run in result["runs"]] == [(2, 2, [])]


class Failing:
    """A SuperLink whose runs all fail."""

    def execute(self, run, out):
        raise FlowerRunError("unknown reason")


def test_endurance_raises_failure_without_kill(tmp_path):
    with pytest.raises(FlowerRunError, match="unknown reason"):
        endurance.execute_until_done(endurance.Killer(Failing(), tmp_path, 0), short_run("fedbn", 1), tmp_path / "run")


def test_endurance_raises_failure_of_killer(tmp_path):
    killer = endurance.Killer(Failing(), tmp_path, 0)  # has no processes
    thread = threading.Thread(target=killer.work)
    thread.start()
    time.sleep(0.1)
    assert thread.is_alive(), "killed before the first round was complete"
    (tmp_path / "run-0.safetensors").touch()
    thread.join(10)
    with pytest.raises(AttributeError, match="processes"):
        endurance.execute_until_done(killer, short_run("fedbn", 1), tmp_path / "run")


def test_deployment_rejects_too_many_users():
    with pytest.raises(UserError, match=r"17 users need 17 SuperNodes, but at most 16 .* digits8:users=3"):
        deployment(17).__enter__()


def test_superlink_check_reports_exited_process_and_log(mark, tmp_path):
    link = SuperLink(tmp_path)
    link.start_process("node", [sys.executable, "-c", "print('out of luck')"])
    link.processes.started["node"].wait()
    with pytest.raises(FlowerRunError, match=r"(?s)Flower's node has exited.*out of luck"):
        link.check()


def test_process_group_stops_orphans_in_new_sessions(mark, tmp_path):
    processes = ProcessGroup()
    code = "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True)"
    processes.start("parent", [sys.executable, "-c", code], tmp_path / "log", os.environ).wait(30)
    assert len(processes.live_pids()) == 1
    processes.stop()
    assert processes.live_pids() == []


def test_process_group_stops_children_in_new_sessions(mark, tmp_path):
    child = "import os, time; os.setsid(); time.sleep(600)"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
    processes = ProcessGroup()
    processes.start("parent", [sys.executable, "-c", parent], tmp_path / "log", os.environ)
    wait_until(lambda: len({os.getsid(pid) for pid in processes.live_pids()}) >= 2, 30)
    assert len(marked(mark)) == 3 - 1
    processes.stop()
    assert processes.live_pids() == []


def test_certificates_are_local_short_lived_and_private(tmp_path):
    certificates = make_certificates(tmp_path / "c")
    root, server = (
        x509.load_pem_x509_certificate((certificates.directory / n).read_bytes()) for n in ("root.pem", "server.pem")
    )
    server.verify_directly_issued_by(root)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert (server.not_valid_after_utc - server.not_valid_before_utc).days <= 2
    key = certificates.node_key(0)
    load_ssh_public_key(key.with_suffix(".pub").read_bytes())
    assert certificates.node_key(0).read_bytes() == key.read_bytes() != certificates.node_key(1).read_bytes()
    assert {p.stat().st_mode & 0o777 for p in certificates.directory.iterdir()} == {0o600}
    assert certificates.directory.stat().st_mode & 0o777 == 0o700


def outcome():
    state = {"w": torch.zeros(2), "n": torch.tensor(3)}
    return Outcome(
        Server(state, state, groups={"a": {"w": torch.ones(1)}}), curve=[RoundMetrics(1, 0.5, 0.25)], seconds=1.0
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda o: setattr(o, "seconds", 9.0), ()),
        (lambda o: setattr(o.server, "state", {"w": torch.zeros(2), "n": torch.tensor(4)}), ("server's state",)),
        (lambda o: setattr(o.server, "state", {"w": torch.zeros(2)}), ("server's state",)),
        (lambda o: setattr(o.server, "groups", {"a": {"w": torch.zeros(1)}}), ("server's groups",)),
        (lambda o: setattr(o.server, "known", {"w": torch.zeros(1).double()}), ("server's known",)),
        (lambda o: o.curve.append(RoundMetrics(2, 0.1)), ("training curve",)),
        (lambda o: o.scores.update({1: []}), ("scores",)),
    ],
)
def test_differences_names_unequal_parts(change, expected):
    other = outcome()
    change(other)
    assert differences(outcome(), other) == expected


@pytest.mark.parametrize("expected", [(), ("scores",)])
def test_deploy_command_prints_comparison(expected, monkeypatch):
    calls = []

    def conduct(run, **options):
        calls.append((run, options["tls"]))
        return Deployment(outcome(), outcome(), 3, True, {"start": 1.0, "run": 2.0, "grid": 0.1}, expected)

    monkeypatch.setattr("fedbn_simulations.engines.deployment.deploy", conduct)
    done = CliRunner().invoke(app, ["deploy", "--strategy", "silobn", "--rounds", "4", "--tls"])
    assert done.exit_code == bool(expected)
    run, tls = calls[0]
    assert (run.strategy, run.plan.rounds, run.plan.eval_every, tls) == ("silobn", 4, 4, True)
    assert "SuperLink and 3 SuperNodes" in done.output
    verdict = "state, scores and curve: " + ("DIFFERENT: scores" if expected else "equal to the last bit")
    assert verdict in " ".join(done.output.split())


def test_compose_file_defines_one_node_per_user():
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    link = services.pop("superlink")
    assert link["ports"] == ["127.0.0.1:8000:8000"]
    command, *options = shlex.split(link["command"])
    served = _parse_args_run_superlink().parse_args(options)
    assert (command, served.insecure, served.host, served.port) == ("flower-superlink", True, "0.0.0.0", 8000)
    for user, node in enumerate(services.values()):
        command, *options = shlex.split(node["command"])
        arguments = _parse_args_run_supernode().parse_args(options)
        assert (command, arguments.insecure, arguments.superlink) == ("flower-supernode", True, "superlink:8000")
        config = parse_config_args([arguments.node_config])
        assert config == {"partition-id": user, "num-partitions": len(services), "state-dir": "/state"}
        assert "ports" not in node


def test_compose_file_example_run_fits_its_nodes():
    text = COMPOSE.read_text()
    example = "".join(line.removeprefix("#").rstrip("\\") for line in text.splitlines() if line.startswith("#   "))
    words = shlex.split(example)
    start, end = words.index("flwr"), len(words) - 1 - words[::-1].index("docker")
    name, *options = words[start + 1 : end]
    arguments = get_command(flwr_app).commands[name].make_context(name, options).params
    run = run_from_config(parse_config_args(arguments["run_config_overrides"]))
    assert len(build_context(run).population.users) == len(yaml.safe_load(text)["services"]) - 1
    image = COMPOSE.with_name("Dockerfile").read_text()
    assert f"[superlink.{arguments['superlink']}]" in image
    assert f"WORKDIR {arguments['app']}" in image


def document_commands(name):
    """Commands in the deployment document, as lists of arguments."""
    text = (COMPOSE.parent / "docs" / "deployment.md").read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in blocks.splitlines() if line.startswith(f"{name} ")]
    return [[word for word in line[1:] if word != "..."] for line in lines]


def test_document_commands_match_flower():
    (link,) = document_commands("flower-superlink")
    assert _parse_args_run_superlink().parse_args(link).enable_supernode_auth
    complete, short = document_commands("flower-supernode")
    arguments = _parse_args_run_supernode().parse_args(complete)
    assert arguments.auth_supernode_private_key == "node0"
    assert parse_config_args([arguments.node_config]).keys() == {"partition-id", "num-partitions", "state-dir", "log"}
    assert parse_config_args([_parse_args_run_supernode().parse_args(short).node_config])["data"] == "/data/mine.npz"
    known = tomllib.loads((COMPOSE.parent / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    runs = [line for line in document_commands("flwr") if line[0] == "run"]
    assert len(runs) == 3
    for name, *options in runs:
        given = get_command(flwr_app).commands[name].make_context(name, options).params
        config = parse_config_args(given["run_config_overrides"])
        assert config.keys() <= known.keys()
        build_context(run_from_config(known | config))
    (register,) = [line for line in document_commands("flwr") if line[:2] == ["supernode", "register"]]
    assert register[2:] == ["node0.pub", "production"]


def test_deploy_rejects_keys_without_tls(tmp_path):
    with pytest.raises(UserError, match="--users binds users to keys of nodes, which only --tls checks: add --tls"):
        deploy(short_run("fedbn", 1), keys=tmp_path / "keys.toml")


def test_users_are_bound_to_keys_once(tmp_path):
    users = tmp_path / "keys" / "keys.toml"
    for name in ("first", "second"):
        certificates = make_certificates(tmp_path / name, users)
        certificates.bind_users(2)
        text = certificates.node_key(1).with_suffix(".pub").read_text()
        assert tomllib.loads(users.read_text())["1"] == text
        assert read_keys(users, 2).user.keys() == {tomllib.loads(users.read_text())[k].encode() for k in "01"}
    assert {path.stat().st_mode & 0o777 for path in users.parent.iterdir()} == {0o600}
