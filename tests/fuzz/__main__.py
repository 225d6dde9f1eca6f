"""Coverage-guided fuzzing of everything that reads what others wrote, and of every operator.

    python -m tests.fuzz states --runs 1000000      # stops at the first finding, which it keeps
    python -m tests.fuzz states --random --runs 1000000     # without atheris: random edits
    python -m tests.fuzz --replay                   # every kept input once, as the tests do
    python -m tests.fuzz states --keep-grown        # what such runs here reached more code with
    python -m tests.fuzz states -max_len=4096       # options of libFuzzer have one dash

Coverage is counted by `pip install atheris`.
A finding lands in tests/fuzz/corpus/<target>/found-..., inputs that reach new code land with
--keep-grown in tests/fuzz/corpus/<target>.hex; the tests replay both from then on. Fix a finding
and start again. What a run did is written to tests/trust/results/fuzz-<target>.json, with what the
target accepted, by kind: a run that refused everything tried nothing, and fails.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from tests.fuzz import targets
from tests.fuzz.crashes import PLACE, LastInput, keep, watch, with_finding
from tests.fuzz.draw import REFUSED
from tests.trust import records

MEMORY = 12 << 30  # bytes of address space: a file must not ask for more and get it
LONGEST = 20.0  # seconds of the processor one input may take; the record's slowest took less
WRITE_EVERY = 60.0  # seconds between two states of the record


class Counted:
    """A target that counts, keeps what it found, and stops at a limit of time."""

    def __init__(self, name: str, runs: int, seconds: float, out: Path, engine: str) -> None:
        self.name, self.seconds, self.out, self.engine = name, seconds, out, engine
        self.most = runs
        self.folder = tempfile.TemporaryDirectory(prefix="recgrela-fuzz-", dir=fast_folder())
        self.target = targets.make(name, Path(self.folder.name))
        self.earlier: dict[str, Any] = records.read(out) if out.exists() else {}
        self.versions = {**records.versions(), "commit": records.commit()}
        self.runs, self.slowest, self.found = 0, 0.0, ""
        self.accepted: Counter[str] = Counter()
        self.last = LastInput(Path(os.environ[PLACE]))
        self.start = self.written = time.monotonic()

    def __call__(self, data: bytes) -> None:
        self.runs += 1
        self.last.begin(data)
        begin, worked = time.monotonic(), time.process_time()
        try:
            accepted = self.target(data)
            self.accepted[accepted] += 1
            took = time.process_time() - worked  # a busy machine is no finding
            assert took < LONGEST, f"one input took {took:.0f} s"
            self.slowest = max(self.slowest, took)
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt):
                self.found = keep(self.name, data)
            self.write()
            self.last.end()
            raise
        self.last.end()
        if begin - self.written > WRITE_EVERY:
            self.write()
            self.written = begin
        # Here, and not by a flag of libFuzzer: that ends the process without what is registered.
        if self.runs >= self.most or (self.seconds and begin - self.start > self.seconds):
            code = self.finish()
            sys.stdout.flush()
            os._exit(code)

    def write(self) -> None:
        """What earlier runs did and this one so far."""
        earlier = self.earlier
        before = earlier.get("runs", {})
        runs = {**before, self.engine: before.get(self.engine, 0) + self.runs}
        since = earlier.get("runs_since_a_finding", 0) + self.runs
        accepted = Counter({name: n for name, n in self.accepted.items() if name != REFUSED})
        earlier_accepted = Counter[str](earlier.get("accepted", {}))
        seconds = earlier.get("seconds", 0.0) + time.monotonic() - self.start
        record = {
            "kind": "fuzz",
            "target": self.name,
            "runs": runs,
            "accepted": dict(sorted((accepted + earlier_accepted).items())),
            "runs_since_a_finding": 0 if self.found else since,
            "seconds": round(seconds, 1),
            "slowest_seconds": round(max(self.slowest, earlier.get("slowest_seconds", 0.0)), 3),
            "findings": with_finding(earlier.get("findings", []), self.found),
            "versions": self.versions,
        }
        records.write(self.out, record)

    def finish(self) -> int:
        """Writes the record; 1 where nothing was accepted."""
        self.folder.cleanup()
        accepted = self.runs - self.accepted[REFUSED]
        print(f"{self.name}: {self.runs} runs, nothing found; {accepted} accepted", flush=True)
        if not accepted:
            print(f"{self.name}: no run counts, every input was refused", file=sys.stderr)
            return 1
        self.write()
        return 0


def fast_folder() -> str | None:
    """In memory where that exists: a run writes files thousands of times a second."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


def grown_folder(name: str) -> Path:
    """Where libFuzzer puts inputs that reach new code; it outlives the run."""
    return Path(tempfile.gettempdir()) / f"recgrela-corpus-{name}"


def guided(counted: Counted, flags: list[str]) -> None:
    """libFuzzer by atheris, which ends the process at a finding."""
    import atheris

    corpus = targets.CORPUS / counted.name
    grown = grown_folder(counted.name)
    for place in (corpus, grown):
        place.mkdir(parents=True, exist_ok=True)
    for data in targets.grown(counted.name):
        (grown / targets.case_name(data)).write_bytes(data)
    # New inputs go into the first folder, failing and slow ones beside it: outside the repository.
    options = [
        "-max_len=512",
        "-len_control=0",
        "-timeout=300",
        "-rss_limit_mb=4096",
    ]
    options.append(f"-artifact_prefix={grown}-")
    atheris.Setup([sys.argv[0], *options, *flags, str(grown), str(corpus)], counted)
    atheris.Fuzz()


def at_random(counted: Counted, seed: int) -> NoReturn:
    """Random bytes and edits of the corpus, for machines without atheris."""
    rng = random.Random(seed)
    known = targets.corpus(counted.name) or [b""]
    while True:
        data = bytearray(rng.choice(known)) if rng.random() < 0.3 else bytearray()
        data += rng.randbytes(rng.randrange(200))
        for _ in range(rng.randrange(4)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        counted(bytes(data))


def instrumented(engine: str, run: Callable[[], Any]) -> Any:
    """Imports of our package count what they reach."""
    if engine != "atheris":
        return run()
    import atheris

    with atheris.instrument_imports(include=["recgrela_ext"]):
        return run()


def replay(names: list[str]) -> int:
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            target = targets.make(name, Path(folder))
            cases = targets.corpus(name)
            for case in cases:
                target(case)
        print(f"{name}: {len(cases)} inputs")
    return 0


def main() -> int:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m tests.fuzz", description=__doc__, formatter_class=kind
    )
    parser.add_argument("target", nargs="?", choices=list(targets.TARGETS), help="what is called")
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs, default %(default)s")
    parser.add_argument("--seconds", type=float, default=0.0, help="stop after this time")
    parser.add_argument("--random", action="store_true", help="without atheris")
    parser.add_argument("--seed", type=int, default=0, help="of --random")
    parser.add_argument("--replay", action="store_true", help="the kept inputs alone")
    parser.add_argument("--keep-grown", action="store_true", help="add to the kept; nothing is run")
    parser.add_argument("--results", type=Path, default=records.FOLDER, help="folder of the record")
    options, flags = parser.parse_known_args()
    if unknown := [x for x in flags if not re.fullmatch(r"-[a-z]\w*=\S*", x)]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    if options.replay:
        return replay([options.target] if options.target else list(targets.TARGETS))
    if options.target is None:
        parser.error("target must be given")
    if options.keep_grown:
        inputs = [path.read_bytes() for path in grown_folder(options.target).glob("*")]
        more = targets.keep_grown(options.target, inputs)
        print(f"{options.target}: {more} inputs more are kept")
        return 0
    out = options.results / f"fuzz-{options.target}.json"
    if PLACE not in os.environ:
        return watch([sys.executable, "-m", "tests.fuzz", *sys.argv[1:]], options.target, out)
    engine = "random" if options.random else "atheris"
    counted = instrumented(
        engine, lambda: Counted(options.target, options.runs, options.seconds, out, engine)
    )
    if options.random:
        at_random(counted, options.seed)
    else:
        guided(counted, flags)
    return 0


if __name__ == "__main__":
    sys.exit(main())
