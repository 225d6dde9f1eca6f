"""What a reader found in training and saving: what was lost, trained or stopped in silence."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import recgrela_ext.evaluation
from recgrela_ext import (
    CheckpointError,
    RecGRELA,
    RecGRELAConfig,
    Sequences,
    StateError,
    Targets,
    TrainConfig,
    UserState,
    UserStateStore,
    fit,
)
from recgrela_ext.cli import main
from recgrela_ext.export import check_agreement, traced
from recgrela_ext.integrations.distributed import train_step
from recgrela_ext.training.losses import NegativeSampler

SIZES: dict[str, Any] = {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "max_seq_len": 12}


def model_of(n_items: int = 21, **changes: Any) -> RecGRELA:
    torch.manual_seed(0)
    return RecGRELA(RecGRELAConfig(n_items=n_items, **{**SIZES, **changes}))


@pytest.fixture
def train() -> Sequences:
    rng = np.random.default_rng(0)
    return Sequences.from_lists([rng.integers(1, 21, 9) for _ in range(12)], num_items=20)


# what is saved can be loaded


def _half_table(model: RecGRELA) -> None:
    model.item_embedding.half()


def _not_finite(model: RecGRELA) -> None:
    with torch.no_grad():
        model.encoder.layers[1].in_proj.weight[0, 0] = torch.nan


def _longer_table(model: RecGRELA) -> None:
    model.item_embedding = nn.Embedding(31, 8, padding_idx=0)


def _fewer_layers(model: RecGRELA) -> None:
    model.encoder.layers = model.encoder.layers[:1]


def _no_bias(model: RecGRELA) -> None:
    model.encoder.layers[0].in_proj.bias = None


def _another_buffer(model: RecGRELA) -> None:
    model.register_buffer("more", torch.ones(2))


def _weight_norm(model: RecGRELA) -> None:
    nn.utils.parametrizations.weight_norm(model.encoder.layers[0].in_proj)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_half_table, "dtype of item_embedding.weight"),
        (_not_finite, "NaN or inf in encoder.layers.1.in_proj.weight"),
        (_longer_table, r"item_embedding.weight must be \[21, 8\], got \[31, 8\]"),
        (_fewer_layers, "lacks encoder.layers.1"),
        (_no_bias, "lacks encoder.layers.0.in_proj.bias"),
        (_another_buffer, "has more"),
        (_weight_norm, "lacks encoder.layers.0.in_proj.weight"),
    ],
)
def test_a_saved_model_is_not_replaced_by_none(
    tmp_path: Path, change: Callable[[RecGRELA], None], what: str
) -> None:
    model = model_of()
    model.save_pretrained(tmp_path)
    change(model)
    with pytest.raises(ValueError, match=f"RecGRELA.save_pretrained: model.*{what}"):
        model.save_pretrained(tmp_path)
    assert RecGRELA.from_pretrained(tmp_path).fingerprint() == model_of().fingerprint()


def quantised(model: RecGRELA) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_models(tmp_path: Path) -> None:
    model = model_of().eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.encoder.layers[0].in_proj.weight.mul_(-3)
    first, same, second = quantised(model), quantised(model), quantised(other)
    assert first.fingerprint() == same.fingerprint() != second.fingerprint()
    state = first.prefill(torch.tensor([[1, 2, 3]]))
    same.step(torch.tensor([4]), copy.deepcopy(state))
    with pytest.raises(ValueError, match="weights"):
        second.step(torch.tensor([4]), state)
    with pytest.raises(StateError):
        UserState.from_bytes(state.to_bytes(0), second)
    store = UserStateStore(first, 2)
    store.step([1], torch.tensor([3]))
    store.save(tmp_path / "users")
    with pytest.raises(StateError):
        UserStateStore.load(tmp_path / "users", second)
    with pytest.raises(TypeError, match=r"save_pretrained: encoder.*must be a tensor"):
        first.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.kernels
def test_exporting_keeps_the_mode() -> None:
    model = model_of(dropout=0.5).train()
    model.encoder.layers[0].eval()
    program = traced(model)
    assert check_agreement(model, program.module(), "program") <= 1e-5  # without dropout
    assert model.training
    assert model.encoder.layers[1].training
    assert not model.encoder.layers[0].training


# what is replaced


def test_the_log_of_something_else_is_kept(tmp_path: Path, train: Sequences) -> None:
    path, folder = tmp_path / "plays.csv", tmp_path / "run"
    fit(model_of(), train, steps=1, checkpoint_dir=folder, progress=False)
    for content in ("user,item\n1,2\n", '{"epoch": 1, "step": 1}\nmine\n', '{"a": 1}\n', "[1]"):
        path.write_text(content)
        for options in ({}, {"checkpoint_dir": folder, "resume": "never"}):
            with pytest.raises(ValueError, match="log_file must be the log of a run"):
                fit(model_of(), train, steps=1, log_file=path, progress=False, **options)
        assert path.read_text() == content
    assert any(folder.glob("step-*"))
    for content in ("", '{"epoch": 1, "step": 1}\n{"epo', '{"epoch": 1, "st', "\0\0\0"):
        path.write_text(content)
        fit(model_of(), train, steps=1, log_file=path, progress=False)
        assert len(path.read_text().splitlines()) == 1


# what ends a run


def _interrupting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: the command evaluates again after its training."""
    ours, done = recgrela_ext.evaluation.evaluate, []

    def evaluate(*arguments: Any, **options: Any) -> Any:
        if not done:
            done.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return ours(*arguments, **options)

    monkeypatch.setattr(recgrela_ext.evaluation, "evaluate", evaluate)


def test_ctrl_c_in_the_last_evaluation(
    tmp_path: Path, train: Sequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    valid = Targets.last_of(train)
    with monkeypatch.context() as patch:
        _interrupting(patch)
        with pytest.raises(KeyboardInterrupt):
            fit(model_of(), train, valid, epochs=1, checkpoint_dir=tmp_path, progress=False)
    done = fit(model_of(), train, valid, epochs=1, checkpoint_dir=tmp_path, progress=False)
    assert done.epochs == 1
    assert len(done.history) == 1


def test_ctrl_c_in_the_last_evaluation_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.csv"
    lines = [f"{user},{item},{item}" for user in range(8) for item in range(1, 6)]
    path.write_text("\n".join(["user,item,timestamp", *lines]))
    _interrupting(monkeypatch)
    command = ["train", "--data", str(path), "--out", str(tmp_path / "model"), "--epochs", "1"]
    assert main([*command, "--hidden-size", "8", "--num-layers", "1", "--num-heads", "1"]) == 130


def test_validation_that_cannot_be_ranked_is_refused_before_an_epoch(train: Sequences) -> None:
    none = Targets.last_of(Sequences.from_lists([[1], [2]], num_items=20))
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="fit: valid must hold at least one target"):
        fit(model, train, none, epochs=1, progress=False)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="fit: model must have padding_idx 0 to be validated"):
        fit(model_of(padding_idx=3), train, Targets.last_of(train), epochs=1, progress=False)


def test_a_model_of_inference_mode_is_told_so(train: Sequences) -> None:
    with torch.inference_mode():
        model = model_of()
    with pytest.raises(ValueError, match=r"fit: model must be made .* outside of torch.inference"):
        fit(model, train, epochs=1, progress=False)


def test_resuming_with_other_weights_frozen(tmp_path: Path, train: Sequences) -> None:
    def run(frozen: bool, folder: str, epochs: int) -> None:
        model = model_of()
        model.encoder.requires_grad_(not frozen)
        fit(model, train, epochs=epochs, checkpoint_dir=tmp_path / folder, progress=False)

    for frozen in (False, True):
        run(frozen, f"{frozen}", 1)
        run(frozen, f"{frozen}", 2)
        with pytest.raises(CheckpointError, match="another set of weights that require no grad"):
            run(not frozen, f"{frozen}", 3)


def test_a_torn_best_checkpoint_is_named(tmp_path: Path, train: Sequences) -> None:
    config = TrainConfig(lr=1e-12, checkpoint_every_steps=1, targets_per_step=30)

    def run(epochs: int) -> None:
        fit(model_of(), train, Targets.last_of(train), epochs=epochs, config=config,
            checkpoint_dir=tmp_path, progress=False)  # fmt: skip

    run(2)
    best, newest = sorted(tmp_path.glob("step-*"))[0], sorted(tmp_path.glob("step-*"))[-1]
    assert best != newest
    for file in best.iterdir():
        file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"best weights so far .resume='never' starts over"):
        run(3)


# losses that draw


@pytest.mark.parametrize("loss", ["sampled", "bpr"])
@pytest.mark.parametrize("negatives", ["uniform", "popularity", "in_batch"])
def test_padding_elsewhere_is_never_drawn(loss: str, negatives: str) -> None:
    rng = np.random.default_rng(0)
    train = Sequences.from_lists([rng.integers(1, 5, 12) for _ in range(40)], num_items=5)
    model = model_of(6, padding_idx=5, num_layers=1)
    recipe = TrainConfig(loss=loss, negatives=negatives, lr=1e-2)
    fit(model, train, epochs=2, config=recipe, progress=False)
    assert torch.equal(model.item_embedding.weight[5], torch.zeros(8))


@pytest.mark.parametrize("padding_idx", [0, 2, 4])
@pytest.mark.parametrize("strategy", ["uniform", "popularity"])
def test_every_other_row_is_drawn_as_often_as_said(padding_idx: int, strategy: str) -> None:
    counts = np.array([3, 1, 4, 1, 5])
    sampler = NegativeSampler(5, strategy, counts, padding_idx=padding_idx)
    torch.manual_seed(0)
    drawn = torch.bincount(sampler.draw(200_000, torch.empty(0)), minlength=5) / 200_000
    wanted = torch.from_numpy(counts).double() if strategy == "popularity" else torch.ones(5)
    wanted[padding_idx] = 0
    wanted = wanted / wanted.sum()
    torch.testing.assert_close(drawn.double(), wanted.double(), rtol=0, atol=0.005)
    torch.testing.assert_close(sampler.log_q.double().exp(), wanted.double(), rtol=1e-6, atol=0)


def test_any_power_of_the_popularity(train: Sequences) -> None:
    recipe = TrainConfig(loss="sampled", negatives="popularity", negative_power=400.0)
    done = fit(model_of(), train, epochs=1, config=recipe, progress=False)
    assert np.isfinite(done.history[-1]["loss"])


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_distributed_step_that_is_not_finite_changes_no_weight(clip: float | None) -> None:
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.no_grad():
        model.item_embedding.weight[4] = torch.inf
    before = {name: x.clone() for name, x in model.state_dict().items()}
    rows: tuple[Tensor, None, Tensor] = (torch.tensor([[1, 4]]), None, torch.tensor([[4, 2]]))
    with pytest.raises(ValueError, match="train_step: loss must be finite"):
        train_step(model, optimizer, [rows], clip)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# models that were taken apart


def test_a_table_of_another_length_is_not_ranked() -> None:
    model = model_of()
    _longer_table(model)
    with pytest.raises(ValueError, match="must have the 21 rows of the config, got 31"):
        model.recommend(torch.tensor([[1, 2]]), k=25)


def test_an_encoder_of_other_layers_has_no_state() -> None:
    model = model_of()
    _fewer_layers(model)
    with pytest.raises(ValueError, match="encoder must have the 2 layers of config, got 1"):
        model.prefill(torch.tensor([[1, 2]]))
