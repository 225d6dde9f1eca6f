"""What is loaded is never a pickle; what CI installs is known by its hash."""

from __future__ import annotations

import ast
import importlib.metadata
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recgrela_ext import RecGRELA, SeenItems, UserState, UserStateStore
from recgrela_ext.training.checkpoint import CheckpointFolder
from tests.fuzz.saved import small_model

ROOT = Path(__file__).resolve().parents[2]
# Pickles of other projects' formats, read by unpicklers with a list of what they may make.
LISTED = {"published.py", "checkpoints.py"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def calls_of(path: Path) -> list[tuple[str, ast.AST]]:
    """Names of imported modules, and dotted names of calls."""
    found: list[tuple[str, ast.AST]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name.partition(".")[0], node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module.partition(".")[0], node))
        elif isinstance(node, ast.Call):
            found.append((ast.unparse(node.func), node))
    return found


def test_no_source_unpickles() -> None:
    """But for LISTED; no other way of unpickling is theirs either."""
    for folder in ("recgrela_ext", "python_examples"):
        for path in (ROOT / folder).rglob("*.py"):
            own = path.parent.name == "integrations" and path.name in LISTED
            assert not own or "def find_class" in path.read_text(encoding="utf-8")
            others = PICKLES - {"pickle"} if own else PICKLES
            for name, node in calls_of(path):
                assert name not in others, f"{path}:{node.lineno}"  # type: ignore[attr-defined]
                if name in ("torch.load", "np.load", "numpy.load"):
                    text = ast.unparse(node)
                    safe = "weights_only=True" in text or "allow_pickle=False" in text
                    assert safe, f"{path}: {text}"


def test_loading_reaches_no_unpickler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    model.save_pretrained(tmp_path / "model")
    store = UserStateStore(model, 3)
    store.step([1], torch.tensor([2]))
    store.save(tmp_path / "users")
    folder = CheckpointFolder(tmp_path / "run")
    folder.save(1, {"a": torch.ones(2)}, {})
    blob = model.init_state(1).to_bytes(0, seen=SeenItems(1))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("something is unpickled")

    RecGRELA.from_pretrained(tmp_path / "model")  # torch imports more of itself at the first call
    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(np, "load", refuse)
    RecGRELA.from_pretrained(tmp_path / "model")
    UserStateStore.load(tmp_path / "users", model)
    assert folder.load_newest() is not None
    UserState.from_bytes(blob, model)
    SeenItems.from_bytes(blob)


def required(*extras: str) -> set[str]:
    """Names that the package and some of its extras ask for, without torch; in normal form."""
    names: set[str] = set()
    todo = ["recgrela-ext[" + ",".join(extras) + "]"]
    while todo:
        name, inner = re.fullmatch(r"([\w.-]+)(?:\[([\w,-]+)\])?.*", todo.pop()).groups()  # type: ignore[union-attr]
        if name != "recgrela-ext":
            names.add(re.sub(r"[-_.]+", "-", name).lower())
            continue
        asked = importlib.metadata.requires("recgrela-ext") or []
        for line in asked:
            text, _, marker = line.partition(";")
            extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
            if extra is None or extra[1] in (inner or "").split(","):
                todo.append(text.strip())
    return names - {"torch"}


@pytest.mark.parametrize(("file", "extras"), [("requirements.txt", ("dev", "service"))])
def test_ci_installs_what_it_knows(file: str, extras: tuple[str, ...]) -> None:
    """`make pins` after a change of pyproject.toml."""
    path = ROOT / ".ci" / file
    if not path.exists():
        pytest.skip("no checkout: .ci is not in the source archive")
    pinned: set[str] = set()
    for entry in path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        name, _, rest = entry.partition("==")
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", rest), entry
        pinned.add(name)
    assert required(*extras) <= pinned


def test_required_names() -> None:
    """The reader of the metadata reads."""
    assert {"numpy", "pytest", "pandas", "ruff", "fastapi"} <= required("dev", "service")
    assert "fastapi" not in required("dev")
