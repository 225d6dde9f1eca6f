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
    "cpu/activation_dropout.cpp:62 - 1 ->  | torch::stable::parallel_for(0, (params.numel + "
    "kDropoutBlock - 1) / kDropoutBlock, kGrain,": (
        "behind whole blocks one more is asked for, in which no element is left"
    ),
    "cpu/feed_forward.cpp:52 + -> - | params.group_tiles = std::max(kFewestTiles, (tiles + "
    "kMostGroups - 1) / kMostGroups);": (
        "how many groups sum the gradients of very many rows: their memory, and which sum is first"
    ),
    "cpu/kernels.h:19 - 1 ->  | return (D + lanes - 1) / lanes * lanes;": (
        "the memory asked for shared rotations, a vector too much; the kernel makes its own steps"
    ),
    "cpu/kernels.h:24 / -> * | return (D + lanes - 1) / lanes * lanes;": (
        "the size that says how many rotations pay to be shared: then none are, with the "
        "same numbers"
    ),
    "cpu/parallel.h:62 + -> - | inline int64_t grain_size(int64_t items, int64_t D) { return "
    "1 + 16384 / (items * D + 1); }": (
        "how much work a thread gets at least: speed alone, the numbers are the same for any"
    ),
    "cpu/parallel.h:79 * -> + | inline int64_t grain_size(int64_t items, int64_t D) { return "
    "1 + 16384 / (items * D + 1); }": (
        "how much work a thread gets at least: speed alone, the numbers are the same for any"
    ),
    "cpu/topk_scores.h:73 + -> - | for (int64_t b = 0; b < row_bytes; b += 64) "
    "__builtin_prefetch(next + b);": (
        "what is fetched ahead: speed alone; a fetch from anywhere is no access"
    ),
    "cuda/backward.cuh:27 + -> - | rotation.move_to(t0 + j, u.position); (2)": (
        "asks whether an anchor is reached, which only a tile's first item, j = 0, can"
    ),
    "cuda/backward.cuh:33 - -> + | const int64_t done = (tiles - 1 - i) * kTile;": (
        "when the recent items' sums join the others: rounding alone"
    ),
    "cuda/common.cuh:10 > -> >= | return x > 0 ? x + 1 : e;": ("at 0 both sides are 1"),
    "cuda/generic.cuh:11 != -> == | if (t != 0 && t % kRecentItems == 0) this->settle();": (
        "whether the recent items' sums join the others: rounding alone, at more items than "
        "the shim has time for"
    ),
    "cuda/runtime.cu:23 < -> <= | for (int64_t i = 0; i < count; ++i) to[i] = from[i];": (
        "the shim's stand-in for a copy from the GPU, which no kernel and no program of the "
        "shim calls"
    ),
    "cpu/simd.h:22 <= -> < | for (; i + kLanes<A> <= count; i += kLanes<A>) "
    "store_vector(f(load_vector(x + i)), x + i);": (
        "the last whole vector is copied, as a part of one is: the same function of its lanes"
    ),
    "cpu/softmax_loss.cpp:47 - -> + | int64_t chunk = std::min((busy + p.group_rows - 1) / "
    "p.group_rows, at_once / p.group_rows);": (
        "how many groups are scored at once: their memory, each group's sums are the same"
    ),
    "cpu/topk_heap.h:33 > -> >= | for (int64_t last = k - 1; last > 0; --last) {": (
        "one step more puts the only entry left where it is"
    ),
    'cpu/levels.cpp:62 && -> || | __builtin_cpu_supports("avx512dq") && '
    '__builtin_cpu_supports("fma")},': (
        "tells on a processor that has a part of AVX-512 alone, which no machine of the tests is"
    ),
    "cpu/topk_scores.h:55 / -> * | const int64_t share = (p.num_items + p.parts - 1) / p.parts;": (
        "how the items are shared out: the first part has them all, with the same best ones"
    ),
    "cuda/generic.cuh:42 == -> != | if (done != 0 && done % kRecentItems == 0) this->settle();": (
        "when the recent items' gradients join the others: rounding alone"
    ),
}
