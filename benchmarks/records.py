"""One measured line: what was timed, ours beside its peers, bytes, bandwidth, targets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.timing import Timing

RESULTS_MIB = "the results alone, MiB"  # a value of a record of memory


@dataclass
class Target:
    """A figure issue 3 or 4 asks for. `met` is None where the figure could not be measured."""

    text: str
    limit: float
    value: float | None
    at_least: bool = True

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass
class Record:
    """`times` in seconds and `memory` in bytes, by candidate, "ours" among them; `values` are
    plain ratios and shares by name; `missing` says why a candidate has no figure.
    """

    row: str
    what: str
    op: str
    shape: dict[str, int]
    dtype: str = "float32"
    threads: int | None = None
    clock: str | None = None
    times: dict[str, Timing] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    bytes: int | None = None
    bandwidth: float | None = None  # bytes a second, measured in the same run
    targets: list[Target] = field(default_factory=list)
    note: str = ""

    def ratio(self, peer: str) -> float | None:
        """How many times the peer's time (or memory, where no time was taken) is of ours."""
        for figures in ({n: t.median for n, t in self.times.items()}, self.memory):
            if "ours" in figures and peer in figures and figures["ours"]:
                return figures[peer] / figures["ours"]
        return None

    def aim(self, text: str, peer: str, limit: float) -> None:
        """A target for `ratio(peer)`."""
        self.targets.append(Target(text, limit, self.ratio(peer)))

    @property
    def gb_per_s(self) -> float | None:
        if self.bytes is None or "ours" not in self.times:
            return None
        return self.bytes / self.times["ours"].median / 1e9

    @property
    def share(self) -> float | None:
        """Of the bandwidth measured in the same run."""
        speed = self.gb_per_s
        return None if speed is None or not self.bandwidth else speed * 1e9 / self.bandwidth

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the derived figures beside the measured ones."""
        fields = asdict(self)
        for target, stored in zip(self.targets, fields["targets"], strict=True):
            stored["met"] = target.met
        peers = [n for n in (*self.times, *self.memory) if n != "ours"]
        fields["ratios"] = {peer: self.ratio(peer) for peer in peers}
        fields["gb_per_s"], fields["share"] = self.gb_per_s, self.share
        return fields


def describe(record: dict[str, Any]) -> str:
    """A stored record as text."""
    shape = " ".join(f"{name}{size}" for name, size in record["shape"].items())
    threads = "" if record["threads"] is None else f", {record['threads']} thread(s)"
    lines = [f"{record['op']}, {record['what']}: {shape}, {record['dtype']}{threads}"]
    lines += _figures(record)
    if record["gb_per_s"] is not None:
        share = "" if record["share"] is None else f", {record['share']:.0%} of the bandwidth"
        lines.append(f"    {record['bytes'] / 1e6:.1f} MB, {record['gb_per_s']:.1f} GB/s{share}")
    lines += [f"    {name}: {value:.3g}" for name, value in record["values"].items()]
    lines += [f"    {name}: {reason}" for name, reason in record["missing"].items()]
    for target in record["targets"]:
        sign = "at least" if target["at_least"] else "at most"
        value = "not measured" if target["value"] is None else f"{target['value']:.3g}"
        verdict = {None: "", True: ": met", False: ": NOT MET"}[target["met"]]
        lines.append(f"    target: {target['text']}, {sign} {target['limit']:g}: {value}{verdict}")
    return "\n".join(lines)


def _figures(record: dict[str, Any]) -> Iterable[str]:
    for name, timing in record["times"].items():
        ratio = record["ratios"].get(name)
        told = "" if ratio is None else f"   {ratio:.2f} x ours"
        spread = f"{duration(timing['p10'])} to {duration(timing['p90'])}"
        yield f"    {name:<22} {duration(timing['median']):>9}  ({spread}){told}"
    for name, used in record["memory"].items():
        ratio = record["ratios"].get(name)
        told = "" if ratio is None or record["times"] else f"   {ratio:.2f} x ours"
        yield f"    {name:<22} {used / 2**20:>9,.0f} MiB{told}"


def duration(seconds: float) -> str:
    """Three digits and a unit: 1.23 ms."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
