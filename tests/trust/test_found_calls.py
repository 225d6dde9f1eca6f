"""What fuzzing and reviews found in calls, each as small as it gets; files are next door."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from recgrela_ext import (
    ItemTable,
    SeenItems,
    StateError,
    UserState,
    UserStateStore,
    evaluate,
    fit,
    ops,
)
from recgrela_ext.errors import shown
from recgrela_ext.layers import FeedForward
from recgrela_ext.model import losses
from recgrela_ext.ops import reference
from recgrela_ext.ops.encoder_step import encoder_step
from tests.fuzz.saved import small_model
from tests.ops.problems import make_problem, make_state


def test_who_does_not_fit_at_rest_is_named() -> None:
    model = small_model()
    store = UserStateStore(model, 4, "float16", active=1)
    state = model.init_state(1)
    state.buffer.fill_(1e6)
    store.put([77], state)
    with pytest.raises(StateError, match=r"the state of user 77 must fit in torch\.float16"):
        store.step([1], torch.tensor([2]))
    store.evict([77])
    store.step([1], torch.tensor([2]))


SPARSE = torch.ones(2, 2).to_sparse()
STATE = torch.ones(1, 1)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ops.topk_scores(None, STATE, 1), "topk_scores: hidden must be a tensor"),
        (lambda: ops.topk_scores(SPARSE, SPARSE, 1), "topk_scores: hidden must be a dense tensor"),
        (lambda: ops.topk_scores(STATE, STATE, 10**30), "topk_scores: k must be below 2**31"),
        (lambda: ops.topk_scores(STATE, STATE, 1, None), "topk_scores: padding_idx must be an int"),
        (lambda: ops.topk_scores(STATE, STATE, 1, 0, None, [1]), "topk_scores: seen must be a ten"),
        (
            lambda: ops.gated_rela(SPARSE, SPARSE, SPARSE, None, STATE, None, None),
            "gated_rela: q must be a dense tensor, got torch.sparse_coo",
        ),
        (lambda: encoder_step(STATE, 3, (STATE, STATE)), "encoder_step: packed_weights must be a"),
        (
            lambda: encoder_step(STATE, small_model().encoder.packed_weights(), STATE),
            "encoder_step: state must be a pair",
        ),
        (
            lambda: encoder_step(None, small_model().encoder.packed_weights(), (STATE, STATE)),
            "encoder_step: item_vectors must be a tensor",
        ),
        (
            lambda: encoder_step(STATE, small_model().encoder.packed_weights(), (0.5, STATE)),
            "encoder_step: item_vectors must have shape",
        ),
    ],
)
def test_arguments_that_are_no_dense_tensors(call: Any, text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(text)}"):
        call()


def test_flags_that_are_no_flags() -> None:
    x = torch.ones(1, 1, 1, 2)
    with pytest.raises(TypeError, match="rela: return_final_state must be True or False, got Tens"):
        ops.rela(x, x, x, torch.ones(1, 1), return_final_state=torch.ones(2))  # type: ignore


def test_eps_too_large_for_torch() -> None:
    x = torch.ones(1, 1, 1, 2)
    with pytest.raises(ValueError, match="rela: eps must be a number from 0 to 1"):
        ops.rela(x, x, x, torch.ones(1, 1), eps=10**30)


def test_active_on_another_device() -> None:
    """It chose the shape-only kernel, whose output is memory nobody wrote."""
    problem = make_problem(2, 1, 1, 4, 2, torch.float32)
    rows = [getattr(problem, name)[:, 0] for name in ("q", "k", "v", "gate")]
    parameters = (problem.inv_freq, problem.conv_weight, problem.conv_bias)
    state = make_state(2, 1, 4, 2, torch.float32)
    active = torch.ones(2, dtype=torch.bool, device="meta")
    text = "^gated_rela_step: active must be on the device of q, cpu, got meta$"
    with pytest.raises(ValueError, match=text):
        ops.gated_rela_step(*rows, *parameters, state, 1e-6, active)


@pytest.mark.parametrize("shape", [(2, 3, 0, 4), (9, 0, 4)])
def test_no_heads(shape: tuple[int, ...]) -> None:
    """Divided by the size of a rotation table of no heads: SIGFPE."""
    q, freq = torch.empty(shape), torch.empty(0, 2, dtype=torch.float64)
    bounds = torch.tensor([0, 5, 9]) if len(shape) == 3 else None
    assert ops.rela(q, q, q, freq, cu_seqlens=bounds).shape == shape


def many_rows() -> tuple[FeedForward, torch.Tensor]:
    """More than the fused feed_forward asks for."""
    torch.manual_seed(0)
    return FeedForward(32, 0.0), torch.randn(64 * torch.get_num_threads() + 5, 32)


def test_checkpointed_feed_forward() -> None:
    """Its backward read the saved tensors twice."""
    layer, x = many_rows()
    x.requires_grad_()
    plain = torch.autograd.grad(layer(x).square().sum(), x)[0]
    found = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)[0]
    torch.testing.assert_close(found, plain)


def test_feed_forward_under_vmap() -> None:
    """Gradients of an ensemble's weights were None."""
    layer, x = many_rows()
    weights = {n: p.detach().expand(2, *p.shape).clone() for n, p in layer.named_parameters()}
    for weight in weights.values():
        weight.requires_grad_()
    out = torch.func.vmap(lambda w: torch.func.functional_call(layer, w, (x,)))(weights)
    out.square().sum().backward()
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        for one in weights[name].grad:  # type: ignore[union-attr]
            torch.testing.assert_close(one, p.grad, rtol=1e-4, atol=1e-4)


def test_operators_under_vmap() -> None:
    q = torch.randn(3, 2, 5, 1, 4, requires_grad=True)
    freq = torch.ones(1, 2, dtype=torch.float64)
    out = torch.func.vmap(lambda x: ops.rela(x, x, x, freq))(q)
    found = torch.autograd.grad(out.square().sum(), q)[0]
    each = torch.stack([ops.rela(x, x, x, freq) for x in q])
    torch.testing.assert_close(out, each)
    torch.testing.assert_close(found, torch.autograd.grad(each.square().sum(), q)[0])


def test_who_watches_the_layers_of_feed_forward() -> None:
    """A forward put on one instance, hooks of all modules and counting modes saw nothing."""
    layer, x = many_rows()
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 2 * x.shape[0] * 32 * 128
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(module)
    )
    try:
        layer(x)
    finally:
        handle.remove()
    assert layer.fc1 in seen
    layer.fc2.forward = lambda y: torch.ones(len(y), 32)  # type: ignore[method-assign]
    assert torch.equal(layer(x), torch.ones(len(x), 32))


def test_feed_forward_has_one_dtype_under_autocast() -> None:
    for C, M in ((16, 32), (17, 32)):
        shapes = (4, C), (M, C), (M,), (C, M), (C,)
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.feed_forward(*map(torch.randn, shapes)).dtype == torch.float32


def test_loss_of_a_probability_of_zero() -> None:
    """exp was floored at -87, times a row of 1e38."""
    table = torch.tensor([[0.0], [1.0], [-1e38]])
    hidden, targets = torch.ones(70, 1), torch.ones(70, dtype=torch.int64)
    found = ops.softmax_loss(hidden, table, targets)
    for x, y in zip(found, reference.softmax_loss(hidden, table, targets), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("rows", [50, 64 * torch.get_num_threads()])
def test_arguments_of_the_loss_whatever_the_rows(rows: int) -> None:
    hidden, targets = torch.ones(rows, 4), torch.zeros(rows, dtype=torch.int64)
    empty = losses.softmax_loss(hidden, torch.ones(0, 4), targets, exclude_padding_class=False)
    assert float(empty) == 0.0
    losses.softmax_loss(hidden, torch.ones(3, 4), targets, np.int64(0))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"softmax_loss: ignore_index must be an int, got 0\.0"):
        losses.softmax_loss(hidden, torch.ones(3, 4), targets, 0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (torch.zeros(3, 3), "a Tensor"),
        (np.zeros((3, 3)), "a ndarray"),
        pytest.param(10**6000, "a int", id="digits"),
        ("x" * 500, "a str"),
        (np.float64(0.5), "np.float64(0.5)"),
        (None, "None"),
    ],
)
def test_a_wrong_value_is_shown_in_one_short_line(value: object, told: str) -> None:
    assert shown(value) == told
    with pytest.raises((TypeError, ValueError), match=f"got {re.escape(told)}$"):
        ops.topk_scores(torch.ones(1, 2), torch.ones(3, 2), 1, padding_idx=value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
        lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
    ],
    ids=["AdamW", "SGD", "Adagrad"],
)
def test_fused_optimizers_are_noticed(make: Any) -> None:
    """They write without counting: packed weights and fingerprint stayed as they were."""
    model = small_model()
    store = UserStateStore(model, 10)
    store.step([7], torch.tensor([1]))
    blob, table, before = model.init_state(1).to_bytes(0), ItemTable(model), model.fingerprint()
    optimizer = make(model.parameters())
    model.loss(torch.tensor([[1, 2]]), None, torch.tensor([[2, 3]])).backward()
    optimizer.step()
    assert model.fingerprint() != before
    stepped = model.step(torch.tensor([1]), model.init_state(1))
    torch.testing.assert_close(stepped, model(torch.tensor([[1]])))
    with pytest.raises(ValueError, match="must come from"):
        store.step([7], torch.tensor([2]))
    with pytest.raises(StateError, match="must come from"):
        UserState.from_bytes(blob, model)
    with pytest.raises(ValueError, match="must come from"):
        model.recommend(torch.tensor([[1]]), k=1, table=table)


def test_weights_loaded_in_inference_mode_are_noticed() -> None:
    with torch.inference_mode():
        model, other = small_model(), small_model()
        for weight in other.parameters():
            weight.mul_(1.1)
        model.step(torch.tensor([1]), model.init_state(1))
        before = model.fingerprint()
        model.load_state_dict(other.state_dict())
        assert model.fingerprint() != before
        stepped = model.step(torch.tensor([1]), model.init_state(1))
        torch.testing.assert_close(stepped, model(torch.tensor([[1]])))
    copy.deepcopy(model)
    pickle.loads(pickle.dumps(model))


def test_states_of_inference_mode_go_on_outside_of_it() -> None:
    """A step outside changed the sums, then failed: the event was counted twice at the next try."""
    model = small_model()
    with torch.inference_mode():
        states = [
            model.prefill(torch.tensor([[1, 2]])),
            model.prefill_packed(torch.tensor([1, 2]), torch.tensor([0, 2])),
            UserState.from_bytes(model.prefill(torch.tensor([[1, 2]])).to_bytes(0), model),
            UserState.cat([model.prefill(torch.tensor([[1, 2]]))]),
            model.prefill(torch.tensor([[3], [1]]))[1:],
        ]
        model.step(torch.tensor([2]), states[-1])
        store = UserStateStore(model, 3, "int8")
        store.step([5], torch.tensor([1]))
    store.step([5], torch.tensor([2]))
    wanted = model.prefill(torch.tensor([[1, 2, 3]]))
    for state in states:
        model.step(torch.tensor([3]), state)
        assert state.position.tolist() == [3]
        torch.testing.assert_close(state.buffer, wanted.buffer)
        torch.testing.assert_close(state.hidden, wanted.hidden)
    with torch.inference_mode():
        model.step(torch.tensor([4]), states[0])
    model.prefill(torch.tensor([[5]]), state=states[0])
    torch.testing.assert_close(
        states[0].buffer, model.prefill(torch.tensor([[1, 2, 3, 4, 5]])).buffer
    )


@pytest.mark.parametrize("length", [-1, 4, 99])
def test_lengths_of_seen_items(length: int) -> None:
    with pytest.raises(ValueError, match=rf"item_seq_len must lie in 0..3, got {length}"):
        SeenItems.from_sequences(torch.tensor([[5, 6, 7]]), torch.tensor([length]))
    with pytest.raises(ValueError, match=r"item_seq_len must be \[1\], got \[2\]"):
        SeenItems.from_sequences(torch.tensor([[5, 6, 7]]), torch.tensor([1, 2]))


def test_seen_items_cannot_be_written_through() -> None:
    """`lookup` says copies; its ids were the store's."""
    store = UserStateStore(small_model(), 3)
    store.step([1], torch.tensor([4]))
    with pytest.raises(ValueError, match="read-only"):
        store.lookup([1]).seen.ids(0)[0] = 5


def test_refusals_name_the_argument() -> None:
    model = small_model()
    store = UserStateStore(model, 3)
    for call, error, text in (
        (lambda: UserStateStore(model, 10**30), ValueError, "capacity must be below"),
        (lambda: UserStateStore(model, 3, torch.ones(5, 5)), ValueError, "dtype must be one of"),
        (lambda: UserStateStore(model, 3, device="meta"), ValueError, "device must hold values"),
        (lambda: ItemTable(model, torch.ones(5, 5)), ValueError, "dtype must be one of"),
        (lambda: store.rebuild([1], [[[1, 2]]]), ValueError, r"history must be items \[L\]"),
        (lambda: SeenItems(None), ValueError, "batch_size must be an int"),
        (lambda: losses.softmax_loss([1.0], None, None), TypeError, "hidden must be a tensor"),
        (lambda: fit(model, None, steps=1), TypeError, "train must be Sequences, got None"),
        (lambda: evaluate(model, None), TypeError, "targets must be Targets, got None"),
    ):
        with pytest.raises(error, match=text) as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1
    store.rebuild([1], [torch.tensor([1, 2])])


class Sharded(torch.Tensor):
    """As ShardedTensor, which TorchRec's optimizers hold: it takes few functions."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"torch function '{func.__name__}' is not supported")


class KeyedOptimizer(torch.optim.Optimizer):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__([torch.nn.Parameter(torch.ones(1))], {})
        self.param_groups[0]["params"].append(weight)

    def step(self, closure: Any = None) -> None:
        return None


def test_optimizers_of_sharded_tensors_step() -> None:
    """The count of every optimizer's steps asked each weight whether it counts."""
    KeyedOptimizer(torch.ones(2).as_subclass(Sharded)).step()
