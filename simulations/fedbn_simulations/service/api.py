"""Routes of the service. `create_app` builds the application. All access to users runs on the bank's thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, cast

import orjson
from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import RedirectResponse
from jinja2 import Template
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from fedbn.errors import UserError
from fedbn_simulations.service.access import USER_BURST, Access, RateLimiter
from fedbn_simulations.service.batching import Batcher
from fedbn_simulations.service.durability import RELAXED_SECONDS, Durability, GroupCommit
from fedbn_simulations.service.middleware import LOG, AccessMiddleware, as_request_error, error_headers
from fedbn_simulations.service.observability import Metrics
from fedbn_simulations.service.openapi import add_window_routes
from fedbn_simulations.service.schema import (
    BINARY,
    RequestError,
    encode_answer,
    parse_json,
    parse_labels,
    validate_name,
    windows_from_lists,
)
from fedbn_simulations.service.service import Service, audit
from fedbn_simulations.service.users import UserStore

DOCS_PAGE = Path(__file__).parent / "demo" / "page" / "docs.html"
"""Template of the page of routes, without scripts or fonts from the network."""

WINDOW_ROUTES = re.compile(r"/v1/users/(?P<user>[^/]+)/(?P<action>observe|predict)")


def create_app(
    users: UserStore, access: Access, *routers: APIRouter, durability: Durability = "full"
) -> AccessMiddleware:
    """Create the ASGI application.

    Args:
        users: the users.
        access: authentication and limits.
        routers: additional routes.
        durability: whether windows are on disk before they are acknowledged.
    """
    saving = None if users.journal is None else GroupCommit(users.journal.commit)
    saved = None if saving is None or durability == "relaxed" else saving.saved
    batcher = Batcher(users.answer, max_batch=min(64, users.limits.capacity), saved=saved)
    quota = RateLimiter(access.user_rate, max(USER_BURST, 2 * access.user_rate))
    service = Service(users, batcher, Metrics(users, batcher), quota, saving)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(_save_periodically(service))
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await batcher.close()
            if saving is not None:
                with contextlib.suppress(UserError):  # logged
                    await saving.saved()
                await saving.close()
            service.parser.shutdown()

    app = FastAPI(
        title="fedbn",
        version=version("fedbn"),
        summary="Predictions for sensor windows, with normalization statistics adapted to each user.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's page loads scripts from the network
        redoc_url=None,
    )
    app.state.service = service
    app.add_exception_handler(UserError, _error_response)
    for router in (_service_router, _users_router, *routers):
        app.include_router(router)
    default_openapi = app.openapi

    def openapi() -> dict[str, Any]:
        return add_window_routes(default_openapi())

    app.openapi = openapi  # type: ignore[method-assign]

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        template = Template(DOCS_PAGE.read_text(encoding="utf-8"), autoescape=True)
        return Response(template.render(schema=app.openapi()), media_type="text/html")

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("docs")  # the demo page has a route of its own, which comes first

    return AccessMiddleware(WindowMiddleware(app, service), access, service.metrics)


async def _save_periodically(service: Service) -> None:
    """Write what nobody waits for: windows with relaxed durability, and changes that could not be written before."""
    journal = service.users.journal
    while service.saving is not None and journal is not None:
        await asyncio.sleep(RELAXED_SECONDS)
        if journal.pending:
            with contextlib.suppress(Exception):  # logged, and tried again
                await service.saving.saved()


async def _error_response(request: Request, error: Exception) -> Response:
    error = as_request_error(cast(UserError, error))
    body = orjson.dumps({"error": str(error)})
    return Response(body, error.status, error_headers(error), media_type="application/json")


class WindowMiddleware:
    """ASGI middleware that handles requests with windows and passes on all others.

    There are thousands of such requests per second, and FastAPI's overhead exceeds the cost of the bank.

    Args:
        app: application for all other requests.
        service: predicts the windows.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle or pass on a request."""
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        match = WINDOW_ROUTES.fullmatch(scope["path"]) if is_post else None
        if match is None:
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        parts, more = [], True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        answer = await self.service.windows(
            match["user"],
            b"".join(parts),
            headers.get(b"content-type", b"").startswith(BINARY.encode()),
            learn=match["action"] == "observe",
            hold=match["action"] == "predict" and b"hold=true" in scope["query_string"].split(b"&"),
        )
        if headers.get(b"accept") == BINARY.encode():
            alarm, alarms = str(int(answer.alarm)).encode(), str(answer.alarms).encode()
            out_headers = [(b"content-type", BINARY.encode()), (b"x-drift-alarm", alarm), (b"x-drift-alarms", alarms)]
            out = answer.predictions.astype("<f4").tobytes()
        else:
            out_headers = [(b"content-type", b"application/json")]
            out = encode_answer(answer, self.service.users.classes)
        out_headers.append((b"content-length", str(len(out)).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": out_headers})
        await send({"type": "http.response.body", "body": out})


async def _service(connection: HTTPConnection) -> Service:
    return cast(Service, connection.app.state.service)


SharedService = Annotated[Service, Depends(_service)]
_service_router = APIRouter(tags=["service"])
_users_router = APIRouter(prefix="/v1/users", tags=["users"])


@_service_router.get("/health", summary="Check that the service responds.")
async def health(service: SharedService) -> dict[str, str]:
    """Fails if the bank hangs, and if changes cannot be saved: 507 if the disk is full, 503 otherwise."""
    await service.batcher.call(lambda: None)
    service.users.require_writable()
    return {"status": "ok"}


@_service_router.get("/metrics", summary="Metrics for Prometheus.")
async def metrics(service: SharedService) -> Response:
    """Metrics as text."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@_service_router.get("/v1/model", summary="The served model: window shape, task, classes, rule, limits.")
async def model(service: SharedService) -> dict[str, Any]:
    """Information that a client needs to send windows."""
    users, bank = service.users, service.users.net.bank
    return {
        "model": bank.model,
        "shape": users.shape,
        "task": users.task.name,
        "classes": list(users.classes),
        "outputs": list(users.outputs),
        "rule": users.rule,
        "reason": users.reason,
        "drift": users.drift,
        "max_windows_per_request": users.limits.windows,
        "users_in_memory": users.num_in_memory,
    }


@_users_router.get("", summary="Names of users, in alphabetical order.")
async def users(
    service: SharedService, after: str = "", limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> dict[str, list[str]]:
    """One page of names. Pass the last name as ``after`` to get the next page."""
    return {"users": await service.batcher.call(lambda: service.users.users(after, limit))}


@_users_router.put("/{user}", summary="Enroll a user. Existing users are unchanged.")
async def enroll(request: Request, service: SharedService, user: str, response: Response) -> dict[str, Any]:
    """Status 201 if the user is new."""
    name = validate_name(user)
    new = await service.change(lambda: service.users.enroll(name), request)
    if new:
        audit(request, "enroll")
    response.status_code = 201 if new else 200
    return {"user": name, "new": new}


@_users_router.get("/{user}", summary="Summary of a user: windows, classes, drift, distance of each layer.")
async def report(service: SharedService, user: str) -> dict[str, Any]:
    """As `UserStore.report`."""
    return await service.batcher.call(lambda: service.users.report(user))


@_users_router.delete("/{user}", summary="Delete all data of a user.", status_code=204)
async def forget(request: Request, service: SharedService, user: str) -> None:
    """Both in memory and in the store."""
    await service.change(lambda: service.users.forget(user), request, "delete")


@_users_router.post("/{user}/reset", summary="Restore a user's initial state.", status_code=204)
async def reset(request: Request, service: SharedService, user: str) -> None:
    """The user stays enrolled."""
    await service.change(lambda: service.users.reset(user), request, "reset")


@_users_router.post(
    "/{user}/commit",
    summary='Learn labels of held windows, {"labels": {"17": "walking"}}, or {"windows": [...], "labels": [...]}.',
)
async def commit(request: Request, service: SharedService, user: str) -> dict[str, int]:
    """Number of learned windows."""
    users, body = service.users, await service.parse_json(request)
    labels = body.get("labels")
    if isinstance(labels, dict):
        by_window = dict(zip(labels, parse_labels(list(labels.values()), users.classes), strict=True))
        return {"learned": await service.change(lambda: users.commit(user, by_window), request)}
    windows = windows_from_lists(body.get("windows"), users.shape, users.limits.windows)
    indices = parse_labels(labels, users.classes)
    service.count_windows(user, len(windows))
    await service.change(lambda: users.learn(user, windows, indices), request)
    return {"learned": len(indices)}


@_users_router.post(
    "/{user}/calibrate",
    summary='Calibrate on the user\'s windows: {"windows": [...], "labels": [...], "then": "freeze" or "adapt"}.',
    status_code=204,
)
async def calibrate(request: Request, service: SharedService, user: str) -> None:
    """Labels are optional. A few windows of each class work best."""
    users, body = service.users, await service.parse_json(request)
    windows = windows_from_lists(body.get("windows"), users.shape, users.limits.windows)
    labels = None if body.get("labels") is None else parse_labels(body["labels"], users.classes)
    then = str(body.get("then", "adapt"))
    service.count_windows(user, len(windows))
    await service.change(lambda: users.calibrate(user, windows, labels, then), request, "calibrate")


@_users_router.get("/{user}/snapshot", summary="A user's state, as safetensors.", response_class=Response)
async def snapshot(request: Request, service: SharedService, user: str) -> Response:
    """For backup, or for another service with the same model and rule."""
    state = await service.batcher.call(lambda: service.users.snapshot(user))
    audit(request, "read snapshot")
    return Response(state, media_type=BINARY)


@_users_router.put("/{user}/snapshot", summary="Replace a user's state.", status_code=204)
async def restore(request: Request, service: SharedService, user: str) -> None:
    """The body is the response of `snapshot`."""
    data = await request.body()
    await service.change(lambda: service.users.restore(user, data, merge=False), request, "replace snapshot")


@_users_router.post("/{user}/merge", summary="Merge another state into a user's state.", status_code=204)
async def merge(request: Request, service: SharedService, user: str) -> None:
    """The body is the response of `snapshot`, for example from another device of the same user."""
    data = await request.body()
    await service.change(lambda: service.users.restore(user, data, merge=True), request, "merge")


@_users_router.get(
    "/{user}/export", summary="Weights of a plain model with the user's statistics.", response_class=Response
)
async def export(request: Request, service: SharedService, user: str) -> Response:
    """As safetensors, with the names of the model's state dict."""
    weights = await service.batcher.call(lambda: service.users.export(user))
    audit(request, "export")
    return Response(weights, media_type=BINARY)


@_users_router.websocket("/{user}/stream")
async def stream(socket: WebSocket, service: SharedService, user: str) -> None:
    """Receive frames of windows (raw float32, or JSON with ``windows`` and optional ``learn``) and answer in order."""
    await socket.accept()
    try:
        while True:
            frame = await socket.receive()
            if frame["type"] == "websocket.disconnect":
                return
            try:
                answer = await _answer_frame(service, user, frame)
            except UserError as error:
                answer = orjson.dumps({"error": str(as_request_error(error))})
            await socket.send_text(answer.decode())
    except WebSocketDisconnect:
        return


async def _answer_frame(service: Service, user: str, frame: Any) -> bytes:
    learn, body = True, frame.get("bytes")
    if not (binary := body is not None):
        body = frame["text"].encode()
        elements = service.users.limits.elements(service.users.shape)
        learn = (await service.parse(body, lambda b: parse_json(b, elements))).get("learn", True)
        if not isinstance(learn, bool):
            raise RequestError(422, '"learn" must be true or false')
    return encode_answer(await service.windows(user, body, binary, learn=learn), service.users.classes)


def log_start(url: str, users: UserStore) -> None:
    """Log the address of the service."""
    LOG.log(logging.INFO, "listening", extra={"fields": {"address": url, "rule": users.rule}})
