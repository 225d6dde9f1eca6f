"""Survivors that no test can tell from the kernels as they are, by name; each was looked at."""

from __future__ import annotations

EXPLAINED: dict[str, str] = {
    "cpu/encoder_step.h:46 == -> != | constexpr int kShare = RECGRELA_VECTOR_BYTES == 64 ? 4 : "
    "2;  // users to a weight in a register": (
        "how many users share a load of a weight: each user's sum keeps its order, so its bits"
    ),
    "cpu/encoder_step.h:13 == -> != | if (users == 1) tiles(std::integral_constant<int, 1>{}, "
    "std::integral_constant<int, 8>{});": (
        "which width of tile goes first: a column's sum is in the same order in every one"
    ),
    "cpu/gated_rela_step.h:33 <= -> < | for (; j + kVectors * kLanes<A> <= D; j += kVectors * "
    "kLanes<A>) {": (
        "the last columns fall to the narrower tile or the plain loop behind it: the same sums"
    ),
    "cuda/forward_wide.cuh:32 > -> >= | const int64_t parts = segments > 1 ? units * "
    "(D * D + D) : 0;": "memory that nothing reads is asked for as well where there is one segment",
    "cpu/simd.h:75 > -> >= | RECGRELA_INLINE Vec<double> larger(Vec<double> x, Vec<double> y) "
    "{ return x > y ? x : y; }": "tells +0 from -0 alone, a sign that no formula here keeps",
}
