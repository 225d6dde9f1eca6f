"""Sizes users crash on elsewhere: more blocks than a grid's y axis has, offsets beyond 32 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recgrela_ext import ops
from tests.gpu.device import DEVICE, DRY_RUN, free_memory
from tests.ops.problems import ROWS, Problem, make_problem, make_state
from tests.tolerance import assert_as_exact, assert_same_bits

pytestmark = pytest.mark.gpu
MANY = 700 if DRY_RUN else 70_000  # sequences


def assert_rows_agree(problem: Problem, given: Tensor, picked: list[int]) -> None:
    """Some sequences of outputs and gradients against the reference on them alone."""
    leaf = problem.requiring_grad()
    out = leaf.run(ops.gated_rela)
    assert out.isfinite().all()
    grads = torch.autograd.grad(out, [getattr(leaf, n) for n in ROWS], given)
    found = dict(zip(("out", *ROWS), (out.detach(), *grads), strict=True))
    part = problem.but(**{n: getattr(problem, n)[picked] for n in ROWS}).on("cpu")
    results = []
    for dtype in (part.q.dtype, torch.float64):
        one = part.to(dtype).requiring_grad()
        y = one.run(ops.reference.gated_rela)
        grads = torch.autograd.grad(
            y, [getattr(one, n) for n in ROWS], given[picked].to("cpu", dtype)
        )
        results.append(dict(zip(("out", *ROWS), (y.detach(), *grads), strict=True)))
    plain, exact = results
    for name, x in found.items():
        dims = (-1,) if name == "out" else (-3, -1)  # q and k cancel at the first items
        assert_as_exact(name, x[picked].cpu(), plain[name], exact[name], dims, name != "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_sequences_than_a_grid_axis(dtype: torch.dtype) -> None:
    problem = make_problem(MANY, 3, 4, 16, dtype=dtype).on(DEVICE)
    given = torch.randn_like(problem.q)
    assert_rows_agree(problem, given, [0, 1, MANY // 2, MANY - 2, MANY - 1])


def test_more_packed_sequences_than_a_grid_axis() -> None:
    """Also empty ones: the same rows as the padded problem's."""
    lengths = (torch.arange(MANY) % 3).tolist()
    padded = make_problem(MANY, 2, 2, 16, dtype=torch.float32, lengths=lengths).on(DEVICE)
    keep = torch.arange(2, device=DEVICE) < padded.lengths[:, None]  # type: ignore[index]
    starts = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)
    rows = {n: getattr(padded, n)[keep] for n in ROWS}
    packed = padded.but(**rows, lengths=None, cu_seqlens=starts)
    torch.testing.assert_close(packed.run(ops.gated_rela), padded.run(ops.gated_rela)[keep])


def test_more_users_than_a_grid_axis() -> None:
    problem = make_problem(MANY, 1, 1, 8, dtype=torch.float32).on(DEVICE)
    state = tuple(x.to(DEVICE) for x in make_state(MANY, 1, 8, 4, torch.float32))
    rows = [getattr(problem, n)[:, 0] for n in ROWS]
    parameters = problem.inv_freq, problem.conv_weight, problem.conv_bias
    last = slice(MANY - 5, MANY)
    few = tuple(x[last].clone() for x in state)
    out = ops.gated_rela_step(*rows, *parameters, state)
    alone = ops.gated_rela_step(*(x[last] for x in rows), *parameters, few)
    assert out.isfinite().all()
    assert_same_bits("out", out[last], alone)
    for x, y in zip(state, few, strict=True):
        assert_same_bits("state", x[last], y)


@pytest.mark.parametrize("head_dim", [16, 64])
def test_more_than_two_to_the_31_numbers(head_dim: int) -> None:
    """bfloat16, forward and backward: 64-bit offsets everywhere."""
    H, L = 256 // head_dim, 4096
    B = 3 if DRY_RUN else 2**31 // (L * 256) + 3
    L = 70 if DRY_RUN else L
    numbers = B * L * 256
    assert DRY_RUN or numbers > 2**31
    # q, k, v, gate, out and their gradients, and the float32 states saved every 64 items
    need = 10 * 2 * numbers + 4 * numbers * (head_dim + 1) // 64 + 2 * 2**30
    if free_memory() < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of GPU memory, {free_memory() / 2**30:.0f} free")
    small = make_problem(1, 1, H, head_dim, dtype=torch.bfloat16).on(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def rows() -> Tensor:
        shape = (B, L, H, head_dim)
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)

    problem = small.but(**{n: rows() for n in ROWS})
    # one number, expanded, is made contiguous by autograd: it would be an eleventh row
    assert_rows_agree(problem, rows(), [0, B - 1])
