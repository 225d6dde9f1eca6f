"""A recommendation service that follows events: FastAPI, a small state per user in SQLite or Redis.

    pip install fastapi uvicorn redis         # redis for the second backend alone
    python python_examples/service.py --model my-model --database states.sqlite
    python python_examples/service.py --model my-model --redis redis://localhost:6379

    curl -X POST localhost:8000/events -H 'content-type: application/json' \\
        -d '{"event_id": "a1", "user": "42", "item": 17}'
    curl 'localhost:8000/recommend?user=42&k=5'

An event carries an id and is applied once, however often it is sent. Its id, the state after it and
the seen items are stored in one transaction, and the answer goes out afterwards: what was
acknowledged is there after a crash, what was not can be sent again. Writers of one user wait for
each other (SQLite) or try again (Redis, which several machines can share; for the same promise it
must run with `appendonly yes` and `appendfsync always`). Events that fail to apply store nothing.
While the storage cannot be reached the answer is 503: send the event again, its id makes that safe.

States rest in float32, because here every event stores one and smaller formats would be rounded
each time. Lists come from an int8 copy of the item table, a quarter of the bytes to read, and not
from micro-batches: a single event needs no partner to be fast, and nobody waits for one. Items are
rows of the model's item table; `model.id_map` translates them.
"""

from __future__ import annotations

import argparse
import contextlib
import sqlite3
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, StrictInt

from recgrela_ext import ItemTable, RecGRELA, SeenItems, StateError, UserState

Update = Callable[[bytes | None], bytes]


class Storage(Protocol):
    """Blobs by user, and the ids of the events that are in them."""

    failures: tuple[type[Exception], ...]  # what its functions raise while it cannot be reached

    def read(self, user: str) -> bytes | None: ...

    def owner(self, event_id: str) -> str | None:
        """Whose event this is; None where it was not recorded."""
        ...

    def apply(self, event_id: str, user: str, update: Update) -> bool:
        """Replace the user's blob by update(blob) and record the event, both or neither; False and
        no change where the user's event was recorded before, TakenError where another user's was.
        Durable when it returns."""
        ...


class TakenError(ValueError):
    """An event id that is another user's."""


def is_recorded(event_id: str, owner: str | None, user: str) -> bool:
    """Whether it is this user's; TakenError where it is another's, whose event it would hide."""
    if owner not in (None, user):
        raise TakenError(f"event_id must be new, got {event_id!r}, which is another user's")
    return owner is not None


class SQLiteStorage:
    """One file; any number of threads and processes of one machine."""

    failures: tuple[type[Exception], ...] = (sqlite3.Error,)  # locked, disk full, damaged

    def __init__(self, path: str) -> None:
        self.path = path
        self._local = threading.local()
        with contextlib.closing(self._open()) as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("CREATE TABLE IF NOT EXISTS users (user TEXT PRIMARY KEY, blob BLOB)")
            db.execute("CREATE TABLE IF NOT EXISTS events (id TEXT PRIMARY KEY, user TEXT)")

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        db.execute("PRAGMA synchronous=FULL")  # a commit is on the disk
        return db

    @property
    def db(self) -> sqlite3.Connection:
        """This thread's connection."""
        if not hasattr(self._local, "db"):
            self._local.db = self._open()
        found: sqlite3.Connection = self._local.db
        return found

    def read(self, user: str) -> bytes | None:
        row = self.db.execute("SELECT blob FROM users WHERE user = ?", (user,)).fetchone()
        if row is not None and not isinstance(row[0], bytes):
            raise StateError(f"the state of {user!r} must be bytes, got {type(row[0]).__name__}")
        return None if row is None else row[0]

    def owner(self, event_id: str) -> str | None:
        row = self.db.execute("SELECT user FROM events WHERE id = ?", (event_id,)).fetchone()
        return None if row is None else str(row[0])

    def apply(self, event_id: str, user: str, update: Update) -> bool:
        db = self.db
        db.execute("BEGIN IMMEDIATE")  # other writers wait from here on
        try:
            new = not is_recorded(event_id, self.owner(event_id), user)
            if new:
                blob = update(self.read(user))
                db.execute("INSERT INTO events VALUES (?, ?)", (event_id, user))
                db.execute("INSERT OR REPLACE INTO users VALUES (?, ?)", (user, blob))
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:  # a full disk has ended it
                db.execute("ROLLBACK")
            raise
        return new


class RedisStorage:
    """One server for any number of machines; a user's writers try again when they collide."""

    def __init__(self, url: str) -> None:
        import redis

        self.failures: tuple[type[Exception], ...] = (redis.RedisError,)
        self.client: Any = redis.Redis.from_url(url, socket_timeout=10, socket_connect_timeout=2)
        self.collision = redis.WatchError

    def read(self, user: str) -> bytes | None:
        blob: bytes | None = self.client.get(f"user:{user}")
        return blob

    def owner(self, event_id: str) -> str | None:
        found = self.client.get(f"event:{event_id}")
        return None if found is None else found.decode()

    def apply(self, event_id: str, user: str, update: Update) -> bool:
        while True:
            with self.client.pipeline() as pipe:
                try:
                    pipe.watch(f"user:{user}", f"event:{event_id}")
                    owner = pipe.get(f"event:{event_id}")
                    if is_recorded(event_id, None if owner is None else owner.decode(), user):
                        return False
                    blob = update(pipe.get(f"user:{user}"))
                    pipe.multi()
                    pipe.set(f"user:{user}", blob)
                    pipe.set(f"event:{event_id}", user)
                    pipe.execute()
                    return True
                except self.collision:
                    continue


class Event(BaseModel):
    event_id: str = Field(min_length=1, max_length=200)
    user: str = Field(min_length=1, max_length=200)
    item: StrictInt


def create_app(model: RecGRELA, storage: Storage) -> FastAPI:
    """The service; its functions run in a pool of threads."""
    app = FastAPI(title="recgrela_ext")
    model = model.eval()
    table = ItemTable(model, "int8")
    padding = model.config.padding_idx

    def user_of(blob: bytes | None) -> tuple[UserState, SeenItems]:
        if blob is None:
            return model.init_state(1), SeenItems(1)
        return UserState.from_bytes(blob, model), SeenItems.from_bytes(blob)

    @app.exception_handler(RequestValidationError)
    def refused(request: Request, error: RequestValidationError) -> JSONResponse:
        # Not FastAPI's own answer: it repeats the input, and has no way to write NaN.
        mistakes = [{"loc": one["loc"], "msg": one["msg"]} for one in error.errors()]
        return JSONResponse({"detail": mistakes}, 422)

    def unreachable(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": f"storage cannot be reached, try again: {error}"}, 503)

    for failure in storage.failures:
        app.add_exception_handler(failure, unreachable)

    @app.exception_handler(StateError)
    def foreign(request: Request, error: StateError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 409)  # the user must be rebuilt

    @app.exception_handler(TakenError)
    def taken(request: Request, error: TakenError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 409)

    @app.post("/events")
    def event(event: Event) -> dict[str, bool]:
        if event.item == padding or not 0 <= event.item < model.config.n_items:
            raise HTTPException(422, f"item must be a row of the item table, got {event.item}")

        def update(blob: bytes | None) -> bytes:
            state, seen = user_of(blob)
            item = torch.tensor([event.item])
            model.step(item, state)
            seen.add(item, padding)
            return state.to_bytes(0, seen=seen)

        return {"applied": storage.apply(event.event_id, event.user, update)}

    @app.get("/events/{event_id:path}")
    def stored(event_id: str) -> dict[str, bool]:
        return {"stored": storage.owner(event_id) is not None}

    @app.get("/users/{user:path}")
    def user(user: str) -> dict[str, int]:
        blob = storage.read(user)
        state, seen = user_of(blob)
        size = 0 if blob is None else len(blob)
        return {"events": int(state.position[0]), "items": len(seen.recent(0)), "bytes": size}

    @app.get("/recommend")
    def recommend(user: str, k: int = 10) -> dict[str, list[int] | list[float]]:
        if not 1 <= k <= 1000:
            raise HTTPException(422, f"k must lie in 1..1000, got {k}")
        blob = storage.read(user)
        if blob is None:
            raise HTTPException(404, f"user must have events, got {user} with none")
        state, seen = user_of(blob)
        best = model.recommend_from_state(state, k, seen, table=table)
        some = best.items[0] != padding
        return {"items": best.items[0][some].tolist(), "scores": best.scores[0][some].tolist()}

    return app


def main() -> None:
    """Read the options and serve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder of save_pretrained")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--database", help="SQLite file, made if it is not there")
    where.add_argument("--redis", help="URL of a Redis server")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    model = RecGRELA.from_pretrained(options.model)
    torch.set_num_threads(1)  # requests share the processor
    storage: Storage
    storage = RedisStorage(options.redis) if options.redis else SQLiteStorage(options.database)
    uvicorn.run(create_app(model, storage), host=options.host, port=options.port, log_level="error")


if __name__ == "__main__":
    main()
