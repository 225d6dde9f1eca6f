"""Arguments of every operator, drawn from a fuzzer's bytes; and how one of them is spoiled."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recgrela_ext import ops
from recgrela_ext.ops import reference
from recgrela_ext.ops.encoder_step import PackedEncoder
from tests.fuzz.draw import Draw
from tests.ops.problems import Problem, make_problem, make_state

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHER_DTYPES = (*DTYPES, torch.int64, torch.int32, torch.int8, torch.bool, torch.complex64)
FLOATS = ("q", "k", "v", "gate", "conv_weight", "conv_bias")  # of gated_rela
Arguments = dict[str, Any]


def problem(draw: Draw) -> Problem:
    B, L, H, D = draw.below(4), draw.one_of([0, 1, 2, 63, 64, 65, 130]), 1 + draw.below(3), 0
    D = draw.one_of([2, 4, 6, 8, 10, 16, 34])
    packed = [draw.below(70) for _ in range(B)] if draw.flag() else None
    lengths = [draw.below(L + 1) for _ in range(B)] if packed is None and draw.flag() else None
    return make_problem(
        B, L, H, D, draw.below(6), draw.one_of(DTYPES), gate=draw.flag(), bias=draw.flag(),
        lengths=lengths, packed=packed, state=draw.flag(), return_final_state=draw.flag(),
    )  # fmt: skip


def step_arguments(draw: Draw) -> Arguments:
    B, H, D, W = draw.below(5), 1 + draw.below(3), draw.one_of([2, 4, 6, 8, 16, 34]), 0
    W, dtype = draw.below(6), draw.one_of(DTYPES)
    problem = make_problem(B, 1, H, D, W, dtype, gate=draw.flag(), bias=draw.flag())
    acc = reference.accumulate_dtype(dtype)
    rows = {n: getattr(problem, n) for n in ("q", "k", "v", "gate")}
    return {
        **{n: None if x is None else x[:, 0] for n, x in rows.items()},
        "inv_freq": problem.inv_freq,
        "conv_weight": problem.conv_weight,
        "conv_bias": problem.conv_bias,
        "state": make_state(B, H, D, max(W, 1), acc),
        "eps": 1e-6,
        "active": torch.rand(B) > 0.3 if draw.flag() else None,
    }


def packed_encoder(draw: Draw) -> tuple[PackedEncoder, Tensor, Tensor, Tensor]:
    H, D, M = 1 + draw.below(2), draw.one_of([2, 4, 8]), draw.one_of([1, 8, 20])
    W, layers, gate, norm = draw.below(5), 1 + draw.below(3), draw.flag(), draw.flag()
    dtype = draw.one_of([torch.float32, torch.float64])
    C, B = H * D, draw.below(4)
    layer = 4 * C + C * C * 4 + 4 * C + gate * (C * C + C) + W * C + (W > 0) * C
    layer += 2 * C * M + M + C
    count = layers * layer + norm * 2 * C
    weights = torch.randn(count, dtype=torch.float64).to(dtype) * 0.3
    packed = PackedEncoder(
        weights, ops.inv_freq(H, D).double(), layers, M, W, gate, norm, 1e-6, 1e-6
    )
    rows = torch.rand(B, packed.state_size, dtype=torch.float64).to(dtype) + 1
    x = torch.randn(B, C, dtype=torch.float64).to(dtype)
    return packed, x, rows, torch.arange(B) + 3


def topk_arguments(draw: Draw) -> Arguments:
    B, N, width = draw.below(5), 1 + draw.one_of([0, 1, 40, 300]), 1 + draw.below(9)
    dtype = draw.one_of([*DTYPES, torch.int8])
    hidden = torch.float64 if dtype == torch.float64 else torch.float32
    whole = torch.randint(-2, 3, (N, width))  # every score is exact
    candidates = [None, torch.randint(0, N, (7,)), torch.randint(0, N, (B, 7))]
    return {
        "hidden": torch.randint(-2, 3, (B, width)).to(hidden),
        "table": whole.to(dtype),
        "k": 1 + draw.below(20),
        "padding_idx": draw.below(N),
        "scale": 2.0 ** torch.randint(-2, 3, (N,)) if dtype == torch.int8 else None,
        "seen": torch.randint(0, N, (B, 5)) if draw.flag() else None,
        "candidates": draw.one_of(candidates),
    }


def dropout_arguments(draw: Draw) -> Arguments:
    shape = tuple(draw.below(7) for _ in range(draw.below(4)))
    dtype = draw.one_of(DTYPES)
    return {
        "x": torch.randn(shape).to(dtype),
        "residual": torch.randn(shape).to(dtype) if draw.flag() else None,
        "gelu": draw.flag(),
        "p": draw.one_of([0.0, 0.1, 0.5, 0.999]),
        "seed": draw.one_of([0, 1, -1, 2**63 - 1]),
    }


def feed_forward_arguments(draw: Draw) -> Arguments:
    N, C, M = draw.one_of([0, 1, 5, 63, 64, 65, 130]), *(draw.one_of([8, 16, 32]) for _ in "CM")
    dtype = draw.one_of(DTYPES)
    return {
        "x": torch.randn(N, C).to(dtype),
        "first_weight": torch.randn(M, C).to(dtype),
        "first_bias": torch.randn(M).to(dtype),
        "second_weight": torch.randn(C, M).to(dtype),
        "second_bias": torch.randn(C).to(dtype),
        "residual": torch.randn(N, C).to(dtype) if draw.flag() else None,
        "p": draw.one_of([0.0, 0.1, 0.5, 0.9]),  # two scales: beyond, terms cancel
        "inner_seed": draw.one_of([0, 1, -1, 2**63 - 1]),
        "outer_seed": draw.one_of([0, 1, -1, 2**63 - 1]),
    }


def softmax_arguments(draw: Draw) -> Arguments:
    T, N, C = draw.one_of([0, 1, 31, 32, 33, 70]), 1 + draw.below(140), draw.below(40)
    dtype = draw.one_of(DTYPES)
    return {
        "hidden": torch.randn(T, C).to(dtype),
        "table": torch.randn(N, C).to(dtype),
        "targets": torch.randint(N, (T,)),
        "ignore_index": draw.below(N),
        "exclude": draw.flag(),
        "gradients": draw.flag(),
    }


def recent_arguments(draw: Draw) -> Arguments:
    """Spans anywhere in a log, some of them empty or upside down."""
    T, R = draw.one_of([0, 1, 5, 70]), draw.one_of([0, 1, 3, 40])
    begin, end = torch.randint(T + 1, (2, R))
    return {"items": torch.randint(1 + draw.below(12), (T,)), "begin": begin, "end": end}


def bias_arguments(draw: Draw, arguments: Arguments, whole: bool = False) -> Arguments:
    """Three tensors or none, if not `whole` now and then with a place that cannot be."""
    names = ("offsets", "items", "values")
    if draw.flag():
        return dict.fromkeys(names)
    T, N = len(arguments["hidden"]), len(arguments["table"])
    counts = torch.randint(0, 1 + draw.below(6), (T,))
    offsets = F.pad(counts.cumsum(0), (1, 0))
    items = torch.randint(N, (int(offsets[-1]),))
    values = torch.randn(len(items)).to(arguments["hidden"].dtype)
    out = torch.rand(len(items)) < draw.below(3) / 4
    out &= items != arguments["targets"].repeat_interleave(counts)  # these stay, it says
    values[out] = -torch.inf
    if not whole and draw.below(8) == 0 and len(items):
        items[draw.below(len(items))] = draw.one_of([-1, N, 2**40, -(2**62)])
    if not whole and draw.below(8) == 0:
        offsets[draw.below(T + 1)] = draw.one_of([-1, 3, 2**40, -(2**62)])
    return dict(zip(names, (offsets, items, values), strict=True))


def recency_arguments(draw: Draw, arguments: Arguments, whole: bool = False) -> Arguments:
    """Of a bias by recency: windows of a log, or spans anywhere; if not `whole` now and then with a
    place or a bound that cannot be."""
    T, N = len(arguments["hidden"]), len(arguments["table"])
    S = T if draw.flag() else draw.one_of([0, 1, 5, 70])
    items = torch.randint(min(N, 1 + draw.below(140)), (S,))
    if S == T:
        end = torch.arange(1, T + 1)
        begin = (end - 1) // (1 + draw.below(40)) * (1 + draw.below(3))
    else:
        begin, end = torch.randint(S + 1, (2, T))
    up_to = draw.one_of([(), (1,), (1, 2, 4, 8, 16), (3, 30, 2**40), tuple(range(2, 20))])
    if not whole and draw.below(8) == 0:
        up_to = draw.one_of([(0, 1), (2, 2), (1.5,), [1, 2], (2**63,), None, tuple(range(1, 255))])
    if not whole and draw.below(8) == 0 and S:
        items[draw.below(S)] = draw.one_of([-1, N, 2**40, -(2**62)])
    count = 1 + len(up_to) if up_to is not None else 1
    values = torch.randn(count).to(arguments["hidden"].dtype)
    return {"items": items, "begin": begin, "end": end, "up_to": up_to, "values": values}


def spoiled(draw: Draw, name: str, x: Any) -> Any:
    """Another value of an argument: often wrong, sometimes only unusual."""
    action = draw.below(12)
    if not isinstance(x, Tensor):
        return draw.value() if action else torch.ones(2)
    if x.layout != torch.strided:  # spoiled before
        return x
    if action == 0:
        return x.to(draw.one_of(OTHER_DTYPES))
    if action == 1:
        return x[: draw.below(x.shape[0] + 1)] if x.dim() else x
    if action == 2:
        return x[..., : draw.below(x.shape[-1] + 1)] if x.dim() else x
    if action == 3:
        return x.unsqueeze(draw.below(x.dim() + 1))
    if action == 4:
        if x.dim() == 1:
            return torch.stack((x, x), -1)[:, 0]
        return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() else x
    if action == 5:
        return x[:1].expand(x.shape) if x.dim() and x.shape[0] else x
    if action == 6:
        return x.to("meta")
    if action == 7 and not x.is_floating_point() and x.numel() and not x.is_meta:
        x = x.clone(memory_format=torch.contiguous_format)
        if name == "state":  # a position: any the rotation can still tell from its neighbour
            x.view(-1)[draw.below(x.numel())] = draw.one_of([0, 1, 7, 2**31, 2**40])
        elif x.dtype in (torch.int64, torch.int32):
            far = torch.tensor([-1, 0, 1, 7, 2**31, 2**62, -(2**63)])[draw.below(7)]
            x.view(-1)[draw.below(x.numel())] = far.to(x.dtype)
        return x
    if action == 8 and x.dim():
        wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + 3)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]
    if action == 9:
        return x.flatten()
    if action == 10:
        dense = x.dim() and x.numel() and not x.is_meta
        return x.to_sparse() if dense else x
    return draw.one_of([None, "x", [1.0], 3])


def spoil_one(draw: Draw, arguments: Arguments) -> Arguments:
    """Nothing, one or two arguments changed."""
    arguments = dict(arguments)
    for _ in range(draw.one_of([0, 1, 1, 2])):
        name = draw.one_of(sorted(arguments))
        value = arguments[name]
        if isinstance(value, tuple) and value:
            place = draw.below(len(value))
            arguments[name] = (
                *value[:place],
                spoiled(draw, "state", value[place]),
                *value[place + 1 :],
            )
        else:
            arguments[name] = spoiled(draw, name, value)
    return arguments
