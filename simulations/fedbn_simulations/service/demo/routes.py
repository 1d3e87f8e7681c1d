"""Files of the page, and the socket that streams a session to it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import orjson
from fastapi import APIRouter, Response, WebSocket, WebSocketDisconnect

from fedbn.errors import UserError, unknown
from fedbn_simulations.service.demo.session import Playground, Session
from fedbn_simulations.service.schema import RequestError, parse_json

PAGE = Path(__file__).parent / "page"
FILES = {"app.js": "text/javascript", "charts.js": "text/javascript", "style.css": "text/css"}
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:",
    "cache-control": "no-cache",
    "x-content-type-options": "nosniff",
}

MAX_VISITORS = 8
"""Maximum number of simultaneous visitors."""

FRAME_INTERVAL = 0.1
"""Minimum seconds between two frames."""

MAX_FRAME_WINDOWS = 24
"""Maximum number of windows per frame. If the computation is too slow, so is the stream."""

MAX_ELEMENTS = 100
"""Maximum number of elements of a visitor's message."""

SPEEDS = (1.0, 100.0)
"""Minimum and maximum speed, relative to real time."""


def routes(playground: Playground) -> APIRouter:
    """Routes of the page."""
    router = APIRouter(include_in_schema=False)
    visitors: set[WebSocket] = set()

    @router.get("/")
    async def index() -> Response:
        return Response((PAGE / "index.html").read_bytes(), media_type="text/html", headers=HEADERS)

    @router.get("/page/{name}")
    async def file(name: str) -> Response:
        if name not in FILES:
            raise RequestError(404, f"no such file: {name!r}")
        return Response((PAGE / name).read_bytes(), media_type=FILES[name], headers=HEADERS)

    @router.websocket("/play")
    async def play(socket: WebSocket) -> None:
        await socket.accept()
        if len(visitors) >= MAX_VISITORS:
            await socket.close(1013, f"the limit of {MAX_VISITORS} visitors is reached: try again later")
            return
        visitors.add(socket)
        try:
            await Player(socket, playground).run()
        except WebSocketDisconnect:
            return
        finally:
            visitors.discard(socket)

    return router


class Player:
    """Streams a session to one visitor.

    Args:
        socket: accepted socket.
        playground: shared by all sessions.
    """

    def __init__(self, socket: WebSocket, playground: Playground) -> None:
        self.socket, self.playground = socket, playground
        self.compute = socket.app.state.service.batcher.call
        self.session: Session | None = None
        self.speed = 1.0
        self.playing: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Handle the visitor's messages until they disconnect."""
        await self._send("hello", self.playground.description())
        try:
            while True:
                text = await self.socket.receive_text()
                try:
                    await self._handle(parse_json(text.encode(), MAX_ELEMENTS))
                except UserError as error:
                    await self._send("error", {"text": str(error)})
        finally:
            await self._pause()

    async def _handle(self, message: dict[str, Any]) -> None:
        action = message.get("action")
        person = str(message.get("person"))
        if action == "open":
            await self._pause()
            order = str(message.get("order", "recorded"))
            self.session = await self.compute(lambda: Session(self.playground, person, order))
            await self._send("opened", {"person": person, "order": order})
            return
        if action == "preset":
            presets, name = self.playground.presets, str(message.get("name"))
            if name not in presets:
                raise unknown("preset", name, presets)
            await self._pause()
            preset = presets[name]
            self.session = await self.compute(lambda: Session(self.playground, preset.person, "short", preset.actions))
            await self._send("opened", {"person": preset.person, "order": "short", "preset": name})
            return
        if self.session is None:
            raise UserError("open a person's stream first")
        session = self.session
        if action == "play":
            self.speed = min(max(_number(message, "speed"), SPEEDS[0]), SPEEDS[1])
            if session.ended:
                session.position = 0
            if self.playing is None or self.playing.done():
                self.playing = asyncio.create_task(self._play(session))
        elif action == "pause":
            await self._pause()
        elif action == "step":
            await self._send("windows", await self.compute(lambda: session.step(1)))
        elif action == "switch":
            await self.compute(lambda: session.switch(person))
            await self._send("switched", {"person": session.person.name} | await self._layers(session))
        elif action == "rotate":
            degrees, given = _number(message, "degrees"), message.get("axis", [0, 0, 1])
            if not isinstance(given, list):
                raise UserError(f"'axis' must be a list of three numbers, not {given!r}")
            axis = [_number({"axis": value}, "axis") for value in given]
            await self.compute(lambda: session.rotate(degrees, axis))
            await self._send("rotated", {"degrees": degrees} | await self._layers(session))
        elif action == "record":
            label = int(_number(message, "class"))
            recorded = await self.compute(lambda: session.record(label))
            await self._send("recorded", recorded | await self._layers(session))
        else:
            raise UserError(f"unknown action {action!r}")

    async def _layers(self, session: Session) -> dict[str, Any]:
        return {"layers": await self.compute(session.positions)}

    async def _play(self, session: Session) -> None:
        due, last = 0.0, time.monotonic()
        while not session.ended:
            await asyncio.sleep(FRAME_INTERVAL)
            now = time.monotonic()
            due, last = min(due + (now - last) * self.speed / self.playground.hop, MAX_FRAME_WINDOWS), now
            if due >= 1:
                count = int(due)
                due -= count
                await self._send("windows", await self.compute(lambda n=count: session.step(n)))  # type: ignore[misc]
        await self._send("ended", {})

    async def _pause(self) -> None:
        if self.playing is not None:
            self.playing.cancel()
            with contextlib.suppress(asyncio.CancelledError, WebSocketDisconnect, RuntimeError):
                await self.playing
            self.playing = None

    async def _send(self, kind: str, content: dict[str, Any]) -> None:
        await self.socket.send_text(orjson.dumps({"kind": kind} | content).decode())


def _number(message: dict[str, Any], name: str) -> float:
    value = message.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{name!r} must be a number, not {value!r}")
    return float(value)
