"""gated_rela beside its peers at one shape: forward, and forward with backward."""

from __future__ import annotations

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
        return make_problem(self.B, self.L, self.H, self.D, dtype=dtype).on(device)


def traffic(shape: Shape, dtype: torch.dtype, backward: bool) -> int:
    """Bytes the operator cannot avoid: q, k, v, gate in and y out; in the backward also dy in,
    dq, dk, dv, dgate out. Saved states are counted where sequences are longer than a chunk.
    """
    numbers = shape.B * shape.L * shape.H * shape.D
    states = 4 * numbers * (shape.D + 1) // CHUNK if shape.L > CHUNK else 0
    if not backward:
        return 5 * numbers * dtype.itemsize
    return 14 * numbers * dtype.itemsize + 2 * states


@dataclass(frozen=True)
class Setting:
    """Where and how rows are measured."""

    clock: Clock
    effort: Effort
    device: torch.device
    threads: int | None
    bandwidth: float | None


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
            check_peer(problem, operator, peer.computes)
            operators[name] = operator
        except (Missing, WrongResult) as error:
            missing[name] = str(error)
        except Exception as error:  # a peer's compiler or kernel may fail in any way
            missing[name] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    records = []
    for what, work in (("forward", _forward), ("forward + backward", _both)):
        if what == "forward" or backward:
            records.append(_record(row, what, shape, dtype, setting, peers))
            records[-1].missing = dict(missing)
            _time(records[-1], work(problem, operators), setting)
    return records


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
        bytes=traffic(shape, dtype, what != "forward"),
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
            text = str(error).splitlines()[0][:120] if str(error) else ""
            record.missing[name] = f"failed: {type(error).__name__}: {text}"
    record.times = interleave(works, setting.clock, setting.effort)


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
