"""A model as a file for other runtimes. Which of them need this package when they run:

    export_program   .pt2 of torch.export: needs torch and `import recgrela_ext.ops` (Python)
    export_aoti      .pt2 compiled by AOTInductor: needs libtorch of the version that compiled it
                     and librecgrela.so, loaded first; no Python
    export_onnx      .onnx: needs an ONNX runtime alone; work and memory grow with the square of
                     the length, because ONNX has no operator for the running sums

All three take (item_seq [B, L], item_seq_len [B]) int64, right-padded, any B and L, and return
hidden [B, hidden_size] of the model's dtype, compared with the model's own before the function
returns; a repeat bias is part of scores, and in none of them. The model keeps its modes, training
or evaluation.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library
from .errors import CheckpointError
from .modes import evaluating

if TYPE_CHECKING:
    from .model import RecGRELA

_TOLERANCE = 1e-5
Call = Callable[[Tensor, Tensor], Tensor]


def export_program(model: RecGRELA, path: str | os.PathLike[str]) -> float:
    """Write a torch.export program; returns the largest difference to the model.

    Raises:
        ValueError: a causal model without the compiled operators: plain PyTorch walks over a
            sequence in chunks, whose number an exported program fixes.
        CheckpointError: the file, loaded again, does not compute what the model does.
    """
    torch.export.save(traced(model), path)
    loaded = torch.export.load(path).module()
    return check_agreement(model, loaded, path)


def export_aoti(model: RecGRELA, path: str | os.PathLike[str]) -> float:
    """Compile with AOTInductor, for this machine's processor; needs a C++ compiler, and minutes.

    Returns and raises as `export_program`.
    """
    program = traced(model)
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(program, package_path=os.fspath(path))
    return check_agreement(model, torch._inductor.aoti_load_package(package), path)


def export_onnx(model: RecGRELA, path: str | os.PathLike[str]) -> float:
    """Write an ONNX model; needs the packages onnx, onnxscript and onnxruntime.

    Returns and raises as `export_program`.
    """
    import onnxruntime

    program = traced(model)
    forward = torch.ops.recgrela.gated_rela_forward.default
    with torch.no_grad():
        program = program.run_decompositions({**_defaults(), forward: quadratic_gated_rela})
        torch.onnx.export(
            program,
            f=os.fspath(path),
            dynamo=True,
            external_data=False,
            input_names=["item_seq", "item_seq_len"],
            output_names=["hidden"],
            verbose=False,
        )
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])

    def run(item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        given = {"item_seq": item_seq.numpy(), "item_seq_len": item_seq_len.numpy()}
        return torch.from_numpy(session.run(None, given)[0])

    return check_agreement(model, run, path)


def traced(model: RecGRELA) -> torch.export.ExportedProgram:
    """The program of `model.forward` in evaluation mode with dynamic batch and length."""
    if model.config.causal and "cpu" not in _library.KERNEL_DEVICES:
        raise ValueError(
            "export: the compiled operators must be present for a causal model, got none"
        )
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1)
    with torch.no_grad(), evaluating(model):
        return torch.export.export(
            model, example(model, 3, 7), dynamic_shapes=({0: batch, 1: length}, {0: batch})
        )


def check_agreement(model: RecGRELA, loaded: Call, path: str | os.PathLike[str]) -> float:
    """Largest difference over batches of several sizes, relative to the largest value."""
    worst = 0.0
    for users, items in ((3, 7), (1, 1), (5, 130)):
        item_seq, item_seq_len = example(model, users, items)
        with torch.no_grad(), evaluating(model):
            wanted = model(item_seq, item_seq_len)
            found = loaded(item_seq, item_seq_len)
        scale = float(wanted.abs().max().clamp(min=1.0))
        worst = max(worst, float((found - wanted).abs().max()) / scale)
    if not worst <= _TOLERANCE:
        raise CheckpointError(f"export: {path} must agree with the model, got a difference {worst}")
    return worst


def example(model: RecGRELA, users: int, length: int) -> tuple[Tensor, Tensor]:
    """Random histories of all lengths up to `length`, right-padded."""
    generator = torch.Generator().manual_seed(users)
    item_seq = torch.randint(1, model.config.rows, (users, length), generator=generator)
    item_seq_len = torch.arange(users) % length + 1
    item_seq_len[0] = length
    real = torch.arange(length) < item_seq_len[:, None]
    return torch.where(real, item_seq, model.config.padding_idx), item_seq_len


def quadratic_gated_rela(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    inv_freq: Tensor,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    lengths: Tensor | None,
    *states_and_options: Any,
) -> tuple[Tensor, ...]:
    """`recgrela::gated_rela_forward` for whole sequences without states, as one masked product of
    all pairs of positions: nothing in it depends on the length being known."""
    cu_seqlens, kv, _, _, _, eps = states_and_options[:6]
    if cu_seqlens is not None or kv is not None:
        raise ValueError("quadratic_gated_rela: sequences must be padded and without states")
    B, L, H, D = q.shape
    step = torch.arange(L, device=q.device)
    angle = step.to(inv_freq.dtype)[:, None, None] * inv_freq  # [L, H, D/2]
    cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)

    def features(x: Tensor) -> Tensor:
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())

    def rotated(x: Tensor) -> Tensor:
        a, b = x.unflatten(-1, (D // 2, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

    past = (step[None, :] <= step[:, None]).to(q.dtype)  # [L, L]
    fq, fk = features(q), features(k)
    weight = torch.einsum("blhd,bmhd->bhlm", fq, fk) * past
    total = weight.sum(-1).transpose(1, 2) + eps * (step + 1).to(q.dtype)[:, None]  # [B, L, H]
    turned = torch.einsum("blhd,bmhd->bhlm", rotated(fq), rotated(fk)) * past
    out = torch.einsum("bhlm,bmhd->blhd", turned, v) / total.unsqueeze(-1)
    if conv_weight is not None:
        width = conv_weight.shape[1]
        values = F.pad(v.reshape(B, L, H * D), (0, 0, width - 1, 0))
        taps = [values[:, j : j + L] * conv_weight[:, j] for j in range(width)]
        mixed = torch.stack(taps).sum(0)
        out = out + F.silu(mixed if conv_bias is None else mixed + conv_bias).view(B, L, H, D)
    if gate is not None:
        out = out * F.silu(gate)
    if lengths is not None:
        out = torch.where((step < lengths[:, None])[..., None, None], out, 0.0)
    none = q.new_zeros(0)
    return out, none, none, none, none, none


def _defaults() -> dict[Any, Callable[..., Any]]:
    return torch.export.default_decompositions()
