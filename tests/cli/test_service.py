"""The example service: events applied once, and none lost when it is killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from recgrela_ext import RecGRELA, RecGRELAConfig

pytest.importorskip("fastapi", reason="needs fastapi")
pytest.importorskip("uvicorn", reason="needs uvicorn")
httpx = pytest.importorskip("httpx", reason="needs httpx")

ROOT = Path(__file__).resolve().parents[2]
WRITERS, USERS = 4, 3  # more writers than users: some share one


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    RecGRELA(RecGRELAConfig(num_items=50, num_layers=2)).save_pretrained(tmp_path / "model")
    return tmp_path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


class Service:
    """The service in a process of its own."""

    def __init__(self, folder: Path, *storage: str) -> None:
        self.port = free_port()
        command = [sys.executable, str(ROOT / "python_examples/service.py"), "--port"]
        command += [str(self.port), "--model", str(folder / "model"), *storage]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, env=environment)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)
        for _ in range(600):
            assert self.process.poll() is None, "the service ended"
            try:
                self.client.get("/users/nobody")
                return
            except httpx.TransportError:
                time.sleep(0.2)
        raise AssertionError("the service did not start")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.client.close()

    def send(self, event_id: str, user: str, item: int) -> bool:
        event = {"event_id": event_id, "user": user, "item": item}
        answer = self.client.post("/events", json=event)
        assert answer.status_code == 200, answer.text
        applied: bool = answer.json()["applied"]
        return applied


@contextmanager
def running(folder: Path, *storage: str) -> Iterator[Service]:
    service = Service(folder, *storage)
    try:
        yield service
    finally:
        service.kill()


class Load:
    """Writers that send events until the service dies; what they sent and what was acknowledged."""

    def __init__(self, name: str, service: Service) -> None:
        self.sent: list[tuple[str, str, int]] = []
        self.acknowledged: set[str] = set()
        self.errors: list[str] = []
        self.threads = [
            threading.Thread(target=self.write, args=(f"{name}-{w}", w, service))
            for w in range(WRITERS)
        ]
        for thread in self.threads:
            thread.start()

    def write(self, name: str, writer: int, service: Service) -> None:
        user = f"user{writer % USERS}"
        for number in range(100_000):
            event = (f"{name}-{number}", user, 1 + (7 * number + writer) % 50)
            self.sent.append(event)
            try:
                applied = service.send(*event)
            except (httpx.TransportError, RuntimeError):
                return  # killed
            except AssertionError as error:
                self.errors.append(str(error))
                return
            if not applied:
                self.errors.append(f"{event[0]} was new, and not applied")
            self.acknowledged.add(event[0])

    def join(self) -> None:
        for thread in self.threads:
            thread.join()
        assert self.errors == []


def crash(folder: Path, kills: int, *storage: str) -> None:
    """Kill under load; after each restart everything acknowledged is there, and sending all again
    applies what was lost and nothing twice."""
    events: dict[str, int] = {f"user{u}": 0 for u in range(USERS)}
    for kill in range(kills):
        service = Service(folder, *storage)
        load = Load(f"run{kill}", service)
        while len(load.acknowledged) < 20:
            assert service.process.poll() is None
            time.sleep(0.01)
        time.sleep(0.05 * (kill % 3))
        service.kill()
        load.join()
        with running(folder, *storage) as again:
            for event_id in load.acknowledged:
                assert again.client.get(f"/events/{event_id}").json() == {"stored": True}
            for event in load.sent:
                applied = again.send(*event)
                assert not (applied and event[0] in load.acknowledged)
                assert not again.send(*event)
                events[event[1]] += 1
            for user, count in events.items():
                assert again.client.get(f"/users/{user}").json()["events"] == count


def test_one_kill(folder: Path) -> None:
    crash(folder, 1, "--database", str(folder / "states.sqlite"))


@pytest.mark.slow
def test_ten_kills(folder: Path) -> None:
    crash(folder, 10, "--database", str(folder / "states.sqlite"))


def follow(folder: Path, *storage: str) -> None:
    """One user's events give the list the model gives, and bad requests change nothing."""
    items = [3, 9, 3, 27, 41, 8]
    with running(folder, *storage) as service:
        for number, item in enumerate(items):
            assert service.send(f"e{number}", "anna", item)
        assert not service.send("e0", "anna", 12)
        for item in (0, 51, -1, "7", True):
            event = {"event_id": "bad", "user": "anna", "item": item}
            assert service.client.post("/events", json=event).status_code == 422
        told = service.client.get("/users/anna").json()
        assert (told["events"], told["items"]) == (6, 5)
        best = service.client.get("/recommend", params={"user": "anna", "k": 50}).json()
        assert service.client.get("/recommend", params={"user": "bert"}).status_code == 404
    model = RecGRELA.from_pretrained(folder / "model")
    want = model.recommend(torch.tensor([items]), k=45)
    assert sorted(best["items"]) == sorted(want.items[0].tolist())
    assert all(type(item) is int for item in best["items"])
    scores = dict(zip(best["items"], best["scores"], strict=True))
    largest = float(want.scores.abs().max())
    for item, score in zip(want.items[0].tolist(), want.scores[0].tolist(), strict=True):
        assert abs(scores[item] - score) <= 0.03 * largest


def test_lists_and_refusals(folder: Path) -> None:
    follow(folder, "--database", str(folder / "states.sqlite"))


class Redis:
    """A Redis server that keeps what it has acknowledged."""

    def __init__(self, program: str, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.command = [program, "--port", str(self.port), "--dir", str(folder)]
        self.command += ["--appendonly", "yes", "--appendfsync", "always"]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        for _ in range(100):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise AssertionError("Redis did not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    pytest.importorskip("redis", reason="needs the Redis client")
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("needs redis-server on the PATH")
    server = Redis(program, tmp_path)
    try:
        yield server
    finally:
        server.kill()


def test_redis(folder: Path, redis: Redis) -> None:
    follow(folder, "--redis", redis.url)
    crash(folder, 1, "--redis", redis.url)


def test_redis_gone_and_back(folder: Path, redis: Redis) -> None:
    """Meanwhile every answer says so; then the service goes on with all that was acknowledged."""
    with running(folder, "--redis", redis.url) as service:
        for number in range(5):
            assert service.send(f"e{number}", "anna", 1 + number)
        redis.kill()
        event = {"event_id": "e5", "user": "anna", "item": 6}
        for answer in (
            service.client.post("/events", json=event),
            service.client.get("/users/anna"),
            service.client.get("/recommend", params={"user": "anna"}),
        ):
            assert answer.status_code == 503
            assert "try again" in answer.json()["detail"]
        redis.start()
        assert service.send("e5", "anna", 6)
        assert not service.send("e4", "anna", 5)
        assert service.client.get("/users/anna").json()["events"] == 6


def test_a_state_of_another_model_is_refused(folder: Path) -> None:
    storage = ("--database", str(folder / "states.sqlite"))
    with running(folder, *storage) as service:
        assert service.send("e0", "anna", 3)
    torch.manual_seed(1)
    RecGRELA(RecGRELAConfig(num_items=50, num_layers=2)).save_pretrained(folder / "model")
    with running(folder, *storage) as service:
        event = {"event_id": "e1", "user": "anna", "item": 4}
        assert service.client.post("/events", json=event).status_code == 409
        assert service.client.get("/events/e1").json() == {"stored": False}
        assert service.send("e2", "bert", 4)
