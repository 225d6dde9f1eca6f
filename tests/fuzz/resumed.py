"""Trainings that go on from a checkpoint with right sums and other contents."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from recgrela_ext import CheckpointError, RecGRELA, Sequences
from recgrela_ext.training import TrainConfig, fit
from recgrela_ext.training.checkpoint import CheckpointFolder
from tests.fuzz.draw import REFUSED, Draw, changed, one_line
from tests.fuzz.saved import edited_tensors

LAST = 2  # steps of the run; the checkpoint is of the first


class Resumes:
    """Data: whether the state or a tensor is changed, then how."""

    def __init__(self, folder: Path) -> None:
        self.place = folder / "run"
        self.train = Sequences.from_lists([[1, 2, 3, 4, 5], [2, 3, 4, 5, 1]] * 2)
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"hidden_size": 8, "num_layers": 1, "num_heads": 2}
        self.model = RecGRELA.for_data(self.train, max_seq_len=5, **sizes)
        self.first = {name: t.clone() for name, t in self.model.state_dict().items()}
        self.go()
        self.folder = CheckpointFolder(self.place)
        found = self.folder.load(1)
        self.state, self.tensors = found.state, found.tensors

    def go(self) -> Any:
        self.model.load_state_dict(self.first)
        config = TrainConfig(targets_per_step=4, checkpoint_every_steps=1, log_every=1)
        return fit(self.model, self.train, steps=LAST, config=config, checkpoint_dir=self.place,
                   progress=False)  # fmt: skip

    def __call__(self, data: bytes) -> str:
        draw = Draw(data)
        state, tensors = self.state, self.tensors
        if draw.below(3):
            state = changed(draw, state)
        else:
            tensors = edited_tensors(draw, tensors)
        shutil.rmtree(self.place)
        self.place.mkdir()
        try:
            if isinstance(state, dict):
                self.folder.save(1, tensors, state)
        except (ValueError, TypeError, RecursionError):  # what JSON cannot hold
            return REFUSED
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # other threads, a torn checkpoint
                done = self.go()
        except CheckpointError as error:
            one_line(error)
            return REFUSED
        except ValueError as error:
            one_line(error)
            if str(error).startswith("fit: loss must be finite"):  # as the weights are not
                return REFUSED
            raise
        assert done.steps >= LAST
        return "went on"
