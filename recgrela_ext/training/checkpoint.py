"""Training checkpoints that are whole or not there, and hold no pickle.

    <folder>/step-0000001200/tensors.safetensors     weights, optimiser state, averages
    <folder>/step-0000001200/state.json              everything else, and the sha256 of both

A checkpoint is written beside its place, flushed to the disk and renamed, so a process killed at
any moment leaves the old ones or the new one. What a broken disk tears is found by the sums, and
the checkpoint before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from recgrela_ext.arguments import as_path
from recgrela_ext.errors import CheckpointError, check_regular, shown
from recgrela_ext.files import flush
from recgrela_ext.tensor_files import READ_OPTIONS, save_tensors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_FORMAT = "recgrela-training-checkpoint"
_VERSION = 1
_TENSORS, _STATE = "tensors.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """Contents of one checkpoint: CPU tensors by name, and a JSON state."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class CheckpointFolder:
    """The checkpoints of one run.

    Raises:
        CheckpointError: the folder cannot be made, or is a file.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = as_path(folder, "fit", "checkpoint_dir")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"fit: checkpoint_dir must be a folder that can be written, got {folder} ({error})"
            ) from None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other run may use the folder (on systems with flock).

        Raises:
            CheckpointError: another process is training into it.
        """
        if fcntl is None:
            yield
            return
        folder = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(folder)
            raise CheckpointError(
                f"fit: checkpoint_dir must not be in use, got {self.path}, into which another run "
                "is training"
            ) from None
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            os.close(folder)

    def steps(self) -> list[int]:
        """Steps of the checkpoints there, ascending."""
        names = (entry.name for entry in self.path.glob("step-*") if entry.is_dir())
        return sorted(int(name[5:]) for name in names if re.fullmatch("[0-9]+", name[5:]))

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        keep: Iterable[int] = (),
    ) -> Path:
        """Writes a checkpoint; the two newest and the steps in `keep` stay, the others go.

        Raises:
            CheckpointError: the disk refuses; what was there stays.
        """
        place = self._place(step)
        part, old = (self.path / f".{place.name}.{os.getpid()}{x}.part" for x in ("", ".old"))
        try:
            self._write(part, step, tensors, state)
            if place.exists():  # this step once more, after a restart from an earlier one
                os.replace(place, old)  # `_prune` removes it
            try:
                os.replace(part, place)
            except BaseException:
                if old.exists():
                    os.replace(old, place)
                raise
            flush(self.path)
        except (OSError, safetensors.SafetensorError) as error:
            shutil.rmtree(part, ignore_errors=True)
            raise CheckpointError(f"fit: {place} must be writable, got {error}") from None
        self._prune({step, *self.steps()[-2:], *keep})
        return place

    @staticmethod
    def _write(
        folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        save_tensors(folder / _TENSORS, tensors)
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "step": step,
            "tensors_sha256": _sha256_of_file(folder / _TENSORS),
            "state": dict(state),
        }
        content["sha256"] = _sha256_of_json(content)
        (folder / _STATE).write_text(json.dumps(content, indent=1), encoding="utf-8")
        for path in (folder / _TENSORS, folder / _STATE, folder):
            flush(path)

    def load(self, step: int) -> Checkpoint:
        """Reads one checkpoint; CheckpointError when it is missing, torn or of another version."""
        place = self._place(step)
        for path in (place / _STATE, place / _TENSORS):
            check_regular(path, CheckpointError)
        try:
            content = json.loads((place / _STATE).read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("format") != _FORMAT:
                raise CheckpointError(f"{place} must be a training checkpoint, got other JSON")
            if content.get("version") != _VERSION:
                raise CheckpointError(
                    f"{place} must have version {_VERSION}, got {shown(content.get('version'))}"
                )
            told = content.pop("sha256", None)
            whole = told == _sha256_of_json(content) and isinstance(content.get("state"), dict)
            tensors_told = content.get("tensors_sha256")
            whole = whole and tensors_told == _sha256_of_file(place / _TENSORS)
            if not whole:
                raise CheckpointError(f"{place} must be whole, got files that miss their checksum")
            loaded = safetensors.torch.load_file(place / _TENSORS, **READ_OPTIONS)
        except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{place} must be a whole checkpoint, got {error}") from None
        if not READ_OPTIONS:  # off the mapped file
            loaded = {name: tensor.clone() for name, tensor in loaded.items()}
        return Checkpoint(step, loaded, content["state"])

    def load_newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, a warning for each torn one; None when there is none at all.

        Raises:
            CheckpointError: there are checkpoints, and none is whole.
        """
        steps = self.steps()
        first: CheckpointError | None = None
        for step in reversed(steps):
            try:
                found = self.load(step)
            except CheckpointError as error:
                first = first or error
                continue
            if first is not None:
                warnings.warn(f"fit: {first}; going on from step {step}", stacklevel=2)
            return found
        if first is not None:
            raise CheckpointError(f"fit: {first}, and there is no earlier one to go on from")
        return None

    def clear(self) -> None:
        """Removes every checkpoint."""
        self._prune(set())

    def discard_after(self, step: int) -> None:
        """Removes torn checkpoints that are newer than the one a run goes on from."""
        self._prune({there for there in self.steps() if there <= step})

    def _place(self, step: int) -> Path:
        return self.path / f"step-{step:010d}"

    def _prune(self, kept: set[int]) -> None:
        for step in set(self.steps()) - kept:
            shutil.rmtree(self._place(step), ignore_errors=True)
        for left in self.path.glob(".step-*.part"):  # of a process killed while it wrote
            shutil.rmtree(left, ignore_errors=True)


def _sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sha256_of_json(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
