"""What is refused: in one line that begins with who refuses, names the argument, and says what it
must be and what it was.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recgrela_ext import (
    CheckpointError,
    DataError,
    GRELAEncoder,
    IdMap,
    Interactions,
    ItemTable,
    RecGRELA,
    SeenItems,
    TrainConfig,
    UserState,
    UserStateStore,
    fit,
    ops,
)
from recgrela_ext.cli import main
from tests.fuzz.saved import small_model


def refused(
    call: Callable[[], Any], error: type[Exception] | tuple[type[Exception], ...], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1


def objects(*values: Any) -> np.ndarray:
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


def users_of(ids: Any) -> list[Any]:
    columns = {"user": ids, "item": range(len(ids)), "timestamp": range(len(ids))}
    return Interactions.from_frame(columns).user_ids.tolist()


BAD_IDS: dict[str, tuple[Any, str]] = {
    "zero in a list": (["a", "a\0"], r"must hold no zero character, got 'a\\x00'"),
    "zero in objects": (objects("a", "a\0"), r"must hold no tab, line feed or zero character, got"),
    "one zero": (objects("a\0", "b"), r"must hold no tab, line feed or zero character, got"),
    "zero in bytes": ([b"a", b"a\0"], r"must hold no zero character, got b'a\\x00'"),
    "surrogate": (["\ud800", "b"], r"must be UTF-8 text, got '\\ud800' in one"),
    "surrogate in an array": (np.array(["\ud800", "b"]), "must be UTF-8 text, got"),
    "bytes": (np.array([b"\xff", b"a"]), "in bytes must be ASCII, got byte 0xff"),
    "lists": (objects([1], [2, 3]), "must be integers or text, got list"),
    "dicts": (objects({1: 2}, {}), "must be integers or text, got dict"),
    "columns": ([[1], [2, 3]], r"must be a plain list, array or tensor, got \[\[1\], \[2, 3\]\]"),
    "inf in objects": (objects(1, np.inf), "must be integers or text, got float"),
    "bools in objects": (objects(True, False), "must be integers or text, got bool"),
    "a bool beside an equal int": (objects(1, True), "must be integers or text, got bool"),
}


@pytest.mark.parametrize("kind", BAD_IDS)
def test_ids_of_columns(kind: str) -> None:
    """NumPy cuts zeros at the end of a text: two ids became one; the others failed later on."""
    pytest.importorskip("pandas")
    ids, text = BAD_IDS[kind]
    refused(lambda: users_of(ids), DataError, f"^from_frame: user ids .*{text}")


def test_ids_that_are_near_those() -> None:
    pytest.importorskip("pandas")
    assert users_of(objects("\u00e9", "\U0001f600", "a b")) == ["a b", "\u00e9", "\U0001f600"]
    assert users_of(objects(1, 0, 2)) == [0, 1, 2]
    assert users_of(np.array([3.0, 1.0], dtype=np.float16)) == [1, 3]
    assert users_of(np.array([b"b", b"a"])) == ["a", "b"]


PARQUET_IDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "lists": (lambda pa: pa.array([[1], [2]]), "be integers or text, got ndarray"),
    "structs": (lambda pa: pa.array([{"a": 1}, {"a": 2}]), "be integers or text, got dict"),
    "inf": (lambda pa: pa.array([1.0, float("inf")]), "be integers .*, got inf in row 1"),
    "nan": (lambda pa: pa.array([1.0, float("nan")]), "not be missing, got 1 missing, the first"),
    "fractions": (lambda pa: pa.array([2.0, 1.5]), "be integers .*, got 1.5 in row 1"),
    "wide floats": (lambda pa: pa.array([2.0**60]), r"be integers \(below 2\*\*53 in"),
    "bools": (lambda pa: pa.array([True, False]), "be integers or text, got bool"),
    "zero": (lambda pa: pa.array(["a", "a\0"]), "hold no tab, line feed or zero character, got"),
}


@pytest.mark.parametrize("kind", PARQUET_IDS)
def test_ids_of_parquet_files(tmp_path: Path, kind: str) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    make, text = PARQUET_IDS[kind]
    ids = make(pyarrow)
    for what, other in (("user", "item"), ("item", "user")):
        rows = range(len(ids))
        table = pyarrow.table({what: ids, other: rows, "timestamp": rows})
        parquet.write_table(table, tmp_path / "x.parquet")
        told = f"^from_file: x.parquet: {what} ids must {text}"
        refused(lambda: Interactions.from_file(tmp_path / "x.parquet", progress=False),
                DataError, told)  # fmt: skip


def test_ids_that_an_id_map_cannot_hold(tmp_path: Path) -> None:
    numbers, path = np.arange(2), tmp_path / "id_map.json"
    for ids in (np.array(["\ud800"]), objects("a"), ["a"], None, np.ones(2), np.ones((1, 1), int)):
        refused(lambda ids=ids: IdMap(numbers, ids), DataError, "^IdMap: item_ids must be ")
        refused(lambda ids=ids: IdMap(ids, numbers), DataError, "^IdMap: user_ids must be ")
    id_map = IdMap(numbers, np.array(["a", "b"]), {"a": "A"})
    for raw in ("a\0", ["a\0"], objects("a\0"), [["a"], ["b\0"]], ["\ud800"], [["a"], ["a", "b"]]):
        refused(lambda raw=raw: id_map.encode_items(raw), DataError, "^encode_items: item must be")
    refused(lambda: id_map.decode_items(["1"]), DataError, "decode_items: rows must be integers")
    refused(lambda: id_map.decode_items([1.5]), DataError, "decode_items: rows must be integers")
    id_map.save(path)
    content = json.loads(path.read_text())
    for name, values in (("item_ids", ["a", "a\0"]), ("item_ids", ["\ud800", "b"]),
                         ("item_titles", ["\ud800", None])):  # fmt: skip
        path.write_text(json.dumps({**content, name: values}))
        refused(lambda: IdMap.load(path), DataError, r"^IdMap\.load: .* must hold ids and titles")


LOG = Interactions.from_frame(
    {"user": [1, 1, 1, 2, 2, 2], "item": [1, 2, 3, 1, 2, 3], "timestamp": range(6)}
)
READING: dict[str, tuple[Callable[[Path], Any], str]] = {
    "seed": (lambda p: Interactions.from_file(p, seed="x"), "from_file: seed must be an int, got"),  # type: ignore[arg-type]
    "keep": (lambda p: Interactions.from_file(p, keep=5), "from_file: keep must be a dict"),  # type: ignore[arg-type]
    "keep's values": (
        lambda p: Interactions.from_file(p, keep={"user": 1}),
        "from_file: keep must have a list of values for column 'user', got 1",
    ),
    "keep's text": (
        lambda p: Interactions.from_file(p, keep={"user": "\ud800"}),
        "from_file: keep must hold UTF-8 text",
    ),
    "k_core": (lambda _: LOG.filter(k_core=5), "filter: k_core must be two ints, .*, got 5"),  # type: ignore[arg-type]
    "k_core's": (lambda _: LOG.filter(k_core=(5, "a")), "filter: k_core must be two ints"),  # type: ignore[arg-type]
    "min_user": (lambda _: LOG.filter(min_user="a"), "filter: min_user must be an int, got 'a'"),  # type: ignore[arg-type]
    "max_item": (lambda _: LOG.filter(max_item=0.5), "filter: max_item must be an int or None"),  # type: ignore[arg-type]
    "train": (lambda _: LOG.split_by_time("a"), "split_by_time: train must be a number, got 'a'"),  # type: ignore[arg-type]
    "nan": (lambda _: LOG.split_by_time(float("nan")), "split_by_time: train, valid, test must"),
    "frame": (lambda _: Interactions.from_frame(None), "from_frame: df must be a frame or a dict"),
    "name": (lambda _: Interactions.from_frame({}, user=None), "from_frame: user must name a colu"),  # type: ignore[arg-type]
    "user codes": (
        lambda _: replace(LOG, user=LOG.user + 1),
        "Interactions: user must hold",
    ),
    "item codes": (lambda _: replace(LOG, item=LOG.item - 1), "Interactions: item .*, got -1"),
    "codes": (
        lambda _: replace(LOG, item=LOG.item / 2),
        "Interactions: item must be integers",
    ),
    "masked ids": (
        lambda _: Interactions.from_frame(
            {"user": np.ma.masked_equal([1, 2], 2), "item": [1, 1]}, time=None, order="file"
        ),
        "from_frame: user ids must have no masked values",
    ),
    "masked times": (
        lambda _: Interactions.from_frame(
            {"user": [1, 2], "item": [1, 1], "timestamp": np.ma.masked_equal([1, 2], 2)}
        ),
        "from_frame: time must have no masked values",
    ),
    "titles": (
        lambda _: Interactions.from_frame(
            {"user": [1], "item": [1], "timestamp": [1], "t": ["\ud800"]}, title="t"
        ),
        "from_frame: titles must be UTF-8 text",
    ),
}


@pytest.mark.parametrize("what", READING)
def test_reading_and_filtering(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text("user,item,timestamp\n1,2,3\n1,3,4\n")
    call, text = READING[what]
    refused(lambda: call(path), DataError, f"^{text}")


def operator_calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Every operator with right arguments."""
    rows, inv_freq, r = torch.ones(2, 3, 2, 4), ops.inv_freq(2, 4), torch.ones
    state = (r(2, 2, 4, 4), r(2, 2, 4), r(2, 2, 8), torch.zeros(2, dtype=torch.int64))
    pair = {n: (r(n, 8), r(n)) for n in (8, 16)}
    layer = ops.EncoderLayer(
        (r(8), r(8)), pair[8], pair[8], pair[16], (r(8, 3), r(8)), pair[8], (r(8), r(8)),
        pair[16], (r(8, 16), r(8)))  # fmt: skip
    packed = ops.pack_encoder([layer], inv_freq)
    conv = {"conv_weight": r(8, 3), "conv_bias": r(8)}
    qkv = dict.fromkeys(("q", "k", "v", "gate"), rows)
    one = dict.fromkeys(("q", "k", "v", "gate"), rows[:, 0])
    wide = {"first_weight": r(32, 16), "first_bias": r(32), "second_weight": r(16, 32),
            "second_bias": r(16), "residual": r(3, 16)}  # fmt: skip
    seen, targets, active = torch.ones(2, 1).long(), torch.tensor([1, 2]), r(2) > 0
    event = {"item_vectors": r(2, 8), "packed_weights": packed, "active": active}
    event["state"] = (r(2, packed.state_size), torch.zeros(2, dtype=torch.int64))
    given: dict[str, dict[str, Any]] = {
        "gated_rela": {**qkv, "inv_freq": inv_freq, **conv},
        "rela": {"q": rows, "k": rows, "v": rows, "inv_freq": inv_freq, "lengths": targets},
        "gated_rela_step": {**one, "inv_freq": inv_freq, **conv, "state": state, "active": active},
        "topk_scores": {"hidden": r(2, 4), "table": r(9, 4), "k": 3, "seen": seen},
        "softmax_loss": {"hidden": r(2, 4), "table": r(9, 4), "targets": targets},
        "feed_forward": {"x": r(3, 16), **wide},
        "activation_dropout": {"x": r(3, 4), "residual": r(3, 4)},
        "encoder_step": event,
    }
    return {name: (getattr(ops, name), arguments) for name, arguments in given.items()}


CALLS = operator_calls()
WRONG_TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", WRONG_TENSORS)
@pytest.mark.parametrize("name", CALLS)
def test_tensors_of_other_kinds_in_operators(name: str, kind: str) -> None:
    """They ended in torch's internal errors, or were looked for in its table of promotions."""
    call, arguments = CALLS[name]
    call(**arguments)
    for argument, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        try:
            wrong = WRONG_TENSORS[kind](value)
        except RuntimeError:  # torch cannot make one of these
            continue
        changed = {**arguments, argument: wrong}
        refused(lambda changed=changed: call(**changed), (TypeError, ValueError),
                rf"^{name}: {argument} must ")  # fmt: skip


def test_frequencies_and_packed_weights() -> None:
    for arguments, error, text in (
        (("a", 4), TypeError, "num_heads must be an int, got 'a'"),
        ((True, 4), TypeError, "num_heads must be an int, got True"),
        ((2, 4.0), TypeError, r"head_dim must be an int, got 4\.0"),
        ((2**40, 4), ValueError, r"num_heads must be below 2\*\*31, got 1099511627776"),
        ((2, 4, None), ValueError, "rotary must be .*, got None"),
        ((2, 4, "none", "x"), ValueError, "base must be a finite number above 0, got 'x'"),
        ((2, 4, "none", 10**400), ValueError, "base must be a finite number above 0"),
    ):
        refused(lambda given=arguments: ops.inv_freq(*given), error, f"^inv_freq: {text}")
    assert ops.inv_freq(np.int64(2), 4).shape == (2, 2)  # type: ignore[arg-type]
    frequencies = ops.inv_freq(2, 4)
    for layers in (5, "x", [None], torch.ones(2)):
        refused(lambda layers=layers: ops.pack_encoder(layers, frequencies), TypeError,
                "^pack_encoder: layers must be a list of EncoderLayer, got ")  # fmt: skip
    refused(lambda: ops.pack_encoder([], None), TypeError, "^pack_encoder: inv_freq must be a ten")  # type: ignore[arg-type]


MODEL = small_model().eval()
TRAIN = LOG.leave_one_out()[0]
NEW = RecGRELA.for_data(TRAIN, hidden_size=8, num_heads=2, num_layers=1)
HERE = Path(__file__).parent
ITEMS = torch.tensor([[1, 2], [3, 4]])
WRONG_CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    name: (call, error, text)
    for name, call, error, text in (
        ("sequences", lambda: SeenItems.from_sequences([[1, 2]]), TypeError,
         "SeenItems.from_sequences: item_seq must be a tensor, got list"),
        ("sequence lengths", lambda: SeenItems.from_sequences(ITEMS, [1, 2]), TypeError,
         "SeenItems.from_sequences: item_seq_len must be a tensor"),
        ("lists", lambda: SeenItems.from_lists(5), TypeError,
         "SeenItems.from_lists: items must be a list per user, got 5"),
        ("flat lists", lambda: SeenItems.from_lists([1, 2]), ValueError,
         r"SeenItems.from_lists: items must be a list \[n\] per user, got 1"),
        ("seen parts", lambda: SeenItems.cat([None]), TypeError,
         r"SeenItems.cat: parts must be a list of SeenItems, got \[None\]"),
        ("states", lambda: UserState.cat([None]), TypeError,
         r"UserState.cat: states must be a list of UserState, got \[None\]"),
        ("no states", lambda: UserState.cat(None), TypeError,
         "UserState.cat: states must be a list of UserState, got None"),
        ("selected", lambda: MODEL.init_state(2).select([0]), TypeError,
         "UserState.select: users must be a tensor"),
        ("frozen", lambda: fit(NEW.requires_grad_(False), TRAIN, steps=1), ValueError,
         "fit: model must have a weight that requires a gradient"),
        ("no gradients", lambda: torch.no_grad()(fit)(NEW.requires_grad_(), TRAIN, steps=1),
         ValueError, "fit: gradients must be enabled"),
        ("backwards", lambda: MODEL.init_state(2)[::-1], ValueError,
         "UserState: a slice must go forwards, got step -1"),
        ("true", lambda: MODEL.init_state(2)[True], TypeError,
         "UserState: index must be int or slice, got bool"),
        ("seen of nobody", lambda: SeenItems(1).ids(5), IndexError,
         "SeenItems.ids: i must be below 1 users, got 5"),
        ("no folder", lambda: MODEL.save_pretrained(""), ValueError,
         "RecGRELA.save_pretrained: folder must be a path, got ''"),
        ("user before the first", lambda: MODEL.init_state(2).select(torch.tensor([0, -1])),
         ValueError, r"UserState.select: users must lie in 0\.\.1, got -1"),
        ("user behind the last", lambda: MODEL.init_state(2).select(torch.tensor([2])), ValueError,
         r"UserState.select: users must lie in 0\.\.1, got 2"),
        ("epochs", lambda: fit(NEW, TRAIN, epochs=10**400), ValueError,
         r"fit: epochs must be below 2\*\*63, got a int"),
        ("log", lambda: fit(NEW, TRAIN, steps=1, log_file=5), TypeError,
         "fit: log_file must be a path, got 5"),
        ("log in a folder's place", lambda: fit(NEW, TRAIN, steps=1, log_file=HERE), ValueError,
         "fit: log_file must be a file, got the folder /"),
        ("masked items", lambda: SeenItems.from_lists([np.ma.masked_equal([1, 2], 2)]), TypeError,
         "SeenItems.from_lists: items of a user must have no masked values, got"),
        ("state's device", lambda: MODEL.init_state(2).to("gpu"), ValueError,
         "UserState.to: device must be usable, got 'gpu'"),
        ("bytes' model", lambda: UserState.from_bytes(b"", None), TypeError,
         "UserState.from_bytes: model must be a RecGRELA, got None"),
        ("store's model", lambda: UserStateStore(None, 5), TypeError,
         "UserStateStore: model must be a RecGRELA, got None"),
        ("store's size", lambda: UserStateStore(MODEL, 2**39), ValueError,
         "UserStateStore: capacity must fit in memory, got 549755813888 users .* of "),
        ("store's device", lambda: UserStateStore(MODEL, 5, device="gpu"), ValueError,
         "UserStateStore: device must be usable, got 'gpu'"),
        ("store's path", lambda: UserStateStore.load(None, MODEL), TypeError,
         "UserStateStore.load: path must be a path, got None"),
        ("loaded store's model", lambda: UserStateStore.load("x", 5), TypeError,
         "UserStateStore.load: model must be a RecGRELA, got 5"),
        ("users", lambda: UserStateStore(MODEL, 5).lookup([[1], [2, 3]]), TypeError,
         "UserStateStore.lookup: users must be a plain list, array or tensor, got"),
        ("histories", lambda: UserStateStore(MODEL, 5).rebuild([1], None), TypeError,
         "UserStateStore.rebuild: histories must be a list of lists, got None"),
        ("table's model", lambda: ItemTable(None), TypeError,
         "ItemTable: model must be a RecGRELA, got None"),
        ("folder", lambda: RecGRELA.from_pretrained(None), TypeError,
         "RecGRELA.from_pretrained: folder must be a path, got None"),
        ("zero in a folder", lambda: MODEL.save_pretrained("a\0"), ValueError,
         r"RecGRELA.save_pretrained: folder must be a path, got 'a\\x00'"),
        ("training data", lambda: RecGRELA.for_data(None), TypeError,
         "RecGRELA.for_data: train must be Sequences, got None"),
        ("many users", lambda: MODEL.init_state(2**62), ValueError,
         r"RecGRELA.init_state: batch_size must be below 2\*\*31"),
        ("negatives", lambda: TrainConfig(num_negatives=2**62), ValueError,
         r"TrainConfig: num_negatives must be below 2\*\*31, got 4611686018427387904"),
        ("betas", lambda: TrainConfig(betas=None), ValueError,
         "TrainConfig: betas must be two numbers, got None"),
        ("nested items", lambda: MODEL(torch.nested.nested_tensor([ITEMS[0]])), ValueError,
         "RecGRELA.forward: item_seq must be a dense tensor, got a nested tensor"),
        ("schedule", lambda: TrainConfig(schedule=np.ones(2)), ValueError,
         "TrainConfig: schedule must be one of .*, got a ndarray"),
        ("rotary", lambda: MODEL.config.replace(rotary=["none"]), ValueError,
         r"RecGRELAConfig: rotary must be one of .*, got \['none'\]"),
        ("side", lambda: MODEL(ITEMS, padding_side=np.ones(2)), ValueError,
         "RecGRELA.forward: padding_side must be right or left, got a ndarray"),
        ("layers", lambda: GRELAEncoder(8, None, 2), TypeError,
         "GRELAEncoder: num_layers must be an int, got None"),
        ("lengths", lambda: GRELAEncoder(8, 1, 2)(torch.ones(1, 2, 8), [1]), TypeError,
         "GRELAEncoder: lengths must be a tensor, got list"),
    )
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("what", WRONG_CALLS)
def test_arguments_of_models_and_states(what: str) -> None:
    call, error, text = WRONG_CALLS[what]
    refused(call, error, f"^{text}")


def test_devices_of_saved_models(tmp_path: Path) -> None:
    MODEL.save_pretrained(tmp_path)
    for device in ("gpu", "cuda:99", [], 10**30):
        refused(lambda device=device: RecGRELA.from_pretrained(tmp_path, device), ValueError,
                r"^RecGRELA\.from_pretrained: device must be usable, got ")  # fmt: skip
    assert RecGRELA.from_pretrained(tmp_path, "cpu").fingerprint() == MODEL.fingerprint()


@pytest.mark.parametrize("name", ["config.json", "id_map.json"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_is_plain_utf8(tmp_path: Path, name: str, encoding: str) -> None:
    """The configuration was taken with a byte order mark, the id map was not."""
    model = small_model()
    model.id_map = IdMap(np.arange(2), np.arange(11))
    model.save_pretrained(tmp_path)
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(text, encoding=encoding)
    refused(lambda: RecGRELA.from_pretrained(tmp_path), CheckpointError, f"{name} must be .*JSON")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            "--num-negatives 4611686018427387904",
            r"num_negatives must be below 2\*\*31, got 461",
        ),
        ("--device meta", "train: --device must hold values, got meta"),
        (
            "--hidden-size 65536",
            r"memory of 1\.0 GiB, got 3,\d+\.. GiB of weights, gradients",
        ),
        ("--num-layers 60000 --paper", r"train: the model must fit .* of 1\.0 GiB, got \d+\.. GiB"),
        ("--loss sampled --num-negatives 2000000000", "averages, scores of the negatives$"),
    ],
)
def test_trainings_that_cannot_be(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
    text: str,
) -> None:
    """Tracebacks, or a process killed without a word."""
    monkeypatch.setattr("recgrela_ext.cli.train.os.sysconf", lambda _: 2**15)
    data = tmp_path / "x.csv"
    data.write_text("user,item,timestamp\n1,1,1\n1,2,2\n1,3,3\n")
    command = ["train", "--data", str(data), "--out", str(tmp_path / "out"), "--steps", "1"]
    assert main([*command, *options.split(), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(text, line)


def test_interrupted_while_it_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("recgrela_ext.cli.import_module", interrupted)
    assert main(["info"]) == 130


@pytest.mark.parametrize("name", ["soak", "matrix"])
def test_help_of_the_trials(name: str) -> None:
    module = import_module("tests.soak" if name == "soak" else "tests.matrix.__main__")
    command = [sys.executable, "-m", f"tests.{name}", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert module.__doc__ is not None
    assert module.__doc__.strip() in shown
