"""rela's kernels: gated_rela without gate and convolution, and a schema of its own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from recgrela_ext import ops
from tests.ops.agreement import assert_agrees
from tests.ops.problems import make_problem, outputs
from tests.tolerance import assert_same_bits

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def as_gated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: None,
    inv_freq: Tensor,
    conv_weight: None,
    conv_bias: None,
    **options: Any,
) -> Any:
    return ops.rela(q, k, v, inv_freq, **options)


BARE: dict[str, Any] = {"gate": False, "W": 0}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"L": 70},
    "right-padded": {"B": 4, "L": 65, "lengths": [65, 0, 1, 64]},
    "packed": {"packed": [65, 0, 1, 3]},
    "state": {"L": 70, "state": True, "return_final_state": True},
    "state, packed": {"packed": [65, 0, 3], "state": True, "return_final_state": True},
    "final state from nothing": {"L": 70, "return_final_state": True},
    "no items": {"L": 0, "state": True, "return_final_state": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_modes(options: dict[str, Any], dtype: torch.dtype) -> None:
    assert_agrees(make_problem(**options, **BARE, dtype=dtype), as_gated)


@pytest.mark.parametrize("head_dim", [2, 10, 16, 64])
def test_head_dims(head_dim: int) -> None:
    assert_agrees(make_problem(L=70, D=head_dim, **BARE, dtype=torch.float32), as_gated)


@pytest.mark.parametrize("packed", [None, [65, 0, 3]], ids=["padded", "packed"])
def test_same_bits_as_gated_rela(packed: list[int] | None) -> None:
    problem = make_problem(
        L=70, packed=packed, **BARE, dtype=torch.float32, state=True, return_final_state=True
    )
    found = outputs(problem.run(as_gated))
    for name, x in outputs(problem.run(ops.gated_rela)).items():
        assert_same_bits(name, found[name], x)


def test_bidirectional_is_the_reference() -> None:
    problem = make_problem(lengths=[9, 4], causal=False, **BARE)
    assert_same_bits("out", problem.run(as_gated), problem.run(ops.reference.gated_rela))


def test_padding_may_hold_anything() -> None:
    problem = make_problem(lengths=[9, 4], dtype=torch.float32, **BARE)
    pad = torch.arange(9) >= torch.tensor([9, 4])[:, None]
    rows = {n: getattr(problem, n).clone() for n in ("q", "k", "v")}
    for x in rows.values():
        x[pad] = math.nan
    out = problem.but(**rows).run(as_gated)
    assert_same_bits("out", out, problem.run(as_gated))
    assert not out[pad].any()
