"""Compiles csrc/ into two files of the package, with ninja: parallel and incremental.

librecgrela.so  every operator, CPU and CUDA, on torch's stable ABI and without a Python symbol
_C              a pybind11 module with the facts of this build
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from cuda_toolkit import Toolkit, find_toolkit
from setuptools.command.build_ext import build_ext
from torch_location import MINIMUM, Torch, find_torch

ROOT = Path(__file__).resolve().parent.parent
WORK = Path("build/native")  # relative to ROOT; shared by wheels, editable and in-place builds
LIBRARY = "recgrela_ext.librecgrela"
MODULE = "recgrela_ext._C"

CXX_FLAGS = [
    # No -march=native: levels are chosen at run time. No -ffast-math: NaN must count.
    *["-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"],
    # A row of 16 floats is copied faster than memcpy is called.
    "-fno-tree-loop-distribute-patterns",
    *["-std=c++20", "-fPIC", "-fvisibility=hidden"],
    # psabi warns of vectors passed by value; none leaves the library.
    *["-Wall", "-Wextra", "-Wno-psabi"],
]
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-Icsrc"]

RULES = """\
ninja_required_version = 1.8
builddir = {work}
rule cxx
  command = {cxx} $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = C++ $in
rule nvcc
  command = {nvcc} $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = CUDA $in
rule link
  command = {cxx} -shared $in -o $out $flags
  description = link $out
"""


class BuildNative(build_ext):
    """`build_ext` for the two files above."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.rpartition(".")[2] == LIBRARY.rpartition(".")[2]:
            return fullname.replace(".", os.sep) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        torch = find_torch()
        if torch is None:
            wanted = ".".join(map(str, MINIMUM))
            raise SystemExit(f"recgrela_ext: no torch {wanted} or newer was found to build with")
        os.chdir(ROOT)
        WORK.mkdir(parents=True, exist_ok=True)
        with (WORK / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            version = self.distribution.get_version()
            built = compile_with_ninja(torch, version, self.get_ext_filename("_C"))
            for name, path in built.items():
                target = Path(self.get_ext_fullpath(name))
                target.parent.mkdir(parents=True, exist_ok=True)
                # A process may have the old file mapped: replace it, never write into it.
                shutil.copy2(path, target.with_suffix(".tmp"))
                target.with_suffix(".tmp").replace(target)


def compile_with_ninja(torch: Torch, version: str, module_file: str) -> dict[str, Path]:
    """Builds both files under WORK; returns extension name -> path."""
    cuda_sources = sorted(Path("csrc/cuda").rglob("*.cu"))
    toolkit = find_toolkit(bool(cuda_sources))
    lines = [
        RULES.format(work=WORK, cxx=compiler(), nvcc=quoted([toolkit.nvcc if toolkit else "nvcc"]))
    ]

    stable = [*STABLE_ABI, "-isystem", str(torch.include)]
    shared = [Path("csrc/library.cpp"), Path("csrc/arguments.cpp")]
    cpp = [*shared, *sorted(Path("csrc/cpu").rglob("*.cpp"))]
    objects = [edge(lines, "cxx", path, [*CXX_FLAGS, *stable]) for path in cpp if path.is_file()]
    if toolkit:
        # The wrappers know torch and no CUDA header, the kernels CUDA and no torch.
        wrappers = sorted(Path("csrc/cuda").rglob("*.cpp"))
        objects += [edge(lines, "cxx", path, [*CXX_FLAGS, *stable]) for path in wrappers]
        objects += [edge(lines, "nvcc", path, nvcc_flags(toolkit)) for path in cuda_sources]
    # --no-as-needed: the CUDA symbols of torch are reached through libtorch alone, and nothing
    # here names one directly. No rpath: torch is imported first and brings its libraries along.
    # libstdc++ comes first, because libtorch_cpu carries copies of some of its symbols.
    torch_libraries = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
    libraries = ["-lstdc++", f"-L{torch.lib}", *torch_libraries, "-Wl,--exclude-libs,ALL"]
    libraries += toolkit.link_flags if toolkit else []
    library = link(lines, WORK / "librecgrela.so", objects, libraries)

    module = edge(lines, "cxx", Path("csrc/module.cpp"), module_flags(torch, version, toolkit))
    built = {LIBRARY: library, MODULE: link(lines, WORK / module_file, [module], [])}
    build_file = WORK / "build.ninja"
    build_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    if subprocess.run([ninja(), "-f", str(build_file), "-j", jobs], check=False).returncode != 0:
        raise SystemExit("recgrela_ext: compilation failed, the compiler's words are above")
    return built


def module_flags(torch: Torch, version: str, toolkit: Toolkit | None) -> list[str]:
    import pybind11

    facts = {
        "VERSION": version,
        "TORCH_BUILT": torch.version,
        "CUDA_TOOLKIT": toolkit.version if toolkit else "",
        "CUDA_ARCHS": ";".join(toolkit.archs) if toolkit else "",
    }
    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    return [
        *CXX_FLAGS,
        *(f'-DRECGRELA_{name}="{value}"' for name, value in facts.items()),
        *(f"-I{path}" for path in includes),
    ]


def nvcc_flags(toolkit: Toolkit) -> list[str]:
    host = ",".join(flag for flag in CXX_FLAGS if flag.startswith("-f"))
    return [
        "-O3",
        "-std=c++20",
        "--expt-relaxed-constexpr",
        f"-Xcompiler={host}",
        *toolkit.gencode_flags,
    ]


def edge(lines: list[str], rule: str, source: Path, flags: Iterable[str]) -> Path:
    target = WORK / source.parent / (source.name + ".o")
    lines.append(f"build {target}: {rule} {source}\n  flags = {quoted(flags)}")
    return target


def link(lines: list[str], target: Path, objects: Iterable[Path], flags: Iterable[str]) -> Path:
    extra = shlex.split(os.environ.get("LDFLAGS", ""))
    inputs = " ".join(map(str, objects))
    lines.append(f"build {target}: link {inputs}\n  flags = {quoted([*flags, *extra])}")
    return target


def quoted(words: Iterable[str]) -> str:
    """Words for a ninja variable that ends in a shell command."""
    return shlex.join(words).replace("$", "$$")


def compiler() -> str:
    command = shlex.split(os.environ.get("CXX", "g++")) + shlex.split(
        os.environ.get("CXXFLAGS", "")
    )
    if shutil.which(command[0]) is None:
        raise SystemExit(
            f"recgrela_ext: a C++ compiler is needed, {command[0]} was not found (set CXX)"
        )
    return quoted(command)


def ninja() -> str:
    try:
        from ninja import BIN_DIR
    except ModuleNotFoundError:
        return "ninja"
    return str(Path(BIN_DIR) / "ninja")
