"""Every route with random paths, headers, queries and bodies: no status 5xx, and no change of state with status 4xx."""

from __future__ import annotations

import json
import random
from urllib.parse import quote_from_bytes, unquote

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi")

from safetensors.torch import load, save
from starlette.testclient import TestClient

from fedbn.models import build
from fedbn.online import SQLiteStore
from fedbn.online.state import _checksum
from fedbn_simulations.service.access import Access
from fedbn_simulations.service.api import create_app
from fedbn_simulations.service.schema import BINARY
from fedbn_simulations.service.users import Limits, UserStore

SHAPE, CLASSES = (6, 16), ("sit", "walk", "lie")
USERS = ("ann", "bob", "cem")
DEFAULT_CASES, SLOW_CASES = 200, 12_000
CASES = pytest.mark.parametrize("cases", [DEFAULT_CASES, pytest.param(SLOW_CASES, marks=pytest.mark.slow)])

WORDS = [
    *(b"ann", b"bob", b"eve", b"%ff", b"%C3%A9", b"e%CC%81", b"%00", b"..", b".", b"%2F", b"%2e%2e", b"x" * 200, b"%"),
    *("é".encode(), b"\xff\xfe", b"a b", b"%F0%9F%98%80", b"%ED%A0%80", b"", b"a%0Ab", b"'; DROP TABLE states; --"),
]
ACTIONS = [
    *(b"observe", b"predict", b"commit", b"calibrate", b"snapshot", b"merge", b"export", b"reset", b"stream", b""),
    *(b"nothing", b"\xff", b"snapshot/x"),
]
ROUTES = [b"/health", b"/metrics", b"/v1/model", b"/v1/users", b"/docs", b"/openapi.json", b"/", b"//", b"", b"*"]
USUAL = {
    **{action: ["POST"] for action in (b"observe", b"predict", b"commit", b"calibrate", b"merge", b"reset")},
    **{b"snapshot": ["GET", "PUT", "PUT"], b"export": ["GET"], b"": ["GET", "PUT", "PUT", "DELETE"]},
}
METHODS = ["GET", "PUT", "POST", "DELETE", "PATCH", "HEAD", "OPTIONS"]
VALUES = [
    *(None, True, 0, -1, 1e39, -1e308, 2**70, "", "sit", "walk", "1", [], {}, [[]], [None], ["sit"], [0], [[[1.0]]]),
    *(
        {"1": "sit"},
        {"": 0},
        {"1": None},
        "freeze",
        "adapt",
        [[[0.0] * 16] * 6],
        [[[1e38] * 16] * 6],
        [[["1"] * 16] * 6],
    ),
    *([[[0.0] * 16] * 6] * 3, [[[True] * 16] * 6], [[[0.0] * 16] * 5 + [[0.0] * 15]], "\x00", "é"),
]
HEADERS = [
    *((b"host", b"["), (b"host", b"localhost"), (b"host", b"localhost:99999"), (b"host", b"\xff"), (b"host", b"a@b")),
    *((b"origin", b"http://["), (b"origin", b"null"), (b"origin", b"http://localhost"), (b"origin", b"\xff")),
    *((b"content-length", b"-1"), (b"content-length", b"9" * 30), (b"content-length", b"x")),
    *((b"content-type", BINARY.encode()), (b"content-type", b"application/json"), (b"content-type", b"\xff")),
    *((b"accept", BINARY.encode()), (b"accept", b"*/*"), (b"authorization", b"Bearer \xff"), (b"x", b"\x00" * 99)),
]
QUERIES = [
    b"",
    b"hold=true",
    b"hold=maybe",
    b"limit=0",
    b"limit=x",
    b"limit=5&after=ann",
    b"after=%ff",
    b"\xff",
    b"limit=1e9",
]


@pytest.fixture
def client(tmp_path):
    model = build("har-cnn", SHAPE, len(CLASSES), seed=0).eval()
    store = SQLiteStore(tmp_path / "users.db")
    users = UserStore(model, SHAPE, CLASSES, "pseudo:n0=4", store=store, limits=Limits(capacity=2, held=4, windows=4))
    app = create_app(users, Access(rate=0, user_rate=0, body=100_000))
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        client.users = users
        for user in USERS:
            client.put(f"/v1/users/{user}")
            client.post(
                f"/v1/users/{user}/observe", content=windows(random.Random(0), 3), headers={"content-type": BINARY}
            )
        yield client
    store.close()


def windows(draw, n):
    return np.random.default_rng(draw.randrange(10)).standard_normal((n, *SHAPE)).astype("<f4").tobytes()


def digest(client):
    """Everything that a rejected request must not change."""

    def read():
        users = client.users
        users.flush()
        held = {user: list(users.held.of(user)) for user in USERS}
        return {user: users.journal[user] for user in users.journal}, held, users.monitor.num_alarms

    return client.portal.call(client.app.app.service.batcher.call, read)


def mutated(draw, data):
    data = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        kind = draw.random()
        at = draw.randrange(len(data)) if data else 0
        if kind < 0.5 and data:
            data[at] ^= 1 << draw.randrange(8)
        elif kind < 0.7:
            del data[at:]
        elif kind < 0.85:
            data[at:at] = draw.randbytes(draw.randint(1, 9))
        else:
            del data[at : at + draw.randint(1, 9)]
    return bytes(data)


def forged(draw, snapshot):
    """A snapshot with bad content and a valid checksum."""
    tensors = load(snapshot)
    header = json.loads(snapshot[8 : 8 + int.from_bytes(snapshot[:8], "little")])
    about = json.loads(header["__metadata__"]["bnstate"])
    version = about.pop("version")
    del about["crc32"]
    for _ in range(draw.randint(1, 2)):
        name, key = draw.choice(list(tensors)), draw.choice(list(about))
        value = tensors[name]
        edits = [
            lambda: tensors.update({name: value * draw.choice([torch.nan, torch.inf, -1.0, 1e30, 0.0])}),
            lambda: tensors.update({name: value.flatten()[: draw.randint(0, value.numel())]}),
            lambda: tensors.update(
                {name: value.to(draw.choice([torch.int8, torch.bool, torch.float16, torch.complex64]))}
            ),
            lambda: tensors.update({draw.choice(["x", "base mean", "base var", "extra", "std"]): value}),
            lambda: tensors.pop(name) is None,
            lambda: about.update(
                {key: draw.choice([*VALUES, {"a": 1}, {"a": 10**9}, [1e30] * 5, [1.5] * 5, [True] * 5])}
            ),
            lambda: about.update({"x": 1}),
            lambda: about.pop(key) is None,
        ]
        draw.choice(edits)()
        if not tensors or not about:
            break
    version = version if draw.random() < 0.9 else draw.choice(VALUES)
    text = json.dumps(about | {"version": version, "crc32": _checksum(tensors, about)})
    return save({name: t.clone().contiguous() for name, t in tensors.items()}, {"bnstate": text})


def random_body(draw, snapshots):
    kind = draw.randrange(9)
    if kind == 0:
        return draw.randbytes(draw.randint(0, 400))
    if kind == 1:
        return windows(draw, draw.randint(1, 6))
    if kind == 2:
        hostile = np.frombuffer(windows(draw, 2), "<f4").copy()
        hostile[draw.randrange(len(hostile))] = draw.choice([np.nan, np.inf, 1e38, -3e38, 1e20])
        return hostile.tobytes()
    if kind == 3:
        names = ["windows", "labels", "then", "learn", "x"]
        return json.dumps({name: draw.choice(VALUES) for name in draw.sample(names, draw.randint(0, 4))}).encode()
    if kind == 4:
        return draw.choice(
            [b"", b"null", b"[" * 2000, b'{"windows": [' + b"[]," * 9000 + b"[]]}", b'{"a": "\xff"}', b"1e999"]
        )
    snapshot = draw.choice(snapshots)
    if kind == 5:
        return snapshot
    return mutated(draw, snapshot) if kind == 6 else forged(draw, snapshot)


def random_request(draw, snapshots):
    action = draw.choice(ACTIONS)
    if draw.random() < 0.9:
        path = b"/v1/users/" + draw.choice(WORDS if draw.random() < 0.2 else WORDS[:2]) + b"/" + action
    else:
        path = draw.choice([*ROUTES, draw.randbytes(9), b"/" + draw.choice(WORDS)])
    path = path.rstrip(b"/") or path
    headers = [(b"host", b"localhost"), (b"content-type", draw.choice([BINARY.encode(), b"application/json"]))]
    if draw.random() < 0.15:
        headers += [draw.choice(HEADERS) for _ in range(draw.randint(1, 3))]
    raw = quote_from_bytes(path, safe="/%*'; -").encode()
    scope = {
        "type": "http",
        "http_version": "1.1",
        "scheme": "http",
        "method": draw.choice(USUAL.get(action, METHODS) if draw.random() < 0.9 else METHODS),
        "path": unquote(raw.decode()),  # as uvicorn does
        "raw_path": raw,
        "root_path": "",
        "query_string": draw.choice(QUERIES),
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    return scope, random_body(draw, snapshots)


async def respond(app, scope, body):
    messages, sent = [], False

    async def receive():
        nonlocal sent
        if sent:
            return {"type": "http.disconnect"}
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        messages.append(message)

    await app(scope, receive, send)
    return messages[0]["status"]


@CASES
def test_no_request_fails_the_service_or_changes_state_when_rejected(client, cases):
    draw = random.Random(cases)
    snapshots = [client.get(f"/v1/users/{user}/snapshot").content for user in USERS]
    before, statuses = digest(client), {}
    for _ in range(cases):
        scope, body = random_request(draw, snapshots)
        status = client.portal.call(respond, client.app, dict(scope), body)
        statuses[status] = statuses.get(status, 0) + 1
        assert status < 500, (scope, body[:200])
        after = digest(client)
        if status >= 400:
            assert after == before, (status, scope, body[:200])
        before = after
        for user in USERS:  # some requests delete users
            if user not in after[0]:
                client.put(f"/v1/users/{user}")
                before = digest(client)
    print(statuses)
    assert {200, 201, 204, 400, 404, 405, 409, 413, 422} <= statuses.keys() or cases < 1000
    for user, record in before[0].items():
        assert all(bool(v.isfinite().all()) for v in client.users.net.bank.records.unpack(record).values()), user


@CASES
def test_no_frame_fails_a_socket(client, cases):
    draw = random.Random(cases)
    snapshots = [client.get("/v1/users/ann/snapshot").content]
    with client.websocket_connect("ws://localhost/v1/users/ann/stream") as socket:
        for _ in range(cases // 4):
            body = random_body(draw, snapshots)
            if draw.random() < 0.5:
                socket.send_bytes(body)
            else:
                socket.send_text(body.decode("latin-1"))
            assert set(socket.receive_json()) & {"answers", "error"}
    assert torch.isfinite(client.users.net.bank.rows["mean"]).all()
