"""Breaks the kernels in one place at a time; the tests must notice.

    python -m tests.mutation.run                       # goes on where it was stopped
    python -m tests.mutation.run --cpu 200 --cuda 0    # a larger sample of the CPU's alone
    python -m tests.mutation.run --list                # the sample, nothing is run

A mutant is an arithmetic, comparison, logical or bit operator that became another, or a number
that is off by one; comments, texts, templates' heads and the preprocessor's lines are left alone.
`cpu` is csrc/*.h, csrc/*.cpp and csrc/cpu: kernels, wrappers, checks of arguments. `cuda` is
csrc/cuda without its wrappers, which need a GPU.

The sample. Places are ordered by a hash of their file and line's text. The first of every file
comes first, so that no file goes untried: a fair draw would miss small ones. Then comes the second
of every file, then whatever is next in the order, so that large files have more. The first --cpu
and --cuda of that are the sample, whatever is known of them or others, but for one thing: a mutant
that does not compile, or whose machine code is what it was, is no mutant, and the next of its file
takes its place.

The tests. A mutant of a CPU kernel is compiled for one instruction set, the first of avx2, avx512
and baseline whose code it changes, and meets the C++ programs, the likeliest first. What lives, and
every mutant of a wrapper or a check, meets its operator's tests in Python, on a library with the
mutant's objects. When the queue has ended, those that live meet the C++ programs under the address
sanitizer, all of tests/ops, and two files of tests/trust. A CUDA mutant meets the shim's tests.

What is kept. tests/trust/results/mutations-*.json has an outcome per mutant, the commit it was
found at, and a digest of the broken file with what it includes, comments and white space aside. A
kill is taken again as long as the mutant's line, that digest and the test that killed are there;
that it lived, as long as no test has changed either, unless tests/mutation/explained.py says why no
test can tell it from the kernels as they are. `python -m tests.trust` writes the survivors into
docs/trust.md.

Needs `python setup.py build_ext --inplace`.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

from tests.mutation.benches import BENCHES, Bench
from tests.mutation.explained import EXPLAINED
from tests.mutation.places import (
    NONE,
    SURVIVED,
    Mutant,
    draw,
    killer_is_there,
    places,
    source_digest,
    tests_digest,
)
from tests.trust import records


def summary(outcomes: dict[str, Any]) -> dict[str, Any]:
    runs = [one for one in outcomes.values() if one["outcome"] not in NONE]
    survivors = [one for one in runs if one["outcome"] == SURVIVED]
    return {
        "mutants": len(runs),
        "killed": len(runs) - len(survivors),
        "survived": len(survivors),
        "explained": len([one for one in survivors if one.get("why")]),
        "no_mutants": len(outcomes) - len(runs),
    }


class Queue:
    """One kind's places, in their order, and what became of them."""

    def __init__(
        self, kind: str, folder: Path = records.FOLDER, bench: Bench | None = None
    ) -> None:
        self.kind, self.bench = kind, bench
        self.out = folder / f"mutations-{kind}.json"
        self.places = places(kind)
        earlier = records.read(self.out)["outcomes"] if self.out.exists() else {}
        there = {mutant.name: mutant for mutant in self.places}
        self.outcomes: dict[str, dict[str, Any]] = {
            name: one
            for name, one in earlier.items()
            if name in there and self.holds(there[name], one)
        }

    def holds(self, mutant: Mutant, one: dict[str, Any]) -> bool:
        """Whether an outcome of earlier is one of the sources and tests as they are."""
        if one.get("source") != source_digest(mutant.file):
            return False
        if one["outcome"] == SURVIVED:
            return mutant.name in EXPLAINED or one["tests"] == tests_digest(self.kind)
        return one["outcome"] in NONE or killer_is_there(one["outcome"])

    def outcome(self, mutant: Mutant) -> str:
        if mutant.name not in self.outcomes:
            self.run(mutant, survivor=False)
        return str(self.outcomes[mutant.name]["outcome"])

    def go(self, count: int) -> None:
        asked: dict[str, Mutant] = {}

        def outcome(mutant: Mutant) -> str:
            asked[mutant.name] = mutant
            return self.outcome(mutant)

        sample = list(islice(draw(self.places, outcome), count))
        for mutant in sample:
            one = self.outcomes[mutant.name]
            unclear = one["outcome"] == SURVIVED and mutant.name not in EXPLAINED
            if unclear and not one["survivor_tests"]:
                self.run(mutant, survivor=True)
        self.outcomes = {name: self.outcomes[name] for name in asked}
        self.write(complete=True)
        print(self.kind, summary(self.outcomes))

    def run(self, mutant: Mutant, survivor: bool) -> None:
        if self.bench is None:
            self.bench = BENCHES[self.kind]()
        start, before = time.monotonic(), self.outcomes.get(mutant.name, {})
        outcome = self.bench.run(mutant, survivor)
        self.outcomes[mutant.name] = {
            "outcome": outcome,
            "commit": records.commit(),
            "source": source_digest(mutant.file),
            "tests": tests_digest(self.kind),
            "seconds": round(time.monotonic() - start) + before.get("seconds", 0),
            "survivor_tests": survivor,
        }
        print(f"{mutant.name}: {outcome}", flush=True)
        self.write()

    def write(self, complete: bool = False) -> None:
        for name, one in self.outcomes.items():
            one.pop("why", None)
            if one["outcome"] == SURVIVED and name in EXPLAINED:
                one["why"] = EXPLAINED[name]
        facts = {"kind": "mutation", "of": self.kind, "complete": complete}
        facts["commit"] = records.commit()  # all of these hold at it
        facts |= {**summary(self.outcomes), "versions": records.versions()}
        records.write(self.out, {**facts, "outcomes": self.outcomes})


def listed(kind: str, count: int) -> list[str]:
    """The names of the sample, as far as it is known which are mutants."""
    known = Queue(kind).outcomes
    names = islice(
        draw(places(kind), lambda x: known.get(x.name, {"outcome": ""})["outcome"]), count
    )
    return [mutant.name for mutant in names]


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    fewer = "(default: %(default)s, 0: leave the record alone; fewer than before drop the others)"
    parser.add_argument("--cpu", type=int, default=80, help=f"mutants of the CPU's code {fewer}")
    parser.add_argument("--cuda", type=int, default=60, help=f"mutants of CUDA kernels {fewer}")
    parser.add_argument("--list", action="store_true", help="print the sample and run nothing")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started ends as well
    for kind, count in {"cpu": options.cpu, "cuda": options.cuda}.items():
        if options.list:
            print(*listed(kind, count), sep="\n")
        elif count:
            Queue(kind).go(count)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
