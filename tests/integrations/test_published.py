from __future__ import annotations

import enum
from pathlib import Path

import numpy as np
import pytest
import torch

from recgrela_ext.errors import CheckpointError
from recgrela_ext.integrations.published import published_state_dict, read_checkpoint

WEIGHTS = {"item_embedding.weight": torch.arange(6.0).reshape(3, 2), "bias": torch.ones(2)}


class Settings:
    """Stands for the configuration object that RecBole pickles into its checkpoints."""

    touched = False

    def __init__(self) -> None:
        self.values = {"device": torch.device("cpu"), "kind": Kind.FIRST, "model": Settings}

    def __setstate__(self, state: object) -> None:
        Settings.touched = True


class Kind(enum.Enum):
    FIRST = 1


def test_weights_of_a_recbole_checkpoint(tmp_path: Path) -> None:
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    checkpoint = {
        "config": Settings(),
        "epoch": 3,
        "state_dict": WEIGHTS,
        "other_parameter": None,
        "optimizer": optimizer.state_dict(),
    }
    torch.save(checkpoint, tmp_path / "model.pth", pickle_protocol=4)
    Settings.touched = False
    found = published_state_dict(tmp_path / "model.pth")
    assert list(found) == list(WEIGHTS)
    assert all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)
    assert not Settings.touched


def test_plain_state_dict(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "model.pth")
    assert torch.equal(published_state_dict(tmp_path / "model.pth")["bias"], torch.ones(2))


class Trap:
    """Would create a file on an ordinary unpickling."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_checkpoint_runs(tmp_path: Path, protocol: int, zipped: bool) -> None:
    path = tmp_path / "model.pth"
    torch.save(
        {"config": Trap(tmp_path / "ran"), "state_dict": WEIGHTS},
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    if zipped:
        assert torch.equal(published_state_dict(path)["bias"], torch.ones(2))
    else:  # the format before torch 1.6
        with pytest.raises(CheckpointError, match="not a zip file"):
            published_state_dict(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # so the trap works


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.load hands such an archive to torch.jit.load, which runs its __setstate__."""
    path = tmp_path / "model.pth"
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("loaded as code"))
    with pytest.raises(CheckpointError, match="must hold a state dict"):
        published_state_dict(path)


def test_dtypes_views_and_parameters(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    weights = {
        "view": base.t()[1:],
        "parameter": torch.nn.Parameter(base.bfloat16()),
        "count": torch.tensor(7),
        "mask": base > 5,
        "none": torch.empty(0, 3),
    }
    torch.save(weights, tmp_path / "model.pth")
    found = published_state_dict(tmp_path / "model.pth")
    for name, x in weights.items():
        assert found[name].dtype == x.dtype
        assert torch.equal(found[name], x)


def test_unusable_files_are_one_clear_line(tmp_path: Path) -> None:
    whole, torn, other = (tmp_path / name for name in ("whole.pth", "torn.pth", "other.pth"))
    torch.save(WEIGHTS, whole)
    torn.write_bytes(whole.read_bytes()[:300])
    torch.save({"state_dict": {"epoch": 3}}, other)
    text = tmp_path / "text.pth"
    text.write_text("no checkpoint", encoding="utf-8")
    for path in (tmp_path / "absent.pth", torn, other, text):
        with pytest.raises(CheckpointError, match="published_state_dict") as caught:
            published_state_dict(path)
        assert "\n" not in str(caught.value)
        assert path.name in str(caught.value)


@pytest.mark.parametrize("protocol", [2, 4])  # torch's and RecBole's
def test_everything_plain_is_read(tmp_path: Path, protocol: int) -> None:
    content = {
        "epoch": 3,
        "score": np.float64(0.25),
        "flag": np.bool_(True),
        "count": np.int64(-7),
        "config": Settings(),
        "optimizer": {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1}]},
    }
    torch.save(content, tmp_path / "model.pth", pickle_protocol=protocol)
    found = read_checkpoint(tmp_path / "model.pth")
    assert (found["epoch"], found["score"], found["flag"], found["count"]) == (3, 0.25, True, -7)
    assert found["optimizer"] == content["optimizer"]
    assert not isinstance(found["config"], Settings)
    torch.save({"what": np.array([object()])}, tmp_path / "array.pth")
    assert not isinstance(read_checkpoint(tmp_path / "array.pth")["what"], np.ndarray)


def test_a_small_file_makes_no_large_tensor(tmp_path: Path) -> None:
    """A stride of 0 would: four bytes, and a copy of terabytes once it is a weight."""
    torch.save({"item_embedding.weight": torch.ones(1, 1).expand(10**9, 64)}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="is larger than its storage"):
        published_state_dict(tmp_path / "m.pth")
