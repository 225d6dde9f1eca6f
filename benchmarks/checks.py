"""A time counts only when the result is right: by the tests' own rule, on the tensors timed.

The first sequences of the problem go through tests/ops/agreement.py, outputs and every gradient
against sums in extended precision. Of the whole batch, as much as fits a few million numbers is
then compared with the reference in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Operator
from recgrela_ext import ops
from tests.ops.agreement import assert_agrees
from tests.ops.problems import PARAMETERS, ROWS, Problem
from tests.tolerance import assert_as_exact

_EXACT_ITEMS = 2_000  # the exact sums are Python loops over items
_NUMBERS = 1 << 21
_PEER_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


class WrongResult(AssertionError):
    """A result is off: its time must not be told."""


def first(problem: Problem, sequences: int, items: int | None = None) -> Problem:
    """The first sequences of a padded problem, the first items of them."""
    return problem.but(**{n: getattr(problem, n)[:sequences, :items] for n in ROWS})


def check_ours(problem: Problem, backward: bool) -> None:
    """Raises WrongResult unless `ops.gated_rela` is right on `problem`, rows [B, L, H, D]."""
    B, L, H, D = problem.q.shape
    try:
        few = max(1, min(B, _EXACT_ITEMS // L))
        # Long sequences: the beginning exactly, all of it below.
        assert_agrees(first(problem, few, 2 * _EXACT_ITEMS), ops.gated_rela, backward)
        _check_batch(problem, max(1, min(B, _NUMBERS // (L * H * D))), backward)
    except AssertionError as error:
        raise WrongResult(str(error)) from None


def _check_batch(problem: Problem, sequences: int, backward: bool) -> None:
    """Rows of the result of the whole batch against the reference of its first sequences."""
    part = first(problem, sequences).on("cpu")
    whole = torch.randn_like(problem.q)
    given = whole[:sequences].cpu()
    found = _run(problem, ops.gated_rela, whole, backward)
    plain = _run(part, ops.reference.gated_rela, given, backward)
    wide = _run(part.to(torch.float64), ops.reference.gated_rela, given.double(), backward)
    for name, x in found.items():
        gradient = name != "out"
        # Gradients of q and k cancel at the first items: their scale is the sequence's.
        dims = (-3, -1) if gradient else (-1,)
        assert_as_exact(name, x[:sequences].cpu(), plain[name], wide[name], dims, gradient)


def _run(
    problem: Problem, operator: Callable[..., Any], given: Tensor, backward: bool
) -> dict[str, Tensor]:
    if not backward:
        with torch.no_grad():
            return {"out": problem.run(operator)}
    problem = problem.requiring_grad()
    out = problem.run(operator)
    leaves = [getattr(problem, name) for name in ROWS]
    grads = torch.autograd.grad(out, leaves, given)
    return {"out": out.detach(), **dict(zip(ROWS, grads, strict=True))}


def check_peer(
    problem: Problem, operator: Operator, computes: str | None, limit: float | None = None
) -> None:
    """Raises WrongResult unless a peer computes what it is said to, within ordinary rounding."""
    with torch.no_grad():
        # The whole batch: a compiled peer is made for one shape.
        out = operator(*(getattr(problem, name) for name in (*ROWS, *PARAMETERS)))
    if not bool(out.isfinite().all()):
        raise WrongResult("not finite")
    if computes is None:
        return
    B, L, H, D = problem.q.shape
    sequences = max(1, min(B, _NUMBERS // (L * H * D)))
    part = first(problem, sequences).on("cpu").to(torch.float64)
    wanted = part.but(causal=computes == "causal").run(ops.reference.gated_rela)
    scale = wanted.abs().amax()
    error = float((out[:sequences].cpu().double() - wanted).abs().max() / scale)
    if not error <= (limit or _PEER_ERROR[problem.q.dtype]):
        raise WrongResult(f"off by {error:.2g} of the largest result")
