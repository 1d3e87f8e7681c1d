"""Limits of connections, headers, bodies and tokens on real sockets, TLS, and the audit log."""

from __future__ import annotations

import http.client
import json
import logging
import resource
import socket
import ssl
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

pytest.importorskip("fastapi")

import trustme
from starlette.testclient import TestClient

from fedbn.errors import UserError
from fedbn.models import build
from fedbn_simulations.service import connections
from fedbn_simulations.service.access import TOKEN_BURST, Access, RateLimiter
from fedbn_simulations.service.api import create_app
from fedbn_simulations.service.connections import RESERVED_FILES, connection_limit
from fedbn_simulations.service.schema import BINARY
from fedbn_simulations.service.server import address, create_server, listen
from fedbn_simulations.service.users import UserStore

SHAPE, CLASSES = (6, 16), ("sit", "walk", "lie")
TOKEN = "a-token-of-twenty-four-c"
BODY = np.zeros((1, *SHAPE), "<f4").tobytes()


@contextmanager
def serving(**access):
    """A service on a socket: its port and its users, of whom ann is enrolled."""
    users = UserStore(build("har-cnn", SHAPE, len(CLASSES), seed=0).eval(), SHAPE, CLASSES, "pseudo:n0=64")
    users.enroll("ann")
    limits = Access(**access)
    with listen("127.0.0.1", 0) as listening:
        ready = threading.Event()
        server = create_server(create_app(users, limits), limits, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        assert ready.wait(10)
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(10)


def get(port, path="/health", method="GET", body=None, headers=(), **options):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10, **options)
    try:
        connection.request(method, path, body, dict(headers))
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def exchange(port, data):
    """Send raw bytes and read until the service closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(data)
        received = b""
        while block := connection.recv(4096):
            received += block
        return received


# ---------------------------------------------------------------- connections


def test_incomplete_headers_time_out(monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.2)
    with serving() as port:
        start = time.monotonic()
        for data in (b"", b"GET /hea", b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: "):
            assert exchange(port, data).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
            time.sleep(0.4)  # an idle connection stays open
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n")
            time.sleep(0.1)
            connection.sendall(b"\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
            connection.sendall(b"GET /")
            assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - start < 5


def test_long_headers_are_refused():
    with serving() as port:
        assert exchange(port, b"GET /health HTTP/1.1\r\nx: " + b"a" * 70_000).startswith(b"HTTP/1.1 431 ")
        assert get(port)[0] == 200


def test_connections_beyond_the_limit_are_refused(monkeypatch):
    monkeypatch.setattr("fedbn_simulations.service.server.limited_protocol", lambda: connections.limited_protocol(3))
    with serving() as port:
        opened = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(3)]
        time.sleep(0.1)
        assert exchange(port, b"").startswith(b"HTTP/1.1 503 ")
        opened.pop().close()
        time.sleep(0.1)
        assert get(port)[0] == 200
        for connection in opened:
            connection.close()


def test_limit_of_connections_follows_the_file_descriptors(monkeypatch):
    for files, expected in ((1024, 1024 - RESERVED_FILES), (10**6, 8192), (20, 1), (resource.RLIM_INFINITY, 8192)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind: (files, files))
        assert connection_limit() == expected


def test_incomplete_body_times_out():
    with serving(timeout=0.3) as port:
        head = b"POST /v1/users/ann/observe HTTP/1.1\r\nhost: localhost\r\ncontent-length: 384\r\n\r\nabc"
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(head)
            assert connection.recv(4096).startswith(b"HTTP/1.1 504 ")


def test_paths_that_are_not_utf8_are_rejected():
    with serving() as port:
        status, body = get(port, "/v1/users/%ff", "PUT")
        assert (status, b"not UTF-8" in body) == (400, True)
        assert b" 400 " in exchange(
            port, b"PUT /v1/users/\xff HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        )
        assert get(port, "/v1/users/e%CC%81", "PUT")[0] == 201
        assert get(port, "/v1/users/%C3%A9", "PUT") == (200, '{"user":"é","new":false}'.encode())
        assert get(port, "/v1/users/e%CC%81")[0] == 200
        assert get(port, "/v1/users/%2E%2E", "PUT")[0] == 422


# ---------------------------------------------------------------- parsing


def test_hostile_json_does_not_delay_other_users():
    hostile = b'{"windows": [' + b"[]," * 1_290_000 + b"[]]}"
    deep = b'{"windows": ' + b"[" * 3_900_000
    with serving(rate=0) as port:
        slowest, stop = [0.0], threading.Event()

        def probe():
            while not stop.is_set():
                start = time.monotonic()
                assert get(port)[0] == 200
                slowest[0] = max(slowest[0], time.monotonic() - start)

        thread = threading.Thread(target=probe)
        thread.start()
        for body in (hostile, deep):
            for path in ("observe", "commit", "calibrate"):
                assert get(port, f"/v1/users/ann/{path}", "POST", body)[0] in (400, 413)
        stop.set()
        thread.join(10)
    assert slowest[0] < 1.0


def test_large_bodies_are_not_parsed_on_the_event_loop(monkeypatch):
    users = UserStore(build("har-cnn", SHAPE, len(CLASSES), seed=0).eval(), SHAPE, CLASSES, "pseudo:n0=64")
    users.enroll("ann")
    threads = []
    with TestClient(create_app(users, Access()), base_url="http://localhost") as client:
        from fedbn_simulations.service import service

        parse = service.parse_windows
        monkeypatch.setattr(
            service, "parse_windows", lambda *a: threads.append(threading.current_thread().name) or parse(*a)
        )
        for n in (1, 200):
            body = json.dumps({"windows": np.zeros((n, *SHAPE)).tolist()})
            assert client.post("/v1/users/ann/observe", content=body).status_code == 200
    assert not threads[0].startswith("parser")
    assert threads[1].startswith("parser")


# ---------------------------------------------------------------- tokens, quotas, TLS, audit


def client_of(**access):
    users = UserStore(build("har-cnn", SHAPE, len(CLASSES), seed=0).eval(), SHAPE, CLASSES, "pseudo:n0=64")
    return TestClient(create_app(users, Access(**access)), base_url="http://localhost")


def test_wrong_tokens_are_limited_before_they_are_compared():
    valid, wrong = ({"authorization": f"Bearer {token}"} for token in (TOKEN, TOKEN + "x"))
    with client_of(token=TOKEN) as client:
        assert client.get("/v1/users", headers=valid).status_code == 200
        statuses = [client.get("/v1/users", headers=wrong).status_code for _ in range(TOKEN_BURST + 5)]
        assert statuses == [401] * TOKEN_BURST + [429] * 5
        assert client.get("/v1/users", headers=valid).status_code == 429
        assert client.get("/health").status_code == 200
    with client_of(token=TOKEN, rate=0) as client:  # behind a proxy, which has its own limits
        assert [client.get("/v1/users", headers=wrong).status_code for _ in range(20)] == [401] * 20


def test_right_tokens_do_not_use_up_the_limit_of_wrong_ones():
    valid = {"authorization": f"Bearer {TOKEN}"}
    with client_of(token=TOKEN) as client:
        assert {client.get("/v1/users", headers=valid).status_code for _ in range(3 * TOKEN_BURST)} == {200}


def test_quota_limits_the_windows_of_one_user():
    with client_of(user_rate=1.0) as client:
        for user in ("ann", "bob"):
            client.put(f"/v1/users/{user}")
        many = {"content": BODY * 200, "headers": {"content-type": BINARY}}
        assert client.post("/v1/users/ann/observe", **many).status_code == 200
        late = client.post("/v1/users/ann/predict", **many)
        assert late.status_code == 429
        assert "1 windows per second" in late.json()["error"]
        assert int(late.headers["retry-after"]) > 100
        calibration = {"windows": np.zeros((100, *SHAPE)).tolist()}
        assert client.post("/v1/users/ann/calibrate", json=calibration).status_code == 429
        assert client.post("/v1/users/bob/observe", **many).status_code == 200


def test_rate_limiter_takes_several_tokens_or_none():
    now = [0.0]
    limiter = RateLimiter(2.0, burst=10, clock=lambda: now[0])
    assert [limiter.acquire("a", 6), limiter.acquire("a", 6), limiter.acquire("a", 4)] == [0, 1, 0]
    assert limiter.blocked("a") == 0.5
    now[0] = 0.5
    assert limiter.blocked("a") == 0


def test_audit_log_has_administrative_actions(caplog):
    with client_of() as client, caplog.at_level(logging.INFO, "fedbn.service.audit"):
        client.put("/v1/users/ann")
        client.put("/v1/users/ann")
        client.post("/v1/users/ann/observe", content=BODY, headers={"content-type": BINARY})
        state = client.get("/v1/users/ann/snapshot").content
        client.put("/v1/users/ann/snapshot", content=state)
        client.put("/v1/users/ann/snapshot", content=b"nonsense")
        client.post("/v1/users/ann/merge", content=state)
        client.get("/v1/users/ann/export")
        client.post("/v1/users/ann/calibrate", json={"windows": [[[1.0] * 16] * 6]})
        client.post("/v1/users/ann/reset")
        client.delete("/v1/users/ann")
        client.delete("/v1/users/ann")
    records = [record.fields for record in caplog.records if record.name == "fedbn.service.audit"]
    actions = ["enroll", "read snapshot", "replace snapshot", "merge", "export", "calibrate", "reset", "delete"]
    assert [fields["action"] for fields in records] == actions
    assert all((fields["user"], fields["caller"]) == ("ann", "testclient") for fields in records)


def test_service_answers_with_tls(tmp_path):
    authority = trustme.CA()
    authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with serving(cert=tmp_path / "both.pem") as port:
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=10, context=context)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        connection.close()
        with pytest.raises((http.client.HTTPException, OSError)):
            get(port)
    with listen("127.0.0.1", 0) as listening:
        assert address("127.0.0.1", listening, tls=True).startswith("https://")


def test_tls_files_are_checked(tmp_path):
    (tmp_path / "no.pem").write_text("no certificate")
    for options, message in (
        ({"cert": tmp_path / "none.pem"}, "none.pem and --tls-key cannot be used"),
        ({"cert": tmp_path / "no.pem"}, "give a certificate in PEM format"),
        ({"key": tmp_path / "no.pem"}, "--tls-key needs the certificate, --tls-cert"),
    ):
        with pytest.raises(UserError, match=message):
            Access(**options)
