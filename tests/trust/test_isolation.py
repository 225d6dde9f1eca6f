"""What one user sends changes no bit of another's: outputs, gradients of inputs, states.

At the same batch shape; weights' gradients are sums over users by nature. In padded, packed and
streaming form, for operators and for the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recgrela_ext import RecGRELA, RecGRELAConfig, SeenItems, UserStateStore, ops
from recgrela_ext.model.losses import softmax_loss
from recgrela_ext.ops.encoder_step import encoder_step
from tests.ops.problems import Problem, gradients, make_problem, make_state, outputs
from tests.tolerance import assert_same_bits

# Values an adversary can send: what spreads, what overflows on the way, what is slow.
BAD = [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45, 1e19]
bad_values = st.sampled_from(BAD)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
quick = settings(max_examples=25)


def spoil(x: Tensor, index: Any, value: float, share: float = 1.0) -> Tensor:
    """`x` with `value` at a share of the elements of `index`."""
    x = x.clone()
    part = x[index]
    x[index] = torch.where(torch.rand(part.shape) < share, part.new_full((), value), part)
    return x


def rela(gate: None, conv_weight: None, conv_bias: None, **arguments: Any) -> Any:
    return ops.rela(**arguments)


@quick
@given(
    operator=st.sampled_from([ops.gated_rela, rela]),
    value=bad_values,
    share=st.sampled_from([1.0, 0.1]),
    dtype=dtypes,
    packed=st.booleans(),
    causal=st.booleans(),
    lengths=st.lists(st.sampled_from([0, 1, 3, 63, 64, 65, 130]), min_size=2, max_size=5),
    head_dim=st.sampled_from([2, 8, 16, 34]),
    state=st.booleans(),
    data=st.data(),
)
def test_operator(
    operator: Callable[..., Any],
    value: float,
    share: float,
    dtype: torch.dtype,
    packed: bool,
    causal: bool,
    lengths: list[int],
    head_dim: int,
    state: bool,
    data: st.DataObject,
) -> None:
    """gated_rela and rela forward and backward, the bad user's rows and state spoiled."""
    options: dict[str, Any] = {"packed": lengths} if packed else {"lengths": lengths}
    if operator is rela:
        options |= {"gate": False, "W": 0}
    problem = make_problem(
        len(lengths), max(*lengths, 1), 2, head_dim, dtype=dtype, state=state and causal,
        return_final_state=causal, causal=causal, **options,
    )  # fmt: skip
    bad = data.draw(st.integers(0, len(lengths) - 1))
    starts = np.cumsum([0, *lengths])
    own: Any = slice(starts[bad], starts[bad + 1]) if packed else bad

    def rows(x: Tensor) -> Tensor:
        return spoil(x, own, value, share)

    whole = {n: getattr(problem, n) for n in ("q", "k", "v", "gate")}
    spoiled = problem.but(**{n: rows(x) for n, x in whole.items() if x is not None})
    if problem.initial_state is not None:
        *sums, position = problem.initial_state
        changed = [spoil(x, bad, value, share) for x in sums]
        spoiled = spoiled.but(initial_state=(*changed, position))
    for found, clean in (
        (outputs(spoiled.run(operator)), outputs(problem.run(operator))),
        (gradients(spoiled, operator), gradients(problem, operator)),
    ):
        for name, x in found.items():
            if name in ("conv_weight", "conv_bias"):
                continue
            by_row = packed and name in ("out", "q", "k", "v", "gate")
            others = torch.ones(x.shape[0], dtype=torch.bool)
            others[own if by_row else bad] = False
            assert_same_bits(name, x[others], clean[name][others])


def steps_of(problem: Problem, t: int) -> dict[str, Any]:
    rows = {n: getattr(problem, n)[:, t] for n in ("q", "k", "v", "gate")}
    return {**rows, **{n: getattr(problem, n) for n in ("inv_freq", "conv_weight", "conv_bias")}}


@quick
@given(
    value=bad_values,
    dtype=dtypes,
    users=st.integers(2, 9),
    head_dim=st.sampled_from([2, 8, 16, 34]),
    data=st.data(),
)
def test_step(
    value: float, dtype: torch.dtype, users: int, head_dim: int, data: st.DataObject
) -> None:
    problem = make_problem(users, 3, 2, head_dim, dtype=dtype)
    bad = data.draw(st.integers(0, users - 1))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    state = make_state(users, 2, head_dim, 4, acc)
    runs = []
    for spoiled in (False, True):
        torch.manual_seed(1)
        mine = tuple(x.clone() for x in state)
        outs = []
        for t in range(3):
            arguments = steps_of(problem, t)
            if spoiled:
                rows = ("q", "k", "v", "gate")
                arguments |= {n: spoil(arguments[n], bad, value) for n in rows}
            outs.append(ops.gated_rela_step(**arguments, state=mine))
        runs.append([*outs, *mine])
    others = torch.arange(users) != bad
    for clean, found in zip(*runs, strict=True):
        assert_same_bits("step", found[others], clean[others])


@pytest.fixture(scope="module")
def model() -> RecGRELA:
    torch.manual_seed(0)
    return RecGRELA(RecGRELAConfig(num_items=40, hidden_size=16, num_layers=2, num_heads=2)).eval()


@quick
@given(value=bad_values, users=st.integers(2, 70), where=st.sampled_from(["rows", "state"]))
def test_encoder_step(model: RecGRELA, value: float, users: int, where: str) -> None:
    packed = model.encoder.packed_weights()
    x = torch.randn(users, 16)
    rows = torch.rand(users, model.state_layout.row_size) + 1
    position = torch.arange(users)
    bad = users // 2
    clean_rows = rows.clone()
    clean = encoder_step(x, packed, (clean_rows, position))
    if where == "rows":
        x = spoil(x, bad, value)
    else:
        rows = spoil(rows, bad, value)
    found = encoder_step(x, packed, (rows, position))
    others = torch.arange(users) != bad
    assert_same_bits("hidden", found[others], clean[others])
    assert_same_bits("state", rows[others], clean_rows[others])


@quick
@given(
    value=bad_values,
    users=st.integers(2, 40),
    table=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    k=st.sampled_from([1, 5, 400]),
)
def test_topk_rows(value: float, users: int, table: torch.dtype, k: int) -> None:
    hidden = torch.randn(users, 24)
    items = torch.randint(-100, 100, (300, 24)).to(table)
    scale = torch.rand(300) if table == torch.int8 else None
    seen = torch.randint(0, 300, (users, 6))
    clean = ops.topk_scores(hidden, items, k, 0, scale, seen)
    bad = users - 1
    seen[bad] = torch.randint(0, 300, (6,))
    found = ops.topk_scores(spoil(hidden, bad, value), items, k, 0, scale, seen)
    for a, b in zip(found, clean, strict=True):
        assert_same_bits("list", a[:bad], b[:bad])


def by_rows(call: Callable[..., Tensor], rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `call` makes of `rows`, and the rows' gradients for random ones of the result."""
    leaves = {name: x.detach().requires_grad_() for name, x in rows.items()}
    out = call(**leaves)
    given = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    found = torch.autograd.grad(out, list(leaves.values()), given)
    return {"out": out, **dict(zip(leaves, found, strict=True))}


def assert_rows_apart(
    call: Callable[..., Tensor], rows: dict[str, Tensor], bad: int, value: float, share: float
) -> None:
    """Row `bad` of every one of `rows` is spoiled; all others come out as they would have."""
    clean = by_rows(call, rows)
    found = by_rows(call, {name: spoil(x, bad, value, share) for name, x in rows.items()})
    others = torch.arange(len(clean["out"])) != bad
    for name, x in clean.items():
        assert_same_bits(name, found[name][others], x[others])


@quick
@given(
    value=bad_values,
    share=st.sampled_from([1.0, 0.1]),
    dtype=dtypes,
    shape=st.sampled_from([(2, 1), (5, 7), (9, 16), (3, 64, 8), (70, 33)]),
    gelu=st.booleans(),
    residual=st.booleans(),
    p=st.sampled_from([0.0, 0.1, 0.9]),
)
def test_activation_dropout(
    value: float, share: float, dtype: torch.dtype, shape: tuple[int, ...], gelu: bool,
    residual: bool, p: float,
) -> None:  # fmt: skip
    names = ("x", "residual") if residual else ("x",)
    rows = {name: torch.randn(shape).to(dtype) for name in names}
    bad = shape[0] // 2

    def call(**given: Tensor) -> Tensor:
        return ops.activation_dropout(**given, gelu=gelu, p=p, seed=3)

    assert_rows_apart(call, rows, bad, value, share)


@quick
@given(
    value=bad_values,
    share=st.sampled_from([1.0, 0.1]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    users=st.sampled_from([2, 5, 63, 64, 65, 130]),
    width=st.sampled_from([8, 16, 32]),  # the kernel takes multiples of 16
    inner=st.sampled_from([24, 64]),
    residual=st.booleans(),
    p=st.sampled_from([0.0, 0.1, 0.9]),
    data=st.data(),
)
def test_feed_forward(
    value: float, share: float, dtype: torch.dtype, users: int, width: int, inner: int,
    residual: bool, p: float, data: st.DataObject,
) -> None:  # fmt: skip
    shapes = {
        "first_weight": (inner, width), "first_bias": (inner,),
        "second_weight": (width, inner), "second_bias": (width,),
    }  # fmt: skip
    weights = {n: torch.randn(shape).to(dtype).requires_grad_() for n, shape in shapes.items()}
    names = ("x", "residual") if residual else ("x",)
    rows = {name: torch.randn(users, width).to(dtype) for name in names}

    def call(**given: Tensor) -> Tensor:
        return ops.feed_forward(**given, **weights, p=p, inner_seed=3, outer_seed=4)

    assert_rows_apart(call, rows, data.draw(st.integers(0, users - 1)), value, share)


@quick
@given(
    value=bad_values,
    share=st.sampled_from([1.0, 0.1]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    users=st.sampled_from([2, 31, 32, 33, 70]),
    items=st.sampled_from([5, 140, 300]),
    biased=st.booleans(),
    counts=st.booleans(),
    chunk_rows=st.sampled_from([None, 1, 7]),
    data=st.data(),
)
def test_softmax_loss(
    value: float, share: float, dtype: torch.dtype, users: int, items: int, biased: bool,
    counts: bool, chunk_rows: int | None, data: st.DataObject,
) -> None:  # fmt: skip
    """Gradients of the other rows; a row without a target changes nothing at all."""
    hidden, table = torch.randn(users, 24).to(dtype), torch.randn(items, 24).to(dtype)
    targets = torch.randint(1, items, (users,))
    targets[::5] = 0
    bad = data.draw(st.integers(0, users - 1))
    targets[bad] = int(counts)
    bias = None
    if biased:  # three items of every user
        values = torch.randn(3 * users).to(dtype)
        bias = ops.LogitBias(
            3 * torch.arange(users + 1), torch.randint(items, (3 * users,)), values
        )
    own = slice(3 * bad, 3 * bad + 3)

    def run(hidden: Tensor, bias: ops.LogitBias | None) -> dict[str, Tensor]:
        names = ("loss", "hidden", "table", "bias")
        found = dict(zip(names, ops.softmax_loss(hidden, table, targets, bias=bias), strict=True))
        leaf = hidden.detach().requires_grad_()
        loss = softmax_loss(leaf, table, targets, chunk_rows=chunk_rows, bias=bias)
        found["whole loss"] = loss.detach()
        (found["hidden, by autograd"],) = torch.autograd.grad(loss, leaf)
        return found

    clean = run(hidden, bias)
    if bias is not None:
        bias = bias._replace(values=spoil(bias.values, own, value, share))
    found = run(spoil(hidden, bad, value, share), bias)
    for name, x in clean.items():
        if "hidden" in name or (name == "bias" and biased):
            others = torch.ones(len(x), dtype=torch.bool)
            others[own if name == "bias" else bad] = False
            assert_same_bits(name, found[name][others], x[others])
        elif not counts:
            assert_same_bits(name, found[name], x)


class Poisoned:
    """A copy of a model whose item 40 is what an adversary would like it to be."""

    def __init__(self, model: RecGRELA, value: float) -> None:
        self.model = RecGRELA(model.config).eval()
        self.model.load_state_dict(model.state_dict())
        with torch.no_grad():
            self.model.item_embedding.weight[40] = value


@quick
@given(
    value=bad_values,
    users=st.integers(2, 6),
    form=st.sampled_from(["padded", "packed", "prefill", "prefill_packed"]),
)
def test_model(model: RecGRELA, value: float, users: int, form: str) -> None:
    """One user meets a poisoned item; the others' hidden states and states keep their bits."""
    poisoned = Poisoned(model, value).model
    lengths = torch.randint(1, 20, (users,))
    rows = torch.randint(1, 40, (users, 20)).masked_fill(torch.arange(20) >= lengths[:, None], 0)
    bad = users // 2
    theirs = rows.clone()
    theirs[bad, 0] = 40
    others = torch.arange(users) != bad
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))

    def run(items: Tensor) -> list[Tensor]:
        flat = items[items != 0]
        if form == "padded":
            return [poisoned.encode(items, lengths)[others]]
        if form == "packed":
            of = torch.repeat_interleave(torch.arange(users), lengths)
            return [poisoned.encode_packed(flat, bounds)[others[of]]]
        if form == "prefill":
            state = poisoned.prefill(items, lengths, chunk_size=7)
        else:
            state = poisoned.prefill_packed(flat, bounds, chunk_size=7)
        return [state.buffer[others], state.hidden[others], state.position[others]]

    with torch.no_grad():
        for found, clean in zip(run(theirs), run(rows), strict=True):
            assert_same_bits(form, found, clean)


@settings(max_examples=12)
@given(value=bad_values, dtype=st.sampled_from(["float32", "bfloat16", "int8"]))
def test_store(model: RecGRELA, value: float, dtype: str) -> None:
    """Events of a user whose state is poisoned, at rest and in use, beside those of others."""
    poisoned = Poisoned(model, value).model
    stores = [UserStateStore(poisoned, 8, dtype, active=3) for _ in range(2)]
    for number in range(12):
        users = np.asarray([number % 5, 5, number % 3])
        if number % 3 == number % 5:
            users = users[:2]
        items = torch.randint(1, 40, (len(users),))
        items[1] = 40
        stores[0].step(users, items)
        stores[1].step(users, torch.where(torch.as_tensor(users) == 5, 7, items))
    found, clean = (store.lookup(np.arange(5)) for store in stores)
    assert_same_bits("state", found.state.buffer, clean.state.buffer)
    assert_same_bits("hidden", found.state.hidden, clean.state.hidden)
    lists = [
        poisoned.recommend_from_state(one.state, 10, SeenItems(5), torch.arange(1, 40))
        for one in (found, clean)
    ]
    assert_same_bits("items", lists[0].items, lists[1].items)
    assert_same_bits("scores", lists[0].scores, lists[1].scores)
