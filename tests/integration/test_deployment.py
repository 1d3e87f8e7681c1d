"""Flower's deployment engine gives the same bits as the grid, and leaves no process behind, however it ends."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
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
from clients.config import run_from_config
from fedbn.errors import UserError
from fedbn.federation.run import Run, plan_for
from fedbn.federation.server import Outcome, RoundMetrics, Server
from fedbn.federation.setup import build_context
from simulations.cli.app import app
from simulations.engines.deployment import CHECKPOINT, Deployment, deploy, deployment, differences
from simulations.flower.certificates import make_certificates
from simulations.flower.processes import Family, free_port
from simulations.flower.superlink import FlowerRunError, SuperLink
from simulations.storage.checkpoint import load_outcome
from tests.fedbn.scenarios.test_remote import SCENARIO, files_in, run_of, served
from tests.integration.test_ray import MARK, kill, marked

COMPOSE = Path(__file__).parents[2] / "compose.yaml"


def short(strategy, rounds):
    plan = plan_for("digits8", rounds=rounds, eval_every=rounds, global_test=60)
    return Run("digits8:users=3:unseen=1", strategy, plan=plan).resolved()


@pytest.fixture
def mark(monkeypatch):
    """A mark that all processes of a test inherit; none of them may be left."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    yield mark
    monkeypatch.delenv(MARK)
    left = marked(mark)
    kill(mark)
    assert not left


@pytest.mark.slow
def test_the_deployed_run_equals_the_grid_to_the_last_bit_with_tls(mark):
    """In the clear, it is the run below whose server is killed."""
    said = []
    result = deploy(short("silobn", 1), tls=True, say=said.append)
    assert result.differences == ()
    assert len(result.deployed.curve) == 1
    assert result.deployed.scores.keys() == {0, 1, 2}
    assert "with TLS and node authentication" in said[0]
    assert said[1].startswith("3 SuperNodes are online")


@pytest.mark.slow
def test_nodes_that_have_their_data_at_a_path_give_the_grids_bits(mark, tmp_path):
    files_in(tmp_path)
    files, run = [tmp_path / f"{user}.npz" for user in range(3)], run_of(SCENARIO, rounds=1)
    with deployment(3, data=files) as link:
        deployed = link.execute(run)
    assert differences(deployed, served(run, lambda user: files[user])) == ()
    assert {s.row for scores in deployed.scores.values() for s in scores} == {"own"}


@pytest.mark.slow
def test_a_node_without_a_registered_key_is_not_let_in(mark, tmp_path):
    family = Family()
    try:
        link = SuperLink(tmp_path, ("--enable-supernode-auth",), make_certificates(tmp_path / "certificates"), family)
        link.start()
        certificates = link.certificates
        command = [str(Path(sys.executable).parent / "flower-supernode"), "--superlink", f"127.0.0.1:{link.port}"]
        command += ["--port", str(free_port()), "--root-certificates", str(certificates.root), *certificates.options()]
        command += ["--auth-supernode-private-key", str(certificates.node_key(0))]
        link.begin("stranger", command)
        family.started["stranger"].wait(120)
        with pytest.raises(FlowerRunError, match=r"(?s)Flower's stranger is gone.*Failed to activate SuperNode"):
            link.check()
    finally:
        family.stop()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_deployment_leaves_nothing_behind(how, mark):
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from simulations.cli.app import app\napp(['deploy', '--rounds', '50'])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while sum("supernode" in command for command in commands(mark)) < 3 and time.monotonic() < deadline:
        time.sleep(0.2)
    homes = {Path(e["FLWR_HOME"]).parent for e in marked(mark).values() if "FLWR_HOME" in e}
    assert len(homes) == 1
    process.send_signal(how)
    time.sleep(0.5)
    process.send_signal(how)  # as impatient people do
    _, said = process.communicate(timeout=120)
    # The second one may meet a process that has stopped everything and is only leaving.
    assert process.returncode in {signal.SIGINT: (130, -how), signal.SIGTERM: (143, -how)}[how]
    assert "SuperLink on" in said
    assert not any(home.exists() for home in homes)


def test_a_second_interruption_does_not_stop_the_clean_up(mark, tmp_path):
    """Wherever the second Ctrl-C falls: while the stack unwinds, and while processes are being stopped."""
    code = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from simulations.flower.processes import private_place\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def stop():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('stopped', flush=True)\n"
        "with private_place(stop) as place:\n"
        "    print(place, flush=True)\n"
        "    try:\n"
        "        os.kill(os.getpid(), getattr(signal, sys.argv[1]))\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
    )
    for name, ends in (("SIGINT", (130, -2)), ("SIGTERM", (143,))):
        done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, timeout=60)
        place, said = done.stdout.split()
        assert said == "stopped"
        assert not Path(place).exists()
        assert done.returncode in ends


@pytest.mark.slow
def test_a_deployment_whose_server_is_killed_goes_on_to_the_same_bits(mark, tmp_path):
    run = short("fedbn", 3)
    checkpoint = tmp_path / CHECKPOINT
    raised = []

    def first():
        try:
            deploy(run, out=tmp_path)
        except FlowerRunError as error:
            raised.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    deadline = time.monotonic() + 400
    while not checkpoint.exists() and thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.2)
    while thread.is_alive() and not (tasks := [p for p, c in named(mark) if "flwr-serverapp" in c]):
        time.sleep(0.2)
    for pid in tasks:
        os.kill(pid, signal.SIGKILL)
    thread.join(400)
    assert raised
    assert 1 <= len(load_outcome(checkpoint, run).curve) < 3
    said = []
    result = deploy(run, out=tmp_path, say=said.append)
    assert "of 3 rounds; going on" in said[0]
    assert "in the clear" in said[1]
    assert result.differences == ()
    assert len(result.deployed.curve) == 3
    assert result.deployed.scores.keys() == {0, 1, 2}


@pytest.mark.slow
def test_a_node_killed_for_good_costs_a_run_nothing_but_time(mark, tmp_path):
    out = tmp_path / "found.json"
    options = ["--minutes", "0", "--every", "0", "--rounds", "2", "--kills", "1", "--out", str(out)]
    assert endurance.main(options) == 0
    found = json.loads(out.read_text())
    assert [kill["killed"] for kill in found["kills"]] == ["supernode-0"]
    assert [(run["rounds"], run["submissions"], run["differences"]) for run in found["runs"]] == [(2, 2, [])]


class Failing:
    """A SuperLink all of whose runs fail."""

    def execute(self, run, out):
        raise FlowerRunError("of itself")


def test_a_run_that_no_kill_explains_has_failed(tmp_path):
    with pytest.raises(FlowerRunError, match="of itself"):
        endurance.insist(endurance.Killer(Failing(), tmp_path, 0), short("fedbn", 1), tmp_path / "run")


def test_a_kill_that_fails_is_told_in_place_of_the_run(tmp_path):
    killer = endurance.Killer(Failing(), tmp_path, 0)  # which has no processes
    thread = threading.Thread(target=killer.work)
    thread.start()
    time.sleep(0.1)
    assert thread.is_alive(), "killed before any round was done"
    (tmp_path / "run-0.safetensors").touch()
    thread.join(10)
    with pytest.raises(AttributeError, match="family"):
        endurance.insist(killer, short("fedbn", 1), tmp_path / "run")


def commands(mark):
    return (command for _, command in named(mark))


def named(mark):
    for pid in marked(mark):
        try:
            yield pid, Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue


def test_too_many_users_for_one_machine():
    with pytest.raises(UserError, match=r"17 users would need as many SuperNodes, at most 16 .* digits8:users=3"):
        deployment(17).__enter__()


def test_a_process_that_ends_is_named_with_what_it_said_last(mark, tmp_path):
    link = SuperLink(tmp_path)
    link.begin("node", [sys.executable, "-c", "print('out of luck')"])
    link.family.started["node"].wait()
    with pytest.raises(FlowerRunError, match=r"(?s)Flower's node is gone.*out of luck"):
        link.check()


def test_a_family_is_stopped_with_children_that_left_their_session(mark, tmp_path):
    child = "import os, time; os.setsid(); time.sleep(600)"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
    family = Family()
    family.start("parent", [sys.executable, "-c", parent], tmp_path / "log", os.environ)
    deadline = time.monotonic() + 30
    while len({os.getsid(pid) for pid in family.find()}) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(marked(mark)) == 3 - 1
    family.stop()
    assert family.find() == []


def test_certificates_are_for_loopback_and_short_lived_and_keys_are_private(tmp_path):
    made = make_certificates(tmp_path / "c")
    root, shown = (x509.load_pem_x509_certificate((made.place / n).read_bytes()) for n in ("root.pem", "server.pem"))
    shown.verify_directly_issued_by(root)
    names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert (shown.not_valid_after_utc - shown.not_valid_before_utc).days <= 2
    key = made.node_key(0)
    load_ssh_public_key(key.with_suffix(".pub").read_bytes())
    assert made.node_key(0).read_bytes() == key.read_bytes() != made.node_key(1).read_bytes()
    assert {p.stat().st_mode & 0o777 for p in made.place.iterdir()} == {0o600}
    assert made.place.stat().st_mode & 0o777 == 0o700


def outcome():
    state = {"w": torch.zeros(2), "n": torch.tensor(3)}
    return Outcome(
        Server(state, state, groups={"a": {"w": torch.ones(1)}}), curve=[RoundMetrics(1, 0.5, 0.25)], seconds=1.0
    )


@pytest.mark.parametrize(
    ("change", "differs"),
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
def test_differences_are_named(change, differs):
    other = outcome()
    change(other)
    assert differences(outcome(), other) == differs


@pytest.mark.parametrize("differs", [(), ("scores",)])
def test_the_command_prints_both_and_the_verdict(differs, monkeypatch):
    seconds = {"start": 1.0, "run": 2.0, "grid": 0.1}
    asked = []

    def conduct(run, **options):
        asked.append((run, options["tls"]))
        return Deployment(outcome(), outcome(), 3, True, seconds, differs)

    monkeypatch.setattr("simulations.engines.deployment.deploy", conduct)
    done = CliRunner().invoke(app, ["deploy", "--strategy", "silobn", "--rounds", "4", "--tls"])
    assert done.exit_code == bool(differs)
    run, tls = asked[0]
    assert (run.strategy, run.plan.rounds, run.plan.eval_every, tls) == ("silobn", 4, 4, True)
    assert "SuperLink and 3 SuperNodes" in done.output
    verdict = "state, scores and curve: " + ("DIFFERENT: scores" if differs else "equal to the last bit")
    assert verdict in " ".join(done.output.split())


def test_the_compose_file_gives_every_user_a_node_and_nobody_else_a_port():
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    link = services.pop("superlink")
    assert link["ports"] == ["127.0.0.1:8000:8000"]
    command, *options = shlex.split(link["command"])
    served = _parse_args_run_superlink().parse_args(options)
    assert (command, served.insecure, served.host, served.port) == ("flower-superlink", True, "0.0.0.0", 8000)
    for user, node in enumerate(services.values()):
        command, *options = shlex.split(node["command"])
        given = _parse_args_run_supernode().parse_args(options)
        assert (command, given.insecure, given.superlink) == ("flower-supernode", True, "superlink:8000")
        config = parse_config_args([given.node_config])
        assert config == {"partition-id": user, "num-partitions": len(services), "state-dir": "/state"}
        assert "ports" not in node


def test_the_run_that_the_compose_file_tells_of_is_one_that_its_nodes_can_serve():
    text = COMPOSE.read_text()
    told = "".join(line.removeprefix("#").rstrip("\\") for line in text.splitlines() if line.startswith("#   "))
    words = shlex.split(told)
    start, end = words.index("flwr"), len(words) - 1 - words[::-1].index("docker")
    name, *options = words[start + 1 : end]
    given = get_command(flwr_app).commands[name].make_context(name, options).params
    run = run_from_config(parse_config_args(given["run_config_overrides"]))
    assert len(build_context(run).population.users) == len(yaml.safe_load(text)["services"]) - 1
    image = yaml.safe_load(text)["services"]["superlink"]["build"]["dockerfile_inline"]
    assert f"[superlink.{given['superlink']}]" in image
    assert f"WORKDIR {given['app']}" in image
