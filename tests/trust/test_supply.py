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
LISTED = {"published.py", "checkpoints.py", "listed_pickle.py"}
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Calls that unpickle unless they are told not to, and what tells them.
LOADERS = {"torch.load": "weights_only=True", "numpy.load": "allow_pickle=False"}


def unpickling(source: str) -> set[str]:
    """What in a module could unpickle: names of modules and functions, under whatever alias."""
    tree = ast.parse(source)
    known, found = dict[str, str](), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                known[alias.asname or whole] = whole
                found.add(alias.name.partition(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    safe = set[int]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            text = ast.unparse(node)
            if LOADERS.get(whole_name(node.func, known), "\0") in text:
                safe.add(id(node.func))
            words = [x.value for x in node.args if isinstance(x, ast.Constant)]
            found |= {str(word).partition(".")[0] for word in words} & PICKLES  # import_module
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and id(node) not in safe:
            found.add(whole_name(node, known))
    pandas = {name for name in found if name.rpartition(".")[2] in ("read_pickle", "to_pickle")}
    return found & (PICKLES | set(LOADERS)) | pandas


def whole_name(node: ast.expr, known: dict[str, str]) -> str:
    """A dotted name with its module's own name in front."""
    first, dot, rest = ast.unparse(node).partition(".")
    return known.get(first, first) + dot + rest


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", {"pickle"}),
        ("import pickle as p", {"pickle"}),
        ("from pickle import loads", {"pickle"}),
        ("importlib.import_module('pickle')", {"pickle"}),
        ("__import__('dill').loads(x)", {"dill"}),
        ("import torch\ntorch.load(x)", {"torch.load"}),
        ("import torch as t\nt.load(x, weights_only=False)", {"torch.load"}),
        ("from torch import load\nload(x)", {"torch.load"}),
        ("from torch import load as read\nmap(read, x)", {"torch.load"}),
        ("import torch\ntorch.load(x, weights_only=True)", set()),
        ("import numpy as np\nnp.load(x)", {"numpy.load"}),
        ("import numpy as np\nnp.load(x, allow_pickle=False)", set()),
        ("import pandas as pd\npd.read_pickle(x)", {"pandas.read_pickle"}),
        ("from safetensors.torch import load\nload(x)", set()),
    ],
)
def test_the_reader_of_sources_finds(source: str, found: set[str]) -> None:
    assert unpickling(source) == found


def test_no_source_unpickles() -> None:
    """But for LISTED; no other way of unpickling is theirs either."""
    for folder in ("recgrela_ext", "python_examples"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            own = path.parent.name == "integrations" and path.name in LISTED
            assert not own or "def find_class" in text
            assert unpickling(text) <= ({"pickle"} if own else set()), path


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
