"""Pickles of others that set attributes of classes and functions, for good. Found by fuzzing."""

from __future__ import annotations

import enum
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from recgrela_ext import CheckpointError
from recgrela_ext.integrations import checkpoints, published
from recgrela_ext.integrations.distributed import load_checkpoint, save_checkpoint
from tests.fuzz.saved import small_model


def set_attribute(named: bytes, name: bytes, value: bytes) -> bytes:
    """Opcodes that give what is `named` an attribute, by the second part of a state."""
    sizes = len(name).to_bytes(4, "little")
    return b"\x80\x02" + named + b"N}X" + sizes + name + value + b"s\x86b."


@pytest.mark.parametrize(
    "named",
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch._utils\n_rebuild_parameter\n",
        b"cnumpy\ndtype\n",
        b"ccollections\nOrderedDict\n",
        b"cno.such\nthing\n",
    ],
)
def test_a_published_checkpoint_changes_nothing(tmp_path: Path, named: bytes) -> None:
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", set_attribute(named, b"__defaults__", b"K\x01\x85"))
    with pytest.raises(CheckpointError, match=r"cannot read .*: it sets attributes of a "):
        published.read_checkpoint(path)
    assert published._tensor.__defaults__ is None


@pytest.fixture
def run(tmp_path: Path) -> Path:
    model = small_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one process
        save_checkpoint(tmp_path, 7, model, torch.optim.SGD(model.parameters()))
    return tmp_path


@pytest.mark.parametrize(
    "named",
    [
        b"cpathlib\nPosixPath\n",
        b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n",
        b"ctorch\nfloat32\n",
        b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\nK\x00\x85R",  # a member
    ],
)
def test_a_distributed_checkpoint_changes_nothing(run: Path, named: bytes) -> None:
    (run / "step-000000007" / ".metadata").write_bytes(set_attribute(named, b"changed", b"K\x01"))
    with pytest.raises(CheckpointError, match="it sets attributes of a"):
        load_checkpoint(run, small_model(), None)
    changed = [kind for kind in checkpoints._CLASSES if hasattr(kind, "changed")]
    assert changed == []
    assert not hasattr(next(iter(checkpoints.meta._MEM_FORMAT_ENCODING)), "changed")
    assert not hasattr(Path, "changed")


def test_what_is_plain_still_comes_back(run: Path) -> None:
    assert load_checkpoint(run, small_model(), None) == 7


class ByAttribute(pickle.Pickler):
    """As Python 3.11.0 to 3.11.3 pickle members of enums."""

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, enum.Enum):
            return getattr, (type(thing), thing.name)
        return NotImplemented


def test_members_of_enums_pickled_by_attribute(run: Path) -> None:
    path = run / "step-000000007" / ".metadata"
    with path.open("rb") as file:
        content = pickle.load(file)  # our own
    with path.open("wb") as file:
        ByAttribute(file).dump(content)
    assert b"getattr" in path.read_bytes()
    assert load_checkpoint(run, small_model(), None) == 7


@pytest.mark.parametrize(
    "named",
    [
        b"ctorch.distributed.checkpoint.metadata\nMetadata\nX\x08\0\0\0__init__",
        b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\nX\x07\0\0\0__new__",
        b"ctorch\nfloat32\nX\x06\0\0\0is_cpu",
    ],
)
def test_attributes_are_not_taken(run: Path, named: bytes) -> None:
    taken = b"\x80\x02cbuiltins\ngetattr\n" + named + b"\x86R."
    (run / "step-000000007" / ".metadata").write_bytes(taken)
    with pytest.raises(CheckpointError, match="it takes attributes"):
        load_checkpoint(run, small_model(), None)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("config", "[]", "a configuration in JSON, got"),
        ("config", "x", "a configuration in JSON, got 'x'"),
        ("config", 5, "a configuration in JSON, got 5"),
        ("step", "x", "a number of steps, got 'x'"),
        ("step", float("inf"), "a number of steps, got inf"),
        ("step", -1, "a number of steps, got -1"),
    ],
)
def test_odd_facts_are_refused_before_a_weight_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, text: str
) -> None:
    model = small_model()
    plain = checkpoints.save

    def other(state: dict[str, Any], **options: Any) -> None:
        plain({**state, name: value}, **options)

    monkeypatch.setattr(checkpoints, "save", other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        save_checkpoint(tmp_path, 7, model, torch.optim.SGD(model.parameters()))
        mine = small_model()
        with torch.no_grad():
            mine.input_norm.weight.add_(1)
        before = {key: weight.clone() for key, weight in mine.state_dict().items()}
        with pytest.raises(CheckpointError, match=f"^load_checkpoint: .* must hold {text}"):
            load_checkpoint(tmp_path, mine, None)
    assert all(torch.equal(weight, before[key]) for key, weight in mine.state_dict().items())
