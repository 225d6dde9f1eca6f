"""The wrong arguments of gated_rela and rela; each gives one line that names argument and value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recgrela_ext.ops.reference import zero_state
from tests.ops.problems import Problem

Change = Callable[[Problem], dict[str, Any]]


@dataclass(frozen=True)
class Bad:
    name: str
    change: Change  # of the arguments of a good problem
    text: str  # after "<op>: "
    error: type[Exception] = ValueError
    raw: bool = False  # the raw operator must refuse it too
    packed: bool = False
    rela: bool = True  # the argument is one of rela's
    conv: bool = True  # with a convolution


def unsafe(*arguments: Any, **options: Any) -> Bad:
    """What the raw operator must refuse too, for memory safety."""
    return Bad(*arguments, raw=True, **options)


def rows(name: str) -> list[Bad]:
    """What may be wrong with k, v or gate."""

    def bad(what: str, make: Callable[[Tensor], Any], text: str, **options: Any) -> Bad:
        options = {"raw": True, "rela": name != "gate"} | options
        return Bad(f"{name} {what}", lambda p: {name: make(getattr(p, name))}, text, **options)

    shape = f"{name} must have the shape of q [2, 5, 2, 8], got"
    return [
        bad("shorter", lambda x: x[:, :4], f"{shape} [2, 4, 2, 8]"),
        bad("of fewer sequences", lambda x: x[:1], f"{shape} [1, 5, 2, 8]"),
        bad("of fewer dims", lambda x: x[..., :6], f"{shape} [2, 5, 2, 6]"),
        bad("flat", lambda x: x.flatten(2), f"{shape} [2, 5, 16]"),
        bad("dtype", lambda x: x.double(), f"{name} must have the dtype of q,"),
        bad("device", lambda x: x.to("meta"), f"{name} must be on the device of q"),
        bad(
            "stride",
            lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
            f"{name} must have a contiguous last dimension, got stride 2",
        ),
        bad(
            "no tensor",
            lambda x: x.tolist(),
            f"{name} must be a tensor, got list",
            error=TypeError,
            raw=False,
        ),
    ]


def q_like(make: Callable[[Tensor], Tensor]) -> Change:
    """q, k, v and gate changed alike."""
    return lambda p: {n: make(getattr(p, n)) for n in ("q", "k", "v", "gate")}


def given(**arguments: Any) -> Change:
    return lambda p: arguments


def state(part: int, make: Callable[[Tensor], Any]) -> Change:
    def change(p: Problem) -> dict[str, Any]:
        width = 1 if p.conv_weight is None else p.conv_weight.shape[1]
        parts: list[Any] = list(zero_state(p.q.shape[0], 2, 8, width, torch.float32))
        parts[part] = make(parts[part])
        return {"initial_state": tuple(parts)}

    return change


def lengths(*values: int) -> Change:
    return given(lengths=torch.tensor(values))


def starts(*values: int) -> Change:
    return given(cu_seqlens=torch.tensor(values))


ARGUMENTS = [
    Bad("q no tensor", given(q=None), "q must be a tensor, got NoneType", TypeError),
    unsafe("q 3 dims", q_like(lambda x: x[0]), "q must have shape [B, L, H, D], got [5, 2, 8]"),
    unsafe("q 0 dims", q_like(lambda x: x[0, 0, 0, 0]), "q must have shape [B, L, H, D], got []"),
    unsafe("q integers", q_like(Tensor.long), "q must have"),
    unsafe("q complex", q_like(lambda x: x.to(torch.complex64)), "q must have"),
    unsafe("odd D", q_like(lambda x: x[..., :7]), "q must have an even last dimension, got 7"),
    unsafe("D = 0", q_like(lambda x: x[..., :0]), "q must have an even last dimension, got 0"),
    unsafe(
        "q stride",
        q_like(lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)),
        "q must have a contiguous last dimension, got stride 2",
    ),
    *rows("k"),
    *rows("v"),
    *rows("gate"),
    unsafe("inv_freq shape", given(inv_freq=torch.ones(4, 2).double()), "inv_freq must have shape"),
    unsafe("inv_freq 1 dim", given(inv_freq=torch.ones(8).double()), "inv_freq must have shape"),
    unsafe(
        "inv_freq dtype", given(inv_freq=torch.ones(2, 4).bfloat16()), "inv_freq must have dtype"
    ),
    unsafe(
        "inv_freq device",
        given(inv_freq=torch.ones(2, 4, device="meta").double()),
        "inv_freq must be on the device of q",
    ),
    Bad(
        "inv_freq no tensor", given(inv_freq=1.0), "inv_freq must be a tensor, got float", TypeError
    ),
    Bad("eps NaN", given(eps=math.nan), "eps must be a number from 0 to 1, got nan"),
    Bad("eps infinite", given(eps=math.inf), "eps must be a number from 0 to 1, got inf"),
    Bad(
        "eps that float32 cannot hold",
        given(eps=1e300),
        "eps must be a number from 0 to 1, got 1e+300",
    ),
    Bad("eps negative", given(eps=-1e-6), "eps must be a number from 0 to 1, got -1e-06"),
    Bad("eps text", given(eps="1e-6"), "eps must be a number from 0 to 1, got '1e-6'"),
    Bad("eps tensor", given(eps=torch.tensor(1e-6)), "eps must be a number from 0 to 1"),
]

CONVOLUTION = [
    unsafe(
        "conv_bias alone", given(conv_weight=None), "conv_bias must be None without conv_weight"
    ),
    unsafe(
        "conv_weight of conv1d",
        lambda p: {"conv_weight": p.conv_weight[:, None]},
        "conv_weight must have shape [H*D, W]",
    ),
    unsafe(
        "conv_weight rows",
        lambda p: {"conv_weight": p.conv_weight[:8]},
        "conv_weight must have shape",
    ),
    unsafe(
        "conv_weight W = 0",
        lambda p: {"conv_weight": p.conv_weight[:, :0]},
        "conv_weight must have shape [H*D, W]",
    ),
    unsafe(
        "conv_weight integers",
        lambda p: {"conv_weight": p.conv_weight.long()},
        "conv_weight must have",
    ),
    unsafe(
        "conv_weight device",
        lambda p: {"conv_weight": p.conv_weight.to("meta")},
        "conv_weight must be on the device of q",
    ),
    Bad(
        "conv_weight no tensor",
        given(conv_weight=3),
        "conv_weight must be a tensor, got int",
        TypeError,
    ),
    unsafe(
        "conv_bias shape", lambda p: {"conv_bias": p.conv_bias[:8]}, "conv_bias must have shape"
    ),
    unsafe(
        "conv_bias 2 dims",
        lambda p: {"conv_bias": p.conv_bias.view(2, 8)},
        "conv_bias must have shape",
    ),
    unsafe(
        "conv_bias integers", lambda p: {"conv_bias": p.conv_bias.long()}, "conv_bias must have"
    ),
    unsafe(
        "conv_bias device",
        lambda p: {"conv_bias": p.conv_bias.to("meta")},
        "conv_bias must be on the device of q",
    ),
]

SEQUENCES = [
    unsafe("lengths beyond L", lengths(5, 6), "lengths must be between 0 and L = 5, got 6 at 1"),
    unsafe("lengths negative", lengths(-1, 5), "lengths must be between 0 and L = 5, got -1 at 0"),
    unsafe(
        "lengths huge", lengths(5, 2**62), f"lengths must be between 0 and L = 5, got {2**62} at 1"
    ),
    unsafe("lengths of fewer", lengths(5), "lengths must have shape"),
    unsafe("lengths 2 dims", given(lengths=torch.ones(2, 1).long()), "lengths must have shape"),
    unsafe("lengths floats", given(lengths=torch.ones(2)), "lengths must have dtype"),
    unsafe(
        "lengths device",
        given(lengths=torch.ones(2, device="meta").long()),
        "lengths must be on the device of q",
    ),
    Bad("lengths list", given(lengths=[5, 5]), "lengths must be a tensor, got list", TypeError),
    unsafe("lengths packed", lengths(3, 3), "lengths must be None with cu_seqlens", packed=True),
    unsafe("q padded and cu_seqlens", starts(0, 5), "q must have shape [T, H, D]"),
    unsafe(
        "cu_seqlens falls",
        starts(0, 4, 3, 6),
        "cu_seqlens must not decrease, got 4 before 3 at 1",
        packed=True,
    ),
    unsafe(
        "cu_seqlens begins late", starts(1, 6), "cu_seqlens must start with 0, got 1", packed=True
    ),
    unsafe(
        "cu_seqlens begins below",
        starts(-1, 6),
        "cu_seqlens must start with 0, got -1",
        packed=True,
    ),
    unsafe(
        "cu_seqlens ends early",
        starts(0, 3, 5),
        "cu_seqlens must end with the number of rows 6, got 5",
        packed=True,
    ),
    unsafe(
        "cu_seqlens ends late",
        starts(0, 3, 7),
        "cu_seqlens must end with the number of rows 6, got 7",
        packed=True,
    ),
    unsafe(
        "cu_seqlens leaves and returns",
        starts(0, 2**40, 6),
        f"cu_seqlens must not decrease, got {2**40} before 6 at 1",
        packed=True,
    ),
    unsafe(
        "cu_seqlens empty",
        given(cu_seqlens=torch.zeros(0).long()),
        "cu_seqlens must have shape [B + 1], got [0]",
        packed=True,
    ),
    unsafe(
        "cu_seqlens 2 dims",
        given(cu_seqlens=torch.tensor([[0, 6]])),
        "cu_seqlens must have shape [B + 1], got [1, 2]",
        packed=True,
    ),
    unsafe(
        "cu_seqlens floats",
        given(cu_seqlens=torch.tensor([0.0, 6.0])),
        "cu_seqlens must have dtype",
        packed=True,
    ),
    unsafe(
        "cu_seqlens device",
        given(cu_seqlens=torch.tensor([0, 6], device="meta")),
        "cu_seqlens must be on the device of q",
        packed=True,
    ),
]

STATES = [
    Bad(
        "no tuple",
        given(initial_state=torch.zeros(2)),
        "initial_state must be a tuple (kv, k_sum, conv, position), got Tensor",
    ),
    Bad("three parts", given(initial_state=(1, 2, 3)), "initial_state must be a tuple"),
    unsafe("kv shape", state(0, lambda x: x[..., :4]), "kv must have shape"),
    unsafe("kv of one user", state(0, lambda x: x[:1]), "kv must have shape"),
    unsafe("kv dtype", state(0, Tensor.double), "kv must have dtype"),
    unsafe("kv half", state(0, Tensor.bfloat16), "kv must have dtype"),
    unsafe("kv device", state(0, lambda x: x.to("meta")), "kv must be on the device of q"),
    Bad("kv None", state(0, lambda x: None), "kv must be a tensor, got NoneType", TypeError),
    unsafe("k_sum shape", state(1, lambda x: x[..., :4]), "k_sum must have shape"),
    unsafe("k_sum dtype", state(1, Tensor.double), "k_sum must have dtype"),
    unsafe("conv shape", state(2, lambda x: x[..., :4]), "conv must have shape", rela=False),
    unsafe(
        "conv of another width",
        state(2, lambda x: torch.zeros(2, 7, 16)),
        "conv must have shape",
        rela=False,
    ),
    unsafe("conv dtype", state(2, Tensor.double), "conv must have dtype", rela=False),
    unsafe("position shape", state(3, lambda x: x[:1]), "position must have shape"),
    unsafe("position dtype", state(3, Tensor.int), "position must have dtype"),
]

CAUSAL = [
    Bad(
        "bidirectional with a state",
        lambda p: {**state(0, lambda x: x)(p), "causal": False},
        "causal must be True with a state, got causal=False",
    ),
    Bad(
        "bidirectional final state",
        given(return_final_state=True, causal=False),
        "causal must be True with a state, got causal=False",
    ),
]

TABLE = [*ARGUMENTS, *CONVOLUTION, *SEQUENCES, *STATES, *CAUSAL]


def raw(operator: Any, *arguments: Any, **named: Any) -> Any:
    """A raw operator call; since torch 2.15 its ValueError arrives wrapped in a RuntimeError."""
    try:
        return operator(*arguments, **named)
    except RuntimeError as error:
        raise ValueError(str(error).split("\n")[0]) from None
