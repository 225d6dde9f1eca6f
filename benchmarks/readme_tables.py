"""Write the results section of README.md from benchmarks/results/*.json.

    python benchmarks/readme_tables.py            # rewrite the section
    python benchmarks/readme_tables.py --check    # exit 1 when it is out of date

A file counts when it holds a result of `recgrela evaluate` or `train` (see
recgrela_ext/evaluation/result.py); other files there are left alone. Needs Python alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results: benchmarks/readme_tables.py -->", "<!-- end of results -->"
SCHEMA = {"model", "variant", "data", "order", "split", "target_sha256", "seeds", "mean", "machine"}
VIEWS, METRICS = ("seen_included", "seen_excluded"), ("hit@10", "ndcg@10", "mrr@10")
COLUMNS = [f"{view}/{metric}" for view in VIEWS for metric in METRICS]
NONE_YET = (
    "No results are committed yet. The commands below make them; this section is then written by\n"
    "`python benchmarks/readme_tables.py`."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(argv)
    old = options.readme.read_text(encoding="utf-8")
    new = replace_section(old, section(load_results(options.results)))
    if new == old:
        return 0
    if options.check:
        print(f"{options.readme} is out of date: run python benchmarks/readme_tables.py")
        return 1
    options.readme.write_text(new, encoding="utf-8")
    return 0


def load_results(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """(file name, result) of every file with the result schema, by name."""
    found = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.keys() >= SCHEMA:
            found.append((path.name, content))
    return found


def section(results: list[tuple[str, dict[str, Any]]]) -> str:
    """Markdown: one table per set of targets, models and baselines as rows."""
    groups: dict[tuple[str, ...], list[tuple[str, dict[str, Any]]]] = {}
    for name, result in results:
        key = tuple(str(result[field]) for field in ("data", "order", "split", "target_sha256"))
        groups.setdefault(key, []).append((name, result))
    return "\n\n".join(_group(*key, group) for key, group in groups.items()) or NONE_YET


def replace_section(readme: str, text: str) -> str:
    """The README with `text` between the markers; SystemExit when they are not there."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the README must hold the lines {BEGIN} and {END}")
    return f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}"


def _group(
    data: str, order: str, split: str, sha256: str, results: list[tuple[str, dict[str, Any]]]
) -> str:
    targets = next((r["targets"] for _, r in results if "targets" in r), None)
    told = "" if targets is None else f"{targets:,} targets, "
    lines = [
        f"**{data}**, order `{order}`, {split}: {told}sha256 `{sha256[:12]}`",
        "",
        "| | seeds | HR@10 | NDCG@10 | MRR@10 | HR@10, unseen | NDCG@10, unseen | MRR@10, unseen |",
        "|---|---|---|---|---|---|---|---|",
    ]
    baselines: dict[str, dict[str, float]] = {}
    for name, result in results:
        label = f"[{result['model']}, {result['variant']}](benchmarks/results/{name})"
        lines.append(_row(label, str(len(result["seeds"])), result["mean"]))
        baselines.update(result.get("baselines", {}))
    lines += [_row(label, "", metrics) for label, metrics in baselines.items()]
    machines = {_machine(result["machine"]) for _, result in results}
    return "\n".join([*lines, "", f"Measured on {'; '.join(sorted(machines))}."])


def _row(label: str, seeds: str, metrics: dict[str, float]) -> str:
    values = (f"{metrics[column]:.4f}" if column in metrics else "" for column in COLUMNS)
    return f"| {' | '.join([label, seeds, *values])} |"


def _machine(machine: dict[str, Any]) -> str:
    device = machine.get("accelerator") or f"{machine['threads']} threads of {machine['processor']}"
    return f"{device}, torch {machine['torch']}"


if __name__ == "__main__":
    sys.exit(main())
