"""How a log was read, filtered and split: done for training, recorded, repeated afterwards."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recgrela_ext.data import IdMap, Interactions, Sequences, Targets
from recgrela_ext.data.download import DATASETS
from recgrela_ext.errors import CheckpointError, DataError, check_regular, shown
from recgrela_ext.files import write_files

if TYPE_CHECKING:
    from recgrela_ext import RecGRELA
    from recgrela_ext.data.interactions import Split

RECORD_FILE = "data.json"
_MODEL_FILES = ("config.json", "model.safetensors", "id_map.json", RECORD_FILE)
_FORMAT, _VERSION = "recgrela-data", 1
_CHOICES = {"split": ["loo", "time"], "time_targets": ["all", "first", "last"]}
_FILTERS = ("k_core", "min_user", "max_user", "min_item", "max_item")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


# What may stand in a field, by its annotation.
_KINDS: dict[str, Callable[[Any], bool]] = {
    "str": _is_text,
    "str | None": lambda value: value is None or _is_text(value),
    "int": _is_number,
    "int | None": lambda value: value is None or _is_number(value),
    "list[int] | None": lambda value: (
        value is None
        or (isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)))
    ),
    "dict[str, str]": lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
    "dict[str, list[str]]": lambda value: (
        isinstance(value, dict) and all(map(_is_texts, value.values()))
    ),
}


@dataclasses.dataclass(frozen=True)
class Reading:
    """The options of ``recgrela train`` that decide what the model sees, and what came of them.

    Args:
        data: path, or name of a data set.
        format, user, item, time, keep, order, order_seed: as in ``Interactions.from_file``.
        k_core, min_user, max_user, min_item, max_item: as in ``Interactions.filter``.
        split: "loo" or "time"; time_targets: as in ``Interactions.split_by_time``.
        seed: of the training, to be named in results.
        target_sha256: split -> checksum of its targets; empty until the data was split.
    """

    data: str
    format: str = "auto"
    user: str | None = None
    item: str | None = None
    time: str | None = None
    keep: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    order: str = "hash"
    order_seed: int = 0
    k_core: list[int] | None = None
    min_user: int = 1
    max_user: int | None = None
    min_item: int = 1
    max_item: int | None = None
    split: str = "loo"
    time_targets: str = "all"
    seed: int = 0
    target_sha256: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Reading:
        keep: dict[str, list[str]] = {}
        for condition in options.keep:
            column, equals, value = condition.partition("=")
            if not equals:
                raise DataError(f"train: --keep must read COLUMN=VALUE, got {condition!r}")
            keep.setdefault(column, []).append(value)
        names = [field.name for field in dataclasses.fields(cls)]
        given = {name: getattr(options, name) for name in names if hasattr(options, name)}
        where = given["data"]
        if os.path.exists(where):
            where = os.path.abspath(where)
        return cls(**{**given, "keep": keep, "data": where})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Reading:
        """What :meth:`save` wrote; CheckpointError when it is missing or something else."""
        path = Path(folder) / RECORD_FILE
        check_regular(path, CheckpointError)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(
                f"{folder} must be a folder that `recgrela train` wrote, got no {RECORD_FILE} "
                f"({error.strerror})"
            ) from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} must be JSON, got {error}") from None
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise CheckpointError(f"{path} must record how data was read, got other JSON")
        version = content.pop("version", None)
        if version != _VERSION:
            raise CheckpointError(f"{path} must have version {_VERSION}, got {shown(version)}")
        try:
            reading = cls(**content["reading"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path} must hold known fields, got {error}") from None
        for field in dataclasses.fields(cls):
            value = getattr(reading, field.name)
            if not _KINDS[str(field.type)](value) or value not in _CHOICES.get(field.name, [value]):
                raise CheckpointError(
                    f"{path}: {field.name} must be {field.type}, as `recgrela train` wrote it, "
                    f"got {shown(value)}"
                )
        return reading

    def save(self, folder: str | os.PathLike[str]) -> None:
        content = {"format": _FORMAT, "version": _VERSION, "reading": dataclasses.asdict(self)}
        write_files({Path(folder) / RECORD_FILE: json.dumps(content, indent=2) + "\n"})

    def at(self, data: str | None) -> Reading:
        """The same reading of another file; of this one with None."""
        return self if data is None else dataclasses.replace(self, data=data)

    def interactions(self, progress: bool | None = None) -> Interactions:
        """The log as it is in the file."""
        options: dict[str, Any] = {
            "format": self.format,
            "user": self.user,
            "item": self.item,
            "time": self.time,
            "order": self.order,
            "seed": self.order_seed,
            "keep": self.keep or None,
            "progress": progress,
        }
        if self.data in DATASETS and not os.path.exists(self.data):
            return Interactions.from_dataset(self.data, **options)
        return Interactions.from_file(self.data, **options)

    def splits(self, progress: bool | None = None) -> Split:
        """Training part, validation and test targets of the filtered log."""
        log = self.interactions(progress)
        bounds = {name: getattr(self, name) for name in _FILTERS}
        if self.k_core is not None:
            bounds["k_core"] = (self.k_core[0], self.k_core[1])
        log = log.filter(**bounds)
        if self.split == "time":
            return log.split_by_time(targets=self.time_targets)
        return log.leave_one_out()

    def with_targets(self, valid: Targets, test: Targets) -> Reading:
        """With the checksums that later commands compare."""
        sums = {"valid": valid.target_sha256, "test": test.target_sha256}
        return dataclasses.replace(self, target_sha256=sums)


def load_model(folder: str, device: str = "cpu") -> RecGRELA:
    """A model with its raw ids; CheckpointError names what is wrong with the folder."""
    from recgrela_ext import RecGRELA

    if not Path(folder).is_dir():
        raise CheckpointError(f"--model must be a folder that `recgrela train` wrote, got {folder}")
    model = RecGRELA.from_pretrained(folder, device)
    if model.id_map is None:
        raise CheckpointError(f"{folder} must hold an id map, got a model without raw ids")
    return model


def check_targets(reading: Reading, model: RecGRELA, targets: Targets) -> None:
    """Refuse targets, or a catalogue, that are not the ones of the training."""
    recorded = reading.target_sha256.get(targets.split)
    if targets.target_sha256 != recorded:
        raise DataError(
            f"evaluate: {targets.split} targets of {reading.data} must have the recorded sha256 "
            f"{str(recorded)[:12]}..., got {targets.target_sha256[:12]}...: another file or version"
        )
    assert model.id_map is not None
    if not np.array_equal(model.id_map.item_ids, targets.id_map.item_ids):
        raise DataError(
            f"evaluate: {reading.data} must have the model's {model.id_map.num_items} items, "
            f"got {targets.num_items} that are not the same"
        )


def histories(log: Interactions, id_map: IdMap) -> Sequences:
    """Whole histories in the item rows of ``id_map``; events of other items are left out.

    Users keep their place in the log; one without any known item has an empty history.
    """
    plain = log.sequences()
    row_of = np.zeros(log.num_items + 1, dtype=np.int32)
    raw, known = log.item_ids, id_map.item_ids
    if raw.dtype.kind != known.dtype.kind:  # one new id in letters turns a column to text
        raw, known = raw.astype(str), known.astype(str)
    here = np.isin(raw, known)
    if here.any():
        row_of[1:][here] = id_map.encode_items(log.item_ids[here])
    items = row_of[plain.items]
    ends = np.concatenate([[0], np.cumsum(items > 0)])
    users = IdMap(log.user_ids, id_map.item_ids, id_map.item_titles or log.item_titles)
    return Sequences(
        items[items > 0],
        ends[plain.offsets],
        users,
        plain.order,
        plain.order_seed,
        plain.name,
        plain.repeat_share,
    )


def use_machine(options: argparse.Namespace) -> str:
    """Set the threads; returns the device."""
    import torch

    from recgrela_ext.arguments import usable_device

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if usable_device(options.device, options.command, "--device").type == "meta":
        raise ValueError(f"{options.command}: --device must hold values, got meta")
    return str(options.device)


def progress_of(options: argparse.Namespace) -> bool | None:
    """The `progress` argument of the package's functions: a bar on a terminal, unless --quiet."""
    return False if options.quiet else None


def prepare_file(path: str | Path | None, *others: str | Path | None) -> None:
    """Make the folder of an output file; called first, not after an hour of training.

    Raises:
        ValueError: it is a folder, or would take the place of `others`: a file, or one of a folder
            that a model or data lie in.
    """
    if path is None:
        return
    if Path(path).is_dir():
        raise ValueError(f"output must be a file, got the folder {path}")
    place = Path(os.path.realpath(path))
    for other in others:
        if other is None:
            continue
        kept = Path(os.path.realpath(other))
        one_of_it = place.name in _MODEL_FILES or (place.is_file() and place.suffix != ".json")
        if place == kept or (kept in place.parents and one_of_it):
            raise ValueError(f"output must not replace what is read or kept, got {path}")
    place.parent.mkdir(parents=True, exist_ok=True)
