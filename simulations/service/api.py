"""The service's routes. `create` makes the application; everything that touches users runs on the bank's thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, cast

import orjson
from fastapi import APIRouter, FastAPI, Query, Request, Response, WebSocket, WebSocketDisconnect
from jinja2 import Template
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.types import ASGIApp, Receive, Scope, Send

from fedbn.errors import UserError
from simulations.service.access import Access
from simulations.service.batching import Batcher, Job
from simulations.service.middleware import LOG, Guard, extra, refusal_of
from simulations.service.observability import Metrics
from simulations.service.openapi import with_windows
from simulations.service.schema import BINARY, Answer, checked_name, encoded, labels_of, listed, parsed, windows_of
from simulations.service.users import UserStore

KEEP = 10.0
"""Seconds between two writes of what has changed: what a crash may lose."""

AT_ONCE = 16
"""Users written between two calls of the bank, so that nobody waits long for the disk: about 10 ms."""

DOCS = Path(__file__).parent / "demo" / "page" / "docs.html"
"""The routes as a page, without a script or font from the network."""

WINDOWS = re.compile(r"/v1/users/(?P<user>[^/]+)/(?P<what>observe|predict)")


@dataclass(frozen=True)
class Service:
    """What the routes work with.

    Attributes:
        users: the users.
        batcher: the way to them.
        metrics: counters.
    """

    users: UserStore
    batcher: Batcher
    metrics: Metrics

    async def windows(self, user: str, body: bytes, binary: bool, *, learn: bool, hold: bool = False) -> Answer:
        """Answer the windows of one body."""
        found = windows_of(body, binary, self.users.shape, self.users.limits.windows)
        return await self.batcher.submit(Job(user, found, learn, hold))


def create(users: UserStore, access: Access, *routers: APIRouter) -> Guard:
    """The application (ASGI), `Guard` outermost.

    Args:
        users: the users.
        access: who may ask, and how much.
        routers: of pages served beside.
    """
    batcher = Batcher(users.answer, rows=min(64, users.limits.capacity))
    service = Service(users, batcher, Metrics(users, batcher))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        keeper = asyncio.create_task(_keep(service))
        try:
            yield
        finally:
            keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeper
            await batcher.call(users.keep)
            await batcher.close()

    app = FastAPI(
        title="fedbn",
        version=version("fedbn"),
        summary="Classes of windows, by statistics that follow each user.",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from the network
        redoc_url=None,
    )
    app.state.service = service
    app.add_exception_handler(UserError, _explain)
    app.include_router(_about)
    app.include_router(_users)
    for router in routers:
        app.include_router(router)
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        return with_windows(plain())

    app.openapi = openapi  # type: ignore[method-assign]

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        template = Template(DOCS.read_text(encoding="utf-8"), autoescape=True)
        return Response(template.render(schema=app.openapi()), media_type="text/html")

    return Guard(Fast(service, app), access, service.metrics)


async def _keep(service: Service) -> None:
    while True:
        await asyncio.sleep(KEEP)
        try:
            while await service.batcher.call(lambda: service.users.keep(AT_ONCE)):
                pass
        except Exception:
            LOG.exception("users could not be written; tried again soon")


async def _explain(request: Request, error: Exception) -> Response:
    refusal = refusal_of(cast(UserError, error))
    return Response(
        orjson.dumps({"error": str(refusal)}), refusal.status, extra(refusal), media_type="application/json"
    )


class Fast:
    """ASGI application that answers windows itself and leaves everything else to another.

    Windows come thousands of times a second, and the way through FastAPI costs more than the bank does.

    Args:
        service: what answers.
        other: what is left.
    """

    def __init__(self, service: Service, other: ASGIApp) -> None:
        self.service, self.other = service, other

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        found = WINDOWS.fullmatch(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if found is None:
            await self.other(scope, receive, send)
            return
        headers = dict(scope["headers"])
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        answer = await self.service.windows(
            found["user"],
            body,
            headers.get(b"content-type", b"").startswith(BINARY.encode()),
            learn=found["what"] == "observe",
            hold=found["what"] == "predict" and b"hold=true" in scope["query_string"].split(b"&"),
        )
        if headers.get(b"accept") == BINARY.encode():
            alarm, alarms = str(int(answer.alarm)).encode(), str(answer.alarms).encode()
            about = [(b"content-type", BINARY.encode()), (b"x-drift-alarm", alarm), (b"x-drift-alarms", alarms)]
            out = answer.probabilities.astype("<f4").tobytes()
        else:
            about = [(b"content-type", b"application/json")]
            out = encoded(answer, self.service.users.classes)
        about.append((b"content-length", str(len(out)).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": about})
        await send({"type": "http.response.body", "body": out})


def _service(request: Request | WebSocket) -> Service:
    found: Service = request.app.state.service
    return found


_about = APIRouter(tags=["service"])
_users = APIRouter(prefix="/v1/users", tags=["users"])


@_about.get("/health", summary="Whether the service answers.")
async def health(request: Request) -> dict[str, str]:
    """Goes through the bank's thread, so that a bank that hangs does not look healthy."""
    await _service(request).batcher.call(lambda: None)
    return {"status": "ok"}


@_about.get("/metrics", summary="Metrics for Prometheus.")
async def metrics(request: Request) -> Response:
    """All counters as text."""
    return Response(generate_latest(_service(request).metrics.registry), media_type=CONTENT_TYPE_LATEST)


@_about.get("/v1/model", summary="What is served: shape of a window, classes, rule, limits.")
async def model(request: Request) -> dict[str, Any]:
    """Everything a client must know before it sends windows."""
    users = _service(request).users
    bank = users.net.bank
    return {
        "model": bank.model,
        "shape": users.shape,
        "classes": list(users.classes),
        "rule": bank.text,
        "drift": users.drift,
        "windows_a_request": users.limits.windows,
        "users_at_hand": users.at_hand,
    }


@_users.get("", summary="Names of users, in alphabetical order.")
async def users(
    request: Request, after: str = "", most: Annotated[int, Query(ge=1, le=1000)] = 100
) -> dict[str, list[str]]:
    """One page; the next begins after its last name."""
    service = _service(request)
    return {"users": await service.batcher.call(lambda: service.users.users(after, most))}


@_users.put("/{user}", summary="Enroll a user; nothing happens to one who is known.")
async def enroll(request: Request, user: str, response: Response) -> dict[str, Any]:
    """Status 201 where the user is new."""
    service, name = _service(request), checked_name(user)
    new = await service.batcher.call(lambda: service.users.enroll(name))
    response.status_code = 201 if new else 200
    return {"user": name, "new": new}


@_users.get("/{user}", summary="How a user stands: windows, classes met, drift, distance of each layer.")
async def report(request: Request, user: str) -> dict[str, Any]:
    """As `UserStore.report`."""
    service = _service(request)
    return await service.batcher.call(lambda: service.users.report(user))


@_users.delete("/{user}", summary="Forget everything about a user.", status_code=204)
async def forget(request: Request, user: str) -> None:
    """In memory and in the store."""
    service = _service(request)
    await service.batcher.call(lambda: service.users.forget(user))


@_users.post("/{user}/reset", summary="Back to the first day.", status_code=204)
async def reset(request: Request, user: str) -> None:
    """The user stays known."""
    service = _service(request)
    await service.batcher.call(lambda: service.users.reset(user))


@_users.post(
    "/{user}/commit",
    summary='Learn labels: of held windows, {"labels": {"17": "walking"}}, or {"windows": [...], "labels": [...]}.',
)
async def commit(request: Request, user: str) -> dict[str, int]:
    """How many windows were learnt."""
    service, given = _service(request), parsed(await request.body())
    users, labels = service.users, given.get("labels")
    if isinstance(labels, dict):
        known = dict(zip(labels, labels_of(list(labels.values()), users.classes), strict=True))
        return {"learnt": await service.batcher.call(lambda: users.commit(user, known))}
    windows = listed(given.get("windows"), users.shape, users.limits.windows)
    told = labels_of(labels, users.classes)
    await service.batcher.call(lambda: users.learn(user, windows, told))
    return {"learnt": len(told)}


@_users.post(
    "/{user}/calibrate",
    summary='Start from the user\'s own windows: {"windows": [...], "labels": [...], "then": "freeze" or "adapt"}.',
    status_code=204,
)
async def calibrate(request: Request, user: str) -> None:
    """Labels may be left out; best are a few windows of each class."""
    service, given = _service(request), parsed(await request.body())
    users = service.users
    windows = listed(given.get("windows"), users.shape, users.limits.windows)
    labels = None if given.get("labels") is None else labels_of(given["labels"], users.classes)
    then = str(given.get("then", "adapt"))
    await service.batcher.call(lambda: users.calibrate(user, windows, labels, then))


@_users.get("/{user}/snapshot", summary="A user's state, as safetensors.", response_class=Response)
async def snapshot(request: Request, user: str) -> Response:
    """To keep, or to give to another service with the same model and rule."""
    service = _service(request)
    return Response(await service.batcher.call(lambda: service.users.snapshot(user)), media_type=BINARY)


@_users.put("/{user}/snapshot", summary="Give a user a state instead of its own.", status_code=204)
async def restore(request: Request, user: str) -> None:
    """As `snapshot` gave it."""
    service, data = _service(request), await request.body()
    await service.batcher.call(lambda: service.users.restore(user, data, merge=False))


@_users.post("/{user}/merge", summary="Add the windows behind another state to a user's.", status_code=204)
async def merge(request: Request, user: str) -> None:
    """As `snapshot` gave it, for example on another device of the same user."""
    service, data = _service(request), await request.body()
    await service.batcher.call(lambda: service.users.restore(user, data, merge=True))


@_users.get("/{user}/export", summary="Weights of a plain model with the user's statistics.", response_class=Response)
async def export(request: Request, user: str) -> Response:
    """As safetensors, under the names of the model's state."""
    service = _service(request)
    return Response(await service.batcher.call(lambda: service.users.export(user)), media_type=BINARY)


@_users.websocket("/{user}/stream")
async def stream(socket: WebSocket, user: str) -> None:
    """A frame of windows in (raw float32, or JSON with ``windows`` and perhaps ``learn``), an answer out, in order."""
    service = _service(socket)
    await socket.accept()
    try:
        while True:
            frame = await socket.receive()
            if frame["type"] == "websocket.disconnect":
                return
            try:
                answer = await _framed(service, user, frame)
            except UserError as error:
                answer = orjson.dumps({"error": str(error)})
            await socket.send_text(answer.decode())
    except WebSocketDisconnect:
        return


async def _framed(service: Service, user: str, frame: Any) -> bytes:
    learn = True
    if (body := frame.get("bytes")) is None:
        body = frame["text"].encode()
        learn = parsed(body).get("learn", True) is not False
    binary = frame.get("bytes") is not None
    return encoded(await service.windows(user, body, binary, learn=learn), service.users.classes)


def log_start(where: str, users: UserStore) -> None:
    """Say where the service listens."""
    LOG.log(logging.INFO, "listening", extra={"about": {"address": where, "rule": users.rule}})
