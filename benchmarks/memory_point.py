"""One point of `python -m benchmarks memory`, in a process of its own.

Memory is the growth of this process's resident memory, at its highest, from the moment the weights
are there and a short history was read. Time is processor time of its one thread. All is float32
but where a format is named.
"""

from __future__ import annotations

import ctypes
import resource
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.memory_models import CANDIDATES, event, read_history, rebuild, stored_bytes
from benchmarks.timing import CpuClock, Effort, interleave
from recgrela_ext.model.losses import softmax_loss
from recgrela_ext.model.retrieval import ItemTable, top_k

SMALL = 8  # items read before anything is measured
USERS, MEAN, MOST = 128, 100, 200  # of the rebuild: users, mean and largest length
LOSS_ROWS = 512


def main(point: dict[str, Any], answer: Any) -> None:
    """Sends down the pipe what was measured, {"missing": why it cannot be}, or {"error": ...}."""
    warnings.simplefilter("ignore")  # a million events: the point is to go there
    limit = point["limit_bytes"]
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        with torch.set_grad_enabled(point["kind"] == "loss"):
            found = KINDS[point["kind"]](point)
    except peers.Missing as missing:
        found = {"missing": str(missing)}
    except Exception as error:
        found = {"error": traceback.format_exc()}
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            found = {"missing": f"more than {limit / 2**30:.0f} GiB of memory"}
    answer.send(found)


def one_event(point: dict[str, Any]) -> dict[str, Any]:
    """Of `batch` users with `length` items each."""
    candidate = CANDIDATES[point["model"]]
    model = candidate.build(point["items"] + 1, point["length"])
    event(candidate, model, SMALL, 1)()
    make = lambda: event(candidate, model, point["length"], point["batch"])  # noqa: E731
    if point["part"] == "memory":
        return {
            "peak": grown(lambda: [work() for work in [make()]]),
            **stored_bytes(candidate, point["length"]),
        }
    return timed(make(), point)


def history(point: dict[str, Any]) -> dict[str, Any]:
    """Reading `length` items of one user into what is kept; the ids are there before."""
    candidate = CANDIDATES[point["model"]]
    model = candidate.build(point["items"] + 1, point["length"])
    read_history(candidate, model, SMALL)()
    work = read_history(candidate, model, point["length"])
    return {"peak": grown(work)}


def ranking(point: dict[str, Any]) -> dict[str, Any]:
    """An event and then the ten best of `items` items."""
    name, _, table_format = point["model"].partition("+")
    candidate = CANDIDATES[name]
    model = candidate.build(point["items"] + 1, point["length"])
    weight = model.item_embedding.weight.detach()
    if candidate.model != "RecGRELA":

        def rank(hidden: torch.Tensor) -> object:
            return (hidden @ weight.t()).topk(10)
    elif table_format:
        table = ItemTable(model, table_format)

        def rank(hidden: torch.Tensor) -> object:
            return table.top_k(hidden, 10)
    else:

        def rank(hidden: torch.Tensor) -> object:
            return top_k(hidden, weight, 10, 0)

    rank(event(candidate, model, SMALL, 1)())
    work = event(candidate, model, point["length"], point["batch"])
    if point["part"] == "memory":
        found: dict[str, Any] = {"peak": grown(lambda: rank(work()))}
        found["table"] = table.nbytes if table_format else 4 * weight.numel()
        return found
    return timed(lambda: rank(work()), point)


def update(point: dict[str, Any]) -> dict[str, Any]:
    """All users' states after the weights changed."""
    candidate = CANDIDATES[point["model"]]
    model = candidate.build(point["items"] + 1, MOST)
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(MEAN) - 0.18, 0.6, USERS), 5, MOST).astype(int)
    histories = [rng.integers(1, point["items"] + 1, n) for n in lengths]
    rebuild(candidate, model, histories[:2])()
    work = rebuild(candidate, model, histories)
    if point["part"] == "memory":
        return {"peak": grown(work), "users": USERS, "items_read": int(lengths.sum())}
    return {**timed(work, point), "users": USERS, "items_read": int(lengths.sum())}


def loss(point: dict[str, Any]) -> dict[str, Any]:
    """Cross-entropy of `batch` positions over all items with its gradients; rows are classes."""
    rows, items = point["batch"], point["items"]

    def work(hidden: torch.Tensor, table: torch.Tensor, targets: torch.Tensor) -> None:
        if point["model"] == "dense":
            value = F.cross_entropy(hidden @ table.t(), targets, ignore_index=0)
        else:
            value = softmax_loss(hidden, table, targets)
        torch.autograd.grad(value, (hidden, table))

    def inputs(rows: int, items: int) -> tuple[torch.Tensor, ...]:
        shapes = ((rows, 64), (items, 64))
        hidden, table = ((0.1 * torch.randn(s)).requires_grad_() for s in shapes)
        return hidden, table, torch.randint(1, items, (rows,))

    work(*inputs(4, 100))
    given = inputs(rows, items)
    return {"peak": grown(lambda: work(*given))}


KINDS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "event": one_event,
    "history": history,
    "ranking": ranking,
    "update": update,
    "loss": loss,
}


def timed(work: Callable[[], object], point: dict[str, Any]) -> dict[str, Any]:
    effort = Effort(rounds=point["rounds"], sample=point["sample"], most=4.0)
    clock = CpuClock(1)
    timing = interleave({"it": work}, clock, effort)["it"]
    return {
        "seconds": timing.median,
        "p10": timing.p10,
        "p90": timing.p90,
        "samples": timing.samples,
        "calls": timing.calls,
        "clock": clock.name,
    }


def grown(work: Callable[[], object]) -> int:
    """Bytes the resident memory grows by at most while `work` runs; its result is kept alive."""
    ctypes.CDLL(None).malloc_trim(0)  # memory freed since the start must not hide new memory
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    kept = work()
    peak = _status("VmHWM") - before
    del kept
    return max(peak, 0)


def _status(field: str) -> int:
    """Bytes; of this program alone, ru_maxrss would include its parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{field}:")[1].split()[0]) * 1024
