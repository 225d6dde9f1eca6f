"""Runs the kernels under the shim's race detector (races.h), then without barriers it alone misses.

    python tests/cuda_shim/races.py [word in the mutants' names ...]

Shuffles stand between the accesses these barriers order. In the shim a shuffle makes a whole warp
meet, so no number changes without them; on a GPU it orders no memory.
"""

from __future__ import annotations

import mutations
from mutations import BACKWARD, STEP, Mutant, no_barrier

MUTANTS: dict[str, Mutant] = {
    "backward: no barrier before scan 1 reads": (
        BACKWARD, "read_ahead(t0 + T); } __syncwarp();", "read_ahead(t0 + T); }",
    ),
    "backward: no barrier after scan 3": no_barrier(BACKWARD, "} // Scan 4, backward in time"),
    "backward: no barrier after scan 4": no_barrier(BACKWARD, "} // pre_t = bias"),
    "step: no barrier before the state": (STEP, "step.stage(); __syncwarp();", "step.stage();"),
}  # fmt: skip


def main() -> int:
    mutations.FLAGS += ["-DRECGRELA_CUDA_RACES"]
    # g++ marks every access; the marks are races.cpp's, ThreadSanitizer is not linked.
    instrumented = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]
    mutations.KERNEL_FLAGS += instrumented
    mutations.MUTANTS = MUTANTS
    return mutations.main()


if __name__ == "__main__":
    raise SystemExit(main())
