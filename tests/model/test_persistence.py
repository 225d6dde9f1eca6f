from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from recgrela_ext.data import IdMap
from recgrela_ext.errors import CheckpointError
from recgrela_ext.model import RecGRELA

MakeModel = Callable[..., RecGRELA]
ITEMS = torch.tensor([[5, 6, 7, 5], [9, 8, 0, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip(make_model: MakeModel, tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_model(dtype, position="learned", rotary="per_head", repeat_share=0.5)
    model.save_pretrained(tmp_path / "deep" / "folder")
    back = RecGRELA.from_pretrained(tmp_path / "deep" / "folder")
    assert back.config == model.config
    assert not back.training
    assert back.item_embedding.weight.dtype == dtype
    assert torch.equal(back(ITEMS), model(ITEMS))
    assert back.fingerprint() == model.fingerprint()
    names = sorted(os.listdir(tmp_path / "deep" / "folder"))
    assert names == ["config.json", "model.safetensors"]
    model.save_pretrained(tmp_path / "deep" / "folder")  # overwriting is fine


def test_id_map_travels_with_the_model(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    model.id_map = IdMap(np.array(["ann", "bob"]), np.array([f"item {i}" for i in range(49)]))
    model.save_pretrained(tmp_path)
    back = RecGRELA.from_pretrained(tmp_path)
    assert back.config.id_map_file == "id_map.json"
    assert back.id_map is not None
    assert back.id_map.encode_items(["item 3"]).tolist() == [4]


def test_rotary_buffer_is_not_saved_and_not_cast(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(torch.float32)
    layer = model.encoder.layers[0].attention
    want = layer.inv_freq.clone()
    model.bfloat16().half()
    assert layer.inv_freq.dtype == torch.float64
    assert torch.equal(layer.inv_freq, want)
    model.save_pretrained(tmp_path)
    assert not [n for n in load_file(tmp_path / "model.safetensors") if "freq" in n]


def saved(make_model: MakeModel, folder: Path) -> Path:
    make_model().save_pretrained(folder)
    return folder


def test_missing_files(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json must be readable: No such file"):
        RecGRELA.from_pretrained(tmp_path)
    (saved(make_model, tmp_path) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors must be readable"):
        RecGRELA.from_pretrained(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_weights(make_model: MakeModel, tmp_path: Path, kept: int) -> None:
    path = saved(make_model, tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="must be a whole safetensors file"):
        RecGRELA.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be JSON"),
        ('{"version": 1, ', "must be JSON"),
        ("[1, 2]", "must be a JSON object"),
        ('{"version": 3}', "must have version 1, got 3"),
        ("{}", "must have version 1, got None"),
        ('{"version": 1, "hidden_size": 64}', "n_items must be given"),
    ],
)
def test_bad_config_file(make_model: MakeModel, tmp_path: Path, text: str, message: str) -> None:
    (saved(make_model, tmp_path) / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        RecGRELA.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_files_of_two_models(make_model: MakeModel, tmp_path: Path) -> None:
    first, second = saved(make_model, tmp_path / "a"), saved(make_model, tmp_path / "b")
    os.replace(second / "model.safetensors", first / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"must be the weights config.json was saved with"):
        RecGRELA.from_pretrained(first)
    fields = json.loads((first / "config.json").read_text())
    del fields["weights_sha256"]
    fields["num_layers"] = 3
    (first / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"lacks encoder.layers.2"):
        RecGRELA.from_pretrained(first)


def test_interrupted_saving_leaves_the_old_model(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make_model()
    old.save_pretrained(tmp_path)

    def fail(handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        make_model().save_pretrained(tmp_path)
    assert torch.equal(RecGRELA.from_pretrained(tmp_path)(ITEMS), old(ITEMS))
    assert len(os.listdir(tmp_path)) == 2


def test_fingerprint_after_an_additional_tensor(make_model: MakeModel) -> None:
    model = make_model()
    first = model.fingerprint()
    model.encoder.layers[0].register_parameter("scale", nn.Parameter(torch.ones(1)))
    second = model.fingerprint()
    model.encoder.layers[0].in_proj.register_buffer("scale", torch.ones(1))
    assert len({first, second, model.fingerprint()}) == 3


def test_pickle_and_deepcopy(make_model: MakeModel) -> None:
    model = make_model()
    model.fingerprint()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ITEMS), model(ITEMS))
        assert other.fingerprint() == model.fingerprint()
        with torch.no_grad():
            other.item_embedding.weight[5] += 1
        assert other.fingerprint() != model.fingerprint()
        assert not torch.equal(other(ITEMS), model(ITEMS))
