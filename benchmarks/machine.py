"""What a figure was measured on: processor or GPU, caches, versions, commit."""

from __future__ import annotations

import ctypes
import datetime
import hashlib
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from recgrela_ext import _library, build_info
from recgrela_ext.evaluation.result import machine_info

# variables that change what is measured
_TELLING = ("OMP_", "KMP_", "MKL_", "MALLOC_", "LD_PRELOAD", "RECGRELA_", "TORCH", "CUDA_")
_PLACES = ("RECGRELA_DATA", "RECGRELA_GOLDEN")  # where files lie says nothing of a speed
ROOT = Path(__file__).resolve().parents[1]


def describe(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Facts for the head of a results file."""
    device = torch.device(device)
    info = machine_info(device)
    info.pop("threads")
    info |= {"caches": caches(), "build": build_info()}
    info["environment"] = {
        n: v for n, v in os.environ.items() if n.startswith(_TELLING) and n not in _PLACES
    }
    if device.type == "cuda":
        info |= cuda_facts(device)
    return info


def require_operators() -> None:
    """SystemExit where there is only plain PyTorch to measure."""
    if "cpu" not in _library.KERNEL_DEVICES:
        raise SystemExit(
            "benchmarks: the compiled operators are absent: nothing to measure; build them into "
            "this folder with pip install -e . or make test"
        )


def keep_freed_memory() -> bool:
    """Freed memory stays with this process from now on; whether the C library can be told so.

    glibc gives large tensors back to the system, which hands out zeroed pages at the next call.
    That is a tenth of an operator's time, a quarter of an eager training step's, and changes with
    what ran before; programs that run for long avoid it by a caching allocator.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    return bool(mallopt and mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_max, 0))


def caches() -> dict[str, int]:
    """Bytes of the first core's caches by name (L1d, L2, L3), as Linux tells them."""
    found: dict[str, int] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (
            (index / name).read_text(encoding="ascii").strip() for name in ("level", "type", "size")
        )
        number = re.fullmatch(r"(\d+)([KM]?)", size)
        if kind != "Instruction" and number:
            unit = {"": 1, "K": 2**10, "M": 2**20}[number[2]]
            found["L1d" if level == "1" else f"L{level}"] = int(number[1]) * unit
    return found


def cuda_facts(device: torch.device) -> dict[str, Any]:
    """Memory, caches, driver, clocks and the TF32 switches of a GPU."""
    properties = torch.cuda.get_device_properties(device)
    facts: dict[str, Any] = {
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2": properties.L2_cache_size,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    command = [
        "nvidia-smi",
        f"--query-gpu={query}",
        "--format=csv,noheader",
        f"--id={device.index or 0}",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        facts |= dict(zip(query.split(","), done.stdout.strip().split(", "), strict=True))
    except (OSError, ValueError, subprocess.SubprocessError):
        facts["driver_version"] = None
    return facts


def commit() -> str:
    """The commit that was measured; with "-dirty-" and a hash where files differ from it.

    Results and the README do not count: measuring writes them.
    """
    everything = ["--", ".", ":!benchmarks/results", ":!README.md"]
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changes = _git("diff", "HEAD", *everything)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    digest = hashlib.sha256(changes.encode(errors="surrogateescape")).hexdigest()[:8]
    return f"{head}-dirty-{digest}" if changes else head


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    # A file that is no text may be among the differences.
    done = subprocess.run(
        command, capture_output=True, text=True, errors="surrogateescape", check=True
    )
    return done.stdout.strip()


def library_hash() -> str:
    """Of the compiled operators, or of nothing where they are absent."""
    if not _library.LIBRARY.exists():
        return "none"
    return hashlib.sha256(_library.LIBRARY.read_bytes()).hexdigest()[:16]


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def slug(name: str) -> str:
    """A file name out of a processor's or GPU's name: "NVIDIA H200" is "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "").replace("(tm)", "")).strip(
        "-"
    )
