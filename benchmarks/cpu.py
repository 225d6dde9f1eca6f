"""The rows of `python -m benchmarks cpu`, and the targets of the CPU kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from benchmarks import peak, training_rows
from benchmarks.checks import WrongResult, check_ours
from benchmarks.machine import caches
from benchmarks.models import SASRec, ml_1m
from benchmarks.operator_rows import Setting, Shape, measure, traffic
from benchmarks.peers import CPU_PEERS, ours
from benchmarks.probes import CpuProbe, copy_work
from benchmarks.records import RESULTS_MIB, Record, Target
from benchmarks.timing import FULL, QUICK, CpuClock, Effort, Work, interleave
from recgrela_ext import ops
from tests.ops.problems import PARAMETERS, ROWS, Problem
from tests.tolerance import assert_same_history


@dataclass(frozen=True)
class Context:
    """What the command line chose."""

    quick: bool = False
    compile: bool = True
    threads: int = os.cpu_count() or 1
    bandwidth: Mapping[int, float] = field(default_factory=dict)  # threads -> bytes a second

    @property
    def effort(self) -> Effort:
        return QUICK if self.quick else FULL

    def setting(self, threads: int) -> Setting:
        clock, bandwidth = CpuClock(threads), self.bandwidth.get(threads)
        return Setting(clock, self.effort, torch.device("cpu"), threads, bandwidth)

    def shape(self, B: int, L: int, D: int) -> Shape:
        """Four heads; small ones for a quick run."""
        return Shape(min(B, 2), min(L, 70), 4, D) if self.quick else Shape(B, L, 4, D)

    def beyond_caches(self) -> Shape:
        """Rows four times the last cache, L 200, D 16."""
        last = max(caches().values(), default=2**25)
        one = 5 * 200 * 4 * 16 * 4
        return self.shape(-(-4 * last // one), 200, 16)


Rows = Callable[[Context], list[Record]]


def operator_rows(
    B: int, L: int, D: int, aims: dict[str, tuple[tuple[str, float], ...]], row: str
) -> Rows:
    """`aims`: what -> (peer, limit) pairs."""

    def run(context: Context) -> list[Record]:
        skip = set() if context.compile else {"published, compiled"}
        peers = {n: p for n, p in CPU_PEERS.items() if n not in skip}
        records = measure(row, context.shape(B, L, D), torch.float32, peers, context.setting(1))
        for record in records:
            for peer, limit in aims.get(record.what, ()):
                text = f"{record.what}, D {D}, L {L}, against {CPU_PEERS[peer].label}"
                record.aim(text, peer, limit)
        return records

    return run


BOTH = "forward + backward"


def length(context: Context) -> list[Record]:
    """Time of an item in a long and in a short history; the same number of items."""
    short, long = (70, 300) if context.quick else (200, 16384)
    shapes = {"L 200": Shape(max(1, long // short), short, 4, 16), "ours": Shape(1, long, 4, 16)}
    problems = {name: shape.problem(torch.float32) for name, shape in shapes.items()}
    for problem in problems.values():
        check_ours(problem, backward=True)
    setting = context.setting(1)
    torch.set_num_threads(1)
    records = []
    for what, backward in (("forward", False), (BOTH, True)):
        record = Record("length", f"{what}: L {long} and L {short}", "gated_rela",
                        shapes["ours"].named(), threads=1, clock=setting.clock.name,
                        labels={"L 200": f"L {short}"})  # fmt: skip
        works = {name: own_work(problem, backward) for name, problem in problems.items()}
        record.times = interleave(works, setting.clock, setting.effort)
        a, b = (record.times[n].median / (s.B * s.L) for n, s in shapes.items())
        text = f"{what}: time of an item at L {long} over L {short}"
        record.values["time of an item over the short one's"] = b / a
        record.targets.append(Target(text, 1.15, b / a, at_least=False))
        records.append(record)
    return records


def own_work(problem: Problem, backward: bool) -> Work:
    """Ours on one problem, as timed."""
    operator = ours(problem)
    source = problem.requiring_grad() if backward else problem
    arguments = [getattr(source, name) for name in (*ROWS, *PARAMETERS)]
    if not backward:
        return torch.no_grad()(lambda: operator(*arguments))
    given = torch.randn_like(problem.q)
    return lambda: torch.autograd.grad(operator(*arguments), arguments, given)


def threads(context: Context) -> list[Record]:
    """What a second thread gains, beside what it gains a loop that must gain."""
    if context.threads < 2:
        return []
    sizes = {"in cache": context.shape(32, 200, 16), "beyond the caches": context.beyond_caches()}
    records = []
    for where, shape in sizes.items():
        problem = shape.problem(torch.float32)
        check_ours(problem, backward=True)
        for what, backward in (("forward", False), (BOTH, True)):
            works = {}
            for count in (1, 2):
                works[f"ours, {count}"] = with_threads(count, own_work(problem, backward))
            records.append(_gain(where, what, shape, works, context))
    return records


def _gain(where: str, what: str, shape: Shape, works: dict[str, Work], context: Context) -> Record:
    clock = CpuClock(2)  # the clock on the wall for all of them
    nbytes = 12 * 2**20 if context.quick else 6 * max(caches().values(), default=2**25)
    probes = {count: CpuProbe(count, nbytes) for count in (1, 2)}
    probe = "FMA loop" if where == "in cache" else "STREAM triad"
    for count, loop in probes.items():
        works[f"{probe}, {count}"] = loop.fma if where == "in cache" else loop.triad
    record = Record("threads", f"{what}, {where}: two threads over one", "gated_rela",
                    shape.named(), threads=2, clock=clock.name)  # fmt: skip
    record.times = interleave(works, clock, context.effort)
    for loop in probes.values():
        loop.close()
    median = {name: timing.median for name, timing in record.times.items()}
    gain = median["ours, 1"] / median["ours, 2"]
    # the FMA loop does its work once in every thread, the triad shares it out
    twice = 2 if where == "in cache" else 1
    possible = twice * median[f"{probe}, 1"] / median[f"{probe}, 2"]
    record.values |= {"gain": gain, f"gain of the {probe}": possible}
    text = f"{what}, {where}: gain of two threads, as a share of the {probe}'s"
    record.targets.append(Target(text, 0.9, gain / possible))
    return record


def with_threads(count: int, work: Work) -> Work:
    def run() -> object:
        torch.set_num_threads(count)
        return work()

    return run


def bandwidth(context: Context) -> list[Record]:
    """The forward beyond the caches beside a copy and a triad of as many bytes."""
    records = []
    shape = context.beyond_caches()
    problem = shape.problem(torch.float32)
    check_ours(problem, backward=False)
    for count in sorted({1, context.threads}):
        setting = context.setting(count)
        torch.set_num_threads(count)
        total = traffic(shape, torch.float32, "forward")
        probe = CpuProbe(count, total)
        copy, copied = copy_work(total)
        works = {"ours": own_work(problem, False), "copy": copy, "triad": probe.triad}
        record = Record("bandwidth", "forward beyond the caches", "gated_rela", shape.named(),
                        threads=count, clock=setting.clock.name, bytes=total)  # fmt: skip
        record.times = interleave(works, setting.clock, setting.effort)
        probe.close()
        speed = {
            "copy": copied / record.times["copy"].median,
            "triad": probe.triad_bytes / record.times["triad"].median,
        }
        record.bandwidth = max(speed.values())
        record.values |= {f"{name}, GB/s": value / 1e9 for name, value in speed.items()}
        if count == context.threads:
            text = f"forward beyond the caches, {count} threads: share of the memory bandwidth"
            record.targets.append(Target(text, 0.5, record.share))
        records.append(record)
    return records


def train(batch: int, hidden_size: int, row: str, aim: bool = True) -> Rows:
    """On all threads, and on one, whose time other work on the machine cannot lengthen."""

    def run(context: Context) -> list[Record]:
        B, L = (2, 20) if context.quick else (batch, 200)
        records = [
            training_rows.training(row, B, L, hidden_size, n, context.effort, CpuClock(n))
            for n in sorted({context.threads, 1}, reverse=True)
        ]
        if aim:
            text = f"training step, {batch} windows: against"
            first = records[0]
            first.aim(f"{text} the eager causal operator, same loss", "eager operator", 1.6)
            first.aim(f"{text} the plain model, dense cross-entropy", "plain", 2.5)
        return records

    return run


def inference(context: Context) -> list[Record]:
    B, L = (2, 20) if context.quick else (32, 200)
    count = context.threads
    return [
        training_rows.inference("inference", B, L, hidden, count, context.effort, CpuClock(count))
        for hidden in (64, 128)
    ]


@torch.no_grad()
def serving(context: Context) -> list[Record]:
    """One new event of one user, beside SASRec reading the last 200 again."""
    torch.set_num_threads(1)
    records = []
    for hidden in (64, 128):
        model = ml_1m(hidden).eval()
        sasrec = SASRec(3417, hidden).eval()
        items = torch.randint(1, 3417, (1, 200))
        state = model.prefill(items[:, :-1])
        packed = model.encoder.packed_weights()
        assert packed is not None
        x = model.input_norm(model.item_embedding(items[:, -1]))
        rows, position = state.buffer.clone(), state.position.clone()
        last = items[:, -1].clone()
        try:
            whole = model(items)
            out = ops.encoder_step(x, packed, (rows, position))
            assert_same_history("encoder_step", out, whole)
            assert_same_history("model.step", model.step(last, state), whole)
        except AssertionError as error:
            raise WrongResult(str(error)) from None

        def step(x=x, packed=packed, rows=rows, position=position) -> object:  # type: ignore
            return ops.encoder_step(x, packed, (rows, position))

        works: dict[str, Work] = {
            "ours": step,
            "model.step": lambda m=model, i=last, s=state: m.step(i, s),  # type: ignore[misc]
            "SASRec": lambda m=sasrec, i=items: m(i),  # type: ignore[misc]
        }
        record = Record("serving", "one event of one user", "encoder_step",
                        {"B": 1, "L": 200, "hidden": hidden, "layers": 4}, threads=1,
                        clock=CpuClock(1).name,
                        labels={"SASRec": "SASRec, re-encoding 200 items"})  # fmt: skip
        no_grad = {name: torch.no_grad()(work) for name, work in works.items()}
        record.times = interleave(no_grad, CpuClock(1), context.effort)
        if hidden == 64:
            record.aim("encoder_step, one user, against SASRec re-encoding 200", "SASRec", 10)
        records.append(record)
    return records


def peak_memory(context: Context) -> list[Record]:
    shape = context.shape(128, 2048, 16)
    record = Record("memory", BOTH, "gated_rela", shape.named(),
                    threads=context.threads,
                    labels={n: CPU_PEERS[n].label for n in peak.PEERS if n != "ours"})  # fmt: skip
    for name in peak.PEERS:
        record.memory[name] = peak.operator_peak(name, shape, context.threads)
    # The output and four gradients: no way to compute them can do without.
    record.values[RESULTS_MIB] = 5 * 4 * shape.B * shape.L * shape.H * shape.D / 2**20
    record.aim("peak extra memory, forward + backward, B 128 L 2048, against causal eager",
               "causal", 5)  # fmt: skip
    return [record]


ROWS_BY_NAME: dict[str, Rows] = {
    "operator-d16-l200": operator_rows(
        32, 200, 16,
        {"forward": (("published", 8),),
         BOTH: (("published", 12), ("sdpa", 10), ("idiap", 15))},
        "operator-d16-l200",
    ),
    "operator-d16-l2048": operator_rows(
        4, 2048, 16, {BOTH: (("sdpa", 30),)}, "operator-d16-l2048"
    ),
    "operator-d16-l16384": operator_rows(
        1, 16384, 16, {BOTH: (("sdpa", 150),)}, "operator-d16-l16384"
    ),
    "operator-d64-l200": operator_rows(
        8, 200, 64, {BOTH: (("published", 8),)}, "operator-d64-l200"
    ),
    "length": length,
    "threads": threads,
    "bandwidth": bandwidth,
    "train-16": train(16, 64, "train-16"),
    "train-32": train(32, 64, "train-32"),
    "train-hidden128": train(16, 128, "train-hidden128", aim=False),
    "inference": inference,
    "serving": serving,
    "memory": peak_memory,
}  # fmt: skip
