"""Compiles csrc/cuda with nvcc for every architecture and judges what ptxas says of each kernel.

    python tests/cuda_shim/check_ptxas.py [arch ...]        for instance: 9.0
    python tests/cuda_shim/check_ptxas.py build.log

The second form compiles nothing: it reads what a build printed under NVCC_APPEND_FLAGS=-Xptxas=-v.

No kernel may spill registers or use local memory, but for those named below, each with its limit.
Prints one line a kernel and architecture; exits with 1 where one breaks the rule. No GPU is needed.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "build_backend"))

from cuda_toolkit import Toolkit, find_toolkit  # noqa: E402
from native_build import nvcc_flags  # noqa: E402

# Bytes of stack frame a kernel may have: (pattern of "sm_90 its name", limit, why). Lower them,
# never raise them.
ALLOWED: tuple[tuple[str, int, str], ...] = (
    (r"sm_1[02]0 backward_kernel<\w+,(16|32),false>", 48, "255 registers, and a few more"),
    # One item a pass would fit; two hide the memory's latency, and sm_90 has room for them.
    (r"sm_(80|120) forward_kernel<\w+,64,false>", 104, "two items a pass"),
    (r"sm_100 forward_kernel<BFloat16,8,true>", 8, "28 bytes of spills, in sums of segments alone"),
    (r"sm_(80|100) wide_backward_kernel<\w+,128,false>", 8, "all 255 registers too"),
    (r"sm_80 mma_forward_kernel<Half,64,false>", 8, "all 128 registers its threads leave it"),
    (r"backward_kernel<\w+,8,true>", 64, "32 bytes on sm_90, in the sums of segments alone"),
    (r"<double(,0)?>$", 64, "40 bytes on sm_90: sincos of a double keeps an array"),
    (r"generic_(for|back)ward_kernel<", 80, "rare head dims; 16 bytes on sm_90, 80 on sm_120"),
)
KERNEL = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")


def compile_one(source: Path, toolkit: Toolkit, folder: Path) -> tuple[str, float]:
    target = folder / f"{source.name}.o"
    command = [toolkit.nvcc, *nvcc_flags(toolkit), "-Xptxas=-v", "-c", str(source)]
    start = time.monotonic()
    run = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True, cwd=ROOT)
    if run.returncode != 0:
        raise SystemExit(f"{source.name} does not compile:\n{run.stderr}")
    return demangled(run.stdout + run.stderr), time.monotonic() - start


def demangled(text: str) -> str:
    tool = shutil.which("c++filt")
    if tool is None:
        return text
    names = sorted(set(re.findall(r"_Z\w+", text)), key=len, reverse=True)
    answer = subprocess.run([tool, *names], capture_output=True, text=True, check=True).stdout
    for name, plain in zip(names, answer.splitlines(), strict=True):
        short = re.sub(r"recgrela::cuda::|\(anonymous namespace\)::|^void |\(.*\)|\s", "", plain)
        text = text.replace(name, short)
    return text


def judge(text: str) -> list[tuple[str, str, int, int, int, bool]]:
    """Per kernel: name, arch, registers, stack bytes, spilled bytes, whether that is allowed."""
    found = []
    for block in re.split(r"(?=Compiling entry function)", text)[1:]:
        kernel, memory, used = KERNEL.search(block), MEMORY.search(block), USED.search(block)
        if not (kernel and memory and used):
            raise SystemExit(f"ptxas' words are not understood:\n{block[:500]}")
        stack, spilled = int(memory[1]), int(memory[2]) + int(memory[3])
        name = f"sm_{kernel[2]} {kernel[1]}"
        limit = max([bytes_ for pattern, bytes_, _ in ALLOWED if re.search(pattern, name)] or [0])
        allowed = stack <= limit and (spilled == 0 or limit > 0)
        found.append((kernel[1], kernel[2], int(used[1]), stack, spilled, allowed))
    return found


def report(text: str) -> tuple[int, int]:
    """Prints a line per kernel and architecture; how many, and how many break the rule."""
    verdicts = judge(text)
    for name, arch, registers, stack, spilled, allowed in verdicts:
        print(f"  {'ok  ' if allowed else 'FAIL'} sm_{arch} {name}: {registers} registers, "
              f"{stack} bytes of stack, {spilled} spilled", flush=True)  # fmt: skip
    return len(verdicts), sum(not verdict[-1] for verdict in verdicts)


def compile_all(archs: list[str]) -> tuple[int, int]:
    if archs:
        os.environ["TORCH_CUDA_ARCH_LIST"] = " ".join(archs)
    os.environ.setdefault("RECGRELA_CUDA", "1")
    toolkit = find_toolkit(True)
    assert toolkit is not None
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    start, kernels, broken = time.monotonic(), 0, 0
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
    ):
        jobs = pool.map(lambda s: compile_one(s, toolkit, Path(folder)), sources)
        for source, (text, seconds) in zip(sources, jobs, strict=True):
            print(f"{source.name}: {seconds:.0f} s")
            found, wrong = report(text)
            kernels, broken = kernels + found, broken + wrong
    print(f"architectures {' '.join(toolkit.archs)}: {time.monotonic() - start:.0f} s")
    return kernels, broken


def main() -> int:
    log = Path(sys.argv[1]) if len(sys.argv) == 2 else None
    if log and log.is_file():
        kernels, broken = report(demangled(log.read_text(encoding="utf-8", errors="replace")))
    else:
        kernels, broken = compile_all(sys.argv[1:])
    if kernels == 0:
        raise SystemExit("ptxas said nothing: was -Xptxas=-v given?")
    print(f"{kernels} kernels, {broken} break the rule")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
