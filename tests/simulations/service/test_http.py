from __future__ import annotations

import asyncio
import json
import logging
import threading

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi")

from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from fedbn.models import build
from fedbn.online import SQLiteStore, personalize
from fedbn_simulations.service.access import Access
from fedbn_simulations.service.api import create_app
from fedbn_simulations.service.observability import JsonLines
from fedbn_simulations.service.schema import BINARY
from fedbn_simulations.service.users import UserStore
from tests.helpers import wait_until

SHAPE, CLASSES = (6, 16), ("sit", "walk", "lie")
TOKEN = "a-token-of-twenty-four-c"
RAW = {"content-type": BINARY}


@pytest.fixture(scope="module")
def model():
    return build("har-cnn", SHAPE, len(CLASSES), seed=0).eval()


@pytest.fixture
def serve(model):
    opened = []

    def make(*enrolled, store=None, durability="full", **access):
        users = UserStore(model, SHAPE, CLASSES, "pseudo:n0=4", store=store)
        app = create_app(users, Access(**access), durability=durability)
        client = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
        opened.append(client.__enter__())
        client.users = users
        for name in enrolled:
            client.put(f"/v1/users/{name}")
        return client

    yield make
    for client in opened:
        client.__exit__(None, None, None)


def observe(client, content, user="ann"):
    return client.post(f"/v1/users/{user}/observe", content=content, headers=RAW)


def windows(n, seed=0):
    return np.random.default_rng(seed).standard_normal((n, *SHAPE)).astype("<f4")


def test_user_life_cycle(serve, model):
    client, reference = serve(), personalize(model, "pseudo:n0=4")
    assert client.put("/v1/users/ann").status_code == 201
    assert client.put("/v1/users/ann").json() == {"user": "ann", "new": False}
    x = windows(3)
    response = client.post("/v1/users/ann/observe", json={"windows": x.tolist()}).json()
    out = reference.predict(torch.from_numpy(x), "ann").softmax(1)
    reference.commit(posterior=out)
    assert [a["class"] for a in response["answers"]] == out.argmax(1).tolist()
    np.testing.assert_allclose([a["probabilities"] for a in response["answers"]], out.numpy(), atol=1e-5)
    assert response["answers"][0]["name"] == CLASSES[response["answers"][0]["class"]]
    assert response["drift"] == {"distance": None, "alarm": False, "alarms": 0}
    assert response["advice"]["action"] in ("calibrate", "none")
    held = client.post("/v1/users/ann/predict?hold=true", content=x[:1].tobytes(), headers=RAW).json()["held"]
    assert client.post("/v1/users/ann/commit", json={"labels": {held[0]: "walk"}}).json() == {"learned": 1}
    assert client.post("/v1/users/ann/commit", json={"labels": [0], "windows": x[:1].tolist()}).json() == {"learned": 1}
    report = client.get("/v1/users/ann").json()
    assert report["learned"] == 5
    assert set(report["classes"]) == set(CLASSES)
    assert set(report["moved"]) == set(client.users.net.bank.spans)
    state = client.get("/v1/users/ann/snapshot").content
    client.put("/v1/users/bob")
    assert client.put("/v1/users/bob/snapshot", content=state).status_code == 204
    assert client.get("/v1/users/bob/snapshot").content == state
    assert client.post("/v1/users/bob/merge", content=state).status_code == 204
    assert client.get("/v1/users/bob").json()["learned"] == 10
    assert client.post("/v1/users/bob/reset").status_code == 204
    assert client.get("/v1/users/bob").json()["learned"] == 0
    assert client.get("/v1/users/ann/export").content[:1]
    assert client.get("/v1/users").json() == {"users": ["ann", "bob"]}
    calibration = {"windows": windows(3).tolist(), "labels": ["sit", "walk", "lie"], "then": "freeze"}
    assert client.post("/v1/users/bob/calibrate", json=calibration).status_code == 204
    assert client.get("/v1/users/bob").json()["frozen"]
    assert client.delete("/v1/users/ann").status_code == 204
    assert client.get("/v1/users/ann").status_code == 404


def test_binary_and_json_predictions_agree(serve):
    client, x = serve("ann", "bob"), windows(2)
    expected = client.post("/v1/users/ann/observe", json={"windows": x.tolist()}).json()
    raw = client.post("/v1/users/bob/observe", content=x.tobytes(), headers=RAW | {"accept": BINARY})
    assert raw.headers["x-drift-alarm"] == "0"
    actual = np.frombuffer(raw.content, "<f4").reshape(2, 3)
    np.testing.assert_allclose(actual, [a["probabilities"] for a in expected["answers"]], atol=1e-6)


def test_socket_answers_each_frame_and_survives_errors(serve):
    client = serve("ann")
    with client.websocket_connect("ws://localhost/v1/users/ann/stream") as socket:
        socket.send_bytes(windows(1).tobytes())
        assert len(socket.receive_json()["answers"]) == 1
        socket.send_text(json.dumps({"windows": windows(2).tolist(), "learn": False}))
        assert len(socket.receive_json()["answers"]) == 2
        socket.send_bytes(b"123")
        assert "not a whole number of windows" in socket.receive_json()["error"]
        socket.send_text("{")
        assert "not JSON" in socket.receive_json()["error"]
        socket.send_bytes(windows(1).tobytes())
        assert "answers" in socket.receive_json()
    assert client.get("/v1/users/ann").json()["learned"] == 2


def test_state_survives_a_restart(serve, tmp_path):
    store = SQLiteStore(tmp_path / "users.db")
    first = serve("ann", store=store)
    observe(first, windows(4).tobytes())
    state = first.get("/v1/users/ann/snapshot").content
    first.__exit__(None, None, None)
    store.close()
    second = serve(store=SQLiteStore(tmp_path / "users.db"))
    assert second.get("/v1/users/ann/snapshot").content == state


def test_errors_have_status_and_message(serve):
    client = serve("ann")
    x = windows(1)
    two_labels = {"windows": x.tolist(), "labels": [0, 1]}
    cases = [
        (observe(client, x.tobytes(), "eve"), 404, "enroll the user first"),
        (observe(client, b"1"), 422, "not a whole number of windows"),
        (client.post("/v1/users/ann/commit", json={"labels": {"99": 0}}), 404, "no longer) held"),
        (client.post("/v1/users/ann/commit", json=two_labels), 422, "one label per window"),
        (client.post("/v1/users/ann/calibrate", json={"windows": x.tolist(), "then": "x"}), 409, "'freeze' or 'adapt'"),
        (client.put("/v1/users/ann/snapshot", content=b"x"), 409, "not a user's state"),
        (client.put("/v1/users/" + "x" * 200), 422, "printable"),
        (client.get("/v1/users/eve/export"), 404, "enroll"),
    ]
    for response, status, text in cases:
        assert (response.status_code, text in response.json()["error"]) == (status, True), response.text


# ---------------------------------------------------------------- access


def test_token_is_required_except_for_health(serve):
    client = serve(token=TOKEN)
    assert client.get("/health").json() == {"status": "ok"}
    for headers in ({}, {"authorization": f"Bearer {TOKEN}x"}, {"authorization": TOKEN}):
        response = client.get("/v1/users", headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
    valid = {"authorization": f"Bearer {TOKEN}"}
    assert client.get("/v1/users", headers=valid).json() == {"users": []}
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("ws://localhost/v1/users/ann/stream"):
        pass
    with client.websocket_connect("ws://localhost/v1/users/ann/stream", headers=valid) as socket:
        socket.send_bytes(b"1")
        assert "error" in socket.receive_json()


def test_other_origins_and_host_names_are_rejected(serve):
    client = serve()
    assert client.get("/v1/users", headers={"origin": "http://localhost"}).status_code == 200
    assert client.get("/v1/users", headers={"origin": "https://evil.example"}).status_code == 403
    assert client.get("/v1/users", headers={"origin": "null"}).status_code == 403
    assert client.get("/v1/users", headers={"host": "evil.example"}).status_code == 421
    with (
        pytest.raises(WebSocketDisconnect),
        client.websocket_connect("ws://localhost/v1/users/a/stream", headers={"origin": "https://evil.example"}),
    ):
        pass


def test_large_bodies_are_rejected(serve):
    client = serve("ann", body=1000)
    with_length = observe(client, b"x" * 1001)
    chunks = (b"x" * 400 for _ in range(100))
    for response in (with_length, observe(client, chunks)):
        assert response.status_code == 413
        assert "1000 bytes" in response.json()["error"]
    chunks = (b"x" * 400 for _ in range(100))
    assert client.post("/v1/users/ann/merge", content=chunks).status_code == 413


def test_rate_limit_returns_retry_after(serve):
    client = serve(rate=1.0)
    assert [client.get("/health").status_code for _ in range(3)] == [200, 200, 429]
    assert client.get("/health").headers["retry-after"] == "1"


def test_slow_requests_time_out(serve):
    client = serve("ann", timeout=0.2)
    batcher = client.app.app.service.batcher
    release = threading.Event()
    client.portal.start_task_soon(batcher.call, lambda: release.wait(10))
    late = observe(client, windows(1).tobytes())
    assert late.status_code == 504
    assert "no answer within 0.2 s" in late.json()["error"]
    release.set()
    assert wait_until(lambda: observe(client, windows(1).tobytes()).status_code == 200)


def test_internal_errors_are_logged_but_not_returned(serve, monkeypatch, caplog):
    client = serve("ann")
    monkeypatch.setattr(client.users.net, "predict", lambda *a: 1 / 0)
    with caplog.at_level(logging.ERROR, "fedbn.service"):
        response = observe(client, windows(1).tobytes())
    assert response.status_code == 500
    assert "division" not in response.text
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.undo()
    assert observe(client, windows(1).tobytes()).status_code == 200


def test_metrics_count_requests_and_windows(serve):
    client = serve("ann")
    observe(client, windows(3).tobytes())
    client.get("/v1/users/eve")
    text = client.get("/metrics").text
    for line in (
        'fedbn_requests_total{method="PUT",status="201"} 1.0',
        'fedbn_requests_total{method="GET",status="404"} 1.0',
        "fedbn_windows 3.0",
        "fedbn_bank_calls 1.0",
        "fedbn_users_in_memory 1.0",
    ):
        assert line in text


def test_schema_and_docs_page_list_every_route(serve):
    client = serve()
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/users/{user}/observe", "/v1/users/{user}/predict", "/v1/users/{user}/export", "/health"} <= set(paths)
    page = client.get("/docs").text
    assert client.get("/", follow_redirects=True).text == page
    assert all(path in page for path in paths)
    assert "https://" not in page
    model = client.get("/v1/model").json()
    assert model["shape"] == list(SHAPE)
    assert model["classes"] == list(CLASSES)


def test_json_lines_formats_one_object_per_line():
    record = logging.LogRecord("fedbn.service", logging.INFO, "x", 1, "request\nfor %s", ("you",), None)
    record.fields = {"status": 200}
    line = JsonLines().format(record)
    assert "\n" not in line
    entry = json.loads(line)
    assert entry["event"] == "request\nfor you"
    assert entry["status"] == 200
    assert entry["level"] == "info"


def test_concurrent_requests_are_batched(serve):
    client = serve(*(f"u{i}" for i in range(40)))
    app, x = client.app, windows(40)

    async def observe(i):
        messages = []
        scope = {
            "type": "http",
            "method": "POST",
            "path": f"/v1/users/u{i}/observe",
            "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"content-type", BINARY.encode())],
        }

        async def receive():
            return {"type": "http.request", "body": x[i].tobytes()}

        async def send(message):
            messages.append(message)

        await app(scope, receive, send)
        return messages[0]["status"]

    async def observe_all():
        return await asyncio.gather(*(observe(i) for i in range(40)))

    before = app.app.service.batcher.num_calls
    assert client.portal.call(observe_all) == [200] * 40
    assert app.app.service.batcher.num_calls - before <= 3


@pytest.mark.slow
def test_load_generator_measures_a_running_service():
    from benchmarks.service import measure

    found = measure(users=20, connections=4, seconds=0.5, forms=["binary", "json", "socket"], max_requests=300)
    assert [row["form"] for row in found["rows"]] == ["binary", "json", "socket"]
    for row in found["rows"]:
        assert set(row["statuses"]) == ({"1000"} if row["form"] == "socket" else {"200"})
        assert row["requests"] == sum(row["statuses"].values()) > 0
        assert 0 < row["ms_p50"] <= row["ms_p99"]
