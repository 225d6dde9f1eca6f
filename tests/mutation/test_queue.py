"""The sample is drawn the same every time and leaves no file out; an outcome is kept as long as it
is one of the sources and tests as they are.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.mutation import places as module
from tests.mutation import run
from tests.mutation.benches import likely
from tests.mutation.explained import EXPLAINED
from tests.mutation.places import EACH, NONE, SURVIVED, Mutant, draw, places, places_in
from tests.trust import records


class FakeBench:
    """Counts what it is asked; every third mutant is none, every fifth lives."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def run(self, mutant: Mutant, survivor: bool) -> str:
        self.asked.append(mutant.name)
        number = len(mutant.name)
        if number % 3 == 0:
            return NONE[0]
        return SURVIVED if number % 5 == 0 else "killed by test_kernels"


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few files, nothing explained; git is not asked hundreds of times."""
    few = [x for x in places("cpu") if x.base in ("gelu.h", "topk_heap.h", "rela.h", "checks.h")]
    monkeypatch.setattr(run, "places", lambda _: few)
    monkeypatch.setattr(run, "EXPLAINED", {})
    monkeypatch.setattr(records, "commit", lambda: "0123456789ab")


def tried(folder: Path, count: int) -> list[str]:
    """What a queue runs anew."""
    bench: Any = FakeBench()
    run.Queue("cpu", folder, bench).go(count)
    return list(bench.asked)


def names(mutants: list[Mutant], count: int) -> list[str]:
    return [mutant.name for mutant in islice(draw(mutants, lambda _: ""), count)]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_no_file_is_left_out(kind: str) -> None:
    everything = places(kind)
    there = Counter(mutant.file for mutant in everything)
    first = sum(min(EACH, count) for count in there.values())
    drawn = names(everything, first)
    assert Counter(name.partition(":")[0] for name in drawn) == {
        file: min(EACH, count) for file, count in there.items()
    }
    assert len(set(names(everything, len(everything)))) == len(everything)
    random.shuffle(everything)
    assert names(everything, first + 50)[:first] == drawn
    assert names(everything, first + 50) == names(places(kind), first + 50)


def test_no_mutant_is_replaced_by_one_of_its_file() -> None:
    everything = places("cpu")
    usual = next(draw(everything, lambda _: ""))
    other = next(draw(everything, lambda x: NONE[1] if x == usual else ""))
    assert other != usual
    assert other.file == usual.file


def test_every_kind_of_source_has_places() -> None:
    files = {mutant.file for kind in ("cpu", "cuda") for mutant in places(kind)}
    assert files >= {"arguments.cpp", "checks.h", "params.h", "cpu/topk_scores.cpp"}
    assert files >= {"cpu/softmax_loss.h", "cpu/storage.h", "cuda/mma.cuh", "cuda/sum_parts.cu"}


def test_comments_texts_and_templates_are_no_places() -> None:
    text = 'template <int a = 1 + 2>\n#if A == B\nfail("W >= 1, \\" a - b", a < b);  // c * d\n'
    (mutant,) = places_in("x.h", text)
    assert (mutant.line, mutant.old, mutant.new) == (3, " < ", " <= ")


def test_a_mutant_changes_its_place_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.h"
    path.write_text("a = b + c;\na = b + c;\n", encoding="utf-8")
    first, second = places_in("x.h", path.read_text(encoding="utf-8"))
    assert first.name != second.name
    second.apply(path)
    assert path.read_text(encoding="utf-8") == "a = b + c;\na = b - c;\n"


def test_the_likely_tests_are_there() -> None:
    for mutant in places("cpu"):
        program, tests = likely(mutant)
        assert not program or (module.ROOT / f"tests/cpp/{program}.cpp").exists()
        assert all((module.ROOT / f"tests/ops/test_{name}.py").exists() for name in tests)


def test_what_is_explained_is_there() -> None:
    there = {mutant.name for kind in ("cpu", "cuda") for mutant in places(kind)}
    assert set(EXPLAINED) <= there


@pytest.mark.usefixtures("queue")
def test_what_is_known_is_not_run_again(tmp_path: Path) -> None:
    first = tried(tmp_path, 40)
    record = records.read(tmp_path / "mutations-cpu.json")
    assert record["complete"]
    assert record["mutants"] == 40 == record["killed"] + record["survived"]
    assert set(first) == set(record["outcomes"])
    assert tried(tmp_path, 40) == []
    more = tried(tmp_path, 45)
    assert more
    assert not set(more) & set(first)
    tried(tmp_path, 10)
    assert records.read(tmp_path / "mutations-cpu.json")["mutants"] == 10


@pytest.mark.usefixtures("queue")
def test_a_changed_file_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tried(tmp_path, 40)
    real = module.source_digest
    changed = "cpu/gelu.h"
    monkeypatch.setattr(run, "source_digest", lambda x: "other" if x == changed else real(x))
    again = set(tried(tmp_path, 40))
    assert again == {name for name in first if name.startswith(changed + ":")}
    assert again


@pytest.mark.usefixtures("queue")
def test_survivors_meet_changed_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried(tmp_path, 40)
    outcomes = records.read(tmp_path / "mutations-cpu.json")["outcomes"]
    alive = {name for name, one in outcomes.items() if one["outcome"] == SURVIVED}
    assert alive
    monkeypatch.setattr(run, "tests_digest", lambda _: "other")
    assert set(tried(tmp_path, 40)) == alive
    monkeypatch.setattr(run, "tests_digest", lambda _: "another")
    monkeypatch.setattr(run, "EXPLAINED", dict.fromkeys(alive, "equal"))
    assert tried(tmp_path, 40) == []
    assert records.read(tmp_path / "mutations-cpu.json")["explained"] == len(alive)


def test_a_kill_needs_its_test() -> None:
    assert module.killer_is_there("killed by test_kernels (crash)")
    assert module.killer_is_there("killed by test_shapes, sanitized")
    assert module.killer_is_there("killed by test_cuda")
    assert module.killer_is_there("killed by tests/ops (never ended)")
    here = "tests/mutation/test_queue.py"
    assert module.killer_is_there(f"killed by {here}::test_a_kill_needs_its_test")
    assert not module.killer_is_there(f"killed by {here}::test_that_is" + "_gone")
    assert not module.killer_is_there("killed by test_gone")


def test_the_digest_is_of_code_and_of_what_it_includes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CSRC", tmp_path)

    def digest(outer: str, inner: str) -> str:
        (tmp_path / "outer.h").write_text(outer, encoding="utf-8")
        (tmp_path / "inner.h").write_text(inner, encoding="utf-8")
        module.included.cache_clear()
        return module.source_digest("outer.h")

    usual = digest('#include "inner.h"\na + b;\n', "c;\n")
    assert usual == digest('#include "inner.h"\n  a + b;  // why\n\n', "c;\n")
    assert usual != digest('#include "inner.h"\na + b;\n', "d;\n")
    assert usual != digest('#include "inner.h"\na - b;\n', "c;\n")
    module.included.cache_clear()
