"""An operator against the exact results and gradients, by the rule of tests/tolerance.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from recgrela_ext.ops import reference
from tests.ops.exact import exact
from tests.ops.problems import Problem, gradients, outputs, random_gradients
from tests.tolerance import assert_as_exact, assert_same_history

STATES = ("final kv", "final k_sum", "final conv", "kv", "k_sum", "conv")


def assert_agrees(problem: Problem, operator: Callable[..., Any], backward: bool = True) -> None:
    """Outputs, states and every gradient of ``operator``, called as gated_rela is.

    The operator runs where the problem is, the reference and the exact sums on the CPU.
    """
    host = problem.on("cpu")
    found = _on_cpu(outputs(problem.run(operator)))
    plain = outputs(host.run(reference.gated_rela))
    wanted = exact(host, random_gradients(found) if backward else None)
    assert found.keys() == wanted.outputs.keys()
    for name, x in found.items():
        if name == "final position":
            assert x.tolist() == wanted.outputs[name].tolist()
        else:
            _compare(name, x, plain[name], wanted.outputs[name], wanted.terms.get(name))
    if not backward:
        return
    found, plain = _on_cpu(gradients(problem, operator)), gradients(host, reference.gated_rela)
    for name, x in found.items():
        _compare(name, x, plain[name], wanted.gradients[name], wanted.terms.get(name), True)


def _on_cpu(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.cpu() for name, x in found.items()}


def _compare(
    name: str,
    actual: Tensor,
    plain: Tensor,
    exactly: Tensor,
    terms: Tensor | None = None,
    backward: bool = False,
) -> None:
    what = f"gradient of {name}" if backward else name
    dims: tuple[int, ...] = (-1,)
    if name in STATES:
        # A head of kv; a row of k_sum and conv.
        dims = (-2, -1) if name.endswith("kv") else dims
        assert_same_history(what, actual, exactly.to(actual.dtype), dims)
        return
    if name.startswith("conv_"):
        dims = tuple(range(exactly.dim()))
    elif exactly.shape[-1] == 2:
        # Two numbers are often small together: they get the scale of their sequence.
        dims = (-3, -1)
    assert_as_exact(what, actual, plain, exactly, dims, backward, terms)
