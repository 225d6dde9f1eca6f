"""The result of an evaluation: one schema, its table and its file.

    {model, variant, data, order, split, target_sha256, seeds, per_seed, mean, seconds, machine}

``mean`` and the entries of ``per_seed`` hold ``seen_included/hit@5 ... seen_excluded/mrr@10`` and
the plain names ``hit@5 ...``, which are the view ``seen_included``. Beside the schema stand
``interval`` (bootstrap, per metric ``[low, high]``), ``baselines`` (name -> metrics), ``targets``,
``users``, ``n_items``, ``max_seq_len`` and ``order_seed``.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recgrela_ext.files import write_files

VIEWS = {"seen_included": "every item competes", "seen_excluded": "seen items left out"}
_SAME = ("model", "variant", "data", "order", "order_seed", "split", "target_sha256", "max_seq_len")


def machine_info(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Where a figure was measured: processor, threads, accelerator, versions."""
    device = torch.device(device)
    info: dict[str, Any] = {
        "system": platform.system(),
        "processor": _processor(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    if device.type == "cuda":
        info["accelerator"] = torch.cuda.get_device_name(device)
    return info


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def combine_seeds(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result of several seeds: metrics and intervals of each seed, and the metrics' mean.

    Raises:
        ValueError: no results, or results of different models, data, orders or targets.
    """
    if not results:
        raise ValueError("combine_seeds: results must hold at least one result, got none")
    first = results[0]
    for result in results[1:]:
        for name in _SAME:
            if result.get(name) != first.get(name):
                raise ValueError(
                    f"combine_seeds: results must agree on {name}, "
                    f"got {first.get(name)!r} and {result.get(name)!r}"
                )
    per_seed = [metrics for result in results for metrics in result["per_seed"]]
    combined = {key: value for key, value in first.items() if key != "interval"}
    combined["seeds"] = [seed for result in results for seed in result["seeds"]]
    combined["per_seed"] = per_seed
    combined["mean"] = {
        name: float(np.mean([metrics[name] for metrics in per_seed])) for name in per_seed[0]
    }
    combined["interval_per_seed"] = [result.get("interval") for result in results]
    combined["seconds"] = sum(result["seconds"] for result in results)
    return combined


def format_table(result: dict[str, Any]) -> str:
    """A result as text: the model, its intervals and the baselines, one block per view."""
    head = (
        f"{result['data']}, order {result['order']}, {result['split']}: "
        f"{result['targets']:,} targets among {result['n_items'] - 1:,} items, "
        f"target sha256 {result['target_sha256'][:12]}"
    )
    names = [name for name in result["mean"] if "/" not in name]
    lines = [head]
    for view, meaning in VIEWS.items():
        rows = [(result["model"], [result["mean"][f"{view}/{name}"] for name in names])]
        for side, label in enumerate(("  95 % from", "  95 % to")):
            if result.get("interval"):
                bounds = [result["interval"][f"{view}/{name}"][side] for name in names]
                rows.append((label, bounds))
        for baseline, metrics in result["baselines"].items():
            rows.append((baseline, [metrics[f"{view}/{name}"] for name in names]))
        width = max(14, *(len(label) for label, _ in rows))
        lines += ["", f"{view} ({meaning})"]
        columns = [max(9, 1 + len(name)) for name in names]
        titles = zip(names, columns, strict=True)
        lines.append(" " * width + "".join(f"{name:>{column}}" for name, column in titles))
        for label, values in rows:
            cells = zip(values, columns, strict=True)
            lines.append(
                f"{label:<{width}}" + "".join(f"{value:{column}.4f}" for value, column in cells)
            )
    return "\n".join(lines)


def write_result(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a result as JSON, atomically: a reader sees the old file or the whole new one."""
    write_files({Path(path): json.dumps(result, indent=2, allow_nan=False) + "\n"})
