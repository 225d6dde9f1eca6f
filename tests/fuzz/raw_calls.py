"""Raw calls of `torch.ops.recgrela`, backwards too: here a missing check would be a crash.

The public checks do not run, and torch refuses what is no tensor itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recgrela_ext import ops
from recgrela_ext.ops import reference
from recgrela_ext.ops.encoder_step import reference_encoder_step
from recgrela_ext.ops.softmax_loss import _plain
from recgrela_ext.ops.topk_scores import _distinct, reference_topk_scores
from tests.fuzz import operator_arguments as make
from tests.fuzz.draw import REFUSED, Draw
from tests.fuzz.operator_arguments import FLOATS, Arguments, spoil_one
from tests.fuzz.operator_results import GRADIENTS, alike, copied, flat, gradients, refused
from tests.fuzz.operator_rules import fits_kernel

# Of torch's own refusals of a raw call.
TORCH_S = (
    "recgrela::", "Not yet supported ScalarType", "Cannot access storage of Sparse",
    "aten::new_empty",  # of more than there is
)  # fmt: skip
STATE = ("kv", "k_sum", "conv", "position")
BACKWARD = (*FLOATS, "inv_freq", "lengths", "cu_seqlens")


def call_raw(
    op: str, name: str, arguments: Arguments, draw: Draw,
    plain: Callable[..., Any] | None = None,
) -> str:  # fmt: skip
    """torch.ops.recgrela.`name` with `arguments`, some of them spoiled.

    `plain`: of the same arguments, what the first results must be; asked where none is spoiled,
    since a raw call may take for granted what the public one has seen to. Then it must accept them
    too, where there is a kernel for them.
    """
    operator = getattr(torch.ops.recgrela, name)
    given = spoil_one(draw, arguments)
    whole = all(given[n] is arguments[n] for n in arguments)
    wanted = flat(plain(**arguments)) if plain is not None and whole else []
    try:
        found = flat(operator(**given))
    except Exception as error:
        if whole and fits_kernel(arguments):
            raise AssertionError(f"refused, though valid: {error}") from error
        # torch: no kernel for this device, the wrong kind of value, a dtype that its stable
        # interface has no name for; or a fake kernel, which checks nothing
        meta = any(isinstance(x, Tensor) and x.is_meta for x in given.values())
        own = any(text in str(error) for text in TORCH_S)
        return REFUSED if meta or own else refused(error, op)
    if wanted:
        dtype = wanted[0].dtype if wanted[0].is_floating_point() else torch.float32
        alike(found[: len(wanted)], wanted, dtype, f"torch.ops.recgrela.{name}")
        return f"{name}, raw"
    return f"{name}, raw, spoiled"


def sequence(draw: Draw) -> str:
    arguments = arguments_of(make.problem(draw)) | {"save_for_backward": draw.flag()}
    return call_raw("gated_rela", "gated_rela_forward", arguments, draw, plain_sequence)


def rela(draw: Draw) -> str:
    arguments = arguments_of(make.problem(draw)) | {"save_for_backward": draw.flag()}
    for name in ("gate", "conv_weight", "conv_bias", "conv"):
        arguments.pop(name)
    return call_raw("rela", "rela_forward", arguments, draw, plain_sequence)


def step(draw: Draw) -> str:
    arguments = make.step_arguments(draw)
    state = arguments.pop("state")
    arguments |= dict(zip(STATE, state, strict=True))

    def plain(**given: Any) -> Any:
        copies = copied(tuple(given.pop(n) for n in STATE))
        return reference.gated_rela_step(**given, state=copies)

    return call_raw("gated_rela_step", "gated_rela_step", arguments, draw, plain)


def encoder(draw: Draw) -> str:
    p, x, rows, position = make.packed_encoder(draw)
    arguments = {
        "x": x, "weights": p.weights, "inv_freq": p.inv_freq, "state": rows,
        "position": position, "active": None, "num_layers": p.num_layers,
        "mlp_width": p.mlp_width, "conv_width": p.conv_width, "gate": p.gate,
        "final_norm": p.final_norm, "eps": p.eps, "layer_norm_eps": p.layer_norm_eps,
    }  # fmt: skip

    def plain(**given: Any) -> Tensor:
        return reference_encoder_step(x, p, (rows.clone(), position), None)

    return call_raw("encoder_step", "encoder_step", arguments, draw, plain)


def topk(draw: Draw) -> str:
    arguments = make.topk_arguments(draw)
    arguments["k"] = min(arguments["k"], len(arguments["table"]))  # as the public one does
    seen, candidates = arguments["seen"], arguments["candidates"]
    arguments["seen"] = None if seen is None else seen.sort(-1).values
    if candidates is not None:
        arguments["candidates"] = _distinct(candidates, arguments["padding_idx"])
    return call_raw("topk_scores", "topk_scores", arguments, draw, reference_topk_scores)


def dropout(draw: Draw) -> str:
    arguments, plain = make.dropout_arguments(draw), reference.activation_dropout
    return call_raw("activation_dropout", "activation_dropout", arguments, draw, plain)


def feed_forward(draw: Draw) -> str:
    arguments = make.feed_forward_arguments(draw) | {"save_for_backward": draw.flag()}

    def plain(save_for_backward: bool, **given: Any) -> Tensor:
        return reference.feed_forward(**given)

    return call_raw("feed_forward", "feed_forward_forward", arguments, draw, plain)


def softmax(draw: Draw) -> str:
    arguments = make.softmax_arguments(draw)
    bias = make.bias_arguments(draw, arguments, whole=True)
    arguments |= {f"bias_{name}": x for name, x in bias.items()}

    def plain(**given: Any) -> Any:
        bias = [given.pop(f"bias_{name}") for name in ("offsets", "items", "values")]
        added = None if bias[0] is None else ops.LogitBias(*bias)
        return reference.softmax_loss(**given, bias=added)

    return call_raw("softmax_loss", "softmax_loss", arguments, draw, plain)


def by_recency(draw: Draw) -> str:
    arguments = make.softmax_arguments(draw)
    bias = make.recency_arguments(draw, arguments, whole=True)
    up_to = bias["up_to"]
    bias |= {"offsets": None, "up_to": torch.tensor(up_to, dtype=torch.int64)}
    arguments |= {f"bias_{name}": x for name, x in bias.items()}

    def plain(**given: Any) -> Any:
        found = {name: given.pop(f"bias_{name}") for name in bias}
        found.pop("offsets")
        return _plain(**given, bias=ops.RecencyBias(**found | {"up_to": up_to}))

    return call_raw("softmax_loss", "softmax_loss", arguments, draw, plain)


def recent(draw: Draw) -> str:
    arguments = make.recent_arguments(draw)
    arguments["next"] = reference.next_places(arguments["items"])

    def plain(next: Tensor, **given: Any) -> Any:
        return reference.recent_items(**given)

    return call_raw("recent_items", "recent_items", arguments, draw, plain)


# Raw backwards: their inputs are a forward's, or were until one was spoiled.


def sequence_backward(draw: Draw) -> str:
    arguments = arguments_of(make.problem(draw)) | {"save_for_backward": True}
    out, *_, kv, k_sum = torch.ops.recgrela.gated_rela_forward(**arguments)
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    given = {n: arguments[n] for n in (*BACKWARD, *STATE, "eps")}
    given |= {"grad_out": grad, "grad_kv": None, "grad_k_sum": None, "grad_conv": None,
              "saved_kv": kv, "saved_k_sum": k_sum, "state_grad": draw.flag()}  # fmt: skip

    def plain(**_: Any) -> list[Tensor]:
        names = [n for n in FLOATS if arguments[n] is not None]
        found = dict(zip(names, gradients(plain_sequence, arguments, names), strict=True))
        empty = {n: out.new_empty(0) for n in FLOATS}
        return [(empty | found)[n] for n in FLOATS[:4]]

    compared = plain if out.dtype in GRADIENTS else None
    return call_raw("gated_rela", "gated_rela_backward", given, draw, compared)


def dropout_backward(draw: Draw) -> str:
    arguments = make.dropout_arguments(draw)
    x = arguments["x"]
    grad = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)
    given = {n: arguments[n] for n in ("gelu", "p", "seed")}
    given |= {"grad": grad, "x": x if arguments["gelu"] else None}

    def plain(**_: Any) -> list[Tensor]:
        return gradients(reference.activation_dropout, arguments, ("x",))

    compared = plain if x.dtype in GRADIENTS else None
    return call_raw("activation_dropout", "activation_dropout_backward", given, draw, compared)


def feed_forward_backward(draw: Draw) -> str:
    arguments = make.feed_forward_arguments(draw)
    x = arguments["x"]
    given = {n: arguments[n] for n in ("x", "first_weight", "second_weight", "p",
                                       "inner_seed", "outer_seed")}  # fmt: skip
    given["pre"] = x @ arguments["first_weight"].t() + arguments["first_bias"]
    given["grad"] = torch.randn(x.shape).to(x.dtype)
    compared = reference.feed_forward_gradients if x.dtype in GRADIENTS else None
    return call_raw("feed_forward", "feed_forward_backward", given, draw, compared)


def arguments_of(problem: Any) -> Arguments:
    """Of torch.ops.recgrela.gated_rela_forward, but for save_for_backward."""
    arguments = problem.arguments()
    state = arguments.pop("initial_state") or (None,) * 4
    arguments.pop("causal")
    return arguments | dict(zip(STATE, state, strict=True))


def plain_sequence(**given: Any) -> Any:
    """The reference with a raw call's arguments, gated or not."""
    state = tuple(given.pop(n, None) for n in STATE)
    given.pop("save_for_backward")
    call, (H, D) = reference.gated_rela, given["q"].shape[-2:]
    if "gate" not in given:
        call = reference.rela
        conv = None if state[0] is None else state[0].new_empty(len(state[0]), 0, H * D)
        state = (*state[:2], conv, state[3])
    found = call(**given, initial_state=None if state[0] is None else state)
    if not given["return_final_state"]:
        return found
    return found[0], *found[1][: 3 if "gate" in given else 2]
