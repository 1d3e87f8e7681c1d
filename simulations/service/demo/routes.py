"""The page's files, and the socket by which it is played."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import orjson
from fastapi import APIRouter, Response, WebSocket, WebSocketDisconnect

from fedbn.errors import UserError
from simulations.service.demo.session import Playground, Session
from simulations.service.schema import Refusal, parsed

PAGE = Path(__file__).parent / "page"
FILES = {"app.js": "text/javascript", "charts.js": "text/javascript", "style.css": "text/css"}
SAFE = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:",
    "cache-control": "no-cache",
    "x-content-type-options": "nosniff",
}

VISITORS = 8
"""At once."""

FRAME = 0.1
"""Seconds between two frames at least."""

MOST = 24
"""Windows a frame; where computing them takes longer than it should, the stream is slower than asked for."""

SPEEDS = (1.0, 100.0)


def routes(playground: Playground) -> APIRouter:
    """Routes of the page."""
    router = APIRouter(include_in_schema=False)
    visitors: set[WebSocket] = set()

    @router.get("/")
    async def index() -> Response:
        return Response((PAGE / "index.html").read_bytes(), media_type="text/html", headers=SAFE)

    @router.get("/page/{name}")
    async def file(name: str) -> Response:
        if name not in FILES:
            raise Refusal(404, "there is no such file")
        return Response((PAGE / name).read_bytes(), media_type=FILES[name], headers=SAFE)

    @router.websocket("/play")
    async def play(socket: WebSocket) -> None:
        await socket.accept()
        if len(visitors) >= VISITORS:
            await socket.close(1013, f"{VISITORS} visitors are here already: try again later")
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
    """Plays a session to one visitor.

    Args:
        socket: accepted.
        playground: what is shared.
    """

    def __init__(self, socket: WebSocket, playground: Playground) -> None:
        self.socket, self.playground = socket, playground
        self.compute = socket.app.state.service.batcher.call
        self.session: Session | None = None
        self.speed = 1.0
        self.playing: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Do what the visitor asks until they go."""
        await self._send("hello", self.playground.about())
        try:
            while True:
                text = await self.socket.receive_text()
                try:
                    await self._do(parsed(text.encode()))
                except UserError as error:
                    await self._send("error", {"text": str(error)})
        finally:
            await self._pause()

    async def _do(self, asked: dict[str, Any]) -> None:
        what = asked.get("do")
        if what == "open":
            await self._pause()
            self.session = await self.compute(lambda: Session(self.playground, str(asked.get("person"))))
            await self._send("opened", {"person": str(asked.get("person"))})
            return
        if self.session is None:
            raise UserError("open somebody's stream first")
        session = self.session
        if what == "play":
            self.speed = min(max(_number(asked, "speed"), SPEEDS[0]), SPEEDS[1])
            if session.ended:
                session.at = 0
            if self.playing is None or self.playing.done():
                self.playing = asyncio.create_task(self._play(session))
        elif what == "pause":
            await self._pause()
        elif what == "step":
            await self._send("windows", await self.compute(lambda: session.step(1)))
        elif what == "switch":
            await self.compute(lambda: session.switch(str(asked.get("person"))))
            await self._send("switched", {"person": session.person.name} | await self._layers(session))
        elif what == "rotate":
            degrees = _number(asked, "degrees")
            await self.compute(lambda: session.rotate(degrees))
            await self._send("rotated", {"degrees": degrees} | await self._layers(session))
        elif what == "record":
            label = int(_number(asked, "class"))
            recorded = await self.compute(lambda: session.record(label))
            await self._send("recorded", recorded | await self._layers(session))
        else:
            raise UserError(f"nothing is known of {what!r}")

    async def _layers(self, session: Session) -> dict[str, Any]:
        return {"layers": await self.compute(session.positions)}

    async def _play(self, session: Session) -> None:
        owed, last = 0.0, time.monotonic()
        while not session.ended:
            await asyncio.sleep(FRAME)
            now = time.monotonic()
            owed, last = min(owed + (now - last) * self.speed / self.playground.hop, MOST), now
            if owed >= 1:
                count = int(owed)
                owed -= count
                await self._send("windows", await self.compute(lambda n=count: session.step(n)))  # type: ignore[misc]
        await self._send("ended", {})

    async def _pause(self) -> None:
        if self.playing is not None:
            self.playing.cancel()
            with contextlib.suppress(asyncio.CancelledError, WebSocketDisconnect, RuntimeError):
                await self.playing
            self.playing = None

    async def _send(self, kind: str, about: dict[str, Any]) -> None:
        await self.socket.send_text(orjson.dumps({"kind": kind} | about).decode())


def _number(asked: dict[str, Any], name: str) -> float:
    value = asked.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{name!r} must be a number, not {value!r}")
    return float(value)
