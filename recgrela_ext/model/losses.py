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

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _library, ops
from ..errors import shown

_TILE, _FEWEST_ROWS = 32, 64  # of csrc/cpu/softmax_loss.cpp: rows a thread takes, and in all
_UNDERFLOW = 1e-30  # below it -log(p) of a float32 probability loses digits


def softmax_loss(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    ignore_index: int = 0,
    exclude_padding_class: bool = True,
    chunk_rows: int | None = None,
    method: str = "auto",
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

    Returns:
        Scalar in float32 (float64 for float64 input); 0 when no row has a target.

    Raises:
        ValueError: a shape, a target or `method` is wrong.
        TypeError: `targets` is not int64, `ignore_index` no int.
    """
    _check(hidden, table, targets, ignore_index, exclude_padding_class, chunk_rows, method)
    ignore_index = int(ignore_index)
    fused = method == "auto" and chunk_rows is None and _fits_kernel(hidden, table)
    rows = None if fused else (targets != ignore_index).nonzero().squeeze(1)
    if method == "torch":
        assert rows is not None
        return _torch_loss(hidden, table, targets, rows, ignore_index, exclude_padding_class)
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or table.requires_grad)
    excluded = ignore_index if exclude_padding_class else None
    loss: Tensor = _Softmax.apply(
        hidden, table, targets, rows, ignore_index, excluded, chunk_rows, wants_grad
    )
    return loss


def _fits_kernel(hidden: Tensor, table: Tensor) -> bool:
    """Whether `ops.softmax_loss` is the faster way: a tile of rows for every thread at once."""
    if torch.compiler.is_compiling() or isinstance(hidden, torch._subclasses.FakeTensor):
        return False
    if hidden.device.type != "cpu" or not _library.has_kernels(hidden.device):
        return False
    if _autocast_factors("cpu") is not None:
        return False
    at_once = min(hidden.shape[0], max(2**24 // max(table.shape[0], 1), _FEWEST_ROWS))
    return at_once >= _TILE * torch.get_num_threads()


def default_chunk_rows(n_items: int, device_type: str = "cpu") -> int:
    """Rows of logits held at once: 64 to 256 on the CPU (cache), up to 8192 on a GPU."""
    if device_type == "cpu":
        return min(256, max(64, 2**24 // max(n_items, 1)))
    return min(8192, max(64, 2**26 // max(n_items, 1)))


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        table: Tensor,
        targets: Tensor,
        rows: Tensor | None,
        ignore_index: int,
        excluded: int | None,
        chunk_rows: int | None,
        wants_grad: bool,
    ) -> Tensor:
        factors = _autocast_factors(hidden.device.type)
        grad_hidden: Tensor | None
        grad_table: Tensor | None
        with torch.autocast(hidden.device.type, enabled=False):
            if rows is None:
                dtype = _score_dtype(hidden, table)
                loss, grad_hidden, grad_table = ops.softmax_loss(
                    hidden.to(dtype), table.to(dtype), targets, ignore_index,
                    excluded is not None, wants_grad,
                )  # fmt: skip
            else:
                loss, grad_hidden, grad_table = _loss_and_gradients(
                    hidden, table, targets, rows, excluded, chunk_rows, wants_grad, factors
                )
        if wants_grad:
            ctx.save_for_backward(grad_hidden, grad_table)
            ctx.dtypes = hidden.dtype, table.dtype  # cast after a loss scale was applied
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_table = ctx.saved_tensors
        needs_hidden, needs_table = ctx.needs_input_grad[:2]
        return (
            (grad_hidden * grad_loss).to(ctx.dtypes[0]) if needs_hidden else None,
            (grad_table * grad_loss).to(ctx.dtypes[1]) if needs_table else None,
            *([None] * 6),
        )


def _loss_and_gradients(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    rows: Tensor,
    excluded: int | None,
    chunk_rows: int | None,
    wants_grad: bool,
    factors: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dtype = _score_dtype(hidden, table)
    num_rows, n_items = rows.numel(), table.shape[0]
    first, last = _class_range(n_items, excluded)
    classes = table[first:last].to(dtype)  # [C, hidden]
    masked = excluded if last - first == n_items else None
    low_classes = classes if factors is None else classes.to(factors)
    grad_hidden = grad_table = grad_classes = None
    if wants_grad:
        grad_hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        grad_table = torch.zeros(table.shape, dtype=dtype, device=table.device)
        grad_classes = grad_table[first:last]
    total = torch.zeros((), dtype=torch.float64 if hidden.device.type == "cpu" else dtype).to(
        hidden.device
    )
    size = chunk_rows or default_chunk_rows(n_items, hidden.device.type)
    logits = torch.empty(min(size, num_rows), classes.shape[0], dtype=dtype, device=hidden.device)
    for start in range(0, num_rows, size):
        index = rows[start : start + size]
        h = hidden.index_select(0, index).to(dtype)  # [c, hidden]
        y = targets.index_select(0, index).unsqueeze(1) - first  # [c, 1]
        p = logits[: h.shape[0]]  # [c, C]
        torch.mm(h, classes.t(), out=p)
        if masked is not None:
            p[:, masked] = -torch.inf
        total += _softmax_in_place(p, h, classes, y, masked)
        if grad_hidden is not None and grad_classes is not None:
            # d loss / d logits = (p - onehot(y)) / num_rows; the division comes last: less to do
            p.scatter_add_(1, y, p.new_full((), -1.0).expand_as(y))
            if factors is None:
                grad_hidden.index_copy_(0, index, (p @ classes).div_(num_rows))
                grad_classes.addmm_(p.t(), h)
            else:
                low = p.to(factors)
                grad_rows = (low @ low_classes).to(dtype).div_(num_rows)
                grad_hidden.index_copy_(0, index, grad_rows)
                grad_classes += low.t() @ h.to(factors)
    if grad_table is not None:
        grad_table.div_(max(num_rows, 1))
    return (total / max(num_rows, 1)).to(dtype), grad_hidden, grad_table


def _softmax_in_place(
    logits: Tensor, h: Tensor, classes: Tensor, y: Tensor, masked: int | None
) -> Tensor:
    """Turns logits [c, C] into probabilities; returns the summed negative log-likelihood of y."""
    if logits.device.type != "cpu":
        torch.log_softmax(logits, 1, out=logits)
        nll = -logits.gather(1, y).sum()
        logits.exp_()
        return nll
    torch.softmax(logits, 1, out=logits)  # one pass less than log_softmax and exp
    picked = logits.gather(1, y)
    total = -picked.log().sum(dtype=torch.float64)
    small = (picked.squeeze(1) < _UNDERFLOW).nonzero().squeeze(1)
    if small.numel() == 0:
        return total
    exact = h[small] @ classes.t()
    if masked is not None:
        exact[:, masked] = -torch.inf
    picked[small] = 1.0
    nll = F.cross_entropy(exact, y[small, 0], reduction="sum")
    return nll.double() - picked.log().sum(dtype=torch.float64)


def _score_dtype(hidden: Tensor, table: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden.dtype, table.dtype), torch.float32)


def _autocast_factors(device_type: str) -> torch.dtype | None:
    """bfloat16 under autocast to it; float16 has too little range for p / num_rows."""
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.bfloat16 if torch.get_autocast_dtype(device_type) == torch.bfloat16 else None


def _class_range(n_items: int, excluded: int | None) -> tuple[int, int]:
    """Rows of the table that are classes; an excluded row in the middle is masked instead."""
    if excluded == 0:
        return 1, n_items
    if excluded == n_items - 1:
        return 0, n_items - 1
    return 0, n_items


def _torch_loss(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    rows: Tensor,
    ignore_index: int,
    exclude_padding_class: bool,
) -> Tensor:
    first, last = _class_range(table.shape[0], ignore_index if exclude_padding_class else None)
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
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"softmax_loss: chunk_rows must be at least 1, got {chunk_rows}")
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
