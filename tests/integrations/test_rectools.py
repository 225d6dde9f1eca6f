"""RecTools fits, saves and recommends with RecGRELA in its transformer slot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recgrela_ext import RecGRELA, RecGRELAConfig
from tests.integrations.walks import columns

pytest.importorskip("rectools", reason="RecTools is not installed (`make test-integrations`)")
pytest.importorskip("pytorch_lightning", reason="rectools[torch] is not installed")

SIZES: dict[str, Any] = {
    "n_blocks": 2, "n_heads": 2, "n_factors": 16, "session_max_len": 12, "dropout_rate": 0.0,
    "lr": 0.01, "epochs": 3, "batch_size": 16, "deterministic": True,
    "transformer_layers_kwargs": {"drop_path": 0.0},
}  # fmt: skip


@pytest.fixture
def dataset() -> Any:
    import pandas as pd
    from rectools import Columns
    from rectools.dataset import Dataset

    frame = pd.DataFrame(columns()).rename(columns={"timestamp": Columns.Datetime})
    frame[Columns.Datetime] = pd.to_datetime(frame[Columns.Datetime], unit="s")
    frame[Columns.Weight] = 1.0
    return Dataset.construct(frame)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)  # Lightning writes folders where it stands

    def model(**changes: Any) -> Any:
        from pytorch_lightning import seed_everything
        from rectools.models import SASRecModel

        from recgrela_ext.integrations.rectools import SLOT

        seed_everything(0, verbose=False)
        return SASRecModel(**{**SLOT, **SIZES, **changes})

    return model


def loss_of(model: Any, dataset: Any) -> float:
    """Mean training loss of the model as it stands."""
    module = model.lightning_model
    module.eval()
    losses = []
    with torch.no_grad():
        for batch in model.data_preparator.get_dataloader_train():
            logits = module.get_batch_logits(batch)
            losses.append(float(module.loss_calculator(logits, batch["y"], batch["yw"])))
    return float(np.mean(losses))


@pytest.mark.parametrize("loss", ["softmax", "BCE", "gBCE", "sampled_softmax"])
def test_learns_with_every_loss(make: Any, dataset: Any, loss: str) -> None:
    before = make(loss=loss, n_negatives=4, lr=0.0).fit(dataset)
    after = make(loss=loss, n_negatives=4, epochs=10).fit(dataset)
    assert loss_of(after, dataset) < 0.9 * loss_of(before, dataset)


def test_rectools_initialisation_is_undone(make: Any, dataset: Any) -> None:
    backbone = make(lr=0.0).fit(dataset).torch_model
    table = backbone.item_model.item_net_blocks[0].ids_emb.weight
    assert not table[0].any()
    assert 0.015 < table[1:].std() < 0.025
    layers = backbone.transformer_layers
    assert 0.015 < layers.encoder.layers[0].mlp.fc1.weight.std() < 0.025
    conv = layers.encoder.layers[0].modulator.conv_weight  # uniform in ±1/2
    assert 0.4 < conv.abs().max() <= 0.5

    from rectools.models.nn.transformers.lightning import TransformerLightningModule

    theirs = make(lr=0.0, lightning_module_type=TransformerLightningModule).fit(dataset)
    assert theirs.torch_model.item_model.item_net_blocks[0].ids_emb.weight[0].any()


def test_second_fit_goes_on(make: Any, dataset: Any) -> None:
    model = make()
    model.fit_partial(dataset, min_epochs=2, max_epochs=2)
    first = loss_of(model, dataset)
    model.fit_partial(dataset, min_epochs=2, max_epochs=2)
    assert loss_of(model, dataset) < first


def test_same_hidden_states_as_the_model(make: Any, dataset: Any) -> None:
    backbone = make().fit(dataset).torch_model.eval()
    table = backbone.item_model.get_all_embeddings().detach()
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2}
    ours = RecGRELA(RecGRELAConfig(n_items=len(table), **sizes)).eval()
    ours.item_embedding.load_state_dict({"weight": table})
    ours.input_norm = backbone.transformer_layers.input_norm
    ours.encoder = backbone.transformer_layers.encoder
    left = torch.tensor([[0, 0, 0, 4, 7, 2], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 9]])
    wider = torch.nn.functional.pad(left, (5, 0))
    with torch.no_grad():
        hidden = backbone.encode_sessions({"x": left}, table)
        torch.testing.assert_close(hidden, ours.encode(left, padding_side="left"))
        same = backbone.encode_sessions({"x": wider}, table)[:, 5:]
        torch.testing.assert_close(hidden, same, rtol=1e-5, atol=1e-6)
    assert not hidden[left == 0].any()


def test_recommends_the_same_after_saving(make: Any, dataset: Any, tmp_path: Path) -> None:
    from rectools import Columns
    from rectools.models import SASRecModel

    model = make(epochs=8).fit(dataset)
    users = np.arange(1, 21)
    reco = model.recommend(users=users, dataset=dataset, k=5, filter_viewed=True)
    log = {user: set(items) for user, items in dataset.get_raw_interactions()
           .groupby(Columns.User)[Columns.Item]}  # fmt: skip
    assert all(item not in log[user] for user, item in zip(reco.user_id, reco.item_id, strict=True))
    model.save(tmp_path / "model")
    again = SASRecModel.load(tmp_path / "model")
    pd_equal = reco.equals(again.recommend(users=users, dataset=dataset, k=5, filter_viewed=True))
    assert pd_equal
    config = model.get_config(simple_types=True)
    assert config["transformer_layers_type"].endswith("rectools.RecGRELALayers")
    assert isinstance(SASRecModel.from_config(config), SASRecModel)


def test_bidirectional_layers_are_refused(make: Any, dataset: Any) -> None:
    model = make(transformer_layers_kwargs={"causal": False})
    with pytest.raises(ValueError, match="causal must be True, got False"):
        model.fit(dataset)
