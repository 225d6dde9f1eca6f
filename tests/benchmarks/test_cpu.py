"""`python -m benchmarks cpu` runs, resumes, refuses wrong results and feeds README's tables."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cpu, machine, peak, peers, readme, speed_tables
from benchmarks.__main__ import main
from benchmarks.records import RESULTS_MIB, Record, Target, describe, duration
from benchmarks.timing import CpuClock, Effort, Timing, interleave
from recgrela_ext import ops


def quick(out: Path, *arguments: str) -> int:
    return main(["cpu", "--quick", "--threads", "1", "--out", str(out), *arguments])


def only(names: Sequence[str]) -> list[str]:
    return [word for name in names for word in ("--only", name)]


def rows(out: Path) -> dict[str, Any]:
    return json.loads(out.read_text())["rows"]  # type: ignore[no-any-return]


@pytest.mark.kernels
def test_every_row_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two threads are left to the full run: on a busy machine they wait for each other."""
    monkeypatch.setattr(peak, "PEERS", ("ours", "causal"))  # a process each
    out = tmp_path / "quick.json"
    names = [
        "operator-d16-l200",
        "length",
        "bandwidth",
        "train-16",
        "inference",
        "serving",
        "memory",
    ]
    assert quick(out, *only(names)) == 0
    content = json.loads(out.read_text())
    assert list(content["rows"]) == names
    assert content["machine"]["processor"]
    assert content["bandwidth"][0]["best"] > 0
    for row in content["rows"].values():
        for record in row["records"]:
            assert record["times"] or record["memory"]
            for timing in record["times"].values():
                assert 0 < timing["p10"] <= timing["median"] <= timing["p90"]
            assert record["missing"].keys() <= {"idiap"}, record["missing"]
            assert not record["targets"]  # they are for full shapes
    shown = capsys.readouterr().out
    assert "gated_rela, forward + backward: B2 L70 H4 D16, float32, 1 thread(s)" in shown
    assert "x ours" in shown


@pytest.mark.kernels
def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "quick.json"
    counted: list[str] = []

    def row(name: str) -> cpu.Rows:
        def run(context: cpu.Context) -> list[Record]:
            counted.append(name)
            if counted == ["first", "second"]:
                raise KeyboardInterrupt
            return [Record(name, "nothing", "rela", {}, times={"ours": Timing(1, 1, 1, 1, 1)})]

        return run

    monkeypatch.setattr(cpu, "ROWS_BY_NAME", {name: row(name) for name in ("first", "second")})
    with pytest.raises(KeyboardInterrupt):
        quick(out)
    assert list(rows(out)) == ["first"]
    assert quick(out) == 0
    assert counted == ["first", "second", "second"]
    assert quick(out, "--fresh", "--only", "first") == 0
    assert counted[-1] == "first"


@pytest.mark.kernels
def test_a_row_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(context: cpu.Context) -> list[Record]:
        raise torch.OutOfMemoryError("no room")

    def whole(context: cpu.Context) -> list[Record]:
        return [Record("whole", "nothing", "rela", {}, times={"ours": Timing(1, 1, 1, 1, 1)})]

    monkeypatch.setattr(cpu, "ROWS_BY_NAME", {"broken": broken, "whole": whole})
    out = tmp_path / "quick.json"
    assert quick(out) == 1
    assert list(rows(out)) == ["whole"]
    left_out = json.loads(out.read_text())["left_out"]
    assert left_out == {"broken": "left out: more memory than this GPU has"}


@pytest.mark.kernels
@pytest.mark.parametrize("scale", [1 + 1e-4, float("nan")])
def test_a_wrong_result_has_no_time(
    scale: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "quick.json"
    right = ops.gated_rela
    monkeypatch.setattr(ops, "gated_rela", lambda *a, **o: right(*a, **o) * scale)  # type: ignore
    assert quick(out, "--only", "operator-d16-l200", "--only", "length") == 1
    assert rows(out) == {}
    left_out = json.loads(out.read_text())["left_out"]
    assert left_out.keys() == {"operator-d16-l200", "length"}
    assert all(reason.startswith("WRONG RESULT") for reason in left_out.values())
    assert "x ours" not in capsys.readouterr().out


@pytest.mark.kernels
def test_a_wrong_peer_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "quick.json"
    bad = peers.Peer("bad", lambda p: lambda *a: peers.ours(p)(*a) * 1.01, "causal")
    broken = peers.Peer("broken", lambda p: lambda *a: a[0].no_such_thing, "causal")
    monkeypatch.setattr(cpu, "CPU_PEERS", peers.CPU_PEERS | {"bad": bad, "broken": broken})
    assert quick(out, "--only", "operator-d16-l200") == 0
    for record in rows(out)["operator-d16-l200"]["records"]:
        assert "bad" not in record["times"]
        assert record["missing"]["bad"].startswith("off by 0.0")
        assert record["missing"]["broken"].startswith("failed: AttributeError")


def test_unknown_rows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="no row is called nonsense"):
        main(["cpu", "--only", "nonsense"])
    assert main(["cpu", "--list"]) == 0
    assert capsys.readouterr().out.split() == list(cpu.ROWS_BY_NAME)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "python -m benchmarks cpu --quick" in shown


def test_interleaving_takes_turns() -> None:
    turns: list[str] = []
    works = {name: lambda name=name: turns.append(name) for name in "abc"}  # type: ignore[misc]

    class Clock(CpuClock):
        def sample(self, work: Any, calls: int) -> float:
            work()
            return 0.01

    times = interleave(works, Clock(1), Effort(rounds=4, sample=0.03, most=1.0))
    assert turns[:6] == ["a", "a", "b", "b", "c", "c"]  # one to warm up, one to see how long
    assert turns[6:] == [*"abc", *"bca", *"cab", *"abc"]
    assert times["a"] == Timing(0.01, 0.01, 0.01, 4, 3)


def test_records_and_tables(tmp_path: Path) -> None:
    shape = {"B": 1, "L": 2, "H": 3, "D": 4}
    timing = {name: Timing(t, t, t, 3, 1) for name, t in (("ours", 0.002), ("peer", 0.03))}
    record = Record("a", "forward", "gated_rela", shape, threads=1, clock="wall", times=timing)
    record.labels, record.missing = {"peer": "a peer"}, {"other": "not installed"}
    record.bytes, record.bandwidth = 2_000_000, 2e9
    record.aim("against a peer", "peer", 10)
    record.aim("against other", "other", 2)
    record.targets.append(Target("growth", 1.1, 1.2, at_least=False))
    assert record.ratio("peer") == pytest.approx(15)
    assert record.share == pytest.approx(0.5)
    stored = record.to_dict()
    text = describe(stored)
    assert "15.00 x ours" in text
    assert "target: against a peer, at least 10: 15: met" in text
    assert "target: against other, at least 2: not measured" in text
    assert "target: growth, at most 1.1: 1.2: NOT MET" in text

    memory = Record("m", "peak", "gated_rela", shape, memory={"ours": 2**20, "peer": 2**22},
                    values={RESULTS_MIB: 1.0})  # fmt: skip
    content = {
        "device": "cpu", "commit": "abc", "date": "today", "threads": 2, "bandwidth": [],
        "machine": {"processor": "abacus", "torch": "2.13", "build": {"cpu_level": "avx2"}},
        "rows": {"a": {"records": [stored]}, "m": {"records": [memory.to_dict()]}},
    }  # fmt: skip
    (tmp_path / "cpu-abacus.json").write_text(json.dumps(content))
    section = readme.SECTIONS["speed on a CPU"](tmp_path)
    assert "**2 cores of abacus**, avx2" in section
    assert "| forward: B 1 L 2 H 3 D 4 | 1 | 2 ms (2 ms to 2 ms) | 15× | not installed |" in section
    assert "| against a peer | ≥ 10 | 15 | met |" in section
    assert "| growth | ≤ 1.1 | 1.2 | **not met** |" in section
    assert "| peak: B 1 L 2 H 3 D 4 | 1 MiB | 4 MiB |" in section
    assert "| of it beyond the 1 MiB of results | 0 MiB | 3 MiB |" in section
    assert readme.SECTIONS["speed on a GPU"](tmp_path) == speed_tables.section([], "cuda")


def test_durations() -> None:
    assert [duration(s) for s in (2.0, 0.01234, 4.5e-6, 3e-9)] == [
        "2 s", "12.3 ms", "4.5 us", "3 ns",
    ]  # fmt: skip


def test_peers_agree_with_what_they_are_said_to_compute() -> None:
    """Both rotations, both formulas; at lengths around the chunk."""
    from benchmarks.checks import check_peer
    from benchmarks.operator_rows import Shape

    torch.set_num_threads(1)
    for length in (1, 64, 65, 130):
        problem = Shape(2, length, 2, 8).problem(torch.float32)
        for name in ("published", "causal", "reference", "sdpa"):
            peer = peers.CPU_PEERS[name]
            check_peer(problem, peer.build(problem), peer.computes)
        check_peer(problem, peers.published(problem, real=True), "bidirectional")


def test_commit_names_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results do not make a tree dirty; two states of changed code are told apart."""
    if shutil.which("git") is None:
        pytest.skip("git was not found")

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True)

    results = tmp_path / "benchmarks" / "results" / "cpu.json"
    results.parent.mkdir(parents=True)
    results.write_text("1")
    code = tmp_path / "code.py"
    code.write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    clean = machine.commit()
    assert len(clean) == 12
    results.write_text("2")
    assert machine.commit() == clean
    found = set()
    for text in ("2", "3"):
        code.write_text(text)
        found.add(machine.commit())
    assert len(found) == 2
    assert all(name.startswith(f"{clean}-dirty-") for name in found)
    monkeypatch.setattr(machine, "ROOT", tmp_path / "absent")
    assert machine.commit() == "unknown"
