"""Misuse of the model, its states and its files: one clear line, never a wrong result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from recgrela_ext import RecGRELA, RecGRELAConfig, SeenItems, UserState
from recgrela_ext.errors import CheckpointError, StateError
from recgrela_ext.model import blob
from recgrela_ext.model.seen import STATE_MAGIC
from recgrela_ext.model.state import _HEADER

MakeModel = Callable[..., RecGRELA]
ITEMS = torch.tensor([[5, 6, 0]])


def one_line(error: pytest.ExceptionInfo[BaseException]) -> bool:
    return "\n" not in str(error.value)


CALLS: dict[str, tuple[Callable[[RecGRELA], Any], str]] = {
    "forward": (lambda m: m([[5]]), "item_seq must be a tensor, got list"),
    "array": (lambda m: m(np.ones((1, 2))), "item_seq must be a tensor, got ndarray"),
    "lengths": (lambda m: m(ITEMS, [2]), "item_seq_len must be a tensor, got list"),
    "targets": (lambda m: m.loss(ITEMS, None, None), "targets must be int64 in a tensor, got None"),
    "packed": (lambda m: m.encode_packed([5], [0, 1]), "item_ids must be a tensor, got list"),
    "step": (lambda m: m.step([5], m.init_state(1)), "items must be a tensor, got list"),
    "candidates": (
        lambda m: m.recommend(ITEMS, candidates=[5]),
        "candidates must be integers in a tensor, got list",
    ),
    "seen": (
        lambda m: m.recommend_from_state(m.prefill(ITEMS), seen=[[5]]),
        "seen must be integers in a tensor, got list",
    ),
    "seen floats": (
        lambda m: m.recommend_from_state(m.prefill(ITEMS), seen=torch.ones(1, 1)),
        "seen must be integers in a tensor, got torch.float32",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_not_a_tensor_of_integers(name: str, make_model: MakeModel) -> None:
    call, message = CALLS[name]
    with pytest.raises(TypeError, match=message) as error:
        call(make_model())
    assert one_line(error)


def test_state_of_another_model(make_model: MakeModel) -> None:
    """Equal sizes, other weights: the result would be wrong without a word."""
    torch.manual_seed(1)
    model = make_model()
    torch.manual_seed(2)
    other = make_model()
    state = model.prefill(ITEMS)
    before = state.buffer.clone()
    calls: list[Callable[[], Any]] = [
        lambda: other.step(torch.tensor([5]), state),
        lambda: other.prefill(ITEMS, state=state),
        lambda: other.recommend_from_state(state),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="state must come from this model"):
            call()
    assert torch.equal(state.buffer, before)
    model.step(torch.tensor([5]), state)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([2**33 + 1], r"items must lie in 0..2147483647, got 8589934593"),
        ([-1], r"items must lie in 0..2147483647, got -1"),
        ([1.5], r"items must be integers, got float64"),
        (["a"], r"items must be integers, got <U1"),
    ],
)
def test_seen_items_that_are_no_rows(items: list[Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"SeenItems\.from_lists: {message}"):
        SeenItems.from_lists([items])
    seen = SeenItems(1)
    with pytest.raises((ValueError, TypeError), match=rf"SeenItems\.add: {message}"):
        seen.add([items])
    assert seen.ids(0).size == 0


def test_seen_items_of_fewer_users(make_model: MakeModel) -> None:
    state = make_model().prefill(torch.tensor([[5], [6]]))
    with pytest.raises(ValueError, match="seen must hold 2 users, got 1"):
        state.to_bytes(1, seen=SeenItems(1))


@pytest.fixture
def saved(make_model: MakeModel, tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", 2**40, "hidden_size must be at most 65536"),
        ("hidden_size", 2**16, "item_embedding.weight must be"),
        ("n_items", 2**40, "item_embedding.weight must be"),
        ("num_layers", 10**9, "num_layers must be at most 65536"),
        ("num_layers", 60000, "tensors for 60000 layers"),
        ("id_map_file", "nothing.json", "No such file"),
    ],
)
def test_edited_config(saved: Path, field: str, value: Any, message: str) -> None:
    path = saved / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(CheckpointError, match=message) as error:
        RecGRELA.from_pretrained(saved)
    assert one_line(error)


def test_nested_config(saved: Path) -> None:
    (saved / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"config\.json must be JSON"):
        RecGRELA.from_pretrained(saved)


def test_integer_weights(saved: Path) -> None:
    weights = {
        name: x.to(torch.int32) for name, x in load_file(saved / "model.safetensors").items()
    }
    save_file(weights, saved / "model.safetensors")
    fields = json.loads((saved / "config.json").read_text())
    fields.pop("weights_sha256")
    (saved / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"must have a dtype out of .*, got torch\.int32"):
        RecGRELA.from_pretrained(saved)


def test_files_that_go_away(saved: Path) -> None:
    shutil.rmtree(saved)
    with pytest.raises(CheckpointError, match="must be readable: No such file"):
        RecGRELA.from_pretrained(saved)


TABLE, TAPS = "item_embedding.weight", "GRELA_block.{}.attn.conv1d.weight"


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (None, TypeError, "state_dict must be a dict of tensors, got NoneType"),
        ({TABLE: 3}, CheckpointError, "item_embedding.weight must be a tensor, got int"),
        ({1: torch.ones(1)}, CheckpointError, "1 must be a published name"),
        (
            {TABLE: torch.ones(4), TAPS.format(0): torch.ones(8, 1, 4)},
            CheckpointError,
            r"item_embedding.weight must be \[n_items, hidden_size\]",
        ),
        (
            {
                TABLE: torch.ones(5, 8),
                TAPS.format(0): torch.ones(8, 1, 4),
                TAPS.format(10**9): TAPS,
            },
            CheckpointError,
            "must be a tensor, got str",
        ),
        (
            {
                TABLE: torch.ones(5, 8),
                TAPS.format(0): torch.ones(8, 1, 4),
                TAPS.format(10**9): torch.ones(8, 1, 4),
            },
            CheckpointError,
            "num_layers must be at most 65536, got 1000000001",
        ),
    ],
)
def test_reference_weights(weights: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RecGRELA.from_reference(weights)


@pytest.mark.filterwarnings("ignore")
def test_quantised_model_streams() -> None:
    """Its state_dict holds more than tensors, and its layers are not torch's own."""
    torch.manual_seed(0)
    model = RecGRELA(RecGRELAConfig(n_items=20)).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    state = quantised.prefill(torch.tensor([[1, 2]]))
    hidden = quantised.step(torch.tensor([3]), state)
    expected = quantised(torch.tensor([[1, 2, 3]]))
    torch.testing.assert_close(hidden, expected, rtol=0.05, atol=0.05)


def test_loaded_in_inference_mode(saved: Path) -> None:
    """Its weights are inference tensors, which count no versions."""
    rows = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        model = RecGRELA.from_pretrained(saved)
        state = model.prefill(rows[:, :2])
        hidden = model.step(rows[:, 2], state)
        torch.testing.assert_close(hidden, model(rows))
        restored = UserState.from_bytes(state.to_bytes(0), model)
        assert torch.equal(restored.hidden, state.hidden)


@pytest.mark.parametrize(
    ("field", "value"), [(1, 200), (1, 5), (2, 9), (4, -5), (5, 2**32 - 1), (6, 7)]
)
def test_forged_header(field: int, value: int, make_model: MakeModel) -> None:
    """A checksum is no signature: whatever the header says, no other error and no other memory."""
    model = make_model()
    _, body = blob.unseal("test", model.prefill(ITEMS).to_bytes(0), (STATE_MAGIC,), _HEADER.size)
    header = list(_HEADER.unpack_from(body))
    header[field] = value
    forged = blob.seal(STATE_MAGIC, _HEADER.pack(*header) + body[_HEADER.size :])
    with pytest.raises(StateError, match="blob must"):
        UserState.from_bytes(forged, model)
    with pytest.raises(StateError, match="ids must be int32, got 3 bytes"):
        SeenItems.from_bytes(blob.seal(b"RGSI", b"abc"))
