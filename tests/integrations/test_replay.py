"""RePlay trains, validates, predicts and exports with RecGRELA in its encoder slot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from recgrela_ext import RecGRELA, RecGRELAConfig
from recgrela_ext._library import KERNEL_DEVICES
from tests.integrations.walks import walks

pytest.importorskip("replay", reason="RePlay is not installed (`make test-integrations`)")
lightning = pytest.importorskip("lightning", reason="replay-rec[torch] is not installed")

ITEMS, LENGTH = 30, 12
PAD = ITEMS  # RePlay's padding item comes after the last one


@pytest.fixture(scope="module")
def schema() -> Any:
    from replay.data import FeatureHint, FeatureType
    from replay.data.nn import TensorFeatureInfo, TensorSchema

    return TensorSchema(
        [
            TensorFeatureInfo(
                name="item_id",
                is_seq=True,
                padding_value=PAD,
                cardinality=ITEMS,
                embedding_dim=16,
                feature_type=FeatureType.CATEGORICAL,
                feature_hint=FeatureHint.ITEM_ID,
            )
        ]
    )


@pytest.fixture
def make(schema: Any) -> Any:
    def model(**changes: Any) -> Any:
        from replay.nn.loss import CE
        from replay.nn.sequential import SasRec

        from recgrela_ext.integrations.replay import recgrela_body

        torch.manual_seed(0)
        options = {"num_heads": 2, "num_blocks": 2, "dropout": 0.0, "drop_path": 0.0, **changes}
        loss = options.pop("loss", None) or CE(ignore_index=PAD)
        return SasRec(body=recgrela_body(schema, **options), loss=loss)

    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import pandas as pd

    folder = tmp_path_factory.mktemp("parquet")
    log = [[item - 1 for item in walk] for walk in walks(items=ITEMS)]
    users = list(range(len(log)))
    parts = {
        "train": {"user_id": users, "item_id": [walk[:-1] for walk in log]},
        "validate": {
            "user_id": users,
            "item_id": [walk[:-1] for walk in log],
            "ground_truth": [walk[-1:] for walk in log],
        },
    }
    parts["predict"] = {"user_id": users, "item_id": log}
    for name, columns in parts.items():
        pd.DataFrame(columns).to_parquet(folder / f"{name}.parquet")
    return {name: folder / f"{name}.parquet" for name in parts}


def data_module(schema: Any, files: dict[str, Path]) -> Any:
    from replay.data.nn import ParquetModule
    from replay.nn.transform.template import make_default_sasrec_transforms

    items = {"shape": LENGTH, "padding": PAD}
    return ParquetModule(
        train_path=str(files["train"]),
        validate_path=str(files["validate"]),
        predict_path=str(files["predict"]),
        batch_size=16,
        metadata={
            "train": {"item_id": {**items, "shape": LENGTH + 1}},
            "validate": {"item_id": items, "ground_truth": {"shape": 1, "padding": -1}},
            "predict": {"user_id": {}, "item_id": items},
        },
        transforms=make_default_sasrec_transforms(schema),
    )


def trainer(folder: Path, **options: Any) -> Any:
    return lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, **options,
    )  # fmt: skip


def test_trains_validates_and_predicts(
    make: Any, schema: Any, files: dict[str, Path], tmp_path: Path
) -> None:
    from replay.nn.lightning import LightningModule
    from replay.nn.lightning.callback import ComputeMetricsCallback, PandasTopItemsCallback
    from replay.nn.lightning.optimizer import OptimizerFactory

    module = LightningModule(make(), optimizer_factory=OptimizerFactory(learning_rate=0.01))
    data = data_module(schema, files)
    metrics = ComputeMetricsCallback(metrics=["recall"], ks=[5], item_count=ITEMS, verbose=False)
    fitting = trainer(tmp_path, max_epochs=12, callbacks=[metrics])
    fitting.fit(module, datamodule=data)
    recalls = [float(epoch["recall@5"]) for epoch in metrics.get_metrics().values()]
    assert recalls[-1] > 0.5  # 5 of 30 by chance: 0.17
    assert recalls[-1] > recalls[0]

    path = tmp_path / "last.ckpt"
    fitting.save_checkpoint(path)
    again = LightningModule.load_from_checkpoint(path, model=make(), weights_only=False)
    lists = []
    for one in (module, again):
        top = PandasTopItemsCallback(top_k=5, query_column="user_id", item_column="item_id",
                                     rating_column="score")  # fmt: skip
        predicting = trainer(tmp_path, callbacks=[top], inference_mode=True)
        predicting.predict(one.eval(), datamodule=data_module(schema, files),
                           return_predictions=False)  # fmt: skip
        lists.append(top.get_result())
    assert len(lists[0]) == 5 * len(walks(items=ITEMS))
    assert lists[0].item_id.between(0, ITEMS - 1).all()
    assert lists[0].equals(lists[1])


def batch() -> dict[str, Any]:
    items = torch.tensor([[PAD, PAD, PAD, 4, 7, 2], [0, 1, 2, 3, 4, 5], [PAD] * 5 + [9]])
    return {"feature_tensors": {"item_id": items}, "padding_mask": items != PAD}


def test_same_scores_as_the_model(make: Any) -> None:
    theirs = make().eval()
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2}
    ours = RecGRELA(RecGRELAConfig(n_items=ITEMS + 1, padding_idx=PAD, **sizes)).eval()
    table = theirs.body.embedder.feature_embedders["item_id"].emb.weight
    assert not table[PAD].any()
    ours.item_embedding.load_state_dict({"weight": table})
    ours.input_norm, ours.encoder = theirs.body.encoder.input_norm, theirs.body.encoder.encoder
    inputs = batch()
    with torch.no_grad():
        logits = theirs(**inputs)["logits"]
        hidden = ours(inputs["feature_tensors"]["item_id"], padding_side="left")
        torch.testing.assert_close(logits, ours.scores(hidden)[:, :ITEMS])
        chosen = torch.tensor([3, 8, 29])
        some = theirs(**inputs, candidates_to_score=chosen)["logits"]
    torch.testing.assert_close(some, logits[:, chosen])


def test_sampled_loss(make: Any) -> None:
    from replay.nn.loss import CESampled

    model = make(loss=CESampled(ignore_index=PAD))
    inputs = batch()
    labels = inputs["feature_tensors"]["item_id"].roll(-1, 1).unsqueeze(-1)
    model(
        **inputs,
        positive_labels=labels.clamp(max=ITEMS - 1),
        negative_labels=torch.tensor([3, 8, 29]),
        target_padding_mask=inputs["padding_mask"].unsqueeze(-1),
    )["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_starts_as_the_model_does(make: Any) -> None:
    encoder = make().body.encoder.encoder
    assert 0.015 < encoder.layers[0].mlp.fc1.weight.std() < 0.025
    assert 0.4 < encoder.layers[1].modulator.conv_weight.abs().max() <= 0.5


def test_whole_model_exports(make: Any) -> None:
    """For any length; without compiled operators for one, as the reference goes by chunks of it."""
    model, inputs = make().eval(), batch()
    kernels = bool(KERNEL_DEVICES)
    rows, length = torch.export.Dim("rows", min=2), torch.export.Dim("length", min=2, max=500)
    by = {0: rows, 1: length} if kernels else {0: rows}
    columns = 40 if kernels else 6
    shapes = {"feature_tensors": {"item_id": by}, "padding_mask": by}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes)
    longer = {
        "feature_tensors": {"item_id": torch.randint(0, ITEMS, (5, columns))},
        "padding_mask": torch.ones(5, columns, dtype=torch.bool),
    }
    torch.testing.assert_close(
        program.module()(**longer)["logits"], model(**longer)["logits"], rtol=1e-4, atol=1e-5
    )


def test_bidirectional_blocks_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="causal must be True, got False"):
        make(causal=False)


def test_padding_on_the_right_is_refused_where_it_would_be_read(make: Any) -> None:
    """RePlay reads the last position: all scores would be 0."""
    model = make()
    right = torch.tensor([[3, 4, PAD], [PAD, 5, 6], [PAD, PAD, PAD]])
    inputs = {"feature_tensors": {"item_id": right}, "padding_mask": right != PAD}
    with pytest.raises(ValueError, match=r"True at the last position .* in row 0"):
        model.eval()(**inputs)
    fine = {"feature_tensors": {"item_id": right[1:]}, "padding_mask": right[1:] != PAD}
    assert model(**fine)["logits"].shape == (2, ITEMS)


def test_schemas_that_cannot_work(schema: Any) -> None:
    from replay.data import FeatureHint, FeatureType
    from replay.data.nn import TensorFeatureInfo, TensorSchema

    from recgrela_ext.integrations.replay import recgrela_body

    def feature(name: str, width: int, hint: Any = None) -> Any:
        return TensorFeatureInfo(
            name=name, is_seq=True, padding_value=5, cardinality=5, embedding_dim=width,
            feature_type=FeatureType.CATEGORICAL, feature_hint=hint,
        )  # fmt: skip

    item = feature("item_id", 16, FeatureHint.ITEM_ID)
    two = TensorSchema([item, feature("genre", 8)])
    with pytest.raises(ValueError, match=r"every feature in 16 numbers.* got 8 for genre"):
        recgrela_body(two, num_heads=2)
    assert recgrela_body(two, num_heads=2, excluded_features=["genre"])
    for wrong in ("genre", ["gender"]):
        with pytest.raises(ValueError, match="excluded_features must be a list of names"):
            recgrela_body(two, excluded_features=wrong)
    with pytest.raises(ValueError, match="must have one item id feature, got 0"):
        recgrela_body(TensorSchema([feature("genre", 8)]))
