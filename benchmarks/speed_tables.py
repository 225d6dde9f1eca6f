"""README's tables of speed, from the results of `python -m benchmarks cpu` and `cuda`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS_MIB, duration

NOT_YET = "Not measured yet. `{command}` measures and writes these tables."
COMMANDS = {"cpu": "python -m benchmarks cpu", "cuda": "make gpu"}
_TABLES = ("gated_rela", "RecGRELA", "encoder_step", "gated_rela_step")


def load_results(folder: Path, device: str) -> list[tuple[str, dict[str, Any]]]:
    """(file name, content) of every full speed measurement on `device`, by name."""
    found = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("device") == device and content.get("rows"):
            found.append((path.name, content))
    return found


def section(results: list[tuple[str, dict[str, Any]]], device: str) -> str:
    """Markdown for one device: per machine its facts, targets, and one table an operation."""
    if not results:
        return NOT_YET.format(command=COMMANDS[device])
    return "\n\n".join(_machine(name, content) for name, content in results)


def _machine(name: str, content: dict[str, Any]) -> str:
    records = [r for row in content["rows"].values() for r in row["records"]]
    facts = content["machine"]
    where = facts.get("accelerator") or f"{content['threads']} cores of {facts['processor']}"
    level = facts["build"].get("cpu_level")
    told = f", {level}" if content["device"] == "cpu" and level else ""
    head = (
        f"**{where}**{told}, torch {facts['torch']}, commit `{content['commit']}`, "
        f"{content['date']} ([{name}](benchmarks/results/{name})). "
        f"{_bandwidth(content)}"
    )
    parts = [head.strip()]
    for op in _TABLES:
        chosen = [r for r in records if r["op"] == op and r["labels"] and _tabled(r)]
        if chosen:
            parts.append(_table(op, chosen))
    memory = [r for r in records if r["memory"]]
    if memory:
        parts.append(_memory(memory))
    targets = [t for r in records for t in r["targets"]]
    if targets:
        parts.append(_targets(targets))
    parts += [f"No figures for {row}: {why}" for row, why in content.get("left_out", {}).items()]
    return "\n\n".join(parts)


def _bandwidth(content: dict[str, Any]) -> str:
    told = []
    for speed in content.get("bandwidth", ()):
        threads = f" on {speed['threads']} thread(s)" if speed.get("threads") else ""
        figures = ", ".join(
            f"{name} {speed[name] / 1e9:.1f} GB/s" for name in ("copy", "triad") if name in speed
        )
        told.append(f"{figures}{threads}")
    return f"Memory bandwidth: {'; '.join(told)}." if told else ""


def _tabled(record: dict[str, Any]) -> bool:
    return bool(record["times"]) and record["row"] not in ("length", "threads", "bandwidth")


def _table(op: str, records: list[dict[str, Any]]) -> str:
    """Ours in seconds; a peer as the multiple of ours, or why it has no figure."""
    labels: dict[str, str] = {}
    for record in records:
        named = {n: record["labels"].get(n, n) for n in (*record["times"], *record["missing"])}
        labels |= {n: label for n, label in named.items() if n != "ours"}
    columns = [
        f"`{op}`" if op != "RecGRELA" else "whole model",
        "threads",
        "ours",
        *labels.values(),
    ]
    shares = any(r["share"] is not None for r in records)
    if shares:
        columns.append("ours, GB/s (share)")
    lines = [_line(columns), _line(["---"] * len(columns))]
    for record in records:
        cells = [_what(record), str(record["threads"] or ""), _ours(record)]
        cells += [_peer(record, name) for name in labels]
        if shares:
            share = record["share"]
            cells.append("" if share is None else f"{record['gb_per_s']:.1f} ({share:.0%})")
        lines.append(_line(cells))
    return "\n".join(lines)


def _what(record: dict[str, Any]) -> str:
    shape = " ".join(f"{name} {size}" for name, size in record["shape"].items())
    dtype = "" if record["dtype"] == "float32" else f", {record['dtype']}"
    return f"{record['what']}: {shape}{dtype}"


def _ours(record: dict[str, Any]) -> str:
    timing = record["times"]["ours"]
    return f"{duration(timing['median'])} ({duration(timing['p10'])} to {duration(timing['p90'])})"


def _peer(record: dict[str, Any], name: str) -> str:
    if name in record["missing"]:
        return record["missing"][name].replace("|", "/")
    ratio = record["ratios"].get(name)
    return "" if ratio is None else f"{_three(ratio)}×"


def _memory(records: list[dict[str, Any]]) -> str:
    labels: dict[str, str] = {}
    for record in records:
        labels |= {name: record["labels"].get(name, name) for name in record["memory"]}
    lines = [_line(["peak extra memory", *labels.values()]), _line(["---"] * (len(labels) + 1))]
    for record in records:
        used = record["memory"]
        cells = [f"{used[n] / 2**20:,.0f} MiB" if n in used else "" for n in labels]
        lines.append(_line([_what(record), *cells]))
        results = record["values"].get(RESULTS_MIB)
        if results is not None:
            beyond = [f"{used[n] / 2**20 - results:,.0f} MiB" if n in used else "" for n in labels]
            lines.append(_line([f"of it beyond the {results:,.0f} MiB of results", *beyond]))
    return "\n".join(lines)


def _targets(targets: list[dict[str, Any]]) -> str:
    lines = [_line(["target", "asked", "measured", ""]), _line(["---"] * 4)]
    for target in targets:
        sign = "≥" if target["at_least"] else "≤"
        value = "not measured" if target["value"] is None else _three(target["value"])
        verdict = {None: "", True: "met", False: "**not met**"}[target["met"]]
        lines.append(_line([target["text"], f"{sign} {target['limit']:g}", value, verdict]))
    return "\n".join(lines)


def _three(value: float) -> str:
    """Three digits, never as 1e+03."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
