"""What is loaded is never a pickle."""

from __future__ import annotations

import ast
import pickle
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
