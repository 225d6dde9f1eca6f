"""The example service, in process: what it answers when its storage does not."""

from __future__ import annotations

import importlib.util
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recgrela_ext import RecGRELA, RecGRELAConfig

pytest.importorskip("fastapi", reason="needs fastapi")
pytest.importorskip("uvicorn", reason="needs uvicorn")
pytest.importorskip("httpx", reason="needs httpx")

pytestmark = pytest.mark.filterwarnings("ignore:Using `httpx` with")  # starlette
SERVICE = Path(__file__).resolve().parents[2] / "python_examples" / "service.py"


@pytest.fixture(scope="module")
def service() -> Any:
    spec = importlib.util.spec_from_file_location("recgrela_service_faults", SERVICE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model() -> RecGRELA:
    torch.manual_seed(0)
    return RecGRELA(RecGRELAConfig(num_items=50, num_layers=1)).eval()


def client_of(service: Any, model: RecGRELA, storage: Any) -> Any:
    from fastapi.testclient import TestClient

    return TestClient(service.create_app(model, storage), raise_server_exceptions=False)


def event(number: int, user: str) -> dict[str, Any]:
    return {"event_id": f"e{number}", "user": user, "item": 1 + number}


def test_an_event_id_of_another_user_is_told(service: Any, model: RecGRELA, tmp_path: Path) -> None:
    client = client_of(service, model, service.SQLiteStorage(str(tmp_path / "db")))
    assert client.post("/events", json=event(1, "anna")).json() == {"applied": True}
    assert client.post("/events", json=event(1, "anna")).json() == {"applied": False}
    answer = client.post("/events", json=event(1, "bert"))
    assert answer.status_code == 409
    assert "another user's" in answer.json()["detail"]
    assert client.get("/users/bert").json()["events"] == 0
    assert client.post("/events", json=event(2, "bert")).json() == {"applied": True}


def test_a_damaged_database_is_a_503(service: Any, model: RecGRELA, tmp_path: Path) -> None:
    path = tmp_path / "db"
    client = client_of(service, model, service.SQLiteStorage(str(path)))
    client.post("/events", json=event(1, "anna"))
    for file in tmp_path.iterdir():
        file.write_bytes(b"no database" * 1000)
    storage = service.SQLiteStorage.__new__(service.SQLiteStorage)
    storage.path, storage._local = str(path), service.threading.local()
    client = client_of(service, model, storage)
    for answer in (
        client.post("/events", json=event(2, "anna")),
        client.get("/users/anna"),
        client.get("/recommend", params={"user": "anna"}),
        client.get("/events/e1"),
    ):
        assert answer.status_code == 503
        assert "try again" in answer.json()["detail"]


@pytest.mark.parametrize("blob", [None, "text", 7, b"", b"short"])
def test_a_damaged_user_is_a_409(service: Any, model: RecGRELA, tmp_path: Path, blob: Any) -> None:
    path = tmp_path / "db"
    client = client_of(service, model, service.SQLiteStorage(str(path)))
    client.post("/events", json=event(1, "anna"))
    client.post("/events", json=event(2, "bert"))
    with sqlite3.connect(path) as db:
        db.execute("UPDATE users SET blob = ? WHERE user = 'anna'", (blob,))
    assert client.post("/events", json=event(3, "anna")).status_code == 409
    assert client.get("/users/anna").status_code == 409
    assert client.get("/users/bert").json()["events"] == 1
    assert client.get("/events/e3").json() == {"stored": False}


def test_a_redis_that_refuses_is_a_503(service: Any, model: RecGRELA) -> None:
    """With a stand-in for the client: a full disk and a replica are ResponseErrors."""
    redis = pytest.importorskip("redis", reason="needs redis")

    class Refusing:
        failures = service.RedisStorage("redis://127.0.0.1:1/0").failures

        def read(self, user: str) -> bytes | None:
            raise redis.ResponseError("MISCONF Redis is configured to save RDB snapshots")

        owner = read

    client = client_of(service, model, Refusing())
    assert client.get("/users/anna").status_code == 503
    assert client.get("/events/e1").status_code == 503
