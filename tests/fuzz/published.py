"""Model files of others that are pickles: RecBole's checkpoints and `torch.distributed.checkpoint`.

The pickles are edited opcode by opcode, with calls put in between, and packed again as torch does
it. Nothing of them may run, and no class may be another one afterwards.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from recgrela_ext import CheckpointError, RecGRELA, RecGRELAConfig
from recgrela_ext.integrations import checkpoints, published
from recgrela_ext.integrations.distributed import load_checkpoint, save_checkpoint
from recgrela_ext.model.persistence import _PUBLISHED_BLOCK, _PUBLISHED_TOP
from tests.fuzz.draw import REFUSED, Draw, changed, one_line
from tests.fuzz.saved import small_model, unfilled

RAN: list[object] = []  # what a file has run
FIELDS = {"hidden_size": 4, "num_layers": 1, "num_heads": 1, "max_seq_len": 3}


def trap(*arguments: object) -> None:
    RAN.append(arguments)


class Settings:
    """In the place of RecBole's configuration: reading it back would run this."""

    def __init__(self) -> None:
        self.values = {"device": torch.device("cpu")}

    def __setstate__(self, state: object) -> None:
        trap(state)


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def named(module: str, name: str) -> list[bytes]:
    """Every way to ask for a global."""
    return [f"c{module}\n{name}\n".encode(), text(module) + text(name) + b"\x93"]


GLOBALS = [
    ("builtins", "dict"), ("builtins", "getattr"), ("copyreg", "_reconstructor"),
    ("torch.storage", "_load_from_bytes"), ("torch", "load"), ("torch", "Tensor"),
    ("torch._utils", "_rebuild_parameter_with_state"),
    ("torch._utils", "_rebuild_wrapper_subclass"),
    ("torch._tensor", "_rebuild_from_type_v2"), ("numpy", "ndarray"), (__name__, "trap"),
    ("torch", "float32"), ("torch", "float32.__class__"), ("pathlib", "PosixPath"),
    *sorted({*published._ALLOWED, *checkpoints._ALLOWED}),
]  # fmt: skip


def traps(folder: Path) -> list[bytes]:
    """Calls that leave a trace if they are made; each leaves one value on the stack."""
    code = f"__import__({__name__!r}, fromlist=['x']).trap('code')"
    found = []
    for module, name, argument in (
        ("builtins", "eval", code), ("builtins", "exec", code), (__name__, "trap", "x"),
        ("os", "system", f"touch {folder / 'ran'}"), ("posix", "system", f"touch {folder / 'ran'}"),
        ("__builtin__", "eval", code), ("pathlib", "Path.touch", str(folder / "ran")),
    ):  # fmt: skip
        found += [one + text(argument) + b"\x85R" for one in named(module, name)]
        found.append(b"(" + text(argument) + f"i{module}\n{name}\n".encode())
        found.append(b"(" + named(module, name)[0] + text(argument) + b"o")
        found.append(named(module, name)[0] + text(argument) + b"\x85\x81")
    return found


# After a global: it is called, made, given a state, an attribute, an item.
DEEDS = [
    b")R", b")\x81", b"}b", b"N}" + text("__doc__") + text("x") + b"s\x86b", b"Nb", b"K\x01\x85R",
    b"K\x01\x85\x81", b"}" + text("data") + text("x") + b"sb", b"", text("k") + b"Ns", b"Na",
    b")}\x92", text("torch") + b"\x85R",
]  # fmt: skip
PLAIN = [
    b"N", b"\x88", b"K\x00", b"J\xff\xff\xff\xff", b"\x8a\x09" + bytes(8) + b"\x01", b"]", b"}",
    b")", b"G\x7f\xf8" + bytes(6), text("a"), b"C\x01a", b"\x8f", b"(K\x01K\x02t", b"I01\n",
    b"M\xff\xff", b"\x8c\x03\xed\xa0\x80", b"0", b"2", b"a", b"s", b"u", b"b", b"e", b"(", b"1",
    b"P0\n", b"Q", b"\x82\x01", b"h\x00", b"\x94", b"q\x01",
]  # fmt: skip


def opcodes(pickled: bytes) -> list[bytes]:
    starts = [place for _, _, place in pickletools.genops(pickled) if place is not None]
    return [pickled[a:b] for a, b in zip(starts, [*starts[1:], len(pickled)], strict=True)]


def fragment(draw: Draw, calls: Sequence[bytes]) -> bytes:
    kind = draw.below(4)
    if kind == 0:
        found = draw.one_of(calls)
    elif kind == 1:
        found = draw.one_of(PLAIN)
    else:
        found = draw.one_of(named(*draw.one_of(GLOBALS))) + draw.one_of(DEEDS)
    return found + b"0" if draw.flag() else found  # taken off again: the rest stays as it was


def recoded(draw: Draw, parts: Sequence[bytes], calls: Sequence[bytes]) -> bytes:
    """A pickle with a few opcodes gone, twice, others, or with a call in between."""
    parts = list(parts)
    for _ in range(1 + draw.below(3)):
        place, kind = draw.below(len(parts)), draw.below(6)
        if kind == 0 and len(parts) > 1:
            del parts[place]
        elif kind == 1:
            parts.insert(place, parts[draw.below(len(parts))])
        elif kind == 2:
            parts[place] = draw.edited(parts[place]) if len(parts[place]) > 1 else draw.take(1)
        elif kind == 3:
            parts[place] = fragment(draw, calls)
        else:
            parts.insert(place, fragment(draw, calls))
    return b"".join(parts)


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # two of one name
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name.removesuffix("#")), content)
    return file.getvalue()


def members_of(archive: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return {name: file.read(name) for name in file.namelist()}


def as_saved(content: Any, protocol: int = 2) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, pickle_protocol=protocol)
    return file.getvalue()


def published_weights() -> dict[str, Tensor]:
    """Of a small published model, under its names."""
    weights = RecGRELA(RecGRELAConfig.paper(6, **FIELDS)).state_dict()
    found = {theirs: weights[ours] for theirs, ours in _PUBLISHED_TOP.items()}
    for theirs, ours in {**_PUBLISHED_BLOCK, "attn.conv1d": "modulator.conv"}.items():
        for kind in ("weight", "bias"):
            joint = "_" if ours == "modulator.conv" else "."
            tensor = weights[f"encoder.layers.0.{ours}{joint}{kind}"]
            taps = theirs == "attn.conv1d" and kind == "weight"
            found[f"GRELA_block.0.{theirs}.{kind}"] = tensor[:, None] if taps else tensor
    return found


class Classes:
    """Everything on the lists as it was: a pickle can set attributes of what it names."""

    def __init__(self) -> None:
        allowed = [*published._ALLOWED.values(), published._Inert]
        for module, name in checkpoints._ALLOWED:
            allowed.append(getattr(__import__(module, fromlist=["x"]), name))
        allowed.append(__import__("pathlib").PurePath)
        self.found = [x for x in allowed if hasattr(x, "__dict__") and not isinstance(x, Tensor)]
        self.before = [self.facts(x) for x in self.found]

    @staticmethod
    def facts(x: Any) -> dict[str, Any]:
        extra = {} if isinstance(x, type) else {"__defaults__": getattr(x, "__defaults__", None)}
        return {**vars(x), **extra}

    def restore(self) -> list[str]:
        """Names of what was changed, which is as before then."""
        changed = []
        for x, before in zip(self.found, self.before, strict=True):
            now = self.facts(x)
            if now.keys() == before.keys() and all(now[n] is before[n] for n in now):
                continue
            changed.append(getattr(x, "__name__", "?"))
            for name in now.keys() - before.keys():
                delattr(x, name)
            for name in before:
                if name not in now or now[name] is not before[name]:
                    setattr(x, name, before[name])
        return changed


class Published:
    """Which reader, what is edited of which file, the edits."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, self.run = folder, folder / "model.pth", folder / "run"
        self.calls = traps(folder)
        torch.manual_seed(0)
        weights = published_weights()
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))]).state_dict()
        whole = {
            "config": Settings(), "epoch": 3, "state_dict": weights, "optimizer": optimizer,
            "score": np.float64(0.5), "flag": np.bool_(True), "other_parameter": None,
        }  # fmt: skip
        self.files = [as_saved(weights), as_saved(whole), as_saved(whole, 4)]
        self.members = [members_of(file) for file in self.files]
        self.data = [next(n for n in m if n.endswith("/data.pkl")) for m in self.members]
        self.parts = [opcodes(m[n]) for m, n in zip(self.members, self.data, strict=True)]

        self.model = small_model(n_items=6, **FIELDS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # one process
            save_checkpoint(self.run, 7, self.model, torch.optim.SGD(self.model.parameters()))
        self.newest = self.run / "step-000000007"
        self.saved = {path.name: path.read_bytes() for path in self.newest.iterdir()}
        self.metadata_parts = opcodes(self.saved[".metadata"])
        self.shapes = {name: t.shape for name, t in self.model.state_dict().items()}
        self.config = json.loads(torch.load(io.BytesIO(self.piece("config")), weights_only=True))
        for file in self.files:  # what is edited must be right
            self.path.write_bytes(file)
            published.published_state_dict(self.path)
        self.read_model()
        self.classes = Classes()

    def __call__(self, data: bytes) -> str:
        draw = Draw(data)
        RAN.clear()
        accepted, error = REFUSED, None
        try:
            accepted = self.distributed(draw) if draw.byte() % 4 == 0 else self.recbole(draw)
        except Exception as one:
            error = one
        changed_ones = self.classes.restore()
        assert not RAN, f"a file ran {RAN}"
        assert not (self.folder / "ran").exists(), "a file ran a program"
        assert not changed_ones, f"a file changed {changed_ones}"
        if error is not None:
            raise error
        return accepted

    # RecBole's

    def recbole(self, draw: Draw) -> str:
        which, kind = draw.below(3), draw.below(4)
        members, name = dict(self.members[which]), self.data[which]
        if kind == 0:
            self.path.write_bytes(draw.edited(self.files[which]))
        else:
            if kind == 1:
                members[name] = draw.edited(members[name])
            elif kind == 2:
                self.other_members(draw, members)
            else:
                members[name] = recoded(draw, self.parts[which], self.calls)
            self.path.write_bytes(zipped(members))
        try:
            content = published.read_checkpoint(self.path)
        except CheckpointError as one:
            self.told(one, "read_checkpoint: ")
            return REFUSED
        self.sane(content)
        try:
            weights = published.published_state_dict(self.path)
        except CheckpointError as one:
            self.told(one, "published_state_dict: ")
            return "read"
        if any(re.search(r"\d\d", str(name)) for name in weights):  # a model of many layers
            return "weights"
        try:
            with unfilled():
                model = RecGRELA.from_reference(weights, num_heads=1)
        except CheckpointError as one:
            self.told(one, "from_reference: ")
            return "weights"
        model.recommend(torch.tensor([[1, 1]]), k=2)
        return "weights, recommends"

    @staticmethod
    def other_members(draw: Draw, members: dict[str, bytes]) -> None:
        name, kind = draw.one_of(sorted(members)), draw.below(5)
        if kind == 0:
            members.pop(name)
        elif kind == 1:
            members[name] = draw.edited(members[name])
        elif kind == 2:
            members[f"{name}#"] = draw.edited(members[name])  # a second one of this name
        elif kind == 3:
            members[draw.one_of([f"x/{name}", f"../{name}", f"/{name}", "data.pkl"])] = b"N."
        else:
            members[name] = members[draw.one_of(sorted(members))]

    def sane(self, content: Any) -> None:
        """Plain things and tensors that are no larger than the file; nothing else."""
        size, seen, todo = self.path.stat().st_size, set[int](), [content]
        while todo:
            one = todo.pop()
            if id(one) in seen:
                continue
            seen.add(id(one))
            if isinstance(one, dict):
                todo += [*one, *one.values()]
            elif isinstance(one, (list, tuple, set, frozenset)):
                todo += one
            elif isinstance(one, Tensor):
                assert one.device.type == "cpu"
                assert one.numel() * one.element_size() <= size
                one.clone()
            else:
                plain = (
                    int, float, str, bytes, bytearray, complex, torch.dtype, type(None),
                    published._Inert, slice, range,
                )  # fmt: skip
                listed = any(one is x for x in (*published._ALLOWED.values(), published._Inert))
                assert isinstance(one, plain) or listed, f"made {type(one)}"

    # torch.distributed.checkpoint

    def distributed(self, draw: Draw) -> str:
        files, kind = dict(self.saved), draw.below(5)
        if kind == 0:
            name = draw.one_of(sorted(files))
            files[name] = draw.edited(files[name])
        elif kind == 1:
            files[".metadata"] = draw.edited(files[".metadata"])
        elif kind == 2:
            self.other_piece(draw, files)
        elif kind == 3:
            self.other_facts(draw, files)
        else:
            files[".metadata"] = recoded(draw, self.metadata_parts, self.calls)
        for name, content in files.items():
            (self.newest / name).write_bytes(content)
        try:
            step = self.read_model()
        except CheckpointError as one:
            self.told(one, "load_checkpoint: ")
            return REFUSED
        assert isinstance(step, int)
        assert {n: t.shape for n, t in self.model.state_dict().items()} == self.shapes
        return "distributed"

    def read_model(self) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return load_checkpoint(self.run, self.model, None)

    def metadata(self) -> Metadata:
        found: Metadata = pickle.loads(self.saved[".metadata"])
        return found

    def piece(self, name: str) -> bytes:
        """What was saved under this name."""
        facts = next(x for at, x in self.metadata().storage_data.items() if at.fqn == name)
        return self.saved[facts.relative_path][facts.offset : facts.offset + facts.length]

    def other_piece(self, draw: Draw, files: dict[str, bytes]) -> None:
        """One thing saved is another one: tensors, the step, the configuration."""
        metadata = self.metadata()
        names = sorted(at.fqn for at in metadata.storage_data)
        name = draw.one_of(["config", "step", draw.one_of(names)])
        place = next(at for at in metadata.storage_data if at.fqn == name)
        kind = draw.below(4)
        if kind == 0:
            content = as_saved(draw.value())
        elif kind == 1:
            content = as_saved(json.dumps(changed(draw, self.config)))
        else:
            members = members_of(self.piece(name))
            data = next(n for n in members if n.endswith("/data.pkl"))
            if kind == 2:
                members[data] = recoded(draw, opcodes(members[data]), self.calls)
            else:
                self.other_members(draw, members)
            content = zipped(members)
        facts = metadata.storage_data[place]
        facts.offset, facts.length = len(files[facts.relative_path]), len(content)
        files[facts.relative_path] += content
        files[".metadata"] = pickle.dumps(metadata)

    def other_facts(self, draw: Draw, files: dict[str, bytes]) -> None:
        """A field of the metadata holds something else."""
        metadata = self.metadata()
        place = draw.one_of(sorted(metadata.storage_data, key=repr))
        tensor = draw.one_of(sorted(metadata.state_dict_metadata))
        holder = draw.one_of(
            [metadata, metadata.storage_data[place], metadata.state_dict_metadata[tensor]]
        )
        fields = sorted(vars(holder))
        if fields:
            setattr(holder, draw.one_of(fields), draw.value())
        files[".metadata"] = pickle.dumps(metadata)

    @staticmethod
    def told(error: CheckpointError, begin: str) -> None:
        one_line(error)
        assert str(error).startswith(begin), f"not ours: {error}"
