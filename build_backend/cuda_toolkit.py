"""Finds nvcc, what it can compile for, and the architectures to compile for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ARCHS = ("8.0", "9.0", "10.0", "12.0")  # 8.0 code runs on 8.6 and 8.9 as well


@dataclass(frozen=True)
class Toolkit:
    nvcc: str
    home: Path
    version: str
    archs: tuple[str, ...]  # as in TORCH_CUDA_ARCH_LIST: "8.0", "12.0+PTX"

    @property
    def gencode_flags(self) -> list[str]:
        flags = []
        for arch in self.archs:
            number = arch.removesuffix("+PTX").replace(".", "")
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if arch.endswith("+PTX"):
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags

    @property
    def link_flags(self) -> list[str]:
        lib = self.home / "lib64" if (self.home / "lib64").is_dir() else self.home / "lib"
        return [f"-L{lib}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


def find_toolkit(has_cuda_sources: bool) -> Toolkit | None:
    """The toolkit to compile csrc/cuda with, or None for a library without CUDA.

    RECGRELA_CUDA is 0 (never), 1 (must) or auto (when nvcc is there). Neither a CUDA device nor a
    torch with CUDA is needed.
    """
    wish = os.environ.get("RECGRELA_CUDA", "auto") or "auto"
    if wish not in ("0", "1", "auto"):
        raise SystemExit(f"recgrela_ext: RECGRELA_CUDA must be 0, 1 or auto, got {wish}")
    if wish == "0" or (wish == "auto" and not has_cuda_sources):
        return None
    try:
        if not has_cuda_sources:
            raise LookupError("csrc/cuda holds no .cu file")
        return _inspect(_nvcc_path())
    except LookupError as error:
        if wish == "1":
            raise SystemExit(f"recgrela_ext: RECGRELA_CUDA=1, but {error}") from None
        print(f"recgrela_ext: built without CUDA, because {error}")
        return None


def _nvcc_path() -> str:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    search = os.pathsep.join(
        [
            *(str(Path(home) / "bin") for home in homes),
            os.environ.get("PATH", ""),
            "/usr/local/cuda/bin",
        ]
    )
    nvcc = shutil.which("nvcc", path=search)
    if nvcc is None:
        raise LookupError("nvcc was not found")
    return nvcc


def _inspect(nvcc: str) -> Toolkit:
    def ask(*arguments: str) -> str:
        answer = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
        if answer.returncode != 0:
            raise LookupError(f"{nvcc} {' '.join(arguments)} failed: {answer.stderr.strip()}")
        return answer.stdout + answer.stderr

    # nvcc on the PATH may be a wrapper script or a link, so its own directory proves nothing.
    top = re.search(r"^#\$ TOP=(.+)$", ask("--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    release = re.search(r"release (\d+\.\d+)", ask("--version"))
    if top is None or release is None:
        raise LookupError(f"{nvcc} does not tell its directory and version")
    home = Path(top[1].strip()).resolve()
    for part in ("include/cuda_runtime.h", "lib*/libcudart_static.a"):
        if not any(home.glob(part)):
            raise LookupError(f"{home} holds no {part}")
    supported = re.findall(r"compute_(\d+)(\d)\b", ask("--list-gpu-arch"))
    return Toolkit(nvcc, home, release[1], _archs([f"{a}.{b}" for a, b in supported]))


def _archs(supported: list[str]) -> tuple[str, ...]:
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace(",", " ").split()
    for arch in wish:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            raise SystemExit(
                f"recgrela_ext: TORCH_CUDA_ARCH_LIST must list 9.0 or 12.0+PTX, got {arch}"
            )
        if int(arch.partition(".")[0]) < 8:  # a block there has too little shared memory
            raise SystemExit(
                f"recgrela_ext: TORCH_CUDA_ARCH_LIST must list 8.0 and later ones alone, got {arch}"
            )
    if wish:
        return tuple(wish)
    archs = [arch for arch in DEFAULT_ARCHS if arch in supported]
    if not archs:
        raise LookupError(f"nvcc compiles for none of {', '.join(DEFAULT_ARCHS)}")
    return (*archs[:-1], archs[-1] + "+PTX")
