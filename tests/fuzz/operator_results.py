"""What a call must give: a refusal of the documented form, or the reference's values."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.draw import REFUSED, one_line
from tests.fuzz.operator_arguments import Arguments

LIMITS = {torch.float32: 2e-4, torch.float64: 1e-9, torch.bfloat16: 5e-2, torch.float16: 1e-2}
GRADIENTS = (torch.float32, torch.float64)  # compared in these
Call = Callable[..., Any]


def refused(error: Exception, op: str) -> str:
    """The documented form of an error."""
    text = str(error)
    assert re.match(rf"{op}(_backward|_forward)?: ", text), f"not ours: {text!r}"
    one_line(error)
    return REFUSED


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [x for part in result for x in flat(part)]


def alike(found: Any, wanted: Any, dtype: torch.dtype, what: str, far: float = 0.0) -> None:
    """Near enough to catch a wrong index or stride; tests/ops hold the tight limits. Angles at a
    position of `far` are rounded by that times 2^-53, a few times."""
    limit = LIMITS[dtype] + far * 2.0**-50
    for a, b in zip(flat(found), flat(wanted), strict=True):
        assert a.shape == b.shape, f"{what}: {a.shape}, not {b.shape}"
        assert a.dtype == b.dtype, f"{what}: {a.dtype}, not {b.dtype}"
        if a.is_meta or not a.numel():
            continue
        x, y = a.double(), b.double()
        scale = y.nan_to_num(0, 0, 0).abs().max().clamp(min=1.0)
        same = ((x - y).abs() <= limit * scale) | (x == y) | (x.isnan() & y.isnan())
        assert bool(same.all()), f"{what}: off by {((x - y).abs() / scale).max():.3g}"


def farthest(state: Any) -> float:
    """The largest position of a state, whatever was made of it."""
    position = state[-1] if isinstance(state, tuple) and state else None
    if not isinstance(position, Tensor) or position.is_meta or position.is_sparse:
        return 0.0
    return float(position.double().abs().max()) if position.numel() else 0.0


def copied(state: Any) -> Any:
    """For the reference: a step changes its state in place."""
    if not isinstance(state, tuple):
        return state
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in state)


def compare(op: str, call: Call, plain: Call, dtype: Any, valid: bool, far: float = 0.0) -> str:
    """The operator's name where it accepted its arguments, which it must where they are `valid`."""
    try:
        found = call()
    except (ValueError, TypeError, RuntimeError) as error:
        if valid:
            raise AssertionError(f"refused, though valid: {error}") from error
        if not isinstance(error, RuntimeError):
            return refused(error, op)
        if "allocate memory" in str(error):
            return REFUSED
        raise
    alike(found, plain(), dtype if dtype in LIMITS else torch.float32, op, far)
    return op


def gradients(call: Callable[..., Any], arguments: Arguments, names: Sequence[str]) -> list[Tensor]:
    """Of the first result, weighted, by what there is of `names`."""
    leaves = {n: x.detach().requires_grad_() for n in names if (x := arguments[n]) is not None}
    with torch.enable_grad():
        out = flat(call(**{**arguments, **leaves}))[0]
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        return list(
            torch.autograd.grad(out, list(leaves.values()), weights, materialize_grads=True)
        )
