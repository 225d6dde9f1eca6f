"""Agreement with the published implementation's recorded outputs, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from recgrela_ext.errors import CheckpointError
from recgrela_ext.model import RecGRELA, RecGRELAConfig

FILES = ("full_length", "right_padded", "single_layer")


def read(path: Path) -> tuple[dict[str, Tensor], int]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, int(  # noqa: SIM118
            file.metadata()["num_heads"]
        )


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("name", FILES)
def test_outputs_loss_and_gradients(golden_dir: Path, name: str) -> None:
    tensors, num_heads = read(golden_dir / f"model_{name}.safetensors")
    model = RecGRELA.from_reference(part(tensors, "param/"), num_heads)
    assert model.config.variant == "published"
    assert model.config.max_seq_len == tensors["item_seq"].shape[1]
    assert model.config.published_single_layer == (name == "single_layer")
    item_seq, lengths = tensors["item_seq"], tensors["item_seq_len"]
    hidden = model(item_seq, lengths)
    close(hidden, tensors["seq_output"])
    close(model.scores(hidden), tensors["scores"])

    loss = model.loss(item_seq, lengths, tensors["target"])
    close(loss, tensors["loss"])
    loss.backward()
    gradients = RecGRELA.from_reference(part(tensors, "grad/"), num_heads)
    for (key, parameter), want in zip(
        model.named_parameters(), gradients.parameters(), strict=True
    ):
        assert parameter.grad is not None, key
        close(parameter.grad, want)


def test_targets_per_position_say_the_same(golden_dir: Path) -> None:
    tensors, num_heads = read(golden_dir / "model_right_padded.safetensors")
    model = RecGRELA.from_reference(part(tensors, "param/"), num_heads)
    item_seq, lengths = tensors["item_seq"], tensors["item_seq_len"]
    targets = torch.zeros_like(item_seq)
    targets.scatter_(1, lengths[:, None] - 1, tensors["target"][:, None])
    close(model.loss(item_seq, lengths, targets), tensors["loss"])
    targets[:, 0] = 1
    with pytest.raises(ValueError, match="targets must be padding_idx=0 but at the last item"):
        model.loss(item_seq, lengths, targets)


def test_weights_of_something_else_are_refused(golden_dir: Path) -> None:
    tensors, num_heads = read(golden_dir / "model_full_length.safetensors")
    weights = part(tensors, "param/")
    with pytest.raises(CheckpointError, match=r"decoder.weight must be a published name"):
        RecGRELA.from_reference({**weights, "decoder.weight": torch.zeros(1)}, num_heads)
    lacking = {k: v for k, v in weights.items() if k != "GRELA_block.1.in_proj.bias"}
    with pytest.raises(CheckpointError, match=r"lacks encoder.layers.1.in_proj.bias"):
        RecGRELA.from_reference(lacking, num_heads)
    with pytest.raises(CheckpointError, match=r"must hold item_embedding.weight"):
        RecGRELA.from_reference({}, num_heads)
    wrong = {**weights, "LayerNorm.weight": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"input_norm.weight must be \[32\], got \[3\]"):
        RecGRELA.from_reference(wrong, num_heads)


def test_checkpoint_wrapped_by_a_trainer(golden_dir: Path) -> None:
    tensors, num_heads = read(golden_dir / "model_full_length.safetensors")
    weights = {f"module.{k}": v for k, v in part(tensors, "param/").items()}
    model = RecGRELA.from_reference({"state_dict": weights, "epoch": 3}, num_heads)
    close(model(tensors["item_seq"], tensors["item_seq_len"]), tensors["seq_output"])


def test_padding_takes_part_in_the_published_model_alone() -> None:
    item_seq = torch.tensor([[3, 4, 5, 0, 0]])
    for attend in (True, False):
        torch.manual_seed(1)
        config = RecGRELAConfig(
            n_items=9, hidden_size=8, num_heads=2, causal=False, attend_padding=attend
        )
        model = RecGRELA(config).eval()
        with torch.no_grad():
            model.item_embedding.weight.normal_()
        short, long = model(item_seq[:, :3]), model(item_seq)
        assert torch.allclose(short, long, atol=1e-6) != attend
        assert model.scores(long)[0, 0].isfinite() == attend
