"""Calls of every public operator: sizes, dtypes, strides, lengths, states; one argument spoiled.

What is refused is refused in one line that begins with the operator's name; what is accepted gives
what the reference gives. Raw calls of `torch.ops` are spoiled too: there a missing check would be a
crash.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recgrela_ext import ops
from recgrela_ext.ops import reference
from recgrela_ext.ops.activation_dropout import activation_dropout
from recgrela_ext.ops.encoder_step import PackedEncoder, encoder_step, reference_encoder_step
from recgrela_ext.ops.topk_scores import reference_topk_scores
from tests.fuzz.draw import Draw, one_line
from tests.ops.problems import make_problem, make_state

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LIMITS = {torch.float32: 2e-4, torch.float64: 1e-9, torch.bfloat16: 5e-2, torch.float16: 1e-2}
OTHER_DTYPES = (*DTYPES, torch.int64, torch.int32, torch.int8, torch.bool, torch.complex64)
Arguments = dict[str, Any]
# Of torch's own refusals of a raw call.
TORCH_S = (
    "recgrela::", "Not yet supported ScalarType", "Cannot access storage of Sparse",
    "aten::new_empty",  # of more than there is
)  # fmt: skip


def refused(error: Exception, op: str) -> None:
    """The documented form of an error."""
    text = str(error)
    assert re.match(rf"{op}(_backward|_forward)?: ", text), f"not ours: {text!r}"
    one_line(error)


def spoiled(draw: Draw, name: str, x: Any) -> Any:
    """Another value of an argument: often wrong, sometimes only unusual."""
    action = draw.below(12)
    if not isinstance(x, Tensor):
        return draw.value() if action else torch.ones(2)
    if x.layout != torch.strided:  # spoiled before
        return x
    if action == 0:
        return x.to(draw.one_of(OTHER_DTYPES))
    if action == 1:
        return x[: draw.below(x.shape[0] + 1)] if x.dim() else x
    if action == 2:
        return x[..., : draw.below(x.shape[-1] + 1)] if x.dim() else x
    if action == 3:
        return x.unsqueeze(draw.below(x.dim() + 1))
    if action == 4:
        return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else x
    if action == 5:
        return x[:1].expand(x.shape) if x.dim() and x.shape[0] else x
    if action == 6:
        return x.to("meta")
    if action == 7 and not x.is_floating_point() and x.numel() and not x.is_meta:
        x = x.clone(memory_format=torch.contiguous_format)
        if name == "state":  # a position: any the rotation can still tell from its neighbour
            x.view(-1)[draw.below(x.numel())] = draw.one_of([0, 1, 7, 2**31, 2**40])
        elif x.dtype in (torch.int64, torch.int32):
            far = torch.tensor([-1, 0, 1, 7, 2**31, 2**62, -(2**63)])[draw.below(7)]
            x.view(-1)[draw.below(x.numel())] = far.to(x.dtype)
        return x
    if action == 8 and x.dim():
        wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + 3)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    if action == 9:
        return x.flatten()
    if action == 10:
        dense = x.dim() and x.numel() and not x.is_meta
        return x.to_sparse() if dense else x
    return draw.one_of([None, "x", [1.0], 3])


def spoil_one(draw: Draw, arguments: Arguments) -> Arguments:
    """Nothing, one or two arguments changed."""
    arguments = dict(arguments)
    for _ in range(draw.one_of([0, 1, 1, 2])):
        name = draw.one_of(sorted(arguments))
        value = arguments[name]
        if isinstance(value, tuple) and value:
            place = draw.below(len(value))
            arguments[name] = (
                *value[:place],
                spoiled(draw, "state", value[place]),
                *value[place + 1 :],
            )
        else:
            arguments[name] = spoiled(draw, name, value)
    return arguments


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


def compare(
    op: str, call: Callable[[], Any], plain: Callable[[], Any], dtype: Any, far: float = 0.0
) -> None:
    try:
        found = call()
    except (ValueError, TypeError) as error:
        refused(error, op)
        return
    except RuntimeError as error:
        if "allocate memory" in str(error):
            return
        raise
    alike(found, plain(), dtype if dtype in LIMITS else torch.float32, op, far)


class Operators:
    """Data: which operator, a seed for the values, sizes, then what is spoiled."""

    def __init__(self, folder: Path) -> None:
        torch.set_grad_enabled(False)
        self.calls = (
            self.sequence, self.sequence, self.step, self.encoder, self.topk, self.dropout,
            self.raw_sequence, self.raw_step, self.raw_encoder, self.raw_topk, self.raw_dropout,
            self.feed_forward, self.raw_feed_forward, self.softmax, self.raw_softmax,
        )  # fmt: skip

    def __call__(self, data: bytes) -> None:
        draw = Draw(data)
        call = draw.one_of(self.calls)
        # not torch.manual_seed, which keeps stacks for other devices: half of the time here
        torch.default_generator.manual_seed(draw.byte())
        call(draw)

    def problem(self, draw: Draw) -> Any:
        B, L, H, D = draw.below(4), draw.one_of([0, 1, 2, 63, 64, 65, 130]), 1 + draw.below(3), 0
        D = draw.one_of([2, 4, 6, 8, 10, 16, 34])
        packed = [draw.below(70) for _ in range(B)] if draw.flag() else None
        lengths = [draw.below(L + 1) for _ in range(B)] if not packed and draw.flag() else None
        return make_problem(
            B, L, H, D, draw.below(6), draw.one_of(DTYPES), gate=draw.flag(), bias=draw.flag(),
            lengths=lengths, packed=packed, state=draw.flag(), return_final_state=draw.flag(),
        )  # fmt: skip

    def sequence(self, draw: Draw) -> None:
        arguments = self.problem(draw).arguments()
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
        far = farthest(arguments["initial_state"])
        compare(name, lambda: call(**arguments), lambda: plain(**arguments), dtype, far)

    def step(self, draw: Draw) -> None:
        arguments = spoil_one(draw, self.step_arguments(draw))
        state = arguments["state"]
        copies = state
        if isinstance(state, tuple):
            copies = tuple(x.clone() if isinstance(x, Tensor) else x for x in state)
        again = {**arguments, "state": copies}
        dtype = getattr(arguments["q"], "dtype", None)
        compare(
            "gated_rela_step",
            lambda: (ops.gated_rela_step(**arguments), *arguments["state"][:3]),
            lambda: (reference.gated_rela_step(**again), *copies[:3]),
            dtype,
            farthest(state),
        )

    def step_arguments(self, draw: Draw) -> Arguments:
        B, H, D, W = draw.below(5), 1 + draw.below(3), draw.one_of([2, 4, 6, 8, 16, 34]), 0
        W, dtype = draw.below(6), draw.one_of(DTYPES)
        problem = make_problem(B, 1, H, D, W, dtype, gate=draw.flag(), bias=draw.flag())
        acc = reference.accumulate_dtype(dtype)
        rows = {n: getattr(problem, n) for n in ("q", "k", "v", "gate")}
        return {
            **{n: None if x is None else x[:, 0] for n, x in rows.items()},
            "inv_freq": problem.inv_freq,
            "conv_weight": problem.conv_weight,
            "conv_bias": problem.conv_bias,
            "state": make_state(B, H, D, max(W, 1), acc),
            "eps": 1e-6,
            "active": torch.rand(B) > 0.3 if draw.flag() else None,
        }

    def packed_encoder(self, draw: Draw) -> tuple[PackedEncoder, Tensor, Tensor, Tensor]:
        H, D, M = 1 + draw.below(2), draw.one_of([2, 4, 8]), draw.one_of([1, 8, 20])
        W, layers, gate, norm = draw.below(5), 1 + draw.below(3), draw.flag(), draw.flag()
        dtype = draw.one_of([torch.float32, torch.float64])
        C, B = H * D, draw.below(4)
        layer = 4 * C + C * C * 4 + 4 * C + gate * (C * C + C) + W * C + (W > 0) * C
        layer += 2 * C * M + M + C
        count = layers * layer + norm * 2 * C
        weights = torch.randn(count, dtype=torch.float64).to(dtype) * 0.3
        packed = PackedEncoder(
            weights, ops.inv_freq(H, D).double(), layers, M, W, gate, norm, 1e-6, 1e-6
        )
        rows = torch.rand(B, packed.state_size, dtype=torch.float64).to(dtype) + 1
        x = torch.randn(B, C, dtype=torch.float64).to(dtype)
        return packed, x, rows, torch.arange(B) + 3

    def encoder(self, draw: Draw) -> None:
        packed, x, rows, position = self.packed_encoder(draw)
        active = torch.rand(len(x)) > 0.3 if draw.flag() else None
        named = {"item_vectors": x, "packed_weights": packed, "state": (rows, position)}
        arguments = spoil_one(draw, {**named, "active": active})
        state = arguments["state"]
        copies = state
        if isinstance(state, tuple):
            copies = tuple(part.clone() if isinstance(part, Tensor) else part for part in state)
        compare(
            "encoder_step",
            lambda: (encoder_step(**arguments), arguments["state"][0]),
            lambda: (reference_encoder_step(
                arguments["item_vectors"], packed, copies, arguments["active"]), copies[0]),
            packed.weights.dtype, farthest(state),
        )  # fmt: skip

    def topk_arguments(self, draw: Draw) -> Arguments:
        B, N, width = draw.below(5), 1 + draw.one_of([0, 1, 40, 300]), 1 + draw.below(9)
        dtype = draw.one_of([*DTYPES, torch.int8])
        hidden = torch.float64 if dtype == torch.float64 else torch.float32
        whole = torch.randint(-2, 3, (N, width))  # every score is exact
        candidates = [None, torch.randint(0, N, (7,)), torch.randint(0, N, (B, 7))]
        return {
            "hidden": torch.randint(-2, 3, (B, width)).to(hidden),
            "table": whole.to(dtype),
            "k": 1 + draw.below(20),
            "padding_idx": draw.below(N),
            "scale": 2.0 ** torch.randint(-2, 3, (N,)) if dtype == torch.int8 else None,
            "seen": torch.randint(0, N, (B, 5)) if draw.flag() else None,
            "candidates": draw.one_of(candidates),
        }

    def topk(self, draw: Draw) -> None:
        arguments = spoil_one(draw, self.topk_arguments(draw))
        if isinstance(arguments["k"], int) and 10**6 < arguments["k"] < 2**31:
            return  # gigabytes of padding, as asked for
        compare(
            "topk_scores",
            lambda: ops.topk_scores(**arguments),
            lambda: reference_topk_scores(**arguments),
            torch.float64,  # whole numbers: exact
        )

    def dropout_arguments(self, draw: Draw) -> Arguments:
        shape = tuple(draw.below(7) for _ in range(draw.below(4)))
        dtype = draw.one_of(DTYPES)
        return {
            "x": torch.randn(shape).to(dtype),
            "residual": torch.randn(shape).to(dtype) if draw.flag() else None,
            "gelu": draw.flag(),
            "p": draw.one_of([0.0, 0.1, 0.5, 0.999]),
            "seed": draw.one_of([0, 1, -1, 2**63 - 1]),
        }

    def dropout(self, draw: Draw) -> None:
        arguments = spoil_one(draw, self.dropout_arguments(draw))
        compare(
            "activation_dropout",
            lambda: activation_dropout(**arguments),
            lambda: reference.activation_dropout(**arguments),
            getattr(arguments["x"], "dtype", None),
        )

    def feed_forward_arguments(self, draw: Draw) -> Arguments:
        N, C, M = draw.one_of([0, 1, 5, 63, 64, 65, 130]), *(draw.one_of([8, 16, 32]) for _ in "CM")
        dtype = draw.one_of(DTYPES)
        return {
            "x": torch.randn(N, C).to(dtype),
            "first_weight": torch.randn(M, C).to(dtype),
            "first_bias": torch.randn(M).to(dtype),
            "second_weight": torch.randn(C, M).to(dtype),
            "second_bias": torch.randn(C).to(dtype),
            "residual": torch.randn(N, C).to(dtype) if draw.flag() else None,
            "p": draw.one_of([0.0, 0.1, 0.5, 0.9]),  # two scales: beyond, terms cancel
            "inner_seed": draw.one_of([0, 1, -1, 2**63 - 1]),
            "outer_seed": draw.one_of([0, 1, -1, 2**63 - 1]),
        }

    def feed_forward(self, draw: Draw) -> None:
        arguments = spoil_one(draw, self.feed_forward_arguments(draw))
        compare(
            "feed_forward",
            lambda: ops.feed_forward(**arguments),
            lambda: reference.feed_forward(**arguments),
            getattr(arguments["x"], "dtype", None),
        )

    def softmax_arguments(self, draw: Draw) -> Arguments:
        T, N, C = draw.one_of([0, 1, 31, 32, 33, 70]), 1 + draw.below(140), draw.below(40)
        dtype = draw.one_of(DTYPES)
        return {
            "hidden": torch.randn(T, C).to(dtype),
            "table": torch.randn(N, C).to(dtype),
            "targets": torch.randint(N, (T,)),
            "ignore_index": draw.below(N),
            "exclude": draw.flag(),
            "gradients": draw.flag(),
        }

    def bias_arguments(self, draw: Draw, arguments: Arguments) -> Arguments:
        """Three tensors or none, now and then with an item or a bound that cannot be."""
        names = ("offsets", "items", "values")
        if draw.flag():
            return dict.fromkeys(names)
        T, N = len(arguments["hidden"]), len(arguments["table"])
        counts = torch.randint(0, 1 + draw.below(6), (T,))
        offsets = F.pad(counts.cumsum(0), (1, 0))
        items = torch.randint(N, (int(offsets[-1]),))
        values = torch.randn(len(items)).to(arguments["hidden"].dtype)
        out = torch.rand(len(items)) < draw.below(3) / 4
        out &= items != arguments["targets"].repeat_interleave(counts)  # these stay, it says
        values[out] = -torch.inf
        if draw.below(8) == 0 and len(items):
            items[draw.below(len(items))] = draw.one_of([-1, N, 2**40, -(2**62)])
        if draw.below(8) == 0:
            offsets[draw.below(T + 1)] = draw.one_of([-1, 3, 2**40, -(2**62)])
        return dict(zip(names, (offsets, items, values), strict=True))

    def softmax(self, draw: Draw) -> None:
        arguments = self.softmax_arguments(draw)
        bias = spoil_one(draw, self.bias_arguments(draw, arguments))
        arguments = spoil_one(draw, arguments)
        if bias["items"] is not None:
            arguments["bias"] = ops.LogitBias(**bias)
        compare(
            "softmax_loss",
            lambda: ops.softmax_loss(**arguments),
            lambda: reference.softmax_loss(**arguments),
            getattr(arguments["hidden"], "dtype", None),
        )

    # Raw calls, for which the public checks do not run. Torch refuses what is no tensor itself.

    def raw(self, op: str, operator: Callable[..., Any], arguments: Arguments) -> None:
        try:
            operator(**arguments)
        except Exception as error:
            # torch: no kernel for this device, the wrong kind of value, a dtype that its stable
            # interface has no name for; or a fake kernel, which checks nothing
            meta = any(isinstance(x, Tensor) and x.is_meta for x in arguments.values())
            own = any(text in str(error) for text in TORCH_S)
            if meta or own:
                return
            refused(error, op)

    def raw_sequence(self, draw: Draw) -> None:
        problem = self.problem(draw)
        state = problem.initial_state or (None,) * 4
        arguments = {n: x for n, x in problem.arguments().items() if n not in (
            "initial_state", "causal")}  # fmt: skip
        arguments |= dict(zip(("kv", "k_sum", "conv", "position"), state, strict=True))
        arguments["save_for_backward"] = draw.flag()
        self.raw("gated_rela", torch.ops.recgrela.gated_rela_forward, spoil_one(draw, arguments))

    def raw_step(self, draw: Draw) -> None:
        arguments = self.step_arguments(draw)
        state = arguments.pop("state")
        arguments |= dict(zip(("kv", "k_sum", "conv", "position"), state, strict=True))
        self.raw("gated_rela_step", torch.ops.recgrela.gated_rela_step, spoil_one(draw, arguments))

    def raw_encoder(self, draw: Draw) -> None:
        p, x, rows, position = self.packed_encoder(draw)
        arguments = {
            "x": x, "weights": p.weights, "inv_freq": p.inv_freq, "state": rows,
            "position": position, "active": None, "num_layers": p.num_layers,
            "mlp_width": p.mlp_width, "conv_width": p.conv_width, "gate": p.gate,
            "final_norm": p.final_norm, "eps": p.eps, "layer_norm_eps": p.layer_norm_eps,
        }  # fmt: skip
        self.raw("encoder_step", torch.ops.recgrela.encoder_step, spoil_one(draw, arguments))

    def raw_topk(self, draw: Draw) -> None:
        arguments = spoil_one(draw, self.topk_arguments(draw))
        self.raw("topk_scores", torch.ops.recgrela.topk_scores, arguments)

    def raw_dropout(self, draw: Draw) -> None:
        arguments = spoil_one(draw, self.dropout_arguments(draw))
        self.raw("activation_dropout", torch.ops.recgrela.activation_dropout, arguments)

    def raw_feed_forward(self, draw: Draw) -> None:
        arguments = self.feed_forward_arguments(draw) | {"save_for_backward": draw.flag()}
        operator = torch.ops.recgrela.feed_forward_forward
        self.raw("feed_forward", operator, spoil_one(draw, arguments))

    def raw_softmax(self, draw: Draw) -> None:
        arguments = self.softmax_arguments(draw)
        bias = self.bias_arguments(draw, arguments)
        arguments |= {f"bias_{name}": x for name, x in bias.items()}
        arguments = spoil_one(draw, arguments)
        self.raw("softmax_loss", torch.ops.recgrela.softmax_loss, arguments)
