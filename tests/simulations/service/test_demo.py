from __future__ import annotations

import math
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from urllib.request import urlopen

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi")

from starlette.testclient import TestClient

from fedbn.data.population import Examples, User
from fedbn.data.shift import rotate
from fedbn.errors import UserError
from fedbn.models import build
from fedbn.online import fit_alignment, personalize
from fedbn.online.alignments import quaternions as so3
from fedbn_simulations.adaptation.methods import adaptation_method
from fedbn_simulations.service.access import Access
from fedbn_simulations.service.api import create_app
from fedbn_simulations.service.demo.routes import FILES, MAX_VISITORS, PAGE, routes
from fedbn_simulations.service.demo.session import RULES, TURN_AT, USER, Playground, Session
from fedbn_simulations.service.model import ServedModel
from fedbn_simulations.service.server import address, create_server, listen
from fedbn_simulations.service.users import UserStore
from tests.helpers import ROOT

SHAPE, CLASSES, TRIPLES = (6, 32), ("sitting", "walking"), ((0, 1, 2), (3, 4, 5))


def examples(n, level, seed):
    y = (torch.arange(n) // 5) % 2
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *SHAPE, generator=draw) * (1 + y)[:, None, None] + level
    return Examples(x, y, torch.zeros(n, dtype=torch.long))


@pytest.fixture(scope="module")
def playground():
    model = build("har-cnn", SHAPE, 2, seed=0)
    for i in range(10):
        model(examples(64, 0.0, i).x)
    people = {
        name: User(name, "x", examples(40, level, 20 + i), examples(60, level, 30 + i))
        for i, (name, level) in enumerate({"user1": 0.5, "user2": -2.0}.items())
    }
    model.eval()
    seen = [(user.train.x, user.train.y) for user in people.values()]
    aligner = fit_alignment(RULES["aligned"][0], seen, 2, TRIPLES)
    rules = {
        name: ServedModel(model, SHAPE, CLASSES, {}, rule=text or "source", align=aligner, reason="" if text else "why")
        for name, (text, _) in RULES.items()
    }
    return Playground(model, people, CLASSES, 1.28, "two people", np.ones(6), rules)


def test_session_predicts_windows_before_learning(playground):
    session = Session(playground, "user1")
    predicted = [step["predicted"] for limit in (7, 20, 100) for step in session.step(limit)["steps"]]
    data = playground.person("user1").test
    assert len(predicted) == len(data)
    assert session.ended
    assert session.step(1)["steps"] == []
    for name, (text, _) in RULES.items():
        align = playground.rules[name].align if name == "aligned" else None
        net = personalize(playground.model, adaptation_method(text or "source").rule, align=align)
        expected = [int(net(x[None], "you").argmax()) for x in data.x]
        assert [p[name] for p in predicted] == expected
        assert session.num_correct[name] == sum(int(a == y) for a, y in zip(expected, data.y.tolist(), strict=True))


@pytest.mark.slow
def test_positions_start_at_population_and_move_to_person(playground):
    session = Session(playground, "user2")
    assert all(v == 0 for shares in session.positions().values() for v in shares)
    positions = session.step(60)["layers"]
    assert all(v == 0 for v in positions["source"] + positions["calibrated"])
    assert all(0 < v <= 1 for v in positions["DA-BN"])
    person = playground.person("user2")
    session.nets["source"].calibrate(person.train.x, USER, n0=0.0)
    assert min(session.positions()["source"]) > 0.95


def test_calibration_needs_one_window_of_each_activity(playground):
    session = Session(playground, "user2")
    assert session.record(1) == {"recorded": 1, "missing": [0], "done": False}
    session.switch("user1")
    assert session.record(0)["missing"] == [1], "recordings of another person must not count"
    session.rotate(90)
    assert session.record(1)["missing"] == [0], "recordings before the rotation must not count"
    assert session.record(0)["done"]
    assert session.nets["calibrated"].report(USER)["frozen"]
    assert session.nets["calibrated"].report(USER)["calibrated"]
    with pytest.raises(UserError, match="no recording of this activity"):
        session.record(7)


def test_rotation_rotates_sensor_axes(playground):
    session = Session(playground, "user1")
    x = session._rotated(playground.person("user1").test.x[:1])
    session.rotate(90)
    rotated = session._rotated(x)
    torch.testing.assert_close(rotated[:, [0, 3]], -x[:, [1, 4]])
    torch.testing.assert_close(rotated[:, [1, 4]], x[:, [0, 3]])
    torch.testing.assert_close(rotated[:, [2, 5]], x[:, [2, 5]])
    session.rotate(90, (2.0, 0.0, 0.0))
    torch.testing.assert_close(session._rotated(x)[:, [0, 1]], torch.stack([x[:, 0], -x[:, 2]], 1))
    for degrees in (181, -1, math.nan):
        with pytest.raises(UserError, match="0 to 180"):
            session.rotate(degrees)
    for axis in ((0.0, 0.0, 0.0), (1.0, 0.0), (math.nan, 0.0, 1.0)):
        with pytest.raises(UserError, match="three coordinates"):
            session.rotate(90, axis)


def test_rotation_compares_estimate_with_truth_without_the_placement_of_the_person(playground):
    session = Session(playground, "user1")
    bank = session.nets["aligned"].bank
    session.rotate(60, (0.0, 1.0, 0.0))
    own = so3.from_vector(session.axis.double() * math.radians(60))
    perfect = so3.multiply(session._placement, own * torch.tensor([1.0, -1, -1, -1]))
    slot = bank.group([USER], create=True).slots
    bank.rows["align_value"][slot] = perfect.float()
    found = session.rotation()
    assert found["degrees"] == pytest.approx(60, abs=0.2)
    assert found["axis"] == pytest.approx([0, 1, 0], abs=0.02)
    assert found["error"] < 0.2
    bank.rows["align_value"][slot] = session._placement.float()
    assert session.rotation()["error"] == pytest.approx(60, abs=0.2)


@pytest.mark.slow
def test_presets_act_at_their_windows(playground):
    presets = playground.presets
    assert set(presets) == {"worn", "hand", "recalibrate", "turn"}
    changed = replace(playground, users={n: replace(u, test=examples(60, 3.0, 1)) for n, u in playground.users.items()})
    for name in ("worn", "recalibrate", "turn"):
        assert changed.presets[name].person == presets[name].person
    session = Session(playground, presets["turn"].person, "short", presets["turn"].actions)
    steps = session.step(50)["steps"]
    assert [i for i, step in enumerate(steps) if step["event"]] == [TURN_AT]
    assert session.degrees == 60
    for name in ("worn", "recalibrate"):
        session = Session(playground, presets[name].person, "short", presets[name].actions)
        assert session.step(1)["degrees"] == 60
    session = Session(playground, "user1", "recorded", {0: ("record_all", ()), 1: ("switch", ("user2",))})
    session.step(2)
    assert session.nets["calibrated"].report(USER)["calibrated"]
    assert session.person.name == "user2"


def test_sensor_is_handed_to_the_person_who_wears_it_most_turned(playground):
    aligned, axis = playground.rules["aligned"], torch.tensor([0.0, 0.0, 1.0])
    mean = aligned.align.prior.mean.clone()
    mean[:, :3] = torch.eye(3)[:2]
    aligner = replace(aligned.align, prior=replace(aligned.align.prior, mean=mean))
    y = torch.arange(8) % 2
    gravity = torch.eye(6)[y, :, None].expand(-1, -1, 32)
    turns = {"ann": 0.1, "bob": 1.0, "eve": 0.4}
    worn = {n: Examples(rotate(axis, torch.tensor(a))(gravity), y, torch.zeros_like(y)) for n, a in turns.items()}
    people = {name: replace(playground.users["user1"], name=name, test=data) for name, data in worn.items()}
    rules = {**playground.rules, "aligned": replace(aligned, align=aligner)}
    page = replace(playground, users=people, rules=rules)
    for name, turn in turns.items():
        assert float(so3.to_vector(page.placement(worn[name])).norm()) == pytest.approx(turn, abs=0.05)
    hand = page.presets["hand"]
    assert hand.person == "ann"
    assert [arguments for _, arguments in hand.actions.values()] == [("bob",)]


def test_calibrated_is_the_source_until_it_is_calibrated_and_then_fixed(playground):
    session = Session(playground, "user1", actions={20: ("record_all", ())})
    steps = session.step(20)["steps"]
    assert all(step["predicted"]["calibrated"] == step["predicted"]["source"] for step in steps)
    assert session.nets["calibrated"].users == []
    session.step(1)
    fixed = session.nets["calibrated"].state("wearer").to_bytes()
    session.step(10)
    assert session.nets["calibrated"].state("wearer").to_bytes() == fixed


def test_auto_says_what_was_chosen_and_why(playground):
    assert playground.description()["reason"] == "why"
    assert playground.description()["rules"]["auto"].startswith("off: ")
    chosen = {**playground.rules, "auto": replace(playground.rules["auto"], rule="rotation/fallback")}
    assert replace(playground, rules=chosen).description()["rules"]["auto"] == "chosen: rotation/fallback"


@pytest.mark.slow
def test_switch_of_person_raises_alarm(playground):
    people = {
        name: replace(u, test=examples(200, 0.5 if name == "user1" else -2.0, 9))
        for name, u in playground.users.items()
    }
    session = Session(replace(playground, users=people), "user1")
    assert sum(step["alarm"] for step in session.step(70)["steps"]) <= 1
    session.switch("user2")
    assert any(step["alarm"] for step in session.step(40)["steps"])


def test_session_rejects_unknown_person(playground):
    with pytest.raises(UserError, match="unknown person 'user3'.*Known: user1, user2"):
        Session(playground, "user3")


# ---------------------------------------------------------------- page


@pytest.fixture
def application(playground):
    users = UserStore(playground.model, playground.shape, playground.classes, "pseudo:n0=64")
    return create_app(users, Access(), routes(playground))


@pytest.fixture
def client(application):
    with TestClient(application, base_url="http://localhost") as client:
        yield client


def test_page_has_no_external_resources(client):
    page = client.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    names = re.findall(r'(?:src|href)="(/page/[^"]+)"', page.text)
    assert names
    assert all(client.get(name).status_code == 200 for name in names)
    for file in [*FILES, "index.html"]:
        text = (PAGE / file).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text
    assert client.get("/page/../api.py").status_code == 404
    assert client.get("/page/docs.html").status_code == 404


def ask(socket, kind, action, **content):
    """Send an action, and receive messages until one of this kind."""
    socket.send_json({"action": action} | content)
    while (message := socket.receive_json())["kind"] != kind:
        pass
    return message


@pytest.mark.slow
def test_socket_protocol_of_the_page(client):
    with client.websocket_connect("ws://localhost/play") as socket:
        assert set(socket.receive_json()["people"]) == {"user1", "user2"}
        assert "open a person's stream" in ask(socket, "error", "play", speed=10)["text"]
        ask(socket, "opened", "open", person="user1")
        assert len(ask(socket, "windows", "step")["steps"]) == 1
        assert ask(socket, "windows", "play", speed=1000)["steps"]
        assert ask(socket, "switched", "switch", person="user2")["person"] == "user2"
        ask(socket, "rotated", "rotate", degrees=30)
        assert not ask(socket, "recorded", "record", **{"class": 0})["done"]
        calibrated = ask(socket, "recorded", "record", **{"class": 1})
        assert calibrated["done"]
        assert min(calibrated["layers"]["calibrated"]) > 0
        while socket.receive_json()["kind"] != "ended":
            pass
        assert "'degrees' must be a number" in ask(socket, "error", "rotate", degrees="x")["text"]
        assert "unknown person" in ask(socket, "error", "open", person="eve")["text"]
        assert "unknown action 'dance'" in ask(socket, "error", "dance")["text"]


def test_number_of_visitors_is_limited(client):
    sockets = [client.websocket_connect("ws://localhost/play") for _ in range(MAX_VISITORS)]
    for socket in sockets:
        socket.__enter__().receive_json()
    with client.websocket_connect("ws://localhost/play") as late:
        closed = late.receive()
        assert closed["code"] == 1013
        assert "visitors" in closed["reason"]
    sockets[0].__exit__(None, None, None)
    with client.websocket_connect("ws://localhost/play") as next_:
        assert next_.receive_json()["kind"] == "hello"
    for socket in sockets[1:]:
        socket.__exit__(None, None, None)


def test_listen_rejects_port_in_use():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}.*choose another --port"):
            listen("127.0.0.1", port)


# ---------------------------------------------------------------- in a real browser


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def url(application):
    with listen("127.0.0.1", 0) as listening:
        ready = threading.Event()
        server = create_server(application, Access(), ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        assert ready.wait(10)
        yield address("127.0.0.1", listening)
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def page(browser, url):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(15_000)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" else None)
    page.requests = []
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(url)
    page.wait_for_selector("#play:not(:disabled)")
    yield page
    assert page.errors == []
    assert all(u.startswith((url, "data:")) for u in page.requests), "the page must work offline"
    context.close()


def slide(page, name, value):
    page.eval_on_selector(name, f"e => {{ e.value = {value}; e.dispatchEvent(new Event('input')); }}")


@pytest.mark.slow
def test_page_plays_switches_rotates_and_calibrates(page):
    assert page.title()
    assert page.locator("#rules tbody tr").count() == len(RULES)
    slide(page, "#speed", 1.5)
    page.click("#play")
    page.wait_for_selector("#rules tbody td.n >> text=%", state="attached")
    assert page.inner_text("#play") == "Pause"
    assert page.inner_text("#true-class") in CLASSES
    page.click("#switch")
    page.wait_for_selector("#events >> text=user2 now has the device")
    slide(page, "#rotate", 90)
    page.wait_for_selector("#events >> text=rotated by 90°")
    page.click("#calibrate")
    page.click("#record-list >> text=Record sitting")
    page.wait_for_selector("#recorded >> text=1 remaining")
    page.click("#record-all")
    page.wait_for_selector("#recorded >> text=Calibrated.")
    page.click("#close")
    slide(page, "#speed", 2)
    if page.inner_text("#play") == "Play":  # on a slow machine the recording may have ended before
        page.click("#play")
    page.wait_for_selector("#status >> text=The recording has ended", state="attached")
    assert page.get_attribute("#progress", "value") == "1"
    assert page.evaluate("document.querySelectorAll('#layers path').length") == 3 * len(RULES)
    painted = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v > 0)"
    assert all(page.eval_on_selector(f"#{name}", painted) for name in ("signals", "accuracy", "activity"))


@pytest.mark.slow
def test_page_plays_a_preset_and_shows_the_rotation(page):
    page.click("#presets >> text=A new user wears it turned")
    slide(page, "#speed", 2)
    page.wait_for_selector("#events >> text=the sensor is rotated by 60°")
    assert page.inner_text("#rotate-now") == "60°"
    assert "wears the sensor turned by 60°" in page.inner_text("#story")
    assert page.get_attribute("#presets >> text=A new user wears it turned", "aria-pressed") == "true"
    assert page.input_value("#axis") == "0,1,0"
    assert page.input_value("#order") == "short"
    assert page.inner_text("#rotation").startswith("True: 60° about (0.0, 1.0, 0.0). Estimated: ")
    assert page.eval_on_selector("#angles", "c => c.width > 0")


@pytest.mark.slow
def test_page_is_accessible_by_keyboard(page):
    names = []
    for _ in range(14):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    expected = ["person", "order", "play", "calibrate", "switch", "restart", "speed", "rotate", "axis"]
    assert names == ["skip", "", "", "", "", *expected], "the four buttons of presets have no names"
    page.focus("#play")
    page.keyboard.press("Enter")
    page.wait_for_selector("#play >> text=Pause")
    page.focus("#speed")
    page.keyboard.press("End")
    assert page.inner_text("#speed-now") == "100×"
    assert page.get_attribute("#speed", "aria-valuetext").startswith("100")
    page.focus("#calibrate")
    page.keyboard.press("Enter")
    page.wait_for_selector("#dialog[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("#dialog", state="hidden")
    unlabeled = """[...document.querySelectorAll('select, input, progress, canvas, button, section, dialog')]
        .filter(e => !(e.labels?.length || e.ariaLabel || e.getAttribute('aria-labelledby') || e.textContent.trim()))
        .map(e => e.outerHTML)"""
    assert page.evaluate(unlabeled) == []
    assert page.locator("[role=status]").count() == 2


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_phone_and_has_readable_contrast(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 740})
    page.click("#play")
    page.wait_for_selector("#rules tbody td.n >> text=%", state="attached")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(
        "(() => { const s = document.querySelector('.scroll'); return s.scrollWidth <= s.clientWidth })()"
    )
    contrast = """() => {
        const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => { v /= 255;
            return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 }); return .2126 * r + .7152 * g + .0722 * b };
        const back = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
            if (!c.endsWith(', 0)')) return c } return 'rgb(255,255,255)' };
        return Math.min(...[...document.querySelectorAll('p, h1, h2, th, td, label, button:not(:disabled), output')]
            .filter(e => e.offsetParent && e.textContent.trim()).map(e => { const a = light(getComputedStyle(e).color),
            b = light(back(e)); return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) })) }"""
    assert page.evaluate(contrast) >= 4.5


@pytest.mark.slow
def test_demo_command_prints_address_and_exits_cleanly(tmp_path):
    command = [
        sys.executable,
        "-m",
        "fedbn",
        "demo",
        "hapt:unseen=27",
        "--rounds",
        "1",
        "--no-browser",
        "--port",
        "0",
    ]
    environment = {"FEDBN_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, env=environment, cwd=ROOT)
    try:
        assert "auto uses the source: 3 seen users are too few" in process.stdout.readline()
        line = process.stdout.readline()
        match = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert match, process.stderr.read()
        with urlopen(match[0], timeout=10) as page:
            assert b"Normalization statistics that adapt to a person" in page.read()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0
    assert out.strip() == "stopped"
    assert "Traceback" not in err
