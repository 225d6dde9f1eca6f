"""The softmax loss and its gradients a chunk of rows at a time; losses.py decides when.

The gradient of a chunk is formed while its probabilities are in the cache. Logits, probabilities
and sums are float32 at least.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import LogitBias

_UNDERFLOW = 1e-30  # below it -log(p) of a float32 probability loses digits

_Entries = tuple[Tensor, Tensor, Tensor]  # entries of a bias; row and column of each


def default_chunk_rows(n_items: int, device_type: str = "cpu") -> int:
    """Rows of logits held at once: 64 to 256 on the CPU (cache), up to 8192 on a GPU."""
    if device_type == "cpu":
        return min(256, max(64, 2**24 // max(n_items, 1)))
    return min(8192, max(64, 2**26 // max(n_items, 1)))


class Scorer:
    """Logits of some rows over the classes, which are all rows of the table or all but one."""

    def __init__(
        self, table: Tensor, dtype: torch.dtype, excluded: int | None, bias: LogitBias | None
    ) -> None:
        n_items = table.shape[0]
        self.bias = None if bias is None else bias._replace(values=bias.values.to(dtype))
        self.first, self.last = class_range(n_items, excluded)
        self.masked = excluded if self.last - self.first == n_items else None
        self.classes = table[self.first : self.last].to(dtype)  # [C, hidden]
        if self.masked is not None:  # it may hold what is not finite
            self.classes = self.classes.clone()
            self.classes[self.masked] = 0.0
        self.table_shape = table.shape

    def logits(self, h: Tensor, entries: _Entries | None, out: Tensor | None = None) -> Tensor:
        """[c, C] of rows h [c, hidden], to which these `entries` of the bias belong."""
        logits = torch.mm(h, self.classes.t(), out=out)
        if self.bias is not None and entries is not None:
            which, *places = entries
            logits.index_put_(tuple(places), self.bias.values[which], accumulate=True)
        if self.masked is not None:
            logits[:, self.masked] = -torch.inf
        return logits

    def entries(self, index: Tensor) -> _Entries | None:
        """Of the rows `index` [c]: which entries of the bias, and the place of each in [c, C]."""
        if self.bias is None:
            return None
        begin, end = self.bias.offsets[index], self.bias.offsets[index + 1]
        counts = end - begin
        row = torch.arange(len(index), device=index.device).repeat_interleave(counts)
        before = (begin - (counts.cumsum(0) - counts)).repeat_interleave(counts)
        entries = before + torch.arange(len(before), device=index.device)
        place = self.bias.items[entries] - self.first
        kept = (place >= 0) & (place < len(self.classes))  # an excluded item is no class
        return entries[kept], row[kept], place[kept]


def loss_and_gradients(
    hidden: Tensor,
    scorer: Scorer,
    targets: Tensor,
    rows: Tensor,
    chunk_rows: int | None,
    wants_grad: bool,
    factors: torch.dtype | None,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The loss and its gradients by hidden, the table and the values of the bias."""
    classes, first = scorer.classes, scorer.first
    dtype, device, num_rows = classes.dtype, hidden.device, rows.numel()
    low_classes = classes if factors is None else classes.to(factors)
    grad_hidden = grad_table = grad_classes = grad_bias = None
    if wants_grad:
        grad_hidden = torch.zeros(hidden.shape, dtype=dtype, device=device)
        grad_table = torch.zeros(scorer.table_shape, dtype=dtype, device=device)
        grad_classes = grad_table[first : scorer.last]
        if scorer.bias is not None:
            grad_bias = torch.zeros_like(scorer.bias.values)
    total = torch.zeros((), dtype=torch.float64 if device.type == "cpu" else dtype, device=device)
    size = chunk_rows or default_chunk_rows(scorer.table_shape[0], device.type)
    room = torch.empty(min(size, num_rows), classes.shape[0], dtype=dtype, device=device)
    for start in range(0, num_rows, size):
        index = rows[start : start + size]
        h = hidden.index_select(0, index).to(dtype)  # [c, hidden]
        y = targets.index_select(0, index) - first  # [c]
        entries = scorer.entries(index)
        p = scorer.logits(h, entries, out=room[: h.shape[0]])  # [c, C]
        total += _softmax_in_place(p, h, index, y, scorer)
        if grad_hidden is not None and grad_classes is not None:
            # d loss / d logits = (p - onehot(y)) / num_rows; the division comes last: less to do
            p.scatter_add_(1, y[:, None], p.new_full((), -1.0).expand(len(y), 1))
            if scorer.masked is not None:
                p[:, scorer.masked] = 0.0  # also in a row that is not finite
            if factors is None:
                grad_hidden.index_copy_(0, index, (p @ classes).div_(num_rows))
                grad_classes.addmm_(p.t(), h)
            else:
                low = p.to(factors)
                grad_rows = (low @ low_classes).to(dtype).div_(num_rows)
                grad_hidden.index_copy_(0, index, grad_rows)
                grad_classes += low.t() @ h.to(factors)
            if grad_bias is not None and entries is not None:
                which, *places = entries
                grad_bias[which] = p[tuple(places)].div_(num_rows)
    if grad_table is not None:
        grad_table.div_(max(num_rows, 1))
        if scorer.masked is not None:
            grad_table[scorer.masked] = 0.0
    return (total / max(num_rows, 1)).to(dtype), (grad_hidden, grad_table, grad_bias)


def _softmax_in_place(
    logits: Tensor, h: Tensor, index: Tensor, y: Tensor, scorer: Scorer
) -> Tensor:
    """Turns logits [c, C] into probabilities; returns the summed negative log-likelihood of y."""
    if logits.device.type != "cpu":
        torch.log_softmax(logits, 1, out=logits)
        nll = -logits.gather(1, y[:, None]).sum()
        logits.exp_()
        return nll
    torch.softmax(logits, 1, out=logits)  # one pass less than log_softmax and exp
    picked = logits.gather(1, y[:, None])
    total = -picked.log().sum(dtype=torch.float64)
    small = (picked.squeeze(1) < _UNDERFLOW).nonzero().squeeze(1)
    if small.numel() == 0:
        return total
    exact = scorer.logits(h[small], scorer.entries(index[small]))
    picked[small] = 1.0
    nll = F.cross_entropy(exact, y[small], reduction="sum")
    return nll.double() - picked.log().sum(dtype=torch.float64)


def class_range(n_items: int, excluded: int | None) -> tuple[int, int]:
    """Rows of the table that are classes; an excluded row in the middle is masked instead."""
    if excluded == 0:
        return 1, n_items
    if excluded == n_items - 1:
        return 0, n_items - 1
    return 0, n_items
