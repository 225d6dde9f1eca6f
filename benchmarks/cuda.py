"""The rows of `python -m benchmarks cuda`, and the targets of the CUDA kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import cuda_peers, cuda_training
from benchmarks.checks import WrongResult
from benchmarks.models import SASRec, ml_1m
from benchmarks.operator_rows import Setting, Shape, failure, measure
from benchmarks.peers import Peer
from benchmarks.records import Record, Target
from benchmarks.timing import GPU, QUICK, Clock, CpuClock, CudaClock, Effort, Work, interleave
from recgrela_ext import ops
from recgrela_ext.ops.reference import State, zero_state
from tests.gpu.device import captured
from tests.ops.agreement import assert_agrees
from tests.ops.problems import ROWS, make_problem
from tests.ops.test_gated_rela_step import stepwise
from tests.tolerance import assert_same_history

SHAPES = (
    Shape(2048, 50, 4, 16),
    Shape(2048, 200, 4, 16),
    Shape(4096, 200, 4, 16),
    Shape(2048, 200, 2, 32),
    Shape(1024, 200, 2, 64),
    Shape(1024, 200, 4, 64),
    Shape(512, 1024, 4, 32),
    Shape(256, 4096, 4, 32),
    Shape(256, 16384, 4, 16),
    Shape(256, 16384, 4, 64),
)
COMPILED = (SHAPES[1], SHAPES[5], SHAPES[6])  # peers under torch.compile take a minute a shape
DTYPES = (torch.float32, torch.bfloat16)
BOTH = "forward + backward"


@dataclass(frozen=True)
class Context:
    """What the command line chose. A dry run does everything on the CPU, at small shapes."""

    device: torch.device
    quick: bool = False
    compile: bool = True
    bandwidth: float | None = None

    @property
    def effort(self) -> Effort:
        return QUICK if self.quick else GPU

    def clock(self, flush: bool = True) -> Clock:
        if self.device.type == "cpu":
            return CpuClock(torch.get_num_threads())
        return CudaClock(self.device, flush)

    def shape(self, shape: Shape) -> Shape:
        return Shape(2, min(shape.L, 70), shape.H, shape.D) if self.quick else shape

    def setting(self) -> Setting:
        return Setting(
            self.clock(), self.effort, self.device, None, self.bandwidth, backward_alone=True
        )


Rows = Callable[[Context], list[Record]]


def operator_row(row: str, shape: Shape, dtype: torch.dtype, context: Context) -> list[Record]:
    """Forward, both and backward of one shape of the table, with the targets for each."""
    peers: dict[str, Peer] = dict(cuda_peers.EAGER)
    if context.compile and shape in COMPILED:
        peers |= cuda_peers.COMPILED
    records = measure(row, context.shape(shape), dtype, peers, context.setting())
    name = row.removeprefix("operator-")
    for record in records:
        limit = {"forward": 0.75, "backward": 0.65}.get(record.what)
        if limit is not None:
            text = f"{record.what}, {name}: share of the copy bandwidth"
            record.targets.append(Target(text, limit, record.share))
        if record.what == "backward":
            continue
        record.aim(
            f"{record.what}, {name}: against published",
            "published",
            8 if record.what == "forward" else 6,
        )
        ratios = [r for peer in cuda_peers.FLA if (r := record.ratio(peer)) is not None]
        fastest = min(ratios, default=None)
        text = f"{record.what}, {name}: against the fastest flash-linear-attention"
        record.targets.append(Target(text, 3, fastest))
    return records


def _state(users: int, heads: int, head_dim: int, context: Context) -> State:
    """A user's state as some dozen items leave it."""
    state = zero_state(users, heads, head_dim, 4, torch.float32, context.device)
    state[1].fill_(10.0)
    state[3].fill_(12)
    return state


def _check_step(context: Context, dtype: torch.dtype) -> None:
    problem = make_problem(3, 5, 4, 16, dtype=dtype, return_final_state=True, state=True)
    try:
        assert_agrees(problem.on(context.device), stepwise, backward=False)
    except AssertionError as error:
        raise WrongResult(str(error)) from None


def _step_work(users: int, state: State, context: Context) -> Work:
    shape = Shape(users, 1, 4, 16)
    problem = shape.problem(torch.float32, context.device)
    rows = [getattr(problem, name)[:, 0].contiguous() for name in ROWS]
    parameters = problem.inv_freq, problem.conv_weight, problem.conv_bias
    return torch.no_grad()(lambda: ops.gated_rela_step(*rows, *parameters, state))


def graph_of(work: Callable[[], Tensor], times: int) -> Work:
    """Replays `work`, `times` in a row, as one CUDA graph; a plain loop in a dry run."""

    def several() -> Sequence[Tensor]:
        return [work() for _ in range(times)]

    return captured(several)[1]


def step_one(context: Context) -> list[Record]:
    """GPU time of the operator for one user: of one launch in a graph of many."""
    _check_step(context, torch.float32)
    times = 2 if context.quick else 100
    replay = graph_of(_step_work(1, _state(1, 4, 16, context), context), times)
    clock = context.clock(flush=False)
    timing = interleave({"ours": replay}, clock, context.effort)["ours"].divided(times)
    what, shape = f"one user, in a CUDA graph of {times}", {"B": 1, "H": 4, "D": 16}
    record = Record("step-1", what, "gated_rela_step", shape, clock=clock.name)
    record.times["ours"] = timing
    text = "gated_rela_step, one user: microseconds of GPU time"
    record.targets.append(Target(text, 5, timing.median * 1e6, at_least=False))
    return [record]


def step_many(context: Context) -> list[Record]:
    """4,096 users, over eight sets of states in turn: one set alone would stay in the L2 cache."""
    _check_step(context, torch.float32)
    users = 4 if context.quick else 4096
    works = [_step_work(users, _state(users, 4, 16, context), context) for _ in range(8)]
    turn = itertools.cycle(works)
    numbers = users * 64
    # kv, k_sum and conv in and out; q, k, v, gate in, y out; position in
    moved = 4 * (2 * numbers * (16 + 1 + 3) + 5 * numbers) + 8 * users
    clock = context.clock(flush=False)
    record = Record("step-4096", "eight sets of states in turn", "gated_rela_step",
                    {"B": users, "H": 4, "D": 16}, clock=clock.name, bytes=moved,
                    bandwidth=context.bandwidth)  # fmt: skip
    record.times = interleave({"ours": lambda: next(turn)()}, clock, context.effort)
    text = "gated_rela_step, 4,096 users: share of the copy bandwidth"
    record.targets.append(Target(text, 0.6, record.share))
    return [record]


@torch.no_grad()
def step_model(context: Context) -> list[Record]:
    """Four layers of one event in a CUDA graph, beside SASRec reading 200 items again in one."""
    model = ml_1m().eval().to(context.device)
    sasrec = SASRec(3417).eval().to(context.device)
    items = torch.randint(1, 3417, (1, 200), device=context.device)
    state = model.prefill(items[:, :-1])
    item = items[:, -1].contiguous()
    try:
        assert_same_history("model.step", model.step(item, state.clone()), model(items))
    except AssertionError as error:
        raise WrongResult(str(error)) from None
    missing = {}
    works: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: model.encoder.step(model._embed(item), state.layers),
        "model.step": lambda: model.step(item, state),
        "SASRec": lambda: sasrec(items),
    }
    graphs: dict[str, Work] = {}
    for name, work in works.items():
        try:
            graphs[name] = torch.no_grad()(graph_of(torch.no_grad()(work), 1))
        except Exception as error:  # model.step may do what a graph cannot hold
            if name == "ours":
                raise
            missing[name] = failure(error)
    clock = context.clock(flush=False)
    what, shape = "four layers of one event, in a CUDA graph", {"B": 1, "L": 200, "layers": 4}
    record = Record("step-model", what, "encoder_step", shape, clock=clock.name, missing=missing)
    record.labels["SASRec"] = "SASRec, re-encoding 200 items"
    record.times = interleave(graphs, clock, context.effort)
    text = "four layers of one event in a CUDA graph: microseconds"
    record.targets.append(Target(text, 60, record.times["ours"].median * 1e6, at_least=False))
    return [record]


def training(context: Context) -> list[Record]:
    batch, length = (3, 20) if context.quick else (2048, 200)
    return cuda_training.training(
        "train", batch, length, context.device, context.clock(), context.effort, context.compile
    )


def inference(context: Context) -> list[Record]:
    batch, length = (3, 20) if context.quick else (4096, 200)
    return cuda_training.inference(
        "inference", batch, length, context.device, context.clock(), context.effort, context.compile
    )


def row_name(shape: Shape, dtype: torch.dtype) -> str:
    kind = str(dtype).removeprefix("torch.")
    return f"operator-b{shape.B}-l{shape.L}-h{shape.H}-d{shape.D}-{kind}"


_OPERATORS = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
ROWS_BY_NAME: dict[str, Rows] = {
    **{
        row_name(shape, dtype): partial(operator_row, row_name(shape, dtype), shape, dtype)
        for shape, dtype in _OPERATORS
    },
    "step-1": step_one,
    "step-4096": step_many,
    "step-model": step_model,
    "train": training,
    "inference": inference,
}
