"""gated_rela beside its peers at one shape: forward, and forward with backward."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from benchmarks.checks import WrongResult, check_ours, check_peer
from benchmarks.peers import Missing, Operator, Peer, ours
from benchmarks.records import Record
from benchmarks.timing import Clock, Effort, Work, interleave
from tests.ops.problems import PARAMETERS, ROWS, Problem, make_problem

CHUNK = 64  # items between the states a forward saves for the backward


@dataclass(frozen=True)
class Shape:
    """Rows [B, L, H, D]."""

    B: int
    L: int
    H: int
    D: int

    def named(self) -> dict[str, int]:
        return {"B": self.B, "L": self.L, "H": self.H, "D": self.D}

    def problem(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Problem:
        torch.manual_seed(0)
        small = make_problem(1, 1, self.H, self.D, dtype=dtype).on(device)
        shape = (self.B, self.L, self.H, self.D)
        return small.but(**{n: torch.randn(shape, dtype=dtype, device=device) for n in ROWS})


def traffic(shape: Shape, dtype: torch.dtype, what: str) -> int:
    """Bytes the operator cannot avoid: q, k, v, gate in and y out; in the backward q, k, v, gate,
    dy in, dq, dk, dv, dgate out. Saved states are counted where sequences are longer than a chunk:
    written by a forward that has a backward, read by that.
    """
    numbers = shape.B * shape.L * shape.H * shape.D
    states = 4 * numbers * (shape.D + 1) // CHUNK if shape.L > CHUNK else 0
    rows = {"forward": 5, "backward": 9, "forward + backward": 14}[what]
    passes = {"forward": 0, "backward": 1, "forward + backward": 2}[what]
    return rows * numbers * dtype.itemsize + passes * states


@dataclass(frozen=True)
class Setting:
    """Where and how rows are measured."""

    clock: Clock
    effort: Effort
    device: torch.device
    threads: int | None
    bandwidth: float | None
    backward_alone: bool = False  # a third record, of ours


def measure(
    row: str,
    shape: Shape,
    dtype: torch.dtype,
    peers: Mapping[str, Peer],
    setting: Setting,
    backward: bool = True,
) -> list[Record]:
    """The records "forward" and "forward + backward" of one shape. Raises WrongResult."""
    if setting.threads is not None:
        torch.set_num_threads(setting.threads)
    problem = shape.problem(dtype, setting.device)
    check_ours(problem, backward)
    torch._dynamo.reset()
    operators: dict[str, Operator] = {"ours": ours(problem)}
    missing: dict[str, str] = {}
    for name, peer in peers.items():
        try:
            operator = peer.build(problem)
            check_peer(problem, operator, peer.computes, peer.error)
            operators[name] = operator
        except (Missing, WrongResult) as error:
            missing[name] = str(error)
        except Exception as error:  # a peer's compiler or kernel may fail in any way
            missing[name] = failure(error)
        forget(setting.device)
    kinds = {"forward": _forward}
    if backward:
        kinds["forward + backward"] = _both
    if backward and setting.backward_alone:
        kinds["backward"] = _alone
    records = []
    for what, work in kinds.items():
        records.append(_record(row, what, shape, dtype, setting, peers))
        if what != "backward":
            records[-1].missing = dict(missing)
        _time(records[-1], work(problem, operators), setting)
        forget(setting.device)
    return records


def forget(device: torch.device) -> None:
    """Gives memory back between measurements: peers may need most of a GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _record(
    row: str,
    what: str,
    shape: Shape,
    dtype: torch.dtype,
    setting: Setting,
    peers: Mapping[str, Peer],
) -> Record:
    return Record(
        row,
        what,
        "gated_rela",
        shape.named(),
        str(dtype).removeprefix("torch."),
        setting.threads,
        setting.clock.name,
        bytes=traffic(shape, dtype, what),
        bandwidth=setting.bandwidth,
        labels={name: peer.label for name, peer in peers.items()},
    )


def _time(record: Record, works: dict[str, Work], setting: Setting) -> None:
    """Times of all that run; a peer that fails now is missing, ours raises."""
    for name in list(works):
        try:
            works[name]()
        except Exception as error:
            if name == "ours":
                raise
            del works[name]
            record.missing[name] = failure(error)
        forget(setting.device)
    record.times = interleave(works, setting.clock, setting.effort)


def failure(error: Exception) -> str:
    """What a cell says of a peer that broke: one short line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = str(error).splitlines()[0][:100] if str(error) else ""
    return f"failed: {type(error).__name__}: {text}"


def _forward(problem: Problem, operators: Mapping[str, Operator]) -> dict[str, Work]:
    arguments = [getattr(problem, name) for name in (*ROWS, *PARAMETERS)]

    def work(operator: Operator) -> Work:
        @torch.no_grad()
        def run() -> object:
            return operator(*arguments)

        return run

    return {name: work(operator) for name, operator in operators.items()}


def _both(problem: Problem, operators: Mapping[str, Operator]) -> dict[str, Work]:
    leaf = problem.requiring_grad()
    arguments = [getattr(leaf, name) for name in (*ROWS, *PARAMETERS)]
    given = torch.randn_like(problem.q)

    def work(operator: Operator) -> Work:
        return lambda: torch.autograd.grad(operator(*arguments), arguments, given)

    return {name: work(operator) for name, operator in operators.items()}


def _alone(problem: Problem, operators: Mapping[str, Operator]) -> dict[str, Work]:
    """The backward of ours, again and again on one forward."""
    leaf = problem.requiring_grad()
    arguments = [getattr(leaf, name) for name in (*ROWS, *PARAMETERS)]
    given = torch.randn_like(problem.q)
    out = operators["ours"](*arguments)
    return {"ours": lambda: torch.autograd.grad(out, arguments, given, retain_graph=True)}
