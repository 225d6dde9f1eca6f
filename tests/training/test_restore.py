"""Checkpoints whose sums are right and whose contents are not what `fit` wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recgrela_ext import CheckpointError, RecGRELA, Sequences
from recgrela_ext.training import TrainConfig, fit
from recgrela_ext.training.checkpoint import CheckpointFolder

Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]


def position(**changes: Any) -> Change:
    return lambda state, tensors: state["position"].update(changes)


CHANGES: dict[str, Change] = {
    "no position": lambda state, tensors: state.pop("position"),
    "no identity": lambda state, tensors: state.pop("identity"),
    "identity is a list": lambda state, tensors: state.update(identity=[1]),
    "position is a list": lambda state, tensors: state.update(position=[1]),
    "another field": position(other=1),
    "text for a number": position(step="3"),
    "negative": position(epoch=-1),
    "beyond the epoch": position(step_in_epoch=10**6),
    "history is a number": position(history=3),
    "best step that is not there": position(best_step=77),
    "a tensor less": lambda state, tensors: tensors.pop(sorted(tensors)[0]),
    "a tensor of another shape": lambda state, tensors: tensors.update(
        {sorted(tensors)[0]: torch.zeros(1)}
    ),
    "an average of Adam's of another kind": lambda state, tensors: tensors.update(
        {name: t.to(torch.int32) for name, t in tensors.items() if "exp_avg/" in name}
    ),
    "a step of Adam's less": lambda state, tensors: tensors.pop(
        next(name for name in tensors if "/step/" in name)
    ),
    "a tensor more": lambda state, tensors: tensors.update(other=torch.ones(2)),
    "no tensors": lambda state, tensors: tensors.clear(),
}


@pytest.mark.filterwarnings("ignore:fit. the checkpoint was written with")
@pytest.mark.parametrize("what", CHANGES)
def test_refused_in_one_line(tmp_path: Path, what: str) -> None:
    train = Sequences.from_lists([[1, 2, 3, 4], [2, 3, 4, 5]] * 4)

    def go() -> Any:
        torch.manual_seed(0)
        model = RecGRELA.for_data(train, hidden_size=8, num_layers=1, num_heads=2)
        config = TrainConfig(targets_per_step=8)
        return fit(model, train, steps=6, config=config, checkpoint_dir=tmp_path, progress=False)

    go()
    folder = CheckpointFolder(tmp_path)
    found = folder.load_newest()
    assert found is not None
    state, tensors = dict(found.state), dict(found.tensors)
    CHANGES[what](state, tensors)
    folder.save(found.step, tensors, state)
    with pytest.raises(CheckpointError) as caught:
        go()
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:fit. the checkpoint was written with")
def test_whole_contents_go_on(tmp_path: Path) -> None:
    """The same way of saving, unchanged, is taken."""
    train = Sequences.from_lists([[1, 2, 3, 4], [2, 3, 4, 5]] * 4)
    model = RecGRELA.for_data(train, hidden_size=8, num_layers=1, num_heads=2)
    config = TrainConfig(targets_per_step=8)
    options: dict[str, Any] = {"config": config, "checkpoint_dir": tmp_path, "progress": False}
    fit(model, train, steps=6, **options)
    folder = CheckpointFolder(tmp_path)
    found = folder.load_newest()
    assert found is not None
    folder.save(found.step, found.tensors, found.state)
    assert fit(model, train, steps=6, resume=True, **options).steps == 6
