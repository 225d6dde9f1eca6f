"""Sizes at the edge of what fits: indices over 2^31, many pairs, long histories, nothing at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recgrela_ext import RecGRELA, RecGRELAConfig, SeenItems, UserStateStore, ops
from recgrela_ext.ops.encoder_step import encoder_step
from tests.ops.agreement import assert_agrees
from tests.ops.problems import make_problem, make_state
from tests.tolerance import assert_same_bits


@pytest.mark.kernels
def test_more_pairs_than_a_grid_has_rows() -> None:
    """B * H over 65,535, which is where a CUDA grid's second dimension ends."""
    problem = make_problem(33_000, 2, 2, 2, dtype=torch.float32)
    whole = problem.run(ops.gated_rela)
    some = torch.tensor([0, 1, 32_766, 32_768, 32_999])
    rows = {name: getattr(problem, name)[some] for name in ("q", "k", "v", "gate")}
    assert_same_bits("out", whole[some], problem.but(**rows).run(ops.gated_rela))
    state = make_state(33_000, 2, 2, 4, torch.float32)
    few = tuple(x[some].clone() for x in state)
    parameters = (problem.inv_freq, problem.conv_weight, problem.conv_bias)
    step = [getattr(problem, name)[:, 0] for name in ("q", "k", "v", "gate")]
    out = ops.gated_rela_step(*step, *parameters, state)
    assert_same_bits(
        "step", out[some], ops.gated_rela_step(*(x[some] for x in step), *parameters, few)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [2, 256])
def test_head_dims_at_the_ends(head_dim: int, dtype: torch.dtype) -> None:
    assert_agrees(
        make_problem(1, 66, 1, head_dim, dtype=dtype, state=True, return_final_state=True),
        ops.gated_rela,
    )


def test_nobody_and_nothing() -> None:
    """No users, no items, users without items, through everything a model does."""
    torch.manual_seed(0)
    model = RecGRELA(RecGRELAConfig(num_items=9, hidden_size=8, num_layers=2, num_heads=2)).eval()
    nobody = torch.empty(0, 5, dtype=torch.int64)
    nothing = torch.empty(3, 0, dtype=torch.int64)
    zeros = torch.zeros(3, dtype=torch.int64)
    assert model.encode(nobody).shape == (0, 5, 8)
    assert model.encode(nothing, zeros).shape == (3, 0, 8)
    assert model.recommend(nobody, k=2).items.shape == (0, 2)
    assert model.recommend(nothing, zeros, k=2).items.shape == (3, 2)
    for state in (model.prefill(nothing), model.prefill(torch.zeros(3, 4, dtype=torch.int64))):
        assert state.position.tolist() == [0, 0, 0]
        assert not state.buffer.any()
    packed = model.prefill_packed(torch.empty(0, dtype=torch.int64), torch.zeros(4).long())
    assert len(packed) == 3
    assert model.step(torch.empty(0, dtype=torch.int64), model.init_state(0)).shape == (0, 8)
    assert model.recommend_from_state(model.init_state(0), 3, SeenItems(0)).items.shape == (0, 3)
    store = UserStateStore(model, 2, "int8")
    assert store.step([], torch.empty(0, dtype=torch.int64)).shape == (0, 8)
    store.rebuild([], [])
    store.put([], model.init_state(0))
    assert len(store.lookup(np.empty(0, np.int64)).state) == 0
    assert len(store.evict(oldest=5).users) == 0


@pytest.mark.slow
def test_four_million_items_of_one_history() -> None:
    """The end of it, against float64 sums of all that came before."""
    L, tail = 4_000_000, 2000
    problem = make_problem(1, L, 1, 8, dtype=torch.float32, return_final_state=True)
    out, final = problem.run(ops.gated_rela)
    rows = ("q", "k", "v", "gate")
    wide = problem.but(**{n: getattr(problem, n)[:, :-tail] for n in rows}).to(torch.float64)
    _, state = wide.run(ops.gated_rela)
    end = problem.but(**{n: getattr(problem, n)[:, -tail:] for n in rows}).to(torch.float64)
    exact, exact_final = end.but(initial_state=state).run(ops.gated_rela)
    assert (out[:, -tail:] - exact).abs().max() <= 2e-4 * exact.abs().max()
    for x, y in zip(final[:3], exact_final[:3], strict=True):
        assert (x - y).abs().max() <= 2e-5 * y.abs().max()
    assert final[3].tolist() == [L]


@pytest.mark.slow
def test_giant_tensors() -> None:
    """More than 2^31 elements a tensor, bfloat16; q, k, v and gate share one storage: 9 GiB."""
    B, L, H, D = 8200, 1024, 4, 64
    assert B * L * H * D > 2**31
    rows = torch.zeros(B, L, H, D, dtype=torch.bfloat16)
    rows[-3:] = torch.randn(3, L, H, D)
    problem = make_problem(3, 1, H, D, dtype=torch.bfloat16)
    end = problem.but(q=rows[-3:], k=rows[-3:], v=rows[-3:], gate=rows[-3:])
    whole = problem.but(q=rows, k=rows, v=rows, gate=rows).run(ops.gated_rela)
    assert_same_bits("the last sequences", whole[-3:], end.run(ops.gated_rela))
    middle = whole[4096]  # zeros: the gate is silu(0)
    assert not middle.any()
    flat = rows.view(B * L, H, D)
    starts = torch.arange(B + 1) * L
    del whole
    packed = problem.but(q=flat, k=flat, v=flat, gate=flat, cu_seqlens=starts).run(ops.gated_rela)
    assert_same_bits("packed", packed[-3 * L :], end.run(ops.gated_rela).view(3 * L, H, D))


def spread(rows: torch.Tensor, gap: int) -> torch.Tensor:
    """The same rows more than 2^31 elements apart; what lies between is never touched."""
    room = torch.empty(gap * (len(rows) - 1) + rows[0].numel(), dtype=rows.dtype)
    far = room.as_strided(rows.shape, (gap, *rows[0].contiguous().stride()))
    return far.copy_(rows)


@pytest.mark.slow
def test_rows_far_apart() -> None:
    """Users' rows and states 2^31 elements apart, as in a table of half a million states."""
    gap = 2**31 + 48
    problem = make_problem(2, 70, 2, 8, dtype=torch.bfloat16)
    rows = {name: spread(getattr(problem, name), gap) for name in ("q", "k", "v", "gate")}
    assert_same_bits("rows", problem.run(ops.gated_rela), problem.but(**rows).run(ops.gated_rela))
    problem = make_problem(2, 1, 2, 8, dtype=torch.float32)
    near = make_state(2, 2, 8, 4, torch.float32)
    *sums, position = near
    far = tuple(spread(x, gap) for x in sums)
    step = [getattr(problem, name)[:, 0] for name in ("q", "k", "v", "gate")]
    parameters = (problem.inv_freq, problem.conv_weight, problem.conv_bias)
    out = [ops.gated_rela_step(*step, *parameters, (*x, position)) for x in (tuple(sums), far)]
    assert_same_bits("step", *out)
    for name, x, y in zip(("kv", "k_sum", "conv"), sums, far, strict=True):
        assert_same_bits(name, x, y)


@pytest.mark.slow
def test_states_far_apart_in_an_encoder_step() -> None:
    torch.manual_seed(0)
    model = RecGRELA(RecGRELAConfig(num_items=9, hidden_size=16, num_layers=2, num_heads=2)).eval()
    near = model.prefill(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    packed = model.encoder.packed_weights()
    assert packed is not None
    x = torch.randn(2, 16)
    far = spread(near.buffer, 2**31 + 48)
    out = [encoder_step(x, packed, (rows, near.position)) for rows in (near.buffer, far)]
    assert_same_bits("step", *out)
    assert_same_bits("state", near.buffer, far)


@pytest.mark.slow
def test_giant_catalogue() -> None:
    """2^31 bytes of item vectors; the best are the last rows and one in the middle."""
    width, N = 64, 2**31 // 64 + 100
    table = torch.zeros(N, width, dtype=torch.int8)
    best = [N - 1, N - 7, N // 2, 1]
    for place, value in zip(best, (100, 90, 80, 70), strict=True):
        table[place] = value
    scores, items = ops.topk_scores(torch.ones(3, width), table, 4, scale=torch.ones(N))
    assert items.tolist() == [best] * 3
    assert scores[0].tolist() == [6400, 5760, 5120, 4480]


@pytest.mark.slow
def test_giant_rows_of_the_loss() -> None:
    """2^31 elements of hidden states; all rows but the last ones have no target."""
    T, width = 2**31 // 16 + 100, 16
    hidden = torch.zeros(T, width)
    targets = torch.zeros(T, dtype=torch.int64)
    hidden[-40:] = torch.randn(40, width)
    targets[-40:] = torch.arange(40) % 4 + 1
    table = torch.randn(5, width)
    whole, *_ = ops.softmax_loss(hidden, table, targets, gradients=False)
    end, *_ = ops.softmax_loss(hidden[-40:], table, targets[-40:], gradients=False)
    torch.testing.assert_close(whole, end)


@pytest.mark.slow
def test_giant_activation() -> None:
    x = torch.zeros(2**31 // 64 + 100, 64, dtype=torch.bfloat16)
    x[-3:] = torch.randn(3, 64)
    out = ops.activation_dropout(x, gelu=True, p=0.0)
    assert_same_bits("end", out[-3:], ops.activation_dropout(x[-3:], gelu=True, p=0.0))
    assert not out[: len(out) // 2].any()
