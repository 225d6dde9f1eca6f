"""The mixin's save and load: config, weights, id map and a card that says what the model is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from recgrela_ext import RecGRELA as Model
from recgrela_ext import RecGRELAConfig, evaluate
from recgrela_ext.data.synthetic import make_synthetic
from recgrela_ext.errors import CheckpointError

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

SMALL = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def split() -> Any:
    return make_synthetic(60, 120, mean_length=8)[0].leave_one_out()


@pytest.fixture
def trained(split: Any) -> Model:
    torch.manual_seed(0)
    return Model.for_data(split[0], **SMALL).eval()


def test_round_trip(trained: Model, split: Any, tmp_path: Path) -> None:
    from recgrela_ext.integrations.hub import RecGRELA

    result = evaluate(trained, split[2], baselines={}, bootstrap=0)
    model = RecGRELA.from_model(trained)
    model.save_pretrained(tmp_path, model_card_kwargs={"result": result, "license": "mit"})
    again = RecGRELA.from_pretrained(tmp_path)
    assert again.config == model.config.replace(id_map_file="id_map.json")
    assert again.id_map.item_ids.tolist() == trained.id_map.item_ids.tolist()
    item_seq = torch.tensor([[3, 1, 4], [1, 5, 0]])
    assert torch.equal(again(item_seq), trained(item_seq))
    assert not again.training
    assert torch.equal(Model.from_pretrained(tmp_path)(item_seq), trained(item_seq))
    assert isinstance(RecGRELA.from_pretrained(str(tmp_path), device="cpu"), RecGRELA)

    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert "license: mit" in card
    assert "no published figure belongs to it" in card
    assert f"Data: {result['data']}, order `{result['order']}`" in card
    assert result["target_sha256"] in card
    assert f"| ndcg@10 | {result['mean']['ndcg@10']:.4f} |" in card


def test_the_plain_models_folder_and_the_published_mode(tmp_path: Path) -> None:
    from recgrela_ext.integrations.hub import RecGRELA

    plain = Model(RecGRELAConfig.paper(n_items=9, hidden_size=16, num_layers=2, num_heads=2)).eval()
    plain.double().save_pretrained(tmp_path)
    model = RecGRELA.from_pretrained(tmp_path)
    item_seq = torch.tensor([[3, 1, 4, 0]])
    assert torch.equal(model(item_seq), plain(item_seq))
    card = str(model.generate_model_card(data="plays of my shop, our own"))
    assert "This is the published bidirectional model" in card
    assert "Data: plays of my shop, our own" in card
    assert "Protocol: not stated" in card
    assert "id map absent" in card


def test_from_and_to_the_hub(
    trained: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's transfers are replaced by copies."""
    import huggingface_hub.hub_mixin as mixin

    from recgrela_ext.integrations import hub

    remote, local = tmp_path / "remote", tmp_path / "local"
    uploaded: list[str] = []

    class Api:
        def __init__(self, **_: Any) -> None: ...

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id: str, folder_path: Path, **_: Any) -> str:
            shutil.copytree(folder_path, remote)
            uploaded.extend(path.name for path in Path(folder_path).iterdir())
            return repo_id

    def snapshot(model_id: str, allow_patterns: list[str], **where: Any) -> str:
        assert model_id == "me/model"
        assert where["revision"] == "main"
        local.mkdir()
        for name in allow_patterns:
            shutil.copy(remote / name, local / name)
        return str(local)

    monkeypatch.setattr(mixin, "HfApi", Api)
    monkeypatch.setattr(mixin, "hf_hub_download", lambda **_: str(remote / "config.json"))
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    hub.RecGRELA.from_model(trained).push_to_hub("me/model")
    assert sorted(uploaded) == ["README.md", "config.json", "id_map.json", "model.safetensors"]
    model = hub.RecGRELA.from_pretrained("me/model", revision="main")
    assert model.id_map.num_items == trained.id_map.num_items
    item_seq = torch.tensor([[3, 1, 4]])
    assert torch.equal(model(item_seq), trained(item_seq))


def test_torn_files_are_refused(trained: Model, tmp_path: Path) -> None:
    from recgrela_ext.integrations.hub import RecGRELA

    RecGRELA.from_model(trained).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="must be a whole safetensors file"):
        RecGRELA.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", [b"[1]", b"{", b"\xff{}", b"[" * 100_000])
@pytest.mark.parametrize("where", ["folder", "Hub"])
def test_config_that_is_none(
    trained: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: bytes, where: str
) -> None:
    import huggingface_hub.hub_mixin as mixin

    from recgrela_ext.integrations.hub import RecGRELA

    RecGRELA.from_model(trained).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(config)
    monkeypatch.setattr(mixin, "hf_hub_download", lambda **_: str(tmp_path / "config.json"))
    with pytest.raises(CheckpointError, match=r"must be (a )?JSON"):
        RecGRELA.from_pretrained(tmp_path if where == "folder" else "me/model")


def test_nothing_but_the_models_files_is_asked_for(
    trained: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.hub_mixin as mixin

    from recgrela_ext.integrations import hub

    hub.RecGRELA.from_model(trained).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "id_map_file": "*"}))
    monkeypatch.setattr(mixin, "hf_hub_download", lambda **_: str(path))
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("asked for *"))
    with pytest.raises(CheckpointError, match="id_map_file must be a plain file name"):
        hub.RecGRELA.from_pretrained("me/model")


def test_hostile_card(trained: Model, split: Any) -> None:
    from recgrela_ext.integrations.hub import RecGRELA

    model = RecGRELA.from_model(trained)
    hostile = "mit\ntags: [evil]"
    assert model.generate_model_card(license=hostile).data.license == hostile
    card = model.generate_model_card(license="a: b", data="x\n---\n# Mine <img src=y>\n| a |")
    assert card.data.license == "a: b"
    assert "- Data: x --- # Mine &lt;img src=y> \\| a \\|\n" in str(card)
    result = evaluate(trained, split[2], baselines={}, bootstrap=0)
    result = {**result, "mean": {"a|b\n# c": 0.5}, "data": "log\n# d"}
    card = model.generate_model_card(result=result)
    assert "| a\\|b # c | 0.5000 |" in str(card)
    assert "- Data: log # d, order" in str(card)
    with pytest.raises(ValueError, match="result must be what evaluate returns, got one without"):
        model.generate_model_card(result=result["mean"])


def test_mistakes(trained: Model, tmp_path: Path) -> None:
    from recgrela_ext.integrations.hub import RecGRELA

    with pytest.raises(TypeError, match="model must be a RecGRELA, got Linear"):
        RecGRELA.from_model(torch.nn.Linear(2, 2))
    RecGRELA.from_model(trained).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="options must be known, got colour"):
        RecGRELA.from_pretrained(tmp_path, colour="red")
    there = RecGRELA.from_pretrained(tmp_path, map_location="meta")
    assert there.item_embedding.weight.device.type == "meta"
