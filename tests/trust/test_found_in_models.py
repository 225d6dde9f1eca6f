"""What a reader found in models, training and commands: silent differences, what was lost."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recgrela_ext import (
    CheckpointError,
    Interactions,
    RecGRELA,
    RecGRELAConfig,
    StateError,
    TrainConfig,
    UserStateStore,
    evaluate,
    fit,
)
from recgrela_ext.cli import main
from recgrela_ext.evaluation.ranking import rank_targets
from recgrela_ext.evaluation.recommend import recommend_for_users
from recgrela_ext.files import write_files
from recgrela_ext.model import persistence
from recgrela_ext.training.checkpoint import CheckpointFolder

ITEMS = torch.tensor([[3, 7, 1, 9], [4, 4, 2, 8], [5, 6, 7, 1]])


def model_of(**changes: Any) -> RecGRELA:
    """At initialisation the layers add almost nothing, which would hide what they do wrong."""
    torch.manual_seed(0)
    config = RecGRELAConfig(n_items=50, hidden_size=32, num_layers=2, num_heads=2, **changes)
    model = RecGRELA(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(10)
        model.item_embedding.weight[0] = 0
    return model


class Scaled(nn.Module):
    """In the place of a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return twice(self, arguments, self.inner(*arguments, **options))


def twice(module: nn.Module, inputs: Any, out: Any) -> Any:
    return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out


@pytest.mark.parametrize("selector", ["silu", "balance"])
@pytest.mark.parametrize(
    "name",
    ["layers.0", "layers.1.modulator", "layers.0.mlp", "layers.0.drop_path", "layers.1.out_proj",
     "layers.1.norm2"],
)  # fmt: skip
@pytest.mark.parametrize("way", ["hook", "module", "forward"])
def test_a_step_does_what_encode_does(name: str, way: str, selector: str) -> None:
    model = model_of(selector=selector)
    parent, _, last = name.rpartition(".")
    module = model.encoder.get_submodule(name)
    state = model.prefill(ITEMS[:, :2])
    plain = model.step(ITEMS[:, 2], state)  # also: what was packed must be packed anew
    if way == "hook":
        module.register_forward_hook(twice)
    elif way == "module":
        if name == "layers.1.modulator":
            pytest.skip("a block needs its modulator's `gate`, which a wrapper hides")
        model.encoder.get_submodule(parent).register_module(last, Scaled(module))
    else:
        inner = module.forward
        module.forward = lambda *a, **o: twice(module, a, inner(*a, **o))  # type: ignore[method-assign]
    with torch.no_grad():
        want = model.encode(ITEMS)
    state = model.prefill(ITEMS[:, :2])
    torch.testing.assert_close(model.step(ITEMS[:, 2], state), want[:, 2], rtol=1e-4, atol=1e-4)
    fourth = ITEMS[:, 3].clone()
    fourth[1] = 0
    after = model.step(fourth, state)
    torch.testing.assert_close(after[[0, 2]], want[[0, 2], 3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after[1], want[1, 2], rtol=1e-4, atol=1e-4)
    assert (plain - want[:, 2]).abs().max() > 0.1


def test_a_compiled_forward_is_its_own() -> None:
    model = model_of()
    block = model.encoder.layers[0]
    block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
    block.mlp.forward = torch.compiler.disable(block.mlp.forward)  # type: ignore[union-attr]
    assert model.encoder.packed_weights() is not None
    block.forward = torch.compile(lambda *a, **o: None)  # type: ignore[method-assign,misc]
    model.encoder.layers[1].forward = model.encoder.layers[1].forward  # type: ignore[method-assign]
    assert model.encoder.packed_weights() is None


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.fixture
def log() -> Interactions:
    rng = np.random.default_rng(0)
    columns = {"user": np.repeat(np.arange(20), 6), "item": rng.integers(0, 49, 120)}
    return Interactions.from_frame({**columns, "timestamp": np.arange(120)})


@pytest.mark.parametrize("root", [True, False])
def test_every_part_keeps_its_mode(log: Interactions, root: bool) -> None:
    train, _, test = log.leave_one_out()
    model = RecGRELA.for_data(train, hidden_size=16, num_layers=1, num_heads=1, dropout=0.5)
    with torch.no_grad():
        model.encoder.layers[0].mlp.fc2.weight.normal_()  # type: ignore[union-attr,operator]
    model.train(root)
    model.encoder.train(not root)
    before = modes(model)
    items = torch.tensor([[3, 2, 1]])
    calls: dict[str, Callable[[], Any]] = {
        "recommend": lambda: model.recommend(items, exclude_seen=False).scores,
        "step": lambda: model.step(items[:, 0], model.prefill(items)),
        "encode_packed": lambda: model.prefill_packed(items[0], torch.tensor([0, 3])).hidden,
        "evaluate": lambda: torch.tensor(
            list(evaluate(model, test, progress=False)["mean"].values())
        ),
    }
    for name, call in calls.items():
        first = call()
        assert modes(model) == before, name
        assert torch.equal(first, call()), name  # no dropout
        assert modes(model) == before, name


def test_blocks_are_whole_numbers(log: Interactions) -> None:
    train, _, test = log.leave_one_out()
    model = RecGRELA.for_data(train, hidden_size=16, num_layers=1, num_heads=1)
    for name in ("user_block", "item_block"):
        for wrong in (-1, 0):
            with pytest.raises(ValueError, match=f"^rank_targets: {name} must be at least 1, got"):
                rank_targets(model, test, **{name: wrong})


def test_items_of_other_ids_are_refused(log: Interactions) -> None:
    """As many items, but text sorts otherwise: the rows would be others."""
    train, _, _ = log.leave_one_out()
    model = RecGRELA.for_data(train, hidden_size=16, num_layers=1, num_heads=1)
    text = {"user": log.user_ids[log.user], "item": log.item_ids[log.item].astype(str)}
    other = Interactions.from_frame({**text, "timestamp": np.arange(120)})
    others, _, test = other.leave_one_out()
    for caller, call in (
        ("rank_targets", lambda: evaluate(model, test, progress=False)),
        ("recommend", lambda: recommend_for_users(model, other.sequences(), [0])),
        ("fit: train", lambda: fit(model, others, steps=1)),
        ("fit: valid", lambda: fit(model, train, test, steps=1)),
    ):
        with pytest.raises(ValueError, match=f"^{caller}: model must have been made for the items"):
            call()
    model.id_map = None  # then nothing is known of them
    recommend_for_users(model, other.sequences(), [0])


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_loss_that_is_not_finite_changes_no_weight(log: Interactions, clip: float | None) -> None:
    train, _, _ = log.leave_one_out()
    model = RecGRELA.for_data(train, hidden_size=16, num_layers=1, num_heads=1)
    with torch.no_grad():
        model.encoder.layers[0].in_proj.weight.mul_(1e38)  # type: ignore[union-attr,operator]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match="loss must be finite, got nan at step 1"):
        fit(model, train, steps=30, config=TrainConfig(clip=clip), progress=False)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_a_gradient_that_is_not_finite_changes_no_weight(log: Interactions) -> None:
    train, _, _ = log.leave_one_out()
    model = RecGRELA.for_data(train, hidden_size=16, num_layers=1, num_heads=1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.encoder.layers[0].norm1.weight.register_hook(lambda g: g * float("nan"))  # type: ignore[union-attr,operator]
    with pytest.raises(ValueError, match="loss must be finite, got nan at step 1"):
        fit(model, train, steps=2, config=TrainConfig(clip=1.0), progress=False)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


DATA = "user,item,timestamp\n" + "".join(
    f"{u},{i},{10 * u + i}\n" for u in range(9) for i in range(6)
)


@pytest.fixture
def trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    (tmp_path / "r.csv").write_text(DATA)
    sizes = ["--hidden-size", "8", "--num-layers", "1", "--num-heads", "1"]
    data = ["--data", str(tmp_path / "r.csv"), "--out", str(tmp_path / "model")]
    assert main(["train", *data, *sizes, "--steps", "1", "--quiet"]) == 0
    capsys.readouterr()
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        "evaluate --model model --json r.csv",
        "evaluate --model model --json model/config.json",
        "evaluate --model model --json link.json",
        "recommend --model model --user 1 --json r.csv",
        "recommend --model model --items 1,2 --json model/data.json",
        "train --data r.csv --out model --steps 1 --json r.csv",
        "train --data r.csv --out model --steps 1 --json model/data.json",
        "export --model model --item-vectors model/config.npy",
    ],
)
def test_no_output_replaces_data_or_model(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.chdir(trained)
    (trained / "link.json").symlink_to(trained / "r.csv")
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert main(command.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "output must not replace what is read or kept, got" in line
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_an_output_may_lie_beside_a_model(trained: Path) -> None:
    for _ in range(2):  # also over its own last one
        target = trained / "model" / "test.json"
        assert main(["evaluate", "--model", str(trained / "model"), "--json", str(target)]) == 0
        assert "mean" in json.loads(target.read_text())


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    model = model_of()
    usual = tmp_path / "usual"
    usual.touch()
    store = UserStateStore(model, 3)
    store.save(tmp_path / "store")
    model.save_pretrained(tmp_path / "model")
    CheckpointFolder(tmp_path / "run").save(1, {"x": torch.ones(3)}, {})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 6
    assert {mode_of(path) for path in files} == {mode_of(usual)}
    for path in files:
        path.chmod(0o640)
    store.save(tmp_path / "store")
    model.save_pretrained(tmp_path / "model")
    write_files({usual: "text"})
    written = [tmp_path / "store", usual, *(tmp_path / "model").iterdir()]
    assert {mode_of(path) for path in written} == {0o640}


def test_why_a_store_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    UserStateStore(model, 3).save(tmp_path / "store")

    def full(*arguments: object, **options: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StateError, match="store must be readable: Too many open files"):
        UserStateStore.load(tmp_path / "store", model)


def test_candidates_and_seen_items_in_any_layout() -> None:
    model = model_of()
    candidates = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 1], [2, 4, 6, 8, 3]])
    turned = candidates.t().contiguous().t()
    assert not turned.is_contiguous()

    def lists(rows: Tensor, seen: Tensor) -> Tensor:
        state = model.prefill(ITEMS)
        return model.recommend_from_state(state, 3, seen=seen, candidates=rows).items

    assert torch.equal(lists(turned, ITEMS.t().contiguous().t()), lists(candidates, ITEMS))


def test_a_model_that_is_not_finite_is_not_loaded(tmp_path: Path) -> None:
    model = model_of()
    with torch.no_grad():
        model.encoder.layers[1].in_proj.bias[3] = float("nan")  # type: ignore[union-attr,operator,index]
    with pytest.MonkeyPatch.context() as patch:  # as versions before wrote it
        patch.setattr(persistence, "_check_finite", lambda *_: None)
        model.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"finite weights, got NaN or inf in encoder\.layers\.1"
    ):
        RecGRELA.from_pretrained(tmp_path)
