"""What was saved: states as bytes, model folders, stores, training checkpoints.

Half of the inputs carry right checksums, so that what lies behind the checksums is tried as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from recgrela_ext import (
    CheckpointError,
    IdMap,
    RecGRELA,
    RecGRELAConfig,
    SeenItems,
    StateError,
    UserState,
    UserStateStore,
)
from recgrela_ext.model import blob as framing
from recgrela_ext.model.persistence import weights_digest
from recgrela_ext.model.seen import STATE_MAGIC
from recgrela_ext.training.checkpoint import CheckpointFolder
from tests.fuzz.draw import REFUSED, Draw, changed, one_line

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def small_model(**options: Any) -> RecGRELA:
    torch.manual_seed(0)
    sizes = {"n_items": 12, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "max_seq_len": 8}
    return RecGRELA(RecGRELAConfig(**{**sizes, **options})).eval()


class States:
    """`UserState.from_bytes` and `SeenItems.from_bytes`; what they accept can be used."""

    def __init__(self, folder: Path) -> None:
        self.model = small_model(repeat_bias=True)
        self.state = state = self.model.prefill(torch.tensor([[1, 2, 3]]))
        seen = SeenItems.from_lists([[1, 2, 3]])
        formats = ("float32", "bfloat16", "float16", "int8", "float64")
        self.blobs = [state.to_bytes(0, name, seen) for name in formats]
        self.blobs += [state.to_bytes(0), seen.to_bytes(0)]

    def __call__(self, data: bytes) -> str:
        draw, accepted = Draw(data), list[str]()
        blob = draw.one_of(self.blobs)
        kind = draw.below(4)
        if kind == 0:
            blob = draw.rest()
        elif kind == 1:
            blob = draw.edited(blob)
        else:
            magic = blob[:4] if kind == 2 else draw.one_of([STATE_MAGIC, b"RGSI"])
            blob = framing.seal(magic, draw.edited(blob[5:-4]) if kind == 2 else draw.rest())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # a state of a million events
                state = UserState.from_bytes(blob, self.model)
                self.model.step(torch.tensor([1]), state)
            accepted.append("state")
        except StateError as error:
            one_line(error)
        try:
            seen = SeenItems.from_bytes(blob)
        except StateError as error:
            one_line(error)
        else:
            seen.add([5])
            ids = seen.ids(0)
            assert (np.diff(ids) > 0).all()
            if len(seen.recent(0)) <= 1000:
                best = self.model.recommend_from_state(self.state, 11, seen, exclude_seen=False)
                assert sorted(best.items[0].tolist()) == list(range(1, 12))
            accepted.append("seen items")
        return " and ".join(accepted)


@contextlib.contextmanager
def unfilled() -> Iterator[None]:
    """Without random values for weights that a file replaces, half of a small model's loading."""
    with contextlib.ExitStack() as stack:
        for name in ("normal_", "zeros_", "ones_", "uniform_", "kaiming_uniform_"):
            stack.enter_context(mock.patch.object(nn.init, name, lambda tensor, *a, **b: tensor))
        yield


class Models:
    """`RecGRELA.from_pretrained` on edited folders; what it accepts recommends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "model"
        model = small_model(repeat_bias=True)
        model.id_map = IdMap(np.arange(3), np.arange(11), {1: "one"})
        model.save_pretrained(self.folder)
        self.files = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        self.weights = {name: t.clone() for name, t in model.state_dict().items()}

    def __call__(self, data: bytes) -> str:
        draw = Draw(data)
        files = dict(self.files)
        kind = draw.below(6)
        if kind == 0:
            files["config.json"] = draw.edited(files["config.json"])
        elif kind == 1:
            files["config.json"] = draw.rest()
        elif kind == 2:
            name = draw.one_of(["config.json", "id_map.json"])
            files[name] = json.dumps(changed(draw, json.loads(files[name]))).encode()
        elif kind == 3:
            files["model.safetensors"] = draw.edited(files["model.safetensors"])
        elif kind == 4:
            files["id_map.json"] = draw.edited(files["id_map.json"])
        else:
            self.other_weights(draw, files)
        for name, content in files.items():
            (self.folder / name).write_bytes(content)
        try:
            with unfilled():
                model = RecGRELA.from_pretrained(self.folder)
        except CheckpointError as error:
            one_line(error)
            return REFUSED
        if model.id_map is not None and model.id_map.num_items:
            model.id_map.title(1)
        if model.config.rows <= 1000 and model.config.max_seq_len <= 1000:
            model.recommend(torch.tensor([[1, 1]]), k=2, exclude_seen=False)
            return "loaded, recommends"
        return "loaded, too large to try"

    def other_weights(self, draw: Draw, files: dict[str, bytes]) -> None:
        weights = edited_tensors(draw, self.weights)
        files["model.safetensors"] = save(weights)
        fields = json.loads(files["config.json"])
        fields["weights_sha256"] = weights_digest(weights)
        if draw.flag():
            fields = changed(draw, fields)
        files["config.json"] = json.dumps(fields).encode()


class Stores:
    """`UserStateStore.load` on edited files; what it accepts steps, evicts and is saved again."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "users.safetensors"
        self.model = small_model()
        self.whole: list[tuple[bytes, dict[str, Tensor], dict[str, Any]]] = []
        for dtype in ("float32", "int8", "bfloat16"):
            store = UserStateStore(self.model, 5, dtype, active=2)
            store.step(np.arange(6), torch.arange(1, 7))
            store.evict([3])
            store.save(self.path)
            content = self.path.read_bytes()
            (size,) = struct.unpack("<Q", content[:8])
            facts = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["facts"])
            self.whole.append((content, load(content), facts))

    def __call__(self, data: bytes) -> str:
        draw = Draw(data)
        whole, tensors, facts = draw.one_of(self.whole)
        kind = draw.below(4)
        if kind == 0:
            self.path.write_bytes(draw.edited(whole))
        elif kind == 1:
            self.path.write_bytes(draw.rest())
        else:
            self.rewrite(draw, tensors, facts)
        try:
            store = UserStateStore.load(self.path, self.model)
        except StateError as error:
            one_line(error)
            return REFUSED
        users = store.users
        assert len(store) == len(np.unique(users)) == len(users)
        store.lookup(users)
        stepped = "and steps"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                store.step(np.arange(100, 108), torch.ones(8, dtype=torch.int64))
        except StateError as error:
            one_line(error)  # a state that does not fit at rest
            stepped = "and does not step"
        store.evict(oldest=3)
        store.save(self.path)
        UserStateStore.load(self.path, self.model)
        return f"loaded {stepped}"

    def rewrite(self, draw: Draw, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Other tensors or facts, with checksums that fit."""
        tensors = edited_tensors(draw, tensors)
        sums = {name: weights_digest({name: t}) for name, t in tensors.items()}
        facts = {**facts, "sha256": sums}
        if draw.flag():
            facts = changed(draw, facts)
        metadata = {"kind": "recgrela_ext user states", "facts": json.dumps(facts)}
        self.path.write_bytes(packed(tensors, metadata))


class Checkpoints:
    """`CheckpointFolder.load_newest` on an edited checkpoint beside a whole one."""

    def __init__(self, folder: Path) -> None:
        self.place = folder / "run"
        self.checkpoints = CheckpointFolder(self.place)
        self.tensors = {"model/a": torch.arange(6.0).view(2, 3), "model/b": torch.ones(2)}
        self.checkpoints.save(2, self.tensors, {"position": {"step": 2}})
        self.newest = self.place / "step-0000000002"
        self.files = {path.name: path.read_bytes() for path in self.newest.iterdir()}
        shutil.rmtree(self.newest)
        self.checkpoints.save(1, self.tensors, {"position": {"step": 1}})
        self.newest.mkdir()

    def __call__(self, data: bytes) -> str:
        draw = Draw(data)
        files = dict(self.files)
        kind = draw.below(4)
        if kind == 3:
            content = json.loads(files["state.json"])
            content.pop("sha256")
            content = changed(draw, content)
            if isinstance(content, dict):
                text = json.dumps(content, sort_keys=True).encode()
                content["sha256"] = hashlib.sha256(text).hexdigest()
            files["state.json"] = json.dumps(content).encode()
        else:
            name = draw.one_of(sorted(files))
            files[name] = draw.rest() if kind == 0 else draw.edited(files[name])
        for name, content in files.items():
            (self.newest / name).write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a torn checkpoint
            found = self.checkpoints.load_newest()
        assert found is not None
        assert found.step in (1, 2)
        return "the edited checkpoint" if found.step == 2 else REFUSED


def edited_tensors(draw: Draw, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One tensor gone, of another type or shape, or with other values."""
    tensors = {name: t.clone() for name, t in tensors.items()}
    name = draw.one_of(sorted(tensors))
    tensor, action = tensors[name], draw.below(5)
    if action == 0:
        del tensors[name]
    elif action == 1:
        other = (torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.bool)
        tensors[name] = tensor.to(draw.one_of(other))
    elif action == 2:
        shape = tuple(draw.below(8) for _ in range(draw.below(4)))
        tensors[name] = torch.ones(shape, dtype=tensor.dtype)
    elif action == 3 and tensor.numel():
        flat = tensor.view(-1).view(torch.uint8)
        for _ in range(1 + draw.below(3)):
            flat[draw.below(flat.numel())] = draw.byte()
    else:
        tensors[f"{name}{draw.below(3)}"] = tensor.clone()
    return tensors


def packed(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file. The library's own writer takes longer than what is tried here."""
    header: dict[str, Any] = {"__metadata__": metadata}
    parts, end = [], 0
    for name, tensor in tensors.items():
        parts.append(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        begin, end = end, end + len(parts[-1])
        kind = NAMES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(parts)
