"""Every instruction-set level on one machine, and what its inner loop is compiled to."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from recgrela_ext import _library, build_info

pytestmark = pytest.mark.kernels
ROOT = Path(__file__).parents[2]

CHECK = """
import sys, torch
from recgrela_ext import build_info, ops
from tests.ops.agreement import assert_agrees
from tests.ops.problems import make_problem
from tests.ops import test_activation_dropout as dropout
from tests.ops import test_feed_forward as feed_forward
from tests.ops import test_softmax_loss as loss
from tests.ops.test_gated_rela_step import stepwise

torch.manual_seed(0)
assert build_info()["cpu_level"] == sys.argv[1], build_info()
state = {"state": True, "return_final_state": True}
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for D in (2, 8, 10, 16, 24, 32, 64, 136):
        assert_agrees(make_problem(L=66, H=1, D=D, dtype=dtype, **state), ops.gated_rela)
        assert_agrees(make_problem(L=3, D=D, dtype=dtype, **state), stepwise, backward=False)
    assert_agrees(make_problem(packed=[65, 0, 3], dtype=dtype), ops.gated_rela)
    assert_agrees(make_problem(L=65, lengths=[65, 2], dtype=dtype), ops.gated_rela)
    dropout.test_the_mask_is_the_reference_s(5, dtype)
    for options in dropout.MODES.values():
        dropout.test_agrees_with_the_reference(options, dtype, 1025)
for dtype in (torch.float32, torch.float64):
    for shape in ((70, 64, 16), (530, 129, 64), (97, 300, 72)):
        loss.test_agrees_with_the_reference(dtype, shape, 0, False)
        loss.test_agrees_with_the_reference(dtype, shape, 11, True)
    for shape in feed_forward.SHAPES:
        feed_forward.test_agrees_with_the_reference(dtype, True, 0.3, shape)
"""


def run_at(level: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"RECGRELA_CPU_LEVEL": level, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, level],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_every_level_is_right(level: str) -> None:
    if level not in build_info()["cpu_levels"]:
        pytest.skip(f"this machine cannot run {level}")
    done = run_at(level, CHECK)
    assert done.returncode == 0, done.stderr[-2000:]


def test_unknown_level() -> None:
    code = """
import torch
from recgrela_ext import build_info, ops
assert build_info()["cpu_level"] is None
x = torch.ones(1, 1, 1, 2)
for _ in range(2):
    try:
        ops.rela(x, x, x, torch.ones(1, 1, dtype=torch.float64))
    except ValueError as error:
        print(error)
"""
    done = run_at("avx9000", code)
    assert done.returncode == 0, done.stderr[-2000:]
    levels = ",".join(build_info()["cpu_levels"])
    line = f"RECGRELA_CPU_LEVEL must be one of {levels} on this machine, got avx9000\n"
    assert done.stdout == line * 2


def test_fastest_level_by_default() -> None:
    done = run_at("", "import recgrela_ext; print(recgrela_ext.build_info()['cpu_level'])")
    assert done.stdout.strip() == build_info()["cpu_levels"][-1], done.stderr


@cache
def disassembly() -> str:
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump was not found")
    command = [objdump, "--disassemble", "--demangle", "--no-show-raw-insn", str(_library.LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def functions(level: str, name: str) -> dict[str, str]:
    """Bodies by signature of the functions of a level whose name begins with ``name``."""
    blocks = re.split(r"\n(?=[0-9a-f]+ <)", disassembly())
    found = {}
    for block in blocks:
        head, _, body = block.partition("\n")
        if f"recgrela::{level}::{name}" in head:
            found[head] = body
    if not found:
        pytest.skip("the library is stripped, or built for another processor")
    return found


@pytest.mark.parametrize(("level", "register"), [("avx512", "zmm"), ("avx2", "ymm")])
@pytest.mark.parametrize("number", ["float", "double"])
def test_the_scan_uses_wide_multiply_adds(level: str, register: str, number: str) -> None:
    """A loop the compiler silently left scalar is several times slower and still right."""
    for name in ("scan_columns", "base_columns"):
        loops = {h: b for h, b in functions(level, name).items() if f"<{number}" in h}
        assert loops
        for head, body in loops.items():
            wide = len(re.findall(rf"vfn?madd\w+p[sd]\s.*%{register}", body))
            assert wide >= 2, f"{head} has {wide} multiply-adds on {register}"


# What maps a whole chunk: phi, SiLU, rotation and their derivatives.
CHUNK_LOOPS = ("map_keys", "finish_chunk", "differentiate_rows", "finish_queries", "finish_keys")


@pytest.mark.parametrize(("level", "register"), [("avx512", "zmm"), ("avx2", "ymm")])
@pytest.mark.parametrize("name", CHUNK_LOOPS)
def test_the_chunk_loops_are_vectors_throughout(level: str, register: str, name: str) -> None:
    """Multiplications are wide, but for one scale per item, and no exp is a call."""
    loops = {
        head: body
        for head, body in functions(level, name).items()
        if "<float, 2" in head and "GatedRelaParams" not in head  # that one only chooses
    }
    assert loops
    for head, body in loops.items():
        wide = len(re.findall(rf"v(?:fn?m(?:add|sub)\w+|mul)ps\s.*%{register}", body))
        narrow = len(re.findall(r"v(?:fn?m(?:add|sub)\w+|mul)ss\s", body))
        assert wide >= 2, f"{head} has {wide} multiplications on {register}"
        assert narrow <= 4, f"{head} has {narrow} scalar multiplications"
        assert "call" not in body, f"{head} calls a function"


@pytest.mark.parametrize(("level", "register"), [("avx512", "zmm"), ("avx2", "ymm")])
@pytest.mark.parametrize("name", ["activate_block", "differentiate_block"])
def test_dropout_is_vectors(level: str, register: str, name: str) -> None:
    """GELU has 8 multiply-adds of erfc, 5 of exp and 2 of the reciprocal; no erf is a call."""
    loops = {h: b for h, b in functions(level, name).items() if "<float, float>" in h}
    assert loops
    for head, body in loops.items():
        assert len(re.findall(rf"vpmulld\s.*%{register}", body)) >= 4, head
        assert len(re.findall(rf"vfn?m(?:add|sub)\w+ps\s.*%{register}", body)) >= 15, head
        assert not re.search(r"v(?:fn?m(?:add|sub)\w+|mul)ss\s", body), head
        assert not re.search(r"call.*(?:exp|erf)", body), head


@pytest.mark.parametrize("wide", ["zmm", "ymm"])
def test_baseline_runs_anywhere(wide: str) -> None:
    bodies = "".join(functions("baseline", "").values())
    assert f"%{wide}" not in bodies
    assert "vfmadd" not in bodies
    if wide == "zmm":
        assert "%zmm" not in "".join(functions("avx2", "").values())
