"""The loop: limits, early stopping, limits of time, seeds, objectives, AMP, and its errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from recgrela_ext import RecGRELA
from recgrela_ext.data.sequences import Sequences, Targets
from recgrela_ext.evaluation import evaluate
from recgrela_ext.training import TrainConfig, fit, trainer
from recgrela_ext.training.stepper import Stepper

from .conftest import assert_same_bits, make_model, make_sequences, weights_of

QUICK = {"lr": 0.02, "targets_per_step": 60, "checkpoint_every_seconds": None}


def make_recgrela(train: Sequences, **options: object) -> RecGRELA:
    torch.manual_seed(0)
    settings = {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "max_seq_len": 6, **options}
    return RecGRELA.for_data(train, **settings)


def test_learns_the_next_item_and_says_so(train: Sequences, valid: Targets, tmp_path: Path) -> None:
    model = make_recgrela(train)
    log = tmp_path / "run.jsonl"
    result = fit(model, train, valid, epochs=12, config=TrainConfig(**QUICK), log_file=log)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines == result.history
    assert [line["epoch"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    assert result.stopped == "epochs"
    assert result.epochs == 12
    assert result.targets == 12 * (len(train.items) - len(train))
    assert result.best_metric == max(line["valid"]["seen_included/ndcg@10"] for line in lines)
    assert not model.training
    found = evaluate(model, valid, baselines={}, bootstrap=0)["mean"]["ndcg@10"]
    assert found == pytest.approx(result.best_metric, abs=1e-12)
    assert found > 0.5


def test_padding_row_stays_zero(train: Sequences) -> None:
    model = make_recgrela(train)
    fit(model, train, epochs=1, config=TrainConfig(**QUICK, weight_decay=0.1, clip=1.0))
    assert not model.item_embedding.weight[0].any()


def test_same_seed_same_bits_other_seed_other_weights(train: Sequences, valid: Targets) -> None:
    def run(seed: int, noise: int) -> dict[str, torch.Tensor]:
        model = make_model()
        torch.manual_seed(noise)  # the caller's random state plays no part
        fit(model, train, valid, epochs=2, config=TrainConfig(**QUICK, seed=seed))
        return weights_of(model)

    assert_same_bits(run(1, 5), run(1, 6))
    other = run(2, 5)
    assert not torch.equal(run(1, 5)["item_embedding.weight"], other["item_embedding.weight"])


def test_leaves_torch_as_it_was(train: Sequences) -> None:
    before = torch.get_rng_state()
    fit(make_model(), train, steps=2, config=TrainConfig(**QUICK, deterministic=True))
    make_model()
    torch.set_rng_state(before)
    fit(make_model(), train, steps=2)
    assert not torch.are_deterministic_algorithms_enabled()


def test_early_stopping_keeps_the_best_weights(
    train: Sequences, valid: Targets, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.1, 0.4, 0.3, 0.2, 0.35, 0.9])
    seen = []

    def scripted(model: torch.nn.Module, *args: object, **kwargs: object) -> dict[str, object]:
        seen.append(weights_of(model))
        return {"mean": {"seen_included/ndcg@10": next(values)}}

    monkeypatch.setattr("recgrela_ext.evaluation.evaluate", scripted)
    model = make_model()
    result = fit(model, train, valid, config=TrainConfig(**QUICK, patience=3))
    assert result.stopped == "patience"
    assert (result.best_metric, result.best_epoch, result.epochs) == (0.4, 2, 5)
    assert_same_bits(weights_of(model), seen[1])


def test_without_validation_the_last_weights_are_kept(train: Sequences) -> None:
    first, second = make_model(), make_model()
    fit(first, train, epochs=2, config=TrainConfig(**QUICK))
    result = fit(second, train, steps=10_000, epochs=2, config=TrainConfig(**QUICK))
    assert result.best_metric is None
    assert_same_bits(weights_of(first), weights_of(second))


def test_steps_cut_an_epoch_and_are_evaluated(train: Sequences, valid: Targets) -> None:
    result = fit(make_model(), train, valid, steps=3, config=TrainConfig(**QUICK, eval_every=5))
    assert (result.steps, result.epochs, result.stopped) == (3, 0, "steps")
    assert result.best_step == 3
    assert result.history[0]["targets"] == result.targets


def test_minutes_count_training_alone(
    train: Sequences, valid: Targets, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = SimpleNamespace(now=0.0)

    def tick() -> float:
        clock.now += 0.5  # read twice a step, so a step takes half a second
        return clock.now

    monkeypatch.setattr(trainer.time, "perf_counter", tick)

    def slow(*args: object, **kwargs: object) -> dict[str, object]:
        clock.now += 1000.0
        return {"mean": {"seen_included/ndcg@10": 0.5}}

    monkeypatch.setattr("recgrela_ext.evaluation.evaluate", slow)
    options = {"config": TrainConfig(**QUICK, patience=None), "checkpoint_dir": tmp_path}
    model = make_model()
    result = fit(model, train, valid, minutes=5 / 60, **options)
    assert (result.steps, result.seconds, result.stopped) == (10, 5.0, "minutes")
    result = fit(model, train, valid, minutes=8 / 60, **options)
    assert (result.steps, result.seconds) == (16, 8.0)
    monkeypatch.undo()


@pytest.mark.parametrize("packed", [True, False])
def test_packed_and_padded_steps_agree(train: Sequences, packed: bool) -> None:
    config = TrainConfig(**QUICK)
    results = []
    for side in (packed, not packed):
        model = make_recgrela(train, dropout=0.0, drop_path=0.0).double()
        stepper = Stepper(model, train, config)
        assert stepper.packed
        stepper.packed = side
        windows = trainer._make_windows(model, train, config, packed=True)
        batches = list(windows.epoch(0))[:3]
        losses = [stepper.step(batch, i, 1e-2).item() for i, batch in enumerate(batches)]
        results.append((losses, weights_of(model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-10)
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(tensor, results[1][1][name], rtol=1e-6, atol=1e-8)


def test_accumulation_changes_nothing(train: Sequences) -> None:
    models = []
    for positions in (65_536, 20):
        model = make_recgrela(train, dropout=0.0, drop_path=0.0).double()
        fit(model, train, steps=4, config=TrainConfig(**QUICK, positions_per_pass=positions))
        models.append(weights_of(model))
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "sampled", "num_negatives": 10},
        {"loss": "sampled", "negatives": "popularity", "negative_power": 0.5},
        {"loss": "sampled", "negatives": "in_batch"},
        {"loss": "bpr"},
        {"objective": "prefix"},
        {"context": 4, "max_seq_len": 4},
        {"max_seq_len": 0},
        {"schedule": "cosine", "decay": 0.5, "warmup_steps": 5, "clip": 1.0},
        {"ema": 0.9},
        {"amp": "bfloat16"},
        {"amp": "float16", "clip": 1.0},
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()),
)
@pytest.mark.parametrize("kind", ["RecGRELA", "TinyGRU"])
def test_every_recipe_learns(
    train: Sequences, valid: Targets, kind: str, options: dict[str, object]
) -> None:
    softmax = options.get("loss", "softmax") == "softmax"  # which alone trains a repeat bias
    model = make_recgrela(train, repeat_bias=softmax) if kind == "RecGRELA" else make_model()
    result = fit(model, train, valid, epochs=6, config=TrainConfig(**{**QUICK, **options}))
    losses = [line["loss"] for line in result.history]
    assert losses[-1] < 0.85 * losses[0]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("attend_padding", [True, False])
def test_bidirectional_model_trains_on_prefixes(train: Sequences, attend_padding: bool) -> None:
    model = make_recgrela(train, causal=False, attend_padding=attend_padding)
    lengths = []
    encode = model.loss

    def watched(item_seq: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        lengths.append(item_seq.shape[1])
        assert ((rest[1] != 0).sum(1) == 1).all()
        return encode(item_seq, *rest)

    model.loss = watched  # type: ignore[method-assign]
    result = fit(model, train, epochs=3, config=TrainConfig(**QUICK))
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert (set(lengths) == {6}) == attend_padding
    with pytest.raises(ValueError, match="objective must be prefix"):
        fit(model, train, epochs=1, config=TrainConfig(objective="dense"))


def test_learning_rate_follows_the_schedule() -> None:
    linear = TrainConfig(lr=1.0, schedule="linear", decay=0.2)
    rates = [linear.learning_rate(5, p) for p in (0.0, 0.79, 0.8, 0.9, 0.95, 1.0, 1.1)]
    assert rates == pytest.approx([1, 1, 1, 0.5, 0.25, 0, 0])
    cosine = TrainConfig(lr=1.0, schedule="cosine", decay=1.0)
    assert cosine.learning_rate(5, 0.5) == pytest.approx(0.5)
    assert cosine.learning_rate(5, 1 / 3) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 3))
    warm = TrainConfig(lr=1.0, warmup_steps=3)
    assert [warm.learning_rate(s, 0.0) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_averaged_weights_are_what_is_kept(train: Sequences) -> None:
    config = TrainConfig(**QUICK, ema=0.5)
    model = make_model()
    stepper = Stepper(model, train, config)
    average = weights_of(model)
    for number, batch in enumerate(trainer._make_windows(model, train, config, False).epoch(0)):
        stepper.step(batch, number, 0.02)
        keep = min(0.5, (1 + number) / (10 + number))
        for name, tensor in weights_of(model).items():
            average[name] = keep * average[name] + (1 - keep) * tensor
    kept = stepper.kept_weights()
    raw = weights_of(model)
    with stepper.averaged():
        assert_same_bits(weights_of(model), kept)
    assert_same_bits(weights_of(model), raw)
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, average[name])


def test_loss_that_is_not_finite_names_its_step(train: Sequences, tmp_path: Path) -> None:
    model = make_model()
    loss, calls = model.loss, []

    def broken(*args: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return loss(*args) * (math.nan if len(calls) == 4 else 1.0)

    model.loss = broken  # type: ignore[method-assign]
    config = TrainConfig(**{**QUICK, "checkpoint_every_steps": 1})
    with pytest.raises(ValueError, match=r"loss must be finite, got nan at step 4 \(epoch 1\)"):
        fit(model, train, epochs=3, config=config, checkpoint_dir=tmp_path)
    assert sorted(p.name for p in tmp_path.glob("step-*"))[-1] == "step-0000000003"


def test_progress_bar_shows_loss_and_speed(
    train: Sequences, valid: Targets, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(make_model(), train, valid, epochs=1, config=TrainConfig(**QUICK), progress=True)
    shown = capsys.readouterr()
    assert "targets/s" in shown.err
    assert "loss" in shown.err
    assert "seen_included/ndcg@10" in shown.err
    fit(make_model(), train, epochs=1, config=TrainConfig(**QUICK))
    assert capsys.readouterr() == ("", ""), "no bar off a terminal"


def test_bad_arguments_give_one_line(train: Sequences, valid: Targets) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="epochs, steps or minutes must be given"):
        fit(model, train)
    with pytest.raises(ValueError, match="epochs must be a positive number, got 0"):
        fit(model, train, epochs=0)
    with pytest.raises(ValueError, match="steps must be a whole number"):
        fit(model, train, steps=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="resume must be"):
        fit(model, train, epochs=1, resume="perhaps")
    with pytest.raises(ValueError, match="must have the model's n_items=31, got 6"):
        fit(model, Sequences.from_lists([[1, 2, 5]]), epochs=1)
    with pytest.raises(TypeError, match="model must have an item_embedding, got Linear"):
        fit(torch.nn.Linear(2, 2), train, epochs=1)
    with pytest.raises(ValueError, match="at least two items"):
        fit(model, Sequences.from_lists([[1], [2]], 30), epochs=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.0),
        ("lr", math.nan),
        ("weight_decay", -1.0),
        ("clip", 0.0),
        ("schedule", "step"),
        ("decay", 0.0),
        ("ema", 1.0),
        ("objective", "cloze"),
        ("max_seq_len", -1),
        ("targets_per_step", 0),
        ("targets_per_step", 3.5),
        ("loss", "hinge"),
        ("negatives", "hard"),
        ("metric", "auc"),
        ("metric", "seen_included/ndcg@0"),
        ("patience", 0),
        ("amp", "int8"),
        ("seed", -1),
        ("betas", (0.9,)),
        ("checkpoint_every_seconds", -1.0),
    ],
)
def test_config_names_a_bad_field(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"TrainConfig: {name} must"):
        TrainConfig(**{name: value})  # type: ignore[arg-type]


def test_config_round_trip() -> None:
    config = TrainConfig(lr=0.01, betas=(0.8, 0.95), amp="bfloat16")
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="known one, got speed"):
        TrainConfig.from_dict({"speed": 3})


def test_plain_metric_name_is_seen_included(train: Sequences, valid: Targets) -> None:
    config = TrainConfig(**QUICK, metric="mrr@3")
    result = fit(make_model(), train, valid, epochs=1, config=config)
    assert result.best_metric == result.history[0]["valid"]["seen_included/mrr@3"]
    assert make_sequences().num_items == 30
