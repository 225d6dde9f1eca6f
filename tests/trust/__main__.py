"""The table of docs/trust.md, from the committed results of the runs.

python -m tests.trust             # writes it
python -m tests.trust --check     # fails where the page says something else
python -m tests.trust --run       # tests/trust with its slow tests, but for the giant ones
python -m tests.trust --run giant # those with this word alone
python -m tests.trust --run sanitizers    # a check of tests/trust/checks.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from tests.fuzz import targets
from tests.trust import records
from tests.trust.checks import CHECKS

PAGE = records.FOLDER.parents[2] / "docs" / "trust.md"
BEGIN = "<!-- results of the runs: python -m tests.trust -->"
END = "<!-- end of results -->"
INPUTS = {
    "readers": "event files of ten kinds, titles beside them",
    "states": "state and seen-item bytes",
    "models": "model folders: config, weights, id map",
    "stores": "saved user-state stores",
    "checkpoints": "training checkpoints",
    "resumes": "trainings resumed from checkpoints with right sums",
    "published": "others' pickled checkpoints, opcode by opcode",
    "frames": "columns of data frames, their splits and metrics",
    "requests": "requests to the example service",
    "operators": "arguments of every operator, public and raw",
}

Row = tuple[str, str, str, str]  # what, how often, found, of which commit on which day

ENGINES = {"random": "random edits", "atheris": "coverage-guided"}


def when(record: dict[str, Any]) -> str:
    """The commit it ran on, and whether sources differed from it; the day it was written."""
    commit = record.get("commit") or record["versions"]["commit"]
    return f"{commit.partition('-')[0][:7]}{commit[12:]}, {record['date']}"


def number(value: float) -> str:
    return f"{value:,.0f}"


def fuzz_row(record: dict[str, Any]) -> Row:
    """A run whose record lies elsewhere, as CI's, leaves its findings in the corpus alone."""
    since = number(record["runs_since_a_finding"])
    kept = {path.name for path in (targets.CORPUS / record["target"]).glob("found-*")}
    known = len(kept.union(record["findings"]))
    engines = ", ".join(f"{number(n)} {ENGINES[name]}" for name, n in record["runs"].items())
    tried = f"{engines}, {number(record['seconds'] / 60)} min"
    found = f"{known} in all, {len(kept)} kept as inputs; none in the last {since} of these"
    if counted := record.get("accepted"):
        found += f"; accepted {number(sum(counted.values()))} in {len(counted)} kinds"
    return f"fuzzing: {INPUTS[record['target']]}", tried, found, f"last run: {when(record)}"


def soak_row(record: dict[str, Any]) -> Row:
    samples, verdict = record["samples"], record["verdict"]
    hours = samples[-1]["seconds"] / 3600
    tried = f"{hours:.1f} h, {samples[-1]['rounds']} rounds, {len(samples)} samples"
    ended = "" if record["finished"] else ", cut short"
    found = "; ".join(verdict["findings"]) or (
        f"flat: {verdict['mib_per_hour']} MiB an hour, {verdict['kib_per_round']} KiB a round"
    )
    if note := record.get("note"):
        found += f": {note}"
    return "soak: training, streaming, retrieval, saving", tried + ended, found, when(record)


def mutation_row(record: dict[str, Any]) -> Row:
    """The share is of those that a test could tell: explained ones give the same results."""
    killed, explained = record["killed"], record["explained"]
    left = record["mutants"] - explained
    tried = f"{record['mutants']} mutants" + ("" if record["complete"] else ", cut short")
    found = f"{killed} killed, {record['survived']} live, {explained} of them explained below"
    found += f": {100 * killed / left:.1f} % of the other {left}"
    what = {"cpu": "CPU kernels, wrappers, checks", "cuda": "CUDA kernels on the host"}
    return f"mutation of {what[record['of']]}", tried, found, when(record)


def survivors() -> list[str]:
    """A line for every mutant that lives: its place, what was changed, why no test notices."""
    found = []
    for path in sorted(records.FOLDER.glob("mutations-*.json")):
        for name, one in records.read(path)["outcomes"].items():
            if one["outcome"] == "survived":
                place, _, line = name.partition(" | ")
                file, _, change = place.partition(" ")
                where = f"`{file.partition(':')[0]}`, `{change}` in `{line}`"
                found.append(f"- {where}: {one.get('why', '**a gap**')}")
    return found


def matrix_rows(record: dict[str, Any]) -> list[Row]:
    rows = [
        (
            f"Python {name.split()[0]}, torch {cell['torch']}",
            "wheel, tests/ops, torch's symbols",
            f"{cell['summary']}; {len(cell['symbols_missing'])} symbols missing",
            when(cell),
        )
        for name, cell in record["cells"].items()
    ]
    symbols = record.get("symbols", {})
    asked = ", ".join(f"{kind} {version}" for kind, version in symbols.items())
    if symbols:
        rows.append(("oldest system", "symbols of the wheel", asked, when(record["versions"])))
    return rows


def other_row(record: dict[str, Any]) -> Row:
    return record["what"], record["tried"], record["found"], when(record)


def rows() -> list[Row]:
    found = []
    for path in sorted(records.FOLDER.glob("*.json")):
        record = records.read(path)
        kind = record["kind"]
        if kind == "matrix":
            found += matrix_rows(record)
        else:
            makers = {"fuzz": fuzz_row, "soak": soak_row, "mutation": mutation_row}
            found.append(makers.get(kind, other_row)(record))
    return found


def page() -> str:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    table = ["| what | how often | found | commit, day |", "|---|---|---|---|"]
    table += [f"| {' | '.join(row)} |" for row in rows()]
    lines = [*table, "", "Mutants that live:", "", *(survivors() or ["none"])]
    return f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}"


def keep(
    name: str, what: str, start: tuple[float, os.times_result], found: str, folder: Path
) -> None:
    """Writes what a run began at `start` found."""
    now = os.times()
    begin, used = start
    cpu = now.children_user + now.children_system - used.children_user - used.children_system
    record = {
        "kind": "tests",
        "what": what,
        "tried": f"once, {number(cpu)} s of CPU, {number(time.monotonic() - begin)} s",
        "found": found,
        "versions": {**records.versions(), "commit": records.commit()},
    }
    records.write(folder / f"tests-{name}.json", record)


def run_check(name: str, seed: int, folder: Path) -> int:
    start = time.monotonic(), os.times()
    what, check = CHECKS[name]
    keep(name, what, start, check(seed), folder)
    return 0


def parts(said: str) -> str:
    """What `pytest -v` ran, by the files' names."""
    names = re.findall(r"test_(\w+)\.py::\S.* PASSED +\[", said)
    return ", ".join(sorted({name.replace("_", " ") for name in names}))


def run_tests(word: str, into: Path) -> int:
    """pytest's last line becomes a record, where tests were found and passed."""
    chosen = word or "not giant"
    command = [sys.executable, "-m", "pytest", "-v", "-m", "slow or not slow", "-k", chosen]
    start = time.monotonic(), os.times()
    folder = records.FOLDER.parent
    run = subprocess.run([*command, str(folder)], capture_output=True, text=True)
    print(run.stdout, run.stderr, sep="")
    last = run.stdout.strip().splitlines()[-1].strip("= ")
    what = f"tests/trust, `-k {chosen!r}`: {parts(run.stdout)}"
    if run.returncode == 0:
        keep(word or "all", what, start, last.partition(" in ")[0], into)
    return run.returncode


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare; 1 where they differ")
    chosen = f"{', '.join(CHECKS)}; or a word of tests' names; without one all but the giant"
    parser.add_argument("--run", nargs="?", const="", metavar="NAME", help=chosen)
    parser.add_argument("--seed", type=int, default=1, help="of random shapes")
    parser.add_argument("--results", type=Path, default=records.FOLDER,
                        help="folder of the new record (default: the committed ones)")  # fmt: skip
    options = parser.parse_args()
    if options.run in CHECKS:
        return run_check(options.run, options.seed, options.results)
    if options.run is not None:
        return run_tests(options.run, options.results)
    text = page()
    if options.check:
        same = text == PAGE.read_text(encoding="utf-8")
        print("" if same else f"{PAGE} is out of date: run python -m tests.trust", end="")
        return 0 if same else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
