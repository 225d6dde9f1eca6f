"""Full softmax over the item table without the logits of all rows at once.

    loss = mean over t with targets[t] != ignore_index of -log softmax(h[t] table^T)[targets[t]]

On a CPU `ops.softmax_loss` does it, a tile of rows at a time. Elsewhere, under autocast to
bfloat16, with `chunk_rows`, and where there is no tile of rows for every thread, torch takes the
rows in chunks: the gradient of a chunk is formed while its probabilities are in the cache, so the
forward does all the work and the backward only scales; memory beside the gradients is one chunk
[chunk_rows, n_items]. Logits, probabilities and sums are float32 at least. Under autocast to
bfloat16 the two products of the gradient take bfloat16 factors (where the CPU can, in a quarter
less time). Same bits for the same input and thread count.

Time and peak memory of loss and gradients (two cores of an AMD Zen 4, torch 2.13, float32, hidden
64, least of several runs; memory holds the gradients themselves too):

                                           4,000 rows, 3,417 items    512 rows, 100,000 items
    F.cross_entropy                            144 ms  158 MB             383 ms  565 MB
    F.linear_cross_entropy, auto chunks         65 ms    5 MB           2,227 ms   25 MB
    F.linear_cross_entropy, best chunks         43 ms    5 MB             265 ms   52 MB
    torch in chunks, method="chunked"           39 ms    7 MB             173 ms   67 MB

`ops.softmax_loss` takes 0.7 of the last row's time in both columns (in turn in one process: 3,200
rows 33 to 23 ms, 512 rows of 100,000 items 278 to 190) and 4 and 85 MB. That is why
`method="auto"` takes it; `method="torch"` calls `F.linear_cross_entropy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _library, ops
from ..errors import shown
from ..ops.checks import check_bias_values, values_are_there
from ..ops.recency_bias import check_either
from .softmax_chunks import Scorer, class_range, default_chunk_rows, loss_and_gradients

_TILE, _FEWEST_ROWS = 32, 64  # of csrc/cpu/softmax_loss.cpp: rows a thread takes, and in all


def softmax_loss(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    ignore_index: int = 0,
    exclude_padding_class: bool = True,
    chunk_rows: int | None = None,
    method: str = "auto",
    bias: ops.LogitBias | ops.RecencyBias | None = None,
) -> Tensor:
    """Mean next-item cross-entropy in nats (RecGRELA paper, section on prediction and training).

    Args:
        hidden: `[T, hidden_size]`, one row per position.
        table: `[n_items, hidden_size]`, the item embedding (tied output layer).
        targets: `[T]` int64, the next item of each row; rows with `ignore_index` are not computed
            and get a zero gradient.
        ignore_index: the padding item.
        exclude_padding_class: the row `ignore_index` of `table` is no class of the softmax and gets
            a zero gradient.
        chunk_rows: rows of logits held at once; by default chosen for the cache.
        method: "auto" (`ops.softmax_loss` where it is faster, else chunks), "chunked" or "torch"
            (`F.linear_cross_entropy`, torch >= 2.13).
        bias: what is added to the logits of some items of some rows, item by item or by recency;
            its values are differentiable. -inf leaves an item out; a target's logit must stay
            finite. By recency, `ops.softmax_loss` holds no list of what the rows have met, and rows
            that follow each other in a window share the walk over it; elsewhere it is listed.

    Returns:
        Scalar in float32 (float64 for float64 input); 0 when no row has a target.

    Raises:
        ValueError: a shape, a target or `method` is wrong.
        TypeError: `targets` is not int64, `ignore_index` no int.
    """
    _check(hidden, table, targets, ignore_index, exclude_padding_class, chunk_rows, method)
    if bias is not None:
        check_either("softmax_loss", bias, hidden)
    ignore_index = int(ignore_index)
    fused = method == "auto" and chunk_rows is None and _fits_kernel(hidden, table)
    if bias is not None and not fused:
        if isinstance(bias, ops.RecencyBias):  # cast first: sums in bfloat16 stop growing
            wide = bias.values.to(_score_dtype(hidden, table))
            bias = bias._replace(values=wide).listed()
        check_bias_values("softmax_loss", bias, len(table))
    rows = None if fused else (targets != ignore_index).nonzero().squeeze(1)
    if method == "torch":
        if bias is not None:
            raise ValueError("softmax_loss: method must be auto or chunked with a bias, got torch")
        assert rows is not None
        return _torch_loss(hidden, table, targets, rows, ignore_index, exclude_padding_class)
    values = None if bias is None else bias.values
    wants_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (hidden, table, values)
    )
    excluded = ignore_index if exclude_padding_class else None
    loss: Tensor = _Softmax.apply(
        hidden, table, values, targets, rows, ignore_index, excluded, chunk_rows, wants_grad, bias
    )
    return loss


def _fits_kernel(hidden: Tensor, table: Tensor) -> bool:
    """Whether `ops.softmax_loss` is the faster way."""
    if not values_are_there(hidden) or not _library.has_kernels(hidden.device):
        return False
    return _autocast_factors("cpu") is None and enough_rows(hidden.shape[0], table.shape[0])


def enough_rows(rows: int, n_items: int) -> bool:
    """Whether the operator has a tile of rows for every thread at once."""
    at_once = min(rows, max(2**24 // max(n_items, 1), _FEWEST_ROWS))
    return at_once >= _TILE * torch.get_num_threads()


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        table: Tensor,
        values: Tensor | None,  # of the bias, for autograd
        targets: Tensor,
        rows: Tensor | None,
        ignore_index: int,
        excluded: int | None,
        chunk_rows: int | None,
        wants_grad: bool,
        bias: ops.LogitBias | ops.RecencyBias | None,
    ) -> Tensor:
        factors = _autocast_factors(hidden.device.type)
        dtype = _score_dtype(hidden, table)
        gradients: Sequence[Tensor | None]
        with torch.autocast(hidden.device.type, enabled=False):
            if rows is None:
                if bias is not None:
                    bias = bias._replace(values=bias.values.to(dtype))
                loss, *gradients = ops.softmax_loss(
                    hidden.to(dtype), table.to(dtype), targets, ignore_index,
                    excluded is not None, wants_grad, bias,
                )  # fmt: skip
            else:
                assert not isinstance(bias, ops.RecencyBias)
                scorer = Scorer(table, dtype, excluded, bias)
                loss, gradients = loss_and_gradients(
                    hidden, scorer, targets, rows, chunk_rows, wants_grad, factors
                )
        if wants_grad:
            ctx.save_for_backward(*gradients)
            ctx.dtypes = [x if x is None else x.dtype for x in (hidden, table, values)]
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # The gradients are the forward's, and constants here. `once_differentiable` would let them
        # pass as such wherever the loss itself is what is differentiated.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "softmax_loss: gradients must be taken without create_graph=True, as the loss has "
                "no second derivatives; F.cross_entropy of model.scores(hidden) has them"
            )
        # Cast after a loss scale was applied.
        gradients = [
            (grad * grad_loss).to(dtype) if needed else None
            for grad, dtype, needed in zip(
                ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:3], strict=True
            )
        ]
        return *gradients, *([None] * 7)


def _score_dtype(hidden: Tensor, table: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden.dtype, table.dtype), torch.float32)


def _autocast_factors(device_type: str) -> torch.dtype | None:
    """bfloat16 under autocast to it; float16 has too little range for p / num_rows."""
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.bfloat16 if torch.get_autocast_dtype(device_type) == torch.bfloat16 else None


def _torch_loss(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    rows: Tensor,
    ignore_index: int,
    exclude_padding_class: bool,
) -> Tensor:
    first, last = class_range(table.shape[0], ignore_index if exclude_padding_class else None)
    if rows.numel() == 0:
        return (hidden.sum() + table.sum()) * 0.0
    if exclude_padding_class and last - first == table.shape[0]:
        raise ValueError(
            "softmax_loss: ignore_index must be the first or the last row for method='torch',"
            f" got {ignore_index}"
        )
    rows_per_chunk = default_chunk_rows(table.shape[0], hidden.device.type)
    loss: Tensor = F.linear_cross_entropy(
        hidden.index_select(0, rows),
        table[first:last].to(hidden.dtype),
        targets.index_select(0, rows) - first,
        options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows_per_chunk),
    )
    return loss


def _check(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    ignore_index: int,
    exclude_padding_class: bool,
    chunk_rows: int | None,
    method: str,
) -> None:
    for name, x in (("hidden", hidden), ("table", table), ("targets", targets)):
        if not isinstance(x, Tensor):
            raise TypeError(f"softmax_loss: {name} must be a tensor, got {shown(x)}")
    if hidden.dim() != 2 or table.dim() != 2 or hidden.shape[1] != table.shape[1]:
        raise ValueError(
            "softmax_loss: hidden must be [T, hidden_size] and table [n_items, hidden_size], got "
            f"{tuple(hidden.shape)} and {tuple(table.shape)}"
        )
    if targets.dtype != torch.int64:
        raise TypeError(f"softmax_loss: targets must be int64, got {targets.dtype}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"softmax_loss: targets must be [{hidden.shape[0]}], got {tuple(targets.shape)}"
        )
    if not isinstance(ignore_index, (int, np.integer)):
        raise TypeError(f"softmax_loss: ignore_index must be an int, got {shown(ignore_index)}")
    if exclude_padding_class and not 0 <= ignore_index < table.shape[0]:
        raise ValueError(
            f"softmax_loss: ignore_index must be a row of table to be excluded, got {ignore_index}"
        )
    if not isinstance(exclude_padding_class, bool):
        raise TypeError(
            "softmax_loss: exclude_padding_class must be True or False, "
            f"got {shown(exclude_padding_class)}"
        )
    if chunk_rows is not None and (not isinstance(chunk_rows, int) or chunk_rows < 1):
        raise ValueError(
            f"softmax_loss: chunk_rows must be an int of at least 1, got {shown(chunk_rows)}"
        )
    if method not in ("auto", "chunked", "torch"):
        raise ValueError(
            f"softmax_loss: method must be auto, chunked or torch, got {shown(method)}"
        )
    if method == "torch" and not hasattr(F, "linear_cross_entropy"):
        raise ValueError("softmax_loss: method='torch' must have torch >= 2.13, got an older one")
    if targets.device.type == "cpu" and targets.numel():
        _check_targets(targets, table.shape[0], ignore_index)


def _check_targets(targets: Tensor, n_items: int, ignore_index: int) -> None:
    low, high = (int(x) for x in targets.aminmax())
    if low >= 0 and high < n_items:
        return
    kept = targets[targets != ignore_index]
    if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= n_items):
        bad = int(kept.min()) if int(kept.min()) < 0 else int(kept.max())
        raise ValueError(f"softmax_loss: targets must be below n_items={n_items}, got {bad}")
