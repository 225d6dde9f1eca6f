"""Calls of every public operator, one or two arguments spoiled; each gives what accepted them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recgrela_ext import ops
from recgrela_ext.model import losses
from recgrela_ext.ops import reference
from recgrela_ext.ops.activation_dropout import activation_dropout
from recgrela_ext.ops.encoder_step import encoder_step, reference_encoder_step
from recgrela_ext.ops.softmax_loss import _plain
from recgrela_ext.ops.topk_scores import reference_topk_scores
from tests.fuzz import operator_arguments as make
from tests.fuzz.draw import REFUSED, Draw
from tests.fuzz.operator_arguments import FLOATS, Arguments, spoil_one
from tests.fuzz.operator_results import (
    GRADIENTS,
    Call,
    alike,
    compare,
    copied,
    farthest,
    gradients,
)
from tests.fuzz.operator_rules import RULES


def sequence(draw: Draw) -> str:
    arguments = make.problem(draw).arguments()
    name = "gated_rela"
    if draw.byte() % 4 == 0:
        name = "rela"
        for unused in ("gate", "conv_weight", "conv_bias"):
            arguments.pop(unused)
        state = arguments["initial_state"]
        if state is not None:
            arguments["initial_state"] = (*state[:2], state[2][:, :0], state[3])
    arguments = spoil_one(draw, arguments)
    dtype = getattr(arguments["q"], "dtype", None)
    call, plain = getattr(ops, name), getattr(reference, name)
    valid, far = RULES[name](arguments), farthest(arguments["initial_state"])
    return compare(name, lambda: call(**arguments), lambda: plain(**arguments), dtype, valid, far)


def step(draw: Draw) -> str:
    arguments = spoil_one(draw, make.step_arguments(draw))
    state = arguments["state"]
    again = {**arguments, "state": copied(state)}
    return compare(
        "gated_rela_step",
        lambda: (ops.gated_rela_step(**arguments), *state[:3]),
        lambda: (reference.gated_rela_step(**again), *again["state"][:3]),
        getattr(arguments["q"], "dtype", None),
        RULES["gated_rela_step"](arguments),
        farthest(state),
    )


def encoder(draw: Draw) -> str:
    packed, x, rows, position = make.packed_encoder(draw)
    active = torch.rand(len(x)) > 0.3 if draw.flag() else None
    named = {"item_vectors": x, "packed_weights": packed, "state": (rows, position)}
    arguments = spoil_one(draw, {**named, "active": active})
    state, copies = arguments["state"], copied(arguments["state"])
    return compare(
        "encoder_step",
        lambda: (encoder_step(**arguments), state[0]),
        lambda: (reference_encoder_step(
            arguments["item_vectors"], packed, copies, arguments["active"]), copies[0]),
        packed.weights.dtype, RULES["encoder_step"](arguments), farthest(state),
    )  # fmt: skip


def topk(draw: Draw) -> str:
    arguments = spoil_one(draw, make.topk_arguments(draw))
    if isinstance(arguments["k"], int) and 10**6 < arguments["k"] < 2**31:
        return REFUSED  # gigabytes of padding, as asked for
    return compare(
        "topk_scores",
        lambda: ops.topk_scores(**arguments),
        lambda: reference_topk_scores(**arguments),
        torch.float64,  # whole numbers: exact
        RULES["topk_scores"](arguments),
    )


def dropout(draw: Draw) -> str:
    arguments = spoil_one(draw, make.dropout_arguments(draw))
    return compare(
        "activation_dropout",
        lambda: activation_dropout(**arguments),
        lambda: reference.activation_dropout(**arguments),
        getattr(arguments["x"], "dtype", None),
        RULES["activation_dropout"](arguments),
    )


def feed_forward(draw: Draw) -> str:
    arguments = spoil_one(draw, make.feed_forward_arguments(draw))
    return compare(
        "feed_forward",
        lambda: ops.feed_forward(**arguments),
        lambda: reference.feed_forward(**arguments),
        getattr(arguments["x"], "dtype", None),
        RULES["feed_forward"](arguments),
    )


def softmax(draw: Draw) -> str:
    arguments = make.softmax_arguments(draw)
    bias = spoil_one(draw, make.bias_arguments(draw, arguments))
    arguments = spoil_one(draw, arguments)
    if bias["items"] is not None:
        arguments["bias"] = ops.LogitBias(**bias)
    return compare(
        "softmax_loss",
        lambda: ops.softmax_loss(**arguments),
        lambda: reference.softmax_loss(**arguments),
        getattr(arguments["hidden"], "dtype", None),
        RULES["softmax_loss"](arguments),
    )


def by_recency(draw: Draw) -> str:
    arguments = make.softmax_arguments(draw)
    bias = ops.RecencyBias(**spoil_one(draw, make.recency_arguments(draw, arguments)))
    arguments = spoil_one(draw, arguments) | {"bias": bias}
    return compare(
        "softmax_loss",
        lambda: ops.softmax_loss(**arguments),
        lambda: _plain(**arguments),
        getattr(arguments["hidden"], "dtype", None),
        RULES["softmax_loss"](arguments),
    )


def recent(draw: Draw) -> str:
    arguments = spoil_one(draw, make.recent_arguments(draw))
    return compare(
        "recent_items",
        lambda: ops.recent_items(**arguments),
        lambda: reference.recent_items(**arguments),
        None,
        RULES["recent_items"](arguments),
    )


# Gradients through autograd, of arguments as they should be.


def sequence_gradients(draw: Draw) -> str:
    problem = make.problem(draw)
    arguments, name = problem.arguments(), "gated_rela"
    if problem.q.dtype not in GRADIENTS:
        return REFUSED
    names = [n for n in FLOATS if arguments[n] is not None]
    found = gradients(ops.gated_rela, arguments, names)
    alike(found, gradients(reference.gated_rela, arguments, names), problem.q.dtype, name)
    return f"{name}, gradients"


def rela_gradients(draw: Draw) -> str:
    problem = make.problem(draw)
    arguments = problem.arguments()
    for unused in ("gate", "conv_weight", "conv_bias", "initial_state"):
        arguments.pop(unused)
    if problem.initial_state is None:
        return compare_gradients("rela", ops.rela, reference.rela, arguments, ("q", "k", "v"))
    kv, k_sum, conv, position = problem.initial_state

    def from_state(call: Call) -> Call:
        return lambda kv, k_sum, **rest: call(
            **rest, initial_state=(kv, k_sum, conv[:, :0], position)
        )

    arguments |= {"kv": kv, "k_sum": k_sum}
    names = ("q", "k", "v", "kv", "k_sum")
    calls = from_state(ops.rela), from_state(reference.rela)
    return compare_gradients("rela", *calls, arguments, names)


def softmax_gradients(draw: Draw) -> str:
    """`model.losses.softmax_loss`, which is the operator's loss for autograd, and torch's own
    gradients of the reference."""
    arguments = make.softmax_arguments(draw)
    bias = make.bias_arguments(draw, arguments, whole=True)
    exclude, chunk_rows = arguments["exclude"], draw.one_of([None, None, 1, 7])
    targets, ignore_index = arguments["targets"], arguments["ignore_index"]

    def biased(values: Tensor | None) -> ops.LogitBias | None:
        if values is None:
            return None
        return ops.LogitBias(bias["offsets"], bias["items"], values)

    def call(hidden: Tensor, table: Tensor, values: Tensor | None) -> Tensor:
        loss = losses.softmax_loss(
            hidden, table, targets, ignore_index, exclude, chunk_rows, bias=biased(values)
        )
        return loss * len(targets)  # of a mean, gradients would be too small to be compared

    def plain(hidden: Tensor, table: Tensor, values: Tensor | None) -> Tensor:
        loss = reference.softmax_loss(
            hidden, table, targets, ignore_index, exclude, False, biased(values)
        )[0]
        return loss * len(targets)

    rows = {"hidden": arguments["hidden"], "table": arguments["table"], "values": bias["values"]}
    return compare_gradients("softmax_loss", call, plain, rows, tuple(rows))


def dropout_gradients(draw: Draw) -> str:
    return compare_gradients(
        "activation_dropout", activation_dropout, reference.activation_dropout,
        make.dropout_arguments(draw), ("x", "residual"),
    )  # fmt: skip


def feed_forward_gradients(draw: Draw) -> str:
    arguments = make.feed_forward_arguments(draw)
    names = [n for n, x in arguments.items() if isinstance(x, Tensor)]
    plain = reference.feed_forward
    return compare_gradients("feed_forward", ops.feed_forward, plain, arguments, names)


def compare_gradients(
    name: str,
    call: Call,
    plain: Call,
    arguments: Arguments,
    names: Sequence[str],
) -> str:
    dtype = next(x.dtype for n in names if (x := arguments[n]) is not None)
    if dtype not in GRADIENTS:
        return REFUSED
    found, wanted = (gradients(one, arguments, names) for one in (call, plain))
    alike(found, wanted, dtype, f"{name}, gradients")
    return f"{name}, gradients"
