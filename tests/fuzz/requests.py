"""Requests to the example service, straight into the application: no socket, states in memory."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import quote_from_bytes

from tests.fuzz.draw import REFUSED, Draw, changed
from tests.fuzz.saved import small_model

SERVICE = Path(__file__).resolve().parents[2] / "python_examples" / "service.py"
ANSWERS = (200, 307, 400, 404, 405, 409, 422)  # and never a 500


class Memory:
    """The service's storage as two dicts, emptied before it grows."""

    failures: tuple[type[Exception], ...] = ()

    def __init__(self, is_recorded: Any) -> None:
        self.is_recorded = is_recorded
        self.blobs: dict[str, bytes] = {}
        self.events: dict[str, str] = {}

    def read(self, user: str) -> bytes | None:
        return self.blobs.get(user)

    def owner(self, event_id: str) -> str | None:
        return self.events.get(event_id)

    def apply(self, event_id: str, user: str, update: Any) -> bool:
        if self.is_recorded(event_id, self.owner(event_id), user):
            return False
        self.blobs[user] = update(self.blobs.get(user))
        self.events[event_id] = user
        return True


async def here(function: Any, *arguments: Any, **options: Any) -> Any:
    """In place of a pool of threads, which takes ten times as long as a request."""
    return function(*arguments)


class Requests:
    """Data: which request; then the edits of a good one, or its body, path and query."""

    def __init__(self, folder: Path) -> None:
        spec = importlib.util.spec_from_file_location("recgrela_example_service", SERVICE)
        assert spec is not None
        assert spec.loader is not None
        service = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = service  # where pydantic looks up what annotations name
        spec.loader.exec_module(service)
        self.storage = Memory(service.is_recorded)
        self.app = service.create_app(small_model(), self.storage)
        self.loop = asyncio.new_event_loop()

    def __call__(self, data: bytes) -> str:
        if len(self.storage.blobs) > 50 or len(self.storage.events) > 500:
            self.storage.blobs.clear()
            self.storage.events.clear()
        draw = Draw(data)
        method, path, query, body = "POST", "/events", b"", b""
        kind = draw.below(5)
        if kind < 3:
            event = {
                "event_id": f"e{draw.byte()}",
                "user": draw.one_of(["anna", "bert"]),
                "item": 1 + draw.below(11),
            }
            body = json.dumps(event if kind == 0 else changed(draw, event)).encode()
            body = draw.edited(body) if kind == 2 else body
        elif kind == 3:
            method, path = "GET", draw.one_of(["/recommend", "/users/anna", "/events/e1"])
            query = draw.one_of([b"user=anna&k=3", b"user=anna", b"user=bert&k=0"])
            query = draw.edited(query)
        else:
            method = draw.one_of(["GET", "POST", "PUT"])
            start = draw.one_of(["/users/", "/events/", "/recommend", "/"])
            path = start + draw.take(draw.below(12)).decode("utf-8", "replace")
            query, body = quote_from_bytes(draw.take(draw.below(12))).encode(), draw.rest()
        with mock.patch("anyio.to_thread.run_sync", here):
            status, answer = self.loop.run_until_complete(self.ask(method, path, query, body))
        assert status in ANSWERS, f"{method} {path} {query!r} {body!r}: {status}"
        json.loads(answer or b"null")
        return f"{method} /{path.split('/')[1]}" if status == 200 and kind < 4 else REFUSED

    async def ask(self, method: str, path: str, query: bytes, body: bytes) -> tuple[int, bytes]:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode("utf-8", "replace"),
            "query_string": query,
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        status, parts = 0, []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            parts.append(message.get("body", b""))

        await self.app(scope, receive, send)
        return status, b"".join(parts)
