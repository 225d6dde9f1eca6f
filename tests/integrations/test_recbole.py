"""RecBole 1.2.1 trains and evaluates the adapter, in an environment of its own."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recgrela_ext import CheckpointError
from recgrela_ext.data.sequences import Sequences, Targets
from recgrela_ext.evaluation import evaluate
from recgrela_ext.integrations.published import published_state_dict, read_checkpoint

pytest.importorskip("recbole", reason="RecBole is not installed (`make test-integrations`)")

MODES = ("causal", "paper")


@pytest.fixture(scope="module")
def log_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 users who walk through 30 items, as RecBole's atomic file."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(1, 41):
        walk = (user + np.cumsum(rng.integers(1, 3, rng.integers(5, 12)))) % 30 + 1
        lines += [f"{user}\t{item}\t{time}" for time, item in enumerate(walk)]
    (folder / "walks").mkdir()
    (folder / "walks" / "walks.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def recbole_run(log_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)  # RecBole writes log folders where it stands
    monkeypatch.setattr("sys.argv", ["recbole"])
    monkeypatch.delenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", raising=False)

    def prepare(**changes: Any) -> tuple[Any, Any, tuple[Any, Any, Any]]:
        from recbole.config import Config
        from recbole.data import create_dataset, data_preparation
        from recbole.utils import init_seed

        from recgrela_ext.integrations.recbole import RecGRELA, SafeTrainer

        settings = {
            "data_path": str(log_folder),
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "MAX_ITEM_LIST_LENGTH": 8,
            "hidden_size": 16,
            "num_heads": 2,
            "num_layers": 2,
            "loss_type": "CE",
            "train_neg_sample_args": None,
            "epochs": 3,
            "learning_rate": 0.01,
            "train_batch_size": 64,
            "eval_args": {
                "split": {"LS": "valid_and_test"},
                "order": "TO",
                "group_by": "user",
                "mode": "full",
            },
            "metrics": ["Hit", "NDCG", "MRR"],
            "topk": [5, 10],
            "valid_metric": "NDCG@10",
            "use_gpu": False,
            "checkpoint_dir": str(tmp_path / "saved"),
            **changes,
        }
        config = Config(model=RecGRELA, dataset="walks", config_dict=settings)
        init_seed(config["seed"], config["reproducibility"])
        data = data_preparation(config, create_dataset(config))
        model = RecGRELA(config, data[0].dataset)
        return SafeTrainer(config, model), model, data

    return prepare


@pytest.mark.parametrize(
    "settings", [*({"mode": mode} for mode in MODES), {"repeat_bias": True}], ids=str
)
def test_recbole_trains_and_its_metrics_are_ours(
    recbole_run: Any, settings: dict[str, Any]
) -> None:
    trainer, model, (train, valid, test) = recbole_run(**settings)
    assert model.model.config.repeat_bias is ("repeat_bias" in settings)
    trainer.fit(train, valid, verbose=False, show_progress=False)
    losses = list(trainer.train_loss_dict.values())
    assert losses[-1] < losses[0]
    recbole = trainer.evaluate(test, load_best_model=True, show_progress=False)

    rows = test.dataset.inter_feat
    histories = [
        [*items[:length].tolist(), int(target)]
        for items, length, target in zip(
            rows["item_id_list"], rows["item_length"], rows["item_id"], strict=True
        )
    ]
    targets = Targets.last_of(Sequences.from_lists(histories, model.n_items - 1))
    ours = evaluate(model.model, targets, baselines={}, bootstrap=0)["mean"]
    # RecBole rounds to four digits; twenty targets often leave a mean in the middle of two.
    assert dict(recbole) == pytest.approx({name: ours[name] for name in recbole}, abs=5.1e-5)

    weights = published_state_dict(trainer.saved_model_file)
    assert all(name.startswith("model.") for name in weights)


def test_training_goes_on_from_a_checkpoint(recbole_run: Any) -> None:
    """SafeTrainer reads what RecBole wrote, which torch.load refuses by default."""
    first, _, (train, valid, _) = recbole_run(epochs=2)
    first.fit(train, valid, verbose=False, show_progress=False)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(first.saved_model_file)
    second, model, (train, valid, test) = recbole_run(epochs=5)
    second.resume_checkpoint(first.saved_model_file)
    saved = read_checkpoint(first.saved_model_file)
    assert second.start_epoch == saved["epoch"] + 1
    assert isinstance(saved["best_valid_score"], float)
    assert second.best_valid_score == first.best_valid_score
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, saved["state_dict"][name])
    moments = second.optimizer.state_dict()["state"]
    assert torch.equal(moments[0]["exp_avg"], saved["optimizer"]["state"][0]["exp_avg"])
    second.fit(train, valid, verbose=False, show_progress=False)
    assert sorted(second.train_loss_dict) == list(range(second.start_epoch, 5))

    fresh, _, (_, _, test) = recbole_run()
    told = [
        trainer.evaluate(test, model_file=second.saved_model_file) for trainer in (fresh, second)
    ]
    assert told[0] == told[1]


def test_published_yaml_keys(log_folder: Path, tmp_path: Path, recbole_run: Any) -> None:
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation

    from recgrela_ext import RecGRELAConfig
    from recgrela_ext.integrations.recbole import RecGRELA

    path = tmp_path / "RecGRELA.yaml"
    keys = ["hidden_size: 32", "num_heads: 2", "num_layers: 3", "dropout_prob: 0.2",
            "drop_path: 0.3", "loss_type: 'CE'", "MAX_ITEM_LIST_LENGTH: 40",
            "train_neg_sample_args: ~", "USER_ID_FIELD: user_id", "ITEM_ID_FIELD: item_id",
            "load_col:", "    inter: [user_id, item_id, timestamp]"]  # fmt: skip
    path.write_text("\n".join(keys), encoding="utf-8")
    for mode, make in (("causal", RecGRELAConfig), ("paper", RecGRELAConfig.paper)):
        given = {"data_path": str(log_folder), "mode": mode, "use_gpu": False}
        config = Config(RecGRELA, "walks", config_file_list=[str(path)], config_dict=given)
        dataset = data_preparation(config, create_dataset(config))[0].dataset
        expected = make(n_items=dataset.item_num, hidden_size=32, num_heads=2, num_layers=3,
                        dropout=0.2, drop_path=0.3, max_seq_len=40)  # fmt: skip
        assert RecGRELA(config, dataset).model.config == expected


def test_bpr_trains(recbole_run: Any) -> None:
    sampled = {"distribution": "uniform", "sample_num": 1}
    trainer, _, (train, _, _) = recbole_run(loss_type="BPR", train_neg_sample_args=sampled)
    trainer.fit(train, None, verbose=False, saved=False, show_progress=False)
    losses = list(trainer.train_loss_dict.values())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("repeat_bias", [False, True])
def test_prediction_is_a_column_of_the_full_scores(recbole_run: Any, repeat_bias: bool) -> None:
    _, model, (train, _, _) = recbole_run(repeat_bias=repeat_bias)
    if repeat_bias:
        torch.nn.init.normal_(model.model.repeat_bias.weight)
    batch = next(iter(train))
    model.eval()
    scores = model.full_sort_predict(batch)
    assert scores.shape == (len(batch), model.n_items)
    chosen = scores.gather(1, batch["item_id"][:, None])[:, 0]
    torch.testing.assert_close(model.predict(batch), chosen)


def test_published_weights_are_read(recbole_run: Any, golden_dir: Path) -> None:
    from safetensors import safe_open

    from recgrela_ext import RecGRELA, RecGRELAConfig

    with safe_open(golden_dir / "model_right_padded.safetensors", "pt") as file:
        golden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        sizes = {
            name: int(file.metadata()[name]) for name in ("num_layers", "num_heads", "hidden_size")
        }
    published = {
        name.removeprefix("param/"): value
        for name, value in golden.items()
        if name.startswith("param/")
    }
    _, model, _ = recbole_run()
    with pytest.raises(ValueError, match="mode must be paper for published weights, got causal"):
        model.load_state_dict(published)

    _, model, _ = recbole_run(mode="paper", **sizes)
    # The golden catalogue in place of the log's.
    config = RecGRELAConfig.paper(n_items=len(published["item_embedding.weight"]), **sizes)
    model.model = RecGRELA(config).double()
    model.load_state_dict(published)
    model.eval()
    inter = {"item_id_list": golden["item_seq"], "item_length": golden["item_seq_len"]}
    torch.testing.assert_close(
        model.full_sort_predict(inter), golden["scores"], rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"mode": "both"}, "mode must be causal or paper, got 'both'"),
        ({"loss_type": "BPR", "repeat_bias": True}, "loss_type must be CE with repeat_bias"),
        ({"loss_type": "MSE"}, "loss_type must be CE or BPR, got 'MSE'"),
        ({"loss_type": "BPR"}, "train_neg_sample_args must be given for BPR, got none"),
    ],
)
def test_unknown_settings(recbole_run: Any, changes: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        recbole_run(**changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_heads": 4}, "num_heads must be 2, as in the checkpoint, got 4"),
        ({"mode": "paper"}, "mode must be 'causal', as in the checkpoint, got 'paper'"),
    ],
)
def test_weights_of_another_model_are_refused(
    recbole_run: Any, changes: dict[str, Any], text: str
) -> None:
    """Neither is told by the weights' shapes, and both would give other numbers."""
    first, _, (train, valid, test) = recbole_run(epochs=1)
    first.fit(train, valid, verbose=False, show_progress=False)
    other, model, _ = recbole_run(**changes)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for use in (lambda path: other.evaluate(test, model_file=path), other.resume_checkpoint):
        with pytest.raises(CheckpointError, match=text):
            use(first.saved_model_file)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_checkpoints_that_lack_something(recbole_run: Any, tmp_path: Path) -> None:
    first, model, (train, valid, _) = recbole_run(epochs=1)
    first.fit(train, valid, verbose=False, show_progress=False)
    whole = {**read_checkpoint(first.saved_model_file), "config": {}}
    path = tmp_path / "changed.pth"
    trainer, _, _ = recbole_run()
    for name in ("epoch", "cur_step", "best_valid_score", "state_dict", "optimizer"):
        torch.save({**whole, name: None}, path)
        with pytest.raises(CheckpointError, match=f"must hold {name}, got NoneType"):
            trainer.resume_checkpoint(path)
    torch.save({**whole, "other_parameter": [1]}, path)
    with pytest.raises(CheckpointError, match="must hold other_parameter, got list"):
        trainer.resume_checkpoint(path)
    assert trainer.start_epoch == 0
    with pytest.raises(RuntimeError, match="Missing key"):  # not taken for published weights
        model.load_state_dict({})


def test_lengths_that_do_not_fit(recbole_run: Any) -> None:
    _, model, (train, _, _) = recbole_run()
    batch = next(iter(train))
    wrong = {name: batch[name] for name in ("item_id_list", "item_length", "item_id")}
    with pytest.raises(ValueError, match=r"item_seq_len must lie in 0\.\.8, got 9"):
        model.calculate_loss({**wrong, "item_length": torch.full_like(batch["item_length"], 9)})
