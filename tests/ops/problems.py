"""Arguments of the operators, made to measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from recgrela_ext.ops import inv_freq
from recgrela_ext.ops.reference import State, accumulate_dtype

ROWS = ("q", "k", "v", "gate")
Change = Callable[[Tensor], Tensor]
PARAMETERS = ("conv_weight", "conv_bias")


@dataclass(frozen=True)
class Problem:
    """The arguments of gated_rela; rows are [B, L, H, D], or [T, H, D] with cu_seqlens."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None
    inv_freq: Tensor
    conv_weight: Tensor | None
    conv_bias: Tensor | None
    lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    initial_state: State | None = None
    return_final_state: bool = False
    causal: bool = True
    eps: float = 1e-6

    def arguments(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def run(self, operator: Callable[..., Any]) -> Any:
        return operator(**self.arguments())

    def run_rela(self, operator: Callable[..., Any]) -> Any:
        drop = ("gate", *PARAMETERS)
        return operator(**{k: v for k, v in self.arguments().items() if k not in drop})

    def but(self, **changes: Any) -> Problem:
        return replace(self, **changes)

    def map_floats(self, change: Change, acc: Change) -> Problem:
        """``change`` applied to the rows and ``acc`` to parameters and states."""
        new: dict[str, Any] = {n: getattr(self, n) for n in (*ROWS, *PARAMETERS)}
        for name, x in new.items():
            if x is not None:
                new[name] = change(x) if name in ROWS else acc(x)
        if self.initial_state is not None:
            *sums, position = self.initial_state
            new["initial_state"] = (*(acc(x) for x in sums), position)
        return self.but(**new)

    def to(self, dtype: torch.dtype) -> Problem:
        """Rows in ``dtype``; parameters and states in the dtype that goes with it."""
        wide = accumulate_dtype(dtype)
        return self.map_floats(lambda x: x.to(dtype), lambda x: x.to(wide))

    def on(self, device: torch.device | str) -> Problem:
        """Every tensor on ``device``."""
        moved = self.map_floats(lambda x: x.to(device), lambda x: x.to(device))
        if moved.initial_state is not None:
            *sums, position = moved.initial_state
            moved = moved.but(initial_state=(*sums, position.to(device)))
        places = {n: getattr(self, n) for n in ("inv_freq", "lengths", "cu_seqlens")}
        return moved.but(**{n: None if x is None else x.to(device) for n, x in places.items()})

    def leaves(self) -> dict[str, Tensor]:
        """Every differentiable tensor that is there, by name."""
        named = {n: getattr(self, n) for n in (*ROWS, *PARAMETERS)}
        if self.initial_state is not None:
            named |= dict(zip(("kv", "k_sum", "conv"), self.initial_state[:3], strict=True))
        return {n: x for n, x in named.items() if x is not None}

    def requiring_grad(self) -> Problem:
        def leaf(x: Tensor) -> Tensor:
            return x.detach().requires_grad_()

        return self.map_floats(leaf, leaf)


def make_problem(
    B: int = 2,
    L: int = 9,
    H: int = 2,
    D: int = 8,
    W: int = 4,
    dtype: torch.dtype = torch.float64,
    *,
    gate: bool = True,
    bias: bool = True,
    lengths: Sequence[int] | None = None,
    packed: Sequence[int] | None = None,
    state: bool = False,
    **options: Any,
) -> Problem:
    """Random arguments that float32 holds exactly (bfloat16 or float16: that dtype holds them).

    W = 0: no convolution. ``packed``: the sequence lengths of packed rows, instead of B and L.
    """
    if packed is not None:
        B = len(packed)
        options["cu_seqlens"] = torch.tensor([0, *packed]).cumsum(0)
    if lengths is not None:
        options["lengths"] = torch.tensor(lengths, dtype=torch.int64)
    shape = (B, L, H, D) if packed is None else (sum(packed), H, D)
    storage = torch.float32 if dtype == torch.float64 else dtype

    def rows() -> Tensor:
        return torch.randn(shape).to(storage).to(dtype)

    wide = accumulate_dtype(dtype)
    if state:
        options["initial_state"] = make_state(B, H, D, max(W, 1), wide)
    return Problem(
        rows(),
        rows(),
        rows(),
        rows() if gate else None,
        inv_freq(H, D),
        torch.randn(H * D, W).mul(0.5).to(wide) if W else None,
        torch.randn(H * D).to(wide) if W and bias else None,
        **options,
    )


def make_state(B: int, H: int, D: int, W: int, dtype: torch.dtype) -> State:
    """A state as some dozen items would leave it: k_sum is positive."""
    kv, conv = torch.randn(B, H, D, D) * 4, torch.randn(B, W - 1, H * D)
    k_sum = torch.rand(B, H, D) * 10 + 5
    position = torch.arange(B) * 7 + 12
    return kv.to(dtype), k_sum.to(dtype), conv.to(dtype), position


def outputs(result: Any) -> dict[str, Tensor]:
    """out, and the final state's tensors where there is one, by name."""
    if isinstance(result, Tensor):
        return {"out": result}
    out, state = result
    names = ("final kv", "final k_sum", "final conv", "final position")
    return {"out": out, **dict(zip(names, state, strict=True))}


def random_gradients(found: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Of every differentiable output; float32, bfloat16 and float16 hold them exactly."""
    generator = torch.Generator().manual_seed(seed)

    def like(x: Tensor) -> Tensor:
        random = torch.randn(x.shape, generator=generator)
        return random.mul(16).round().div(16).to(x.device, x.dtype)

    return {n: like(x) for n, x in found.items() if x.is_floating_point()}


def gradients(problem: Problem, operator: Callable[..., Any], seed: int = 1) -> dict[str, Tensor]:
    """Gradients of every leaf for the random gradients of out and of the final state."""
    problem = problem.requiring_grad()
    found = outputs(problem.run(operator))
    given = random_gradients(found, seed)
    leaves = problem.leaves()
    # An output nothing depends on (the conv state of a convolution of width 1) is left out.
    given = {n: x for n, x in given.items() if found[n].requires_grad}
    grads = torch.autograd.grad(
        [found[n] for n in given], list(leaves.values()), list(given.values()), allow_unused=True
    )
    return {
        n: torch.zeros_like(x) if g is None else g
        for (n, x), g in zip(leaves.items(), grads, strict=True)
    }
