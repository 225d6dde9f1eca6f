"""`python -m benchmarks cuda`: every path that runs without a GPU, and one line where it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import cuda, cuda_peers, cuda_training, peers
from benchmarks.__main__ import main
from benchmarks.operator_rows import Shape, traffic
from recgrela_ext import _library
from tests.gpu import device


@pytest.fixture
def dry(monkeypatch: pytest.MonkeyPatch) -> None:
    """As RECGRELA_GPU_DRY_RUN=1, which is read when the module is imported."""
    monkeypatch.setenv("RECGRELA_GPU_DRY_RUN", "1")
    monkeypatch.setattr(device, "DRY_RUN", True)


@pytest.mark.kernels
@pytest.mark.usefixtures("dry")
def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "dry.json"
    names = ["operator-b2048-l200-h4-d16-float32", "step-1", "step-4096", "step-model", "train",
             "inference"]  # fmt: skip
    chosen = [word for name in names for word in ("--only", name)]
    assert main(["cuda", "--dry-run", "--no-compile", "--out", str(out), *chosen]) == 0
    content = json.loads(out.read_text())
    assert content["device"] == "dry run"  # README's tables leave it alone
    assert list(content["rows"]) == names
    records = [r for row in content["rows"].values() for r in row["records"]]
    assert [r["what"] for r in records[:3]] == ["forward", "forward + backward", "backward"]
    assert records[0]["missing"].keys() == {"causal + conv1d", "fla", "fla + conv1d", "mamba"}
    assert set(records[0]["missing"].values()) == {"needs a GPU"}
    assert {"ours", "published"} <= records[-2]["times"].keys()
    assert "says nothing about a GPU" in capsys.readouterr().out


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^benchmarks cuda: torch sees no CUDA device"):
        main(["cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_library, "KERNEL_DEVICES", frozenset({"cpu"}))
    with pytest.raises(SystemExit, match=r"^benchmarks cuda: no CUDA kernels"):
        main(["cuda"])


def test_every_shape_in_both_dtypes() -> None:
    assert len(cuda.ROWS_BY_NAME) == 2 * len(cuda.SHAPES) + 5
    # bytes at the shape the published code trains on: 123 and 227 us at 4.3 TB/s
    shape = Shape(2048, 200, 4, 16)
    assert traffic(shape, torch.float32, "forward") == pytest.approx(123e-6 * 4.3e12, rel=0.02)
    assert traffic(shape, torch.float32, "backward") == pytest.approx(227e-6 * 4.3e12, rel=0.02)
    both = traffic(shape, torch.bfloat16, "forward + backward")
    assert both == pytest.approx(186e-6 * 4.3e12, rel=0.02)


def test_recomputed_mlp_changes_nothing() -> None:
    """The same loss and gradients, dropout included."""
    items = torch.randint(1, 3417, (2, 9))
    results = []
    for recompute in (False, True):
        model = cuda_training.ml_1m().train()
        if recompute:
            cuda_training.recompute_mlp(model)
        torch.manual_seed(3)
        loss = model.loss(items, None, items)
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


def test_published_model_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_training.check_published(20, torch.device("cpu"))
    monkeypatch.setattr(peers, "augment", lambda v, w, b: v)
    with pytest.raises(AssertionError, match="published model: off by"):
        cuda_training.check_published(20, torch.device("cpu"))


def test_peers_of_other_packages_say_why_they_are_missing() -> None:
    with pytest.raises(peers.Missing, match=r"^not installed$"):
        peers.import_peer("no_such_package_at_all.inner")
    problem = Shape(1, 70, 2, 8).problem(torch.float32)
    for name in ("fla", "mamba", "fla + conv1d"):
        with pytest.raises(peers.Missing, match=r"^needs a GPU$"):
            cuda_peers.EAGER[name].build(problem)


def test_surroundings_of_fla(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands around its kernel, with a stand-in for the kernel itself."""
    from types import SimpleNamespace

    from benchmarks.checks import check_peer

    def product(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, normalize: bool
    ) -> tuple[torch.Tensor, None]:
        assert (scale, normalize) == (1.0, False)
        scores = torch.einsum("bthd,bshd->bhts", q, k).tril()
        return torch.einsum("bhts,bshd->bthd", scores, v), None

    module = SimpleNamespace(fused_chunk_linear_attn=product)
    monkeypatch.setattr(cuda_peers, "import_peer", lambda name: module)
    monkeypatch.setattr(cuda_peers, "_need_gpu", lambda problem: None)
    problem = Shape(2, 70, 2, 8).problem(torch.float32)
    check_peer(problem, cuda_peers.fla(problem), "causal")
