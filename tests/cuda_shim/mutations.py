"""Shows that the shim's tests can fail: breaks a copy of the kernels in one place, expects red.

    python tests/cuda_shim/mutations.py [word in the mutants' names ...]

A mutant that stays green is an error, as is one whose place in the source is gone.
"""

from __future__ import annotations

import concurrent.futures
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-w", "-DRECGRELA_CUDA_SHIM"]
FLAGS += ["-Itests/cuda_shim", "-Icsrc", "-x", "c++"]
BARRIER = "    __syncwarp();\n"

# name: (file under csrc/cuda, the text that goes, what comes in its place)
MUTANTS = {
    "forward: no barrier before the scan": (
        "forward.cuh",
        BARRIER + "#pragma unroll\n    for (int j = 0; j < T; ++j) {\n      const float* key",
        "#pragma unroll\n    for (int j = 0; j < T; ++j) {\n      const float* key",
    ),
    "forward: one exchange buffer instead of two": (
        "forward.cuh", "buffer ^= 1", "buffer ^= 0",
    ),
    "forward: base sum skipped": ("forward.cuh", "if (sum.used) add_base", "if (false) add_base"),
    "forward: recent sum counted twice": (
        "forward.cuh",
        "base[i * Tile::D + m] += S[i][m];\n        S[i][m] = 0.0f;",
        "base[i * Tile::D + m] += S[i][m];",
    ),
    "forward: base of the normaliser skipped": (
        "forward.cuh", "(sum.z[e] + sum.z_base[e])", "sum.z[e]",
    ),
    "forward: one segment's partial sum dropped": (
        "forward.cuh", "int64_t s = 0; s < segment &&", "int64_t s = 1; s < segment &&",
    ),
    "forward: saved and final states without the base": (
        "forward.cuh", "S[i][m] + (base ? base[i * Tile::D + m] : 0.0f)", "S[i][m]",
    ),
    "forward: padding not zeroed": ("forward.cuh", "u.span.length, p.L, 0.0f);", "p.L, p.L, 0.0f);"),
    "tile: half of the columns' sum dropped": (
        "warp_tile.cuh", "keep + __shfl_xor_sync(0xffffffffu, give, 1)", "keep",
    ),
    "tile: one lane's part of the normaliser dropped": (
        "warp_tile.cuh", "lanes < Tile::LU; lanes *= 2", "2 * lanes < Tile::LU; lanes *= 2",
    ),
    "tile: columns one to the right": (
        "warp_tile.cuh", "columns() const { return at(column); }",
        "columns() const { return at(column) + 1; }",
    ),
    "tile: convolution window shifted": (
        "warp_tile.cuh", "window[0][e] = window[1][e];", "window[0][e] = window[2][e];",
    ),
    "tile: rotation one item late": ("warp_tile.cuh", "      set(start + t);\n    } else {\n      advance();",
                                     "      set(start + t + 1);\n    } else {\n      advance();"),
    "unit: length not clamped": ("common.cuh", "length >= 0 && length <= p.L;", "length >= 0;"),
    "unit: decreasing offsets taken": ("common.cuh", "begin <= end && end <= p.items", "end <= p.items"),
    "unit: last offset not clamped": ("common.cuh", "begin <= end && end <= p.items;\n", "begin <= end;\n"),
    "backward: no barrier after the start state": (
        "backward.cuh",
        BARRIER + "  }\n\n  // Scan 1",
        "  }\n\n  // Scan 1",
    ),
    "backward: no barrier before scan 1": (
        "backward.cuh",
        "  " + BARRIER + "#pragma unroll\n      for (int j = 0; j < T; ++j) {\n        Quad num",
        "#pragma unroll\n      for (int j = 0; j < T; ++j) {\n        Quad num",
    ),
    "backward: no barrier after scan 1": (
        "backward.cuh", BARRIER + "  }\n  RECGRELA_DEVICE void load_dy",
        "  }\n  RECGRELA_DEVICE void load_dy",
    ),
    "backward: no barrier after scan 3": (
        "backward.cuh", BARRIER + "  }\n\n  // Scan 4", "  }\n\n  // Scan 4",
    ),
    "backward: no barrier after scan 4": (
        "backward.cuh", BARRIER + "  }\n  // pre_t = bias", "  }\n  // pre_t = bias",
    ),
    "backward: one buffer while S is restored": ("backward.cuh", "% (2 * T)", "% T"),
    "backward: base of T skipped for keys": (
        "backward.cuh", "if (base_used) add_transposed_base", "if (false) add_transposed_base",
    ),
    "backward: base of T skipped for values": (
        "backward.cuh", "if (base_used) add_base", "if (false) add_base",
    ),
    "backward: convolution ends at the segment": (
        "backward.cuh", "int r = 2; r >= 0; --r", "int r = -1; r >= 0; --r",
    ),
    "backward: the normaliser's share of dq dropped": (
        "backward.cuh", "dphi[e] + ddens[j] * z[e]", "dphi[e]",
    ),
    "backward: a later segment's sum dropped": (
        "backward.cuh", "int64_t s = segment + 1;", "int64_t s = segment + 2;",
    ),
    "sums: no barrier": ("sum_parts.cu", "  __syncthreads();\n", ""),
    "sums: one part dropped": ("sum_parts.cu", "i < kLanes; ++i", "i + 1 < kLanes; ++i"),
    "generic: no barrier after phi": (
        "generic.cuh", "    __syncthreads();\n    RECGRELA_EACH(i, D / 2) {\n      A c, s;\n      rotation_at(p.inv_freq[u.h * (D / 2) + i], u.position + t, &c, &s);\n      turn(",
        "    RECGRELA_EACH(i, D / 2) {\n      A c, s;\n      rotation_at(p.inv_freq[u.h * (D / 2) + i], u.position + t, &c, &s);\n      turn(",
    ),
    "generic: no barrier inside the block's sum": (
        "generic.cuh", "  __syncthreads();\n  A sum = A(0);", "  A sum = A(0);",
    ),
    "step: no barrier before the state": (
        "gated_rela_step.cu", "  __syncwarp();\n  if constexpr (kD == 0)", "  if constexpr (kD == 0)",
    ),
    "step: no barrier behind the state": (
        "gated_rela_step.cu", "  __syncwarp();\n  step.store", "  step.store",
    ),
    "step: a row group's sum dropped": (
        "gated_rela_step.cu", "int lanes = kQuads; lanes < kWarp", "int lanes = 2 * kQuads; lanes < kWarp",
    ),
}  # fmt: skip


def includes(source: Path, folder: Path) -> set[str]:
    """Names of the headers in `folder` a file needs, itself included."""
    names, todo = set(), [source.name]
    while todo:
        name = todo.pop()
        if name in names or not (folder / name).is_file():
            continue
        names.add(name)
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        todo += [line.split('"')[1] for line in lines if line.startswith('#include "')]
    return names


def compile_one(source: str, tree: Path, target: Path) -> None:
    command = [os.environ.get("CXX", "g++"), *FLAGS, "-c", source, "-o", str(target)]
    subprocess.run(command, cwd=tree, check=True)


def outcome(tree: Path, objects: list[Path]) -> str:
    """green, or what made the run red."""
    program = tree / "test_cuda"
    command = [os.environ.get("CXX", "g++"), *map(str, objects), "-o", str(program)]
    subprocess.run(command, check=True)
    # Seconds of CPU, not of the clock: a busy machine makes no mutant red.
    limit = (resource.RLIMIT_CPU, (200, 200))
    run = subprocess.run([str(program), "first"], capture_output=True, text=True,
                         preexec_fn=lambda: resource.setrlimit(*limit))  # fmt: skip
    if run.returncode == 0:
        return "green"
    fails = [line for line in run.stdout.splitlines() if line.startswith("FAIL")]
    first = fails[0] if fails else (run.stderr.strip().splitlines() or ["it crashed"])[-1]
    return f"red: {first}"


def run_mutant(name: str, base: Path, scratch: Path) -> str:
    file, old, new = MUTANTS[name]
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        tree = Path(folder)
        shutil.copytree(ROOT / "csrc/cuda", tree / "csrc/cuda")
        shutil.copytree(ROOT / "tests/cuda_shim", tree / "tests/cuda_shim")
        path = tree / "csrc/cuda" / file
        text = path.read_text(encoding="utf-8")
        if old not in text:
            return "gone: the source no longer holds the text this mutant replaces"
        path.write_text(text.replace(old, new), encoding="utf-8")
        objects = [base / f"{source.name}.o" for source in test_sources()]
        for source in sorted((tree / "csrc/cuda").glob("*.cu")):
            target = base / f"{source.name}.o"
            if file in includes(source, source.parent):
                target = tree / f"{source.name}.o"
                compile_one(str(source.relative_to(tree)), tree, target)
            objects.append(target)
        return outcome(tree, objects)


def test_sources() -> list[Path]:
    return sorted((ROOT / "tests/cuda_shim").glob("*.cpp"))


def main() -> int:
    names = [n for n in MUTANTS if all(word in n for word in sys.argv[1:])]
    jobs = len(os.sched_getaffinity(0))
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ThreadPoolExecutor(jobs) as pool,
    ):
        base = Path(folder)
        kernels = sorted((ROOT / "csrc/cuda").glob("*.cu"))
        sources = [*test_sources(), *kernels]
        list(pool.map(lambda s: compile_one(str(s), ROOT, base / f"{s.name}.o"), sources))
        unbroken = outcome(base, [base / f"{s.name}.o" for s in sources])
        print(f"{unbroken:6} the kernels as they are", flush=True)
        survivors = 0 if unbroken == "green" else 1
        for name, result in zip(names, pool.map(lambda n: run_mutant(n, base, base), names)):
            print(f"{name}: {result}", flush=True)
            survivors += not result.startswith("red")
    print(f"{len(names)} mutants, {survivors} not as expected")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
