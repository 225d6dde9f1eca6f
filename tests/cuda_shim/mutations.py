"""Shows that the shim's tests can fail: breaks a copy of the kernels in one place, expects red.

    python tests/cuda_shim/mutations.py [word in the mutants' names ...] [2/3: the second third]

A mutant that stays green is an error, as is one whose place in the source is gone. Barriers that
change no number here, because shuffles stand between the accesses they order, are in races.py.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-w", "-DRECGRELA_CUDA_SHIM"]
FLAGS += ["-Itests/cuda_shim", "-Icsrc", "-x", "c++"]
KERNEL_FLAGS: list[str] = []  # of races.py
# The text that goes from a file under csrc/cuda, and what comes in its place; any white space
# matches any other.
Mutant = tuple[str, str, str]
WITHOUT_FIRST_WORD = "the same without its first word"


def no_barrier(file: str, behind: str, barrier: str = "__syncwarp();") -> Mutant:
    return file, f"{barrier} {behind}", WITHOUT_FIRST_WORD


FORWARD, BACKWARD, TILE, UNIT = "forward.cuh", "backward.cuh", "warp_tile.cuh", "common.cuh"
WIDE_FORWARD, WIDE_BACKWARD, WIDE_TILE = "forward_wide.cuh", "backward_wide.cuh", "wide_tile.cuh"
CONV = "conv_gradient.cuh"
MMA, MMA_TILE, MMA_FORWARD = "mma.cuh", "mma_tile.cuh", "mma_forward.cuh"
GENERIC, STEP, SUMS = "generic.cuh", "gated_rela_step.cu", "sum_parts.cu"
BLOCK = "__syncthreads();"
ROLLED = "#pragma unroll 1 for (int j = 0; j < T && i0 + j < count; ++j)"
ROLLED_BACK = "#pragma unroll 1 for (int j = 0; j < T && j <= i0; ++j)"
SCAN = "#pragma unroll for (int j = 0; j < T; ++j) {"

MUTANTS: dict[str, Mutant] = {
    "forward: no barrier before the scan": no_barrier(
        FORWARD, SCAN + " const bool there = i0 + j < items; const float* key"
    ),
    "forward: one exchange buffer instead of two": (FORWARD, "buffer ^= 1", "buffer ^= 0"),
    "forward: base sum skipped": (FORWARD, "if (sum.used) add_base", "if (false) add_base"),
    "forward: recent sum counted twice": (
        FORWARD, "+= S[i][m]; S[i][m] = 0.0f;", "+= S[i][m];",
    ),
    "forward: base of the normaliser skipped": (FORWARD, "+ sum.z_base[e])", ")"),
    "forward: one segment's partial sum dropped": (
        FORWARD, "int64_t s = 0; s < segment &&", "int64_t s = 1; s < segment &&",
    ),
    "forward: saved and final states without the base": (
        FORWARD, "S[i][m] + (base ? base[i * Tile::D + m] : 0.0f)", "S[i][m]",
    ),
    "forward: padding not zeroed": (FORWARD, "u.span.length, p.L, 0.0f);", "p.L, p.L, 0.0f);"),
    "tile: half of the columns' sum dropped": (
        TILE, "keep + __shfl_xor_sync(0xffffffffu, give, 1)", "keep",
    ),
    "tile: one lane's part of the normaliser dropped": (
        TILE, "lanes < Tile::LU; lanes *= 2", "2 * lanes < Tile::LU; lanes *= 2",
    ),
    "tile: columns of another lane": (TILE, "return at(column);", "return at(column ^ 4);"),
    "tile: convolution window shifted": (
        TILE, "window[0][e] = window[1][e];", "window[0][e] = window[2][e];",
    ),
    "tile: rotation one item late": (
        TILE, "set(start + t); } else { advance();", "set(start + t + 1); } else { advance();",
    ),
    "unit: length not clamped": (UNIT, "length >= 0 && length <= p.L;", "length >= 0;"),
    "unit: decreasing offsets taken": (
        UNIT, "begin <= end && end <= p.items", "end <= p.items",
    ),
    "unit: last offset not clamped": (UNIT, "begin <= end && end <= p.items;", "begin <= end;"),
    "backward: no barrier while S is restored": no_barrier(
        BACKWARD, SCAN + " const float* key"
    ),
    "backward: one buffer while S is restored": (BACKWARD, "% (2 * T)", "% T"),
    "backward: no barrier after scan 1": no_barrier(
        BACKWARD, "} RECGRELA_DEVICE void differentiate"
    ),
    "backward: base of T skipped for keys": (
        BACKWARD, "if (base_used) add_transposed_base", "if (false) add_transposed_base",
    ),
    "backward: base of T skipped for values": (
        BACKWARD, "if (base_used) add_base", "if (false) add_base",
    ),
    "backward: convolution ends at the segment": (
        BACKWARD, "int r = 2; r >= 0", "int r = -1; r >= 0",
    ),
    "backward: the normaliser's share of dq dropped": (BACKWARD, "+ ddens[j] * z[e])", ")"),
    "backward: a later segment's sum dropped": (BACKWARD, "s = segment + 1;", "s = segment + 2;"),
    "wide tile: half of the columns' sum dropped": (
        WIDE_TILE, "keep + __shfl_xor_sync(0xffffffffu, give, lanes);", "keep;",
    ),
    "wide tile: one warp's part of the sums dropped": (
        WIDE_TILE, "int w = 1; w < Tile::warps", "int w = 1; w + 1 < Tile::warps",
    ),
    "wide tile: pairs turned the other way": (WIDE_TILE, "(odd ? s : -s)", "(odd ? -s : s)"),
    "wide tile: channel of another lane": (
        WIDE_TILE, "channel(column + lane / 4)", "channel(column + (lane / 4 ^ 2))",
    ),
    "wide tile: convolution window shifted": (
        WIDE_TILE, "window[0] = window[1];", "window[0] = window[2];",
    ),
    "wide forward: no barrier before the scan": no_barrier(
        WIDE_FORWARD, ROLLED + " { float columns", BLOCK
    ),
    "wide forward: no barrier before a chunk's sum": no_barrier(
        WIDE_FORWARD, ROLLED + " sum.add_item", BLOCK
    ),
    "wide forward: one exchange buffer instead of two": (
        WIDE_FORWARD, "buffer ^= 1", "buffer ^= 0",
    ),
    "wide forward: the sums before a chunk dropped": (
        WIDE_FORWARD, "sum.join(tile, total());", "sum.store(tile, total());",
    ),
    "wide forward: a chunk's part of the normaliser dropped": (
        WIDE_FORWARD, "z_base += z; z = 0.0f;", "z = 0.0f;",
    ),
    "wide forward: one segment's partial sum dropped": (
        WIDE_FORWARD, "s = slot - slot % args.segments;", "s = slot - slot % args.segments + 1;",
    ),
    "wide backward: no barrier before scan 1": no_barrier(
        WIDE_BACKWARD, ROLLED + " { float columns", BLOCK
    ),
    "wide backward: no barrier after scan 1": no_barrier(
        WIDE_BACKWARD, ROLLED + " finish_query", BLOCK
    ),
    "wide backward: no barrier before scan 2": no_barrier(
        WIDE_BACKWARD, ROLLED_BACK + " { const int i", BLOCK
    ),
    "wide backward: no barrier after scan 2": no_barrier(
        WIDE_BACKWARD, ROLLED_BACK + " finish_key", BLOCK
    ),
    "wide backward: no barrier before a chunk's sum": no_barrier(
        WIDE_BACKWARD, ROLLED + " { sum.add_item", BLOCK
    ),
    "wide backward: no barrier after a chunk's sum": no_barrier(
        WIDE_BACKWARD, "// dnums and the buffers", BLOCK
    ),
    "wide backward: one buffer in a chunk's sum": (
        WIDE_BACKWARD, "buffer == keys ? queries : keys", "keys",
    ),
    "wide backward: dnum not divided by den": (WIDE_BACKWARD, "own(dnums, i) *= scale;", ""),
    "wide backward: the items behind a chunk dropped from y": (
        WIDE_BACKWARD, "+ (y_base + y)", "+ y",
    ),
    "wide backward: the normaliser's share of dq dropped": (
        WIDE_BACKWARD, "+ dden * own(zs, j)", "",
    ),
    "wide backward: T behind a chunk dropped": (
        WIDE_BACKWARD, "sum.load(tile, total()); WideAhead", "sum.clear(); WideAhead",
    ),
    "wide backward: convolution ends at the segment": (
        WIDE_BACKWARD, "= dpre_of<S>(p, u, tile.channel, u.end + r);", "= 0.0f;",
    ),
    "wide backward: convolution ends at the chunk": (
        WIDE_BACKWARD, "own(dpres, kChunk + r) = own(dpres, r);", "own(dpres, kChunk + r) = 0.0f;",
    ),
    "wide backward: a later segment's sum dropped": (
        WIDE_BACKWARD, "s = segment() + 1;", "s = segment() + 2;",
    ),
    "conv gradient: the final window's gradient dropped": (
        CONV, "p.grad_final.conv && r >= 0 ?", "false ?",
    ),
    "mma: low parts of the second factor dropped": (
        MMA_TILE, "mma(c, a_high, b0_low, b1_low);", "",
    ),
    "mma: low parts of the keys dropped from S": (
        MMA_TILE, "mma(part[m], high.at[i], b_low[2 * m], b_low[2 * m + 1]);", "",
    ),
    "mma: low parts of float16 values dropped": (
        MMA_TILE, "if constexpr (!kExact) mma(part[m]", "if constexpr (false) mma(part[m]",
    ),
    "mma: an item sees the one behind it": (MMA_TILE, "s <= t ? sum", "s <= t + 1 ? sum"),
    "mma: columns of S in disorder": (MMA_TILE, "tile.c.g + i / 2 * 8;", "tile.c.g + i % 2 * 8;"),
    "mma: fragment of another matrix": (
        MMA, "lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8",
        "lane % 8 + lane / 8 % 2 * 8, column + lane / 16 * 8",
    ),
    "mma forward: no barrier before the rows are mapped": no_barrier(
        MMA_FORWARD, "save_states(t0);", "__syncthreads();"
    ),
    "mma forward: no barrier behind the mapped rows": no_barrier(
        MMA_FORWARD, "if (t0 + kStep < u.end) request", "__syncthreads();"
    ),
    "mma forward: no barrier behind the scores": (
        MMA_FORWARD, "load_gates(t0, gates); __syncthreads();", "load_gates(t0, gates);",
    ),
    "mma forward: copies not waited for": (MMA_FORWARD, "wait_for_copies();", ""),
    "mma forward: one buffer of values instead of two": (
        MMA_FORWARD, "element(buffer * (kStep + kPast), 0)", "element(0, 0)",
    ),
    "mma forward: one warp's items missing from the normaliser": (
        MMA_FORWARD, "w < tile.warp; ++w", "w + 1 < tile.warp; ++w",
    ),
    "mma forward: normaliser stays": (MMA_FORWARD, "z[tile.thread] += step;", ""),
    "mma forward: convolution forgets the state": (
        MMA_FORWARD, "t < kPast && t - kPast + j < 0", "false",
    ),
    "mma forward: one segment's partial sum dropped": (
        MMA_FORWARD, "int64_t s = 0; !kSums", "int64_t s = 1; !kSums",
    ),
    "mma forward: padding not zeroed": (
        MMA_FORWARD, "u.span.length, p.L, 0.0f);", "p.L, p.L, 0.0f);",
    ),
    "sums: no barrier": (SUMS, "__syncthreads();", ""),
    "sums: one part dropped": (SUMS, "i < kLanes; ++i", "i + 1 < kLanes; ++i"),
    "generic: no barrier after phi": no_barrier(
        GENERIC, "RECGRELA_EACH(i, D / 2) { A c, s; rotation_at", "__syncthreads();"
    ),
    "generic: no barrier inside the block's sum": no_barrier(
        GENERIC, "A sum = A(0); for (int w", "__syncthreads();"
    ),
    "step: no barrier behind the state": no_barrier(STEP, "step.store"),
    "step: a row group's sum dropped": (STEP, "int lanes = kQuads;", "int lanes = 2 * kQuads;"),
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
    flags = [*FLAGS, *(KERNEL_FLAGS if source.endswith(".cu") else ())]
    command = [os.environ.get("CXX", "g++"), *flags, "-c", source, "-o", str(target)]
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
        shutil.copytree(ROOT / "csrc", tree / "csrc")
        shutil.copytree(ROOT / "tests/cuda_shim", tree / "tests/cuda_shim")
        path = tree / "csrc/cuda" / file
        text = path.read_text(encoding="utf-8")
        place = re.compile(r"\s+".join(map(re.escape, old.split())))
        if place.search(text) is None:
            return "gone: the source no longer holds the text this mutant replaces"
        shorter = place.sub(lambda found: found[0].removeprefix(old.split()[0]), text)
        changed = shorter if new is WITHOUT_FIRST_WORD else place.sub(lambda _: new, text)
        path.write_text(changed, encoding="utf-8")
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
    parts = [word for word in sys.argv[1:] if re.fullmatch(r"[1-9]/[1-9]", word)]
    words = [word for word in sys.argv[1:] if word not in parts]
    names = [n for n in MUTANTS if all(word in n for word in words)]
    for part in parts:
        number, count = map(int, part.split("/"))
        names = names[number - 1 :: count]
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
        results = pool.map(lambda n: run_mutant(n, base, base), names)
        for name, result in zip(names, results, strict=True):
            print(f"{name}: {result}", flush=True)
            survivors += not result.startswith("red")
    print(f"{len(names)} mutants, {survivors} not as expected")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
