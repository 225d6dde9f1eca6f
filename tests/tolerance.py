"""How far two results may lie apart: one rule for every test, never looser in CI.

An error is measured in units in the last place of a scale, the largest magnitude of the exact
result within a group:

    outputs, gradients of rows    one row (b, t, h), over its D values (D = 2: one sequence's head)
    gradients of parameters       the whole tensor: they are sums over all rows

Where what is added up may cancel to nothing, the scale is the magnitude of what is added up
(``terms`` in tests/ops/exact.py). With one key out = v whatever q is (up to eps), so at the first
position rounding is all that is left of dq; the same holds for dk and the parameters. The attention
and the rank augmentation cancel within one item of a row, which a large gate then makes the largest
of the row.

States and their gradients are held to the rule for two views of one history, with the scale of one
head of kv or one row of k_sum and conv.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Two views of one history: step, prefill, packed, padded, encode.
SAME_HISTORY = {torch.float32: 2e-5, torch.float64: 1e-12}

# Units in the last place of the scale that bfloat16 and float16 results may be off by. Forward:
# everything is computed in float32 and rounded once, which costs half a unit. Backward: the same,
# measured 0.5024 at most over D 2 to 136, L 1 to 1000.
HALF_ULPS = 1.0


def ulp(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of ``dtype`` at ``scale``, in float64."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(scale.double().clamp(min=info.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(scale, info.eps, dtype=torch.float64), exponent)


def assert_as_exact(
    what: str,
    actual: Tensor,
    plain: Tensor | None,
    exact: Tensor,
    dims: Sequence[int] = (-1,),
    backward: bool = False,
    terms: Tensor | None = None,
) -> None:
    """``actual`` is about as near to ``exact`` as plain PyTorch gets in the same dtype.

    float32, float64: at most 2 (backward 3) times the error of ``plain``, the reference in the
    dtype of ``actual``, plus 4 units in the last place of the scale. The error of ``plain`` is that
    of its worst group: a single group is often exact by luck. bfloat16, float16: at most HALF_ULPS
    units; ``plain`` is not looked at.

    Args:
        exact: the result on the same (rounded) inputs, computed more precisely, in float64.
        dims: the dimensions of one group, see above.
        terms: the magnitude of what cancels in ``exact``.
    """
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, expected {exact.shape}"
    assert exact.dtype == torch.float64
    if exact.numel() == 0:
        return
    scale = _largest(exact if terms is None else torch.maximum(exact.abs(), terms), dims)
    unit = ulp(scale, actual.dtype)
    error = _largest(actual.double() - exact, dims) / unit
    limit = HALF_ULPS
    if actual.dtype not in (torch.bfloat16, torch.float16):
        assert plain is not None
        assert plain.dtype == actual.dtype
        ours = (_largest(plain.double() - exact, dims) / unit).max().item()
        limit = (3 if backward else 2) * ours + 4
    _assert_below(what, error, limit, "units in the last place")


def assert_same_history(
    what: str, actual: Tensor, expected: Tensor, dims: Sequence[int] = (-1,)
) -> None:
    """Two results for the same items that were computed along different ways."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    assert actual.dtype == expected.dtype
    if expected.numel() == 0:
        return
    error = _largest(actual.double() - expected.double(), dims)
    scale = _largest(expected.double(), dims).clamp(min=torch.finfo(actual.dtype).tiny)
    _assert_below(what, error / scale, SAME_HISTORY[actual.dtype], "of the scale")


def assert_same_bits(what: str, actual: Tensor, expected: Tensor) -> None:
    """Equal bit for bit; NaN equals NaN."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    assert actual.dtype == expected.dtype
    a, b = (x.detach().contiguous().flatten().view(torch.uint8) for x in (actual, expected))
    differ = int((a != b).sum())
    assert differ == 0, f"{what}: {differ} bytes of {a.numel()} differ"


def _largest(x: Tensor, dims: Sequence[int]) -> Tensor:
    return x.detach().abs().amax(dim=tuple(dims), keepdim=True)


def _assert_below(what: str, error: Tensor, limit: float, words: str) -> None:
    bad = ~(error <= limit)  # NaN is bad
    if not bool(bad.any()):
        return
    worst = int(error.nan_to_num(nan=torch.inf).argmax())
    where = [int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape)]
    raise AssertionError(
        f"{what}: error {error.flatten()[worst]:.3g} {words} at {where}, limit {limit:.3g}; "
        f"{int(bad.sum())} of {bad.numel()} groups are off"
    )
