"""Exports agree with the model, and say when they cannot."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from recgrela_ext import RecGRELA, RecGRELAConfig, _library, export
from recgrela_ext.errors import CheckpointError
from recgrela_ext.ops import reference

pytestmark = pytest.mark.kernels


@pytest.fixture
def model() -> RecGRELA:
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2}
    return RecGRELA(RecGRELAConfig(num_items=40, **sizes)).eval()


def test_program_with_dynamic_batch_and_length(model: RecGRELA, tmp_path: Path) -> None:
    assert export.export_program(model, tmp_path / "model.pt2") <= 1e-6


def test_a_file_that_computes_something_else_is_refused(model: RecGRELA) -> None:
    def wrong(item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> torch.Tensor:
        return model(item_seq, item_seq_len) + 0.01

    with pytest.raises(CheckpointError, match="x must agree with the model, got a difference"):
        export.check_agreement(model, wrong, "x")


@pytest.mark.parametrize("parts", ["all", "no gate", "no convolution"])
def test_quadratic_form_is_the_reference(parts: str) -> None:
    B, L, H, D = 3, 70, 2, 8
    q, k, v, gate = torch.randn(4, B, L, H, D, dtype=torch.float64)
    weight, bias = torch.randn(H * D, 4).double(), torch.randn(H * D).double()
    inv_freq, lengths = reference.inv_freq(H, D), torch.tensor([70, 5, 0])
    g = None if parts == "no gate" else gate
    w, b = (None, None) if parts == "no convolution" else (weight, bias)
    want = reference.gated_rela(q, k, v, g, inv_freq, w, b, lengths=lengths)
    got = export.quadratic_gated_rela(
        q, k, v, g, inv_freq, w, b, lengths, None, None, None, None, None, 1e-6, False, False
    )[0]
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_onnx(model: RecGRELA, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    assert export.export_onnx(model, tmp_path / "model.onnx") <= 1e-5


@pytest.mark.slow
def test_compiled_program_runs_from_cpp(model: RecGRELA, tmp_path: Path) -> None:
    """AOTInductor compiles for minutes; RECGRELA_RUN_PT2 names the program CMake built."""
    path = tmp_path / "model.pt2"
    assert export.export_aoti(model, path) <= 1e-5
    program = os.environ.get("RECGRELA_RUN_PT2")
    if not program:
        pytest.skip("needs the C++ program: set RECGRELA_RUN_PT2 to build/cmake/run_pt2")
    item_seq, item_seq_len = export.example(model, 4, 50)
    numbers = [4, 50, *item_seq.flatten().tolist(), *item_seq_len.tolist()]
    run = subprocess.run(
        [program, str(_library.LIBRARY), str(path)],
        input=" ".join(map(str, numbers)),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    rows = [[float(x) for x in line.split()] for line in run.stdout.splitlines()]
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(rows), model(item_seq, item_seq_len))
