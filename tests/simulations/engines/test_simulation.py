"""Any Flower app runs in this process: calls, replies, failures, limits of time, seeds and directories."""

from __future__ import annotations

import re
import shutil
import sys
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedbn.errors import UserError
from fedbn_simulations.engines.grid import FIRST_NODE
from fedbn_simulations.engines.simulation import Workers, run_simulation
from tests.helpers import ROOT, wait_until
from tests.simulations.engines.calls import reply, simulate, slow_second

APPS = ROOT / "tests" / "apps"


def count(message, context):
    number = context.state["n"]["n"] + 1 if "n" in context.state else 1
    context.state["n"] = ConfigRecord({"n": number})
    if context.node_config["partition-id"] == 1:
        raise ValueError("boom")
    return reply(message, 10 * context.node_config["partition-id"] + number)


@pytest.mark.parametrize("backend", ["serial", "threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_run_simulation_keeps_state_and_reports_failures(backend, caplog):
    found = simulate(count, 3, backend, {"num_workers": 2} if backend != "serial" else None, rounds=2)
    assert found == [[1, "ValueError: boom", 21], [2, "ValueError: boom", 22]]
    assert caplog.text.count('raise ValueError("boom")') == 2


def test_run_simulation_drops_state_of_failed_call():
    states = []

    def client(message, context):
        states.append("n" in context.state)
        return count(message, context)

    simulate(client, 2, rounds=2)
    assert states == [False, False, True, False]


def test_run_simulation_reports_reply_that_is_no_message():
    assert simulate(lambda message, context: None, 1) == [["the ClientApp returned NoneType instead of a Message"]]


def test_run_simulation_passes_error_of_server():
    server = ServerApp()

    @server.main()
    def main(grid, context):
        raise KeyError("missing")

    threads = set(threading.enumerate())
    with pytest.raises(KeyError, match="missing"):
        run_simulation(server, ClientApp(), 2)
    assert wait_until(lambda: not set(threading.enumerate()) - threads)


def test_send_and_receive_respects_timeout_and_late_replies_arrive():
    server, app, found = ServerApp(), ClientApp(), []
    release = threading.Event()

    @app.query()
    def query(message, context):
        if context.node_config["partition-id"] == 1:
            release.wait(10)
        return reply(message, context.node_config["partition-id"])

    @server.main()
    def main(grid, context):
        ids = grid.push_messages([Message(RecordDict(), node, "query") for node in grid.get_node_ids()])
        messages = [Message(RecordDict(), FIRST_NODE + 1, "query")]
        found.append(list(grid.send_and_receive(messages, timeout=0.1)))
        found.append([r.content["x"]["x"] for r in grid.pull_messages(ids)])
        release.set()
        grid.send_and_receive([Message(RecordDict(), FIRST_NODE + 2, "query")])
        found.append([r.content["x"]["x"] for r in grid.pull_messages(ids)])

    run_simulation(server, app, 3)
    assert found == [[], [0], [1, 2]]


@pytest.mark.parametrize("backend", ["serial", "threads"])
def test_client_timeout_fails_slow_client_only(backend):
    start = time.perf_counter()
    found = simulate(slow_second, 3, backend, {"client-timeout": 0.2})
    assert found == [[0, "no reply after 0.2 seconds, the limit for each client", 0]]
    assert time.perf_counter() - start < 3


def draw(message, context):
    return reply(message, [float(torch.rand(())), float(np.random.rand())])


def test_seed_keys_random_numbers_by_client_and_call():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    a, b = (simulate(draw, 3, rounds=2, seed=1) for _ in range(2))
    assert a == b
    assert len({str(values) for values in (*a[0], *a[1])}) == 6
    assert simulate(draw, 2, rounds=2, seed=1) == [values[:2] for values in a]
    assert simulate(draw, 3, seed=2) != a[:1]
    assert torch.equal(torch.rand(3), expected)


def test_seed_of_training_does_not_depend_on_how_often_a_client_evaluates():
    drawn = []
    for evaluations in (0, 2):
        app, numbers = ClientApp(), []

        @app.train()
        @app.evaluate()
        def draws(message, context, numbers=numbers):
            if message.metadata.message_type == "train":
                numbers.append(float(torch.rand(())))
            return Message(RecordDict(), reply_to=message)

        def server(grid, context, evaluations=evaluations):
            for _ in range(3):
                for kind in ["train", *["evaluate"] * evaluations]:
                    grid.send_and_receive([Message(RecordDict(), FIRST_NODE, kind)])

        run_simulation(server, app, 1, seed=4)
        drawn.append(numbers)
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 3


@pytest.mark.slow
def test_seed_gives_the_same_numbers_in_processes():
    assert simulate(draw, 3, "processes", rounds=2, seed=1) == simulate(draw, 3, rounds=2, seed=1)


def test_servers_may_send_from_several_threads():
    server, app, found = ServerApp(), ClientApp(), {}

    @app.query()
    def query(message, context):
        return reply(message, context.node_config["partition-id"])

    def ask(grid, node):
        for _ in range(20):
            (answer,) = grid.send_and_receive([Message(RecordDict(), node, "query")])
            assert answer.content["x"]["x"] == node - FIRST_NODE
        found[node] = answer.metadata.src_node_id

    @server.main()
    def main(grid, context):
        threads = [threading.Thread(target=ask, args=(grid, node)) for node in grid.get_node_ids()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    run_simulation(server, app, 8)
    assert found == {FIRST_NODE + p: FIRST_NODE + p for p in range(8)}


def test_messages_to_one_node_are_answered_in_order():
    app, server, found = ClientApp(), ServerApp(), []

    @app.query()
    def query(message, context):
        time.sleep(0.01 * (3 - len(context.state)))
        context.state[str(len(context.state))] = ConfigRecord()
        return reply(message, len(context.state))

    @server.main()
    def main(grid, context):
        messages = [Message(RecordDict(), FIRST_NODE, "query") for _ in range(3)]
        found.extend(r.content["x"]["x"] for r in grid.send_and_receive(messages))

    run_simulation(server, app, 2, "threads", {"num_workers": 2})
    assert found == [1, 2, 3]


def test_on_reply_receives_messages_and_replies():
    pairs = []
    simulate(draw, 2, on_reply=lambda message, reply: pairs.append((message, reply)))
    assert [m.metadata.message_id for m, _ in pairs] == [r.metadata.reply_to_message_id for _, r in pairs]


@pytest.mark.parametrize("legacy", [False, True])
def test_exception_of_on_reply_ends_the_simulation(legacy):
    """Also of a server that catches exceptions in its threads, as those of Flower's former interface."""

    def fail(message, reply):
        raise UserError("unknown arrays")

    def server(grid, context):
        messages = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
        with suppress(UserError if legacy else ()):
            grid.send_and_receive(messages)

    client = ClientApp()
    client.query()(draw)
    with pytest.raises(UserError, match="unknown arrays"):
        run_simulation(server, client, 2, on_reply=fail)


def test_threads_of_the_server_end_with_the_simulation():
    started, ended = threading.Event(), threading.Event()

    def wait(grid, node):
        started.set()
        with pytest.raises(RuntimeError, match="has ended"):
            grid.send_and_receive([Message(RecordDict(), node, "query")])
        ended.set()

    def server(grid, context):
        threading.Thread(target=wait, args=(grid, FIRST_NODE), daemon=True).start()
        started.wait()
        raise ZeroDivisionError

    released = threading.Event()
    client = ClientApp()

    @client.query()
    def block(message, context):
        released.wait(10)
        return reply(message, 1)

    with pytest.raises(ZeroDivisionError):
        run_simulation(server, client, 1)
    assert ended.wait(5)
    released.set()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"backend_name": "ray"}, "unknown backend 'ray'.*use flwr.simulation.run_simulation"),
        ({"backend_config": {"num_worker": 2}}, "unknown key of backend_config 'num_worker'.*'num_workers'"),
        ({"backend_config": {"num_workers": 2}}, "serial has one worker: use backend threads or processes"),
        ({"backend_name": "threads", "backend_config": {"num_workers": 0}}, "must be at least 1, not 0"),
        ({"backend_config": {"client_timeout": 0.0}}, "client timeout must be positive, not 0"),
        ({"backend_name": "threads", "seed": 1}, "use backend serial or processes with a seed"),
        ({"num_supernodes": 0}, "number of SuperNodes must be at least 1, not 0"),
    ],
)
def test_run_simulation_rejects_bad_options(options, text):
    with pytest.raises(UserError, match=text):
        run_simulation(ServerApp(), ClientApp(), **{"num_supernodes": 2} | options)


def test_workers_read_number_from_flower_config():
    assert Workers.from_config("serial", {"init_args": {"num_cpus": 4}}).number is None
    flower = {"init_args": {"num_cpus": 1}, "client_resources": {"num_cpus": 2}}
    assert Workers.from_config("processes", flower).number == 1


def test_mods_and_metrics_pass_unchanged():
    names = []

    def mod(message, context, call_next):
        names.append(message.metadata.message_type)
        return call_next(message, context)

    app, server = ClientApp(mods=[mod]), ServerApp()

    @app.evaluate()
    def evaluate(message, context):
        return Message(RecordDict({"m": MetricRecord({"a": 0.5})}), reply_to=message)

    @server.main()
    def main(grid, context):
        (answer,) = grid.send_and_receive([Message(RecordDict(), FIRST_NODE, "evaluate")])
        names.append(answer.content["m"]["a"])

    run_simulation(server, app, 1)
    assert names == ["evaluate", 0.5]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("messages", "{1: {'eval_mse'"),
        ("numpy_client", "'accuracy': [(1, "),
        ("sklearn", "Aggregated MetricRecord: {'accuracy': 0.925}"),
    ],
)
def test_run_command_runs_apps_of_every_shape(name, text, run_cli, caplog):
    caplog.set_level("INFO", "flwr")
    before = set(sys.modules)
    code, *_ = run_cli("run", APPS / name)
    assert code == 0
    assert text in caplog.text
    assert caplog.messages[0] == "Starting Flower Simulation"
    assert ("3 simulated SuperNodes" if name == "numpy_client" else "2 simulated SuperNodes") in caplog.text
    assert not {m for m in set(sys.modules) - before if m.partition(".")[0] in ("messages", "numpyclient", "task")}


def test_run_command_overrides_run_config_and_number_of_nodes(run_cli, caplog, tmp_path):
    caplog.set_level("INFO", "flwr")
    config = "num-server-rounds=1 out='{}'".format(tmp_path / "a.pt")
    assert run_cli("run", APPS / "messages", "--num-supernodes", 3, "-c", config)[0] == 0
    assert "Sampled 3 nodes (out of 3)" in caplog.text
    assert "[ROUND 1/1]" in caplog.text
    assert torch.load(tmp_path / "a.pt")["norm.running_mean"].isfinite().all()


def test_run_command_ends_like_flower_after_exception(run_cli, caplog):
    code, _, _ = run_cli("run", APPS / "messages", "-c", "out='missing/directory/a.pt' num-server-rounds=1")
    assert code == 1
    assert "Simulation raised an exception" in caplog.text
    assert "Exit Code: 700" in caplog.text


def make_app(directory, package, server="app = ServerApp()", client="app = ClientApp()"):
    (directory / package).mkdir(parents=True)
    (directory / package / "__init__.py").write_text("")
    head = "from flwr.clientapp import ClientApp\nfrom flwr.serverapp import ServerApp\n"
    (directory / package / "server.py").write_text(head + server)
    (directory / package / "client.py").write_text(head + client)
    (directory / "pyproject.toml").write_text(
        f'[tool.flwr.app.components]\nserverapp = "{package}.server:app"\nclientapp = "{package}.client:app"\n'
    )
    return directory


WRITE = """
from pathlib import Path
app = ServerApp()
@app.main()
def main(grid, context):
    import {package}.server
    Path("who.txt").write_text({package}.server.__file__)
"""


@pytest.mark.parametrize("package", ["same_name", "fedbn", "fedbn_clients"])
def test_apps_with_the_same_package_name_run_their_own_code(package, run_cli, tmp_path):
    for name in ("a", "b"):
        app = make_app(tmp_path / name, package, server=WRITE.format(package=package))
        assert run_cli("run", app)[0] == 0
        assert (tmp_path / "who.txt").read_text() == str(app / package / "server.py")
    assert sys.modules["fedbn"].__file__ == str(ROOT / "fedbn" / "__init__.py")
    if package != "same_name":
        code, _, err = run_cli("run", app, "--backend", "processes")
        assert code == 2
        assert f"the app's package {package} has the name of one of this project" in err


def test_app_whose_package_hides_this_project_cannot_import_its_mods(run_cli, tmp_path, caplog):
    app = make_app(tmp_path / "app", "fedbn", client="from fedbn.errors import UserError\napp = ClientApp()")
    code, _, err = run_cli("run", app)
    assert code == 2
    assert "the app's package fedbn hides this project's package of the same name" in err
    app = make_app(tmp_path / "other", "fedbn", client="from fedbn.missing import x")
    assert run_cli("run", app)[0] == 1
    assert "No module named 'fedbn.missing'" in caplog.text


@pytest.mark.parametrize(
    ("change", "arguments", "text"),
    [
        (lambda d: (d / "pyproject.toml").unlink(), (), "is not a Flower app: it has no pyproject.toml"),
        (lambda d: (d / "pyproject.toml").write_text("a = "), (), "is not valid TOML"),
        (lambda d: (d / "pyproject.toml").write_text("a = 1"), (), 'names no serverapp: add serverapp = "package'),
        (lambda d: (d / "p" / "client.py").write_text("app = 3"), (), "p.client:app is a int, not a ClientApp"),
        (lambda d: (d / "p" / "client.py").write_text(""), (), "module p.client of .* has no 'app'"),
        (lambda d: (d / "p" / "client.py").unlink(), (), "has no module p.client, which p.client:app names"),
        (lambda d: None, ("-c", "lr=0.1"), "unknown run-config key 'lr'"),
        (lambda d: None, ("-c", "lr"), "--run-config takes pairs of TOML such as .*, not 'lr'"),
        (lambda d: None, ("-c", "lr=abc"), "--run-config takes pairs of TOML"),
        (lambda d: None, ("-c", "missing.toml"), "cannot read missing.toml"),
        (lambda d: None, ("--backend", "thread"), "unknown backend 'thread'. Did you mean 'threads'"),
    ],
)
def test_run_command_rejects_bad_apps_and_options(change, arguments, text, run_cli, tmp_path):
    change(make_app(tmp_path / "app", "p"))
    code, _, err = run_cli("run", tmp_path / "app", *arguments)
    assert code == 2
    assert re.search(text, err), err


def test_import_error_of_an_app_ends_with_code_of_flower(run_cli, tmp_path, caplog):
    make_app(tmp_path / "app", "p", client="import not_installed_anywhere")
    assert run_cli("run", tmp_path / "app")[0] == 1
    assert "Exit Code: 607" in caplog.text


def test_run_command_runs_a_copy_in_place(run_cli, tmp_path):
    """An app in the working directory is the default, and relative paths start there."""
    shutil.copytree(APPS / "sklearn", tmp_path, dirs_exist_ok=True)
    assert run_cli("run", "-c", "penalty='none'")[0] == 0
