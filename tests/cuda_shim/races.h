// A race detector for the shim. The fibers of a block run one after another and every shuffle makes
// a whole warp meet, so a barrier that is missing on a GPU may change no number here. With
// -DRECGRELA_CUDA_RACES and the kernels compiled with -fsanitize=thread, g++ tells of every access
// to memory (nothing of ThreadSanitizer is linked), and two accesses to one place, one of them a
// write, must have a barrier of both threads between them: __syncthreads, or inside a warp
// __syncwarp. A shuffle is none, as in CUDA. Without the macro nothing is watched.
#pragma once
#include <cstddef>

namespace races {

#ifdef RECGRELA_CUDA_RACES
constexpr bool watched = true;
void block_starts(unsigned threads);
void block_ends();
void thread_runs(unsigned thread, const void* stack, std::size_t bytes);
void warp_barrier(unsigned thread);
void block_barrier(unsigned thread);
void access(const void* at, std::size_t bytes, bool write);
int found();  // so far
#else
constexpr bool watched = false;
inline void block_starts(unsigned) {}
inline void block_ends() {}
inline void thread_runs(unsigned, const void*, std::size_t) {}
inline void warp_barrier(unsigned) {}
inline void block_barrier(unsigned) {}
inline void access(const void*, std::size_t, bool) {}
inline int found() { return 0; }
#endif

}  // namespace races
