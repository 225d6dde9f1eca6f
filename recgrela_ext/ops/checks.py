"""Argument checks of the public operators: shapes, dtypes, devices, strides; never values.

They run on real, fake and meta tensors alike. Values (lengths, cu_seqlens) are checked by the CPU
kernels, and here only where the plain PyTorch reference runs instead. (The reference itself reads
`cu_seqlens`, and so does not run on meta tensors.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import shown
from .reference import LogitBias, State, accumulate_dtype
from .transforms import is_batched

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)


def check_tensor(op: str, name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:  # nested ones have no shape
        got = "a nested tensor" if x.is_nested else x.layout
        raise ValueError(f"{op}: {name} must be a dense tensor, got {got}")


def check_shape(op: str, name: str, x: Tensor, shape: tuple[int, ...], words: str) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(
            f"{op}: {name} must have shape {words} = {list(shape)}, got {list(x.shape)}"
        )


def check_same_device(op: str, name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{op}: {name} must be on the device of q, {q.device}, got {x.device}")


def check_rows(op: str, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, dims: int) -> None:
    """q, k, v and gate: one shape, floating dtype and device, the last dimension contiguous."""
    check_tensor(op, "q", q)
    words = {4: "[B, L, H, D]", 3: "[T, H, D] with cu_seqlens"}[dims]
    if op.endswith("step"):
        words = "[B, H, D]"
    if q.dim() != dims:
        raise ValueError(f"{op}: q must have shape {words}, got {list(q.shape)}")
    if q.dtype not in FLOATING:
        raise ValueError(
            f"{op}: q must have dtype float32, float64, bfloat16 or float16, got {q.dtype}"
        )
    if q.shape[-1] < 2 or q.shape[-1] % 2:
        raise ValueError(f"{op}: q must have an even last dimension, got {q.shape[-1]}")
    for name, x in (("q", q), ("k", k), ("v", v), ("gate", gate)):
        if x is None and name == "gate":
            continue
        check_tensor(op, name, x)
        assert x is not None
        if x.shape != q.shape:
            raise ValueError(
                f"{op}: {name} must have the shape of q {list(q.shape)}, got {list(x.shape)}"
            )
        if x.dtype != q.dtype:
            raise ValueError(f"{op}: {name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        check_same_device(op, name, x, q)
        if x.numel() and x.stride(-1) != 1:
            raise ValueError(
                f"{op}: {name} must have a contiguous last dimension, got stride {x.stride(-1)}"
            )


def check_parameters(
    op: str,
    q: Tensor,
    inv_freq: Tensor,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    eps: float,
) -> int:
    """inv_freq, conv_weight, conv_bias and eps; returns the convolution's width W."""
    H, D = q.shape[-2:]
    check_tensor(op, "inv_freq", inv_freq)
    if inv_freq.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: inv_freq must have dtype float64 or float32, got {inv_freq.dtype}")
    check_shape(op, "inv_freq", inv_freq, (H, D // 2), "[H, D/2]")
    check_same_device(op, "inv_freq", inv_freq, q)
    # A large one times the number of keys would leave float32.
    if not (isinstance(eps, (float, int)) and 0 <= eps <= 1):
        raise ValueError(f"{op}: eps must be a number from 0 to 1, got {shown(eps)}")
    if conv_weight is None:
        if conv_bias is not None:
            raise ValueError(f"{op}: conv_bias must be None without conv_weight, got a tensor")
        return 1
    check_tensor(op, "conv_weight", conv_weight)
    if conv_weight.dim() != 2 or conv_weight.shape[0] != H * D or conv_weight.shape[1] < 1:
        raise ValueError(
            f"{op}: conv_weight must have shape [H*D, W] = [{H * D}, W] with W >= 1, "
            f"got {list(conv_weight.shape)}"
        )
    for name, x in (("conv_weight", conv_weight), ("conv_bias", conv_bias)):
        if x is None:
            continue
        check_tensor(op, name, x)
        if x.dtype not in FLOATING:
            raise ValueError(f"{op}: {name} must have a floating dtype, got {x.dtype}")
        check_same_device(op, name, x, q)
    if conv_bias is not None:
        check_shape(op, "conv_bias", conv_bias, (H * D,), "[H*D]")
    return conv_weight.shape[1]


def check_state(op: str, name: str, state: Any, q: Tensor, B: int, width: int) -> None:
    """A state tuple (kv, k_sum, conv, position) for B sequences of rows like q."""
    if not isinstance(state, tuple | list) or len(state) != 4:
        raise ValueError(
            f"{op}: {name} must be a tuple (kv, k_sum, conv, position), got {type(state).__name__}"
        )
    H, D = q.shape[-2:]
    acc = accumulate_dtype(q.dtype)
    parts = (
        ("kv", (B, H, D, D), "[B, H, D, D]", acc),
        ("k_sum", (B, H, D), "[B, H, D]", acc),
        ("conv", (B, width - 1, H * D), "[B, W-1, H*D]", acc),
        ("position", (B,), "[B]", torch.int64),
    )
    for x, (part, shape, words, dtype) in zip(state, parts, strict=True):
        label = f"{name} {part}"
        check_tensor(op, label, x)
        check_shape(op, label, x, shape, words)
        if x.dtype != dtype:
            raise ValueError(f"{op}: {label} must have dtype {dtype}, got {x.dtype}")
        check_same_device(op, label, x, q)


def check_sequence(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    inv_freq: Tensor,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: State | None,
    return_final_state: bool,
    causal: bool,
    eps: float,
) -> None:
    """Every argument of gated_rela and rela."""
    if lengths is not None and cu_seqlens is not None:
        raise ValueError(f"{op}: lengths must be None with cu_seqlens, got both")
    for name, flag in (("return_final_state", return_final_state), ("causal", causal)):
        if not isinstance(flag, bool):
            raise TypeError(f"{op}: {name} must be True or False, got {type(flag).__name__}")
    check_rows(op, q, k, v, gate, 3 if cu_seqlens is not None else 4)
    width = check_parameters(op, q, inv_freq, conv_weight, conv_bias, eps)
    B = q.shape[0]
    for name, x in (("lengths", lengths), ("cu_seqlens", cu_seqlens)):
        if x is None:
            continue
        check_tensor(op, name, x)
        if x.dtype not in INTEGERS:
            raise ValueError(f"{op}: {name} must have dtype int64 or int32, got {x.dtype}")
        check_same_device(op, name, x, q)
    if lengths is not None:
        check_shape(op, "lengths", lengths, (B,), "[B]")
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(
                f"{op}: cu_seqlens must have shape [B + 1], got {list(cu_seqlens.shape)}"
            )
        B = cu_seqlens.shape[0] - 1
    if not causal and (initial_state is not None or return_final_state):
        raise ValueError(f"{op}: causal must be True with a state, got causal=False")
    if initial_state is not None:
        check_state(op, "initial_state", initial_state, q, B, width)


def check_dropout(op: str, x: Any, residual: Any, gelu: Any, p: Any, seed: Any) -> None:
    """Every argument of activation_dropout."""
    check_tensor(op, "x", x)
    if x.dtype not in FLOATING:
        raise ValueError(
            f"{op}: x must have dtype float32, float64, bfloat16 or float16, got {x.dtype}"
        )
    if residual is not None:
        check_tensor(op, "residual", residual)
        check_shape(op, "residual", residual, tuple(x.shape), "of x")
        _like(op, "residual", residual, "x", x)
    if not isinstance(gelu, bool):
        raise TypeError(f"{op}: gelu must be True or False, got {shown(gelu)}")
    _share(op, p)
    _int64(op, "seed", seed)


def check_feed_forward(
    op: str,
    x: Any,
    first_weight: Any,
    first_bias: Any,
    second_weight: Any,
    second_bias: Any,
    residual: Any,
    p: Any,
    inner_seed: Any,
    outer_seed: Any,
) -> None:
    """Every argument of feed_forward."""
    check_tensor(op, "x", x)
    check_tensor(op, "first_weight", first_weight)
    if x.dim() != 2:
        raise ValueError(f"{op}: x must be [N, C], got {list(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: x must have dtype float32 or float64, got {x.dtype}")
    if first_weight.dim() != 2 or first_weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"{op}: first_weight must be [M, {x.shape[1]}], got {list(first_weight.shape)}"
        )
    (N, C), M = x.shape, first_weight.shape[0]
    rest: dict[str, tuple[Any, tuple[int, ...]]] = {
        "first_weight": (first_weight, (M, C)),
        "first_bias": (first_bias, (M,)),
        "second_weight": (second_weight, (C, M)),
        "second_bias": (second_bias, (C,)),
    }
    if residual is not None:
        rest["residual"] = (residual, (N, C))
    for name, (tensor, shape) in rest.items():
        check_tensor(op, name, tensor)
        check_shape(op, name, tensor, shape, "of x and first_weight")
        _like(op, name, tensor, "x", x)
    _share(op, p)
    _int64(op, "inner_seed", inner_seed)
    _int64(op, "outer_seed", outer_seed)


def check_softmax(
    op: str,
    hidden: Any,
    table: Any,
    targets: Any,
    ignore_index: Any,
    exclude: Any,
    gradients: Any = True,
) -> None:
    """Every argument of softmax_loss but its bias; the values of targets where that is free."""
    for name, x in (("hidden", hidden), ("table", table), ("targets", targets)):
        check_tensor(op, name, x)
        if x.device != hidden.device:
            raise ValueError(
                f"{op}: {name} must be on the device of hidden, {hidden.device}, got {x.device}"
            )
    if hidden.dim() != 2:
        raise ValueError(f"{op}: hidden must be [T, width], got {list(hidden.shape)}")
    if hidden.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: hidden must have dtype float32 or float64, got {hidden.dtype}")
    if table.dim() != 2 or table.shape[1] != hidden.shape[1]:
        raise ValueError(f"{op}: table must be [N, {hidden.shape[1]}], got {list(table.shape)}")
    if table.dtype != hidden.dtype:
        raise ValueError(
            f"{op}: table must have the dtype of hidden, {hidden.dtype}, got {table.dtype}"
        )
    check_shape(op, "targets", targets, (hidden.shape[0],), "of the rows")
    if targets.dtype != torch.int64:
        raise TypeError(f"{op}: targets must have dtype int64, got {targets.dtype}")
    _int64(op, "ignore_index", ignore_index)
    for name, flag in (("exclude", exclude), ("gradients", gradients)):
        if not isinstance(flag, bool):
            raise TypeError(f"{op}: {name} must be True or False, got {type(flag).__name__}")
    if exclude and not 0 <= ignore_index < table.shape[0]:
        raise ValueError(
            f"{op}: ignore_index must be a row of table to be excluded, got {ignore_index}"
        )


def check_bias(op: str, bias: Any, hidden: Tensor) -> None:
    if not isinstance(bias, LogitBias):
        raise TypeError(f"{op}: bias must be a LogitBias or RecencyBias, got {shown(bias)}")
    for name, x in bias._asdict().items():
        check_tensor(op, f"bias.{name}", x)
        check_same_device(op, f"bias.{name}", x, hidden)
    offsets, items, values = bias
    check_shape(op, "bias.offsets", offsets, (hidden.shape[0] + 1,), "of the rows and one")
    if items.dim() != 1 or values.shape != items.shape:
        raise ValueError(
            f"{op}: bias.items and bias.values must have one shape [K], got {list(items.shape)} "
            f"and {list(values.shape)}"
        )
    for name, x in (("offsets", offsets), ("items", items)):
        if x.dtype != torch.int64:
            raise TypeError(f"{op}: bias.{name} must have dtype int64, got {x.dtype}")
    if not values.is_floating_point():
        raise ValueError(f"{op}: bias.values must have a floating dtype, got {values.dtype}")


def check_bias_values(op: str, bias: LogitBias, n_items: int) -> None:
    """As check_values, of the bias of a loss."""
    offsets, items, _ = bias
    if not values_are_there(items):
        return
    first, last, count = int(offsets[0]), int(offsets[-1]), items.numel()
    told = f"{op}: bias.offsets must rise from 0 to K={count}"
    if first != 0 or last != count:
        raise ValueError(f"{told}, got {first} to {last}")
    falls = (offsets.diff() < 0).nonzero()
    if falls.numel():
        at = int(falls[0])
        raise ValueError(f"{told}, got {int(offsets[at])} before {int(offsets[at + 1])}")
    if count and not 0 <= int(items.min()) <= int(items.max()) < n_items:
        bad = int(items.min()) if int(items.min()) < 0 else int(items.max())
        raise ValueError(f"{op}: bias.items must lie in 0..{n_items - 1}, got {bad}")


def check_values(op: str, q: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """The values a CPU kernel would refuse, for calls that run the reference. CPU tensors only."""
    given = [x for x in (lengths, cu_seqlens) if x is not None]
    if not values_are_there(q) or any(map(is_batched, given)):
        return
    if lengths is not None and lengths.numel():
        L = q.shape[1]
        bad = (lengths < 0) | (lengths > L)
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            raise ValueError(
                f"{op}: lengths must be between 0 and L = {L}, got {int(lengths[at])} at {at}"
            )
    if cu_seqlens is not None:
        if int(cu_seqlens[0]) != 0:
            raise ValueError(f"{op}: cu_seqlens must start with 0, got {int(cu_seqlens[0])}")
        drops = (cu_seqlens.diff() < 0).nonzero()
        if drops.numel():
            at = int(drops[0])
            before, after = int(cu_seqlens[at]), int(cu_seqlens[at + 1])
            raise ValueError(
                f"{op}: cu_seqlens must not decrease, got {before} before {after} at {at}"
            )
        if int(cu_seqlens[-1]) != q.shape[0]:
            raise ValueError(
                f"{op}: cu_seqlens must end with the number of rows {q.shape[0]}, "
                f"got {int(cu_seqlens[-1])}"
            )


def _like(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Dtype and device are another argument's."""
    if x.dtype != other.dtype:
        raise ValueError(
            f"{op}: {name} must have the dtype of {other_name}, {other.dtype}, got {x.dtype}"
        )
    if x.device != other.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {other_name}, {other.device}, got {x.device}"
        )


def _share(op: str, p: Any) -> None:
    if not isinstance(p, (float, int)) or not 0.0 <= p < 1.0:
        raise ValueError(f"{op}: p must lie in [0, 1), got {shown(p)}")


def _int64(op: str, name: str, x: Any) -> None:
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"{op}: {name} must be an int, got {shown(x)}")
    if not -(2**63) <= x < 2**63:
        raise ValueError(f"{op}: {name} must fit in 64 bits, got {shown(x)}")


def values_are_there(x: Tensor) -> bool:
    """Not on a GPU, which would have to be waited for, nor where a graph is made."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    return not isinstance(x, torch._subclasses.FakeTensor)
