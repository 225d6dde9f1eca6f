// See races.h. Between blocks nothing is compared: they wait for none of each other.
#ifdef RECGRELA_CUDA_RACES
#include "races.h"

#include <cstdint>
#include <cstdio>
#include <unordered_map>
#include <vector>

namespace races {
namespace {

constexpr unsigned kLanes = 32;
constexpr int kShown = 5;

// Barriers a thread has passed.
struct Time {
  uint32_t block = 0, warp = 0;
};
struct Access {
  int thread = -1;
  Time time;
};
// Two bytes of memory. Readers since the last write: two of one warp and two of another are enough,
// for any writer at least one of them is another thread, and of another warp if one is.
struct Cell {
  Access write, reads[4];
};

std::vector<Time> times;
std::unordered_map<uintptr_t, Cell> cells;
const char *stack_begin = nullptr, *stack_end = nullptr;
int self = 0, count = 0;

bool ordered(const Access& before, const Time& now) {
  if (before.thread < 0 || before.thread == self || before.time.block < now.block) return true;
  const bool same_warp = unsigned(before.thread) / kLanes == unsigned(self) / kLanes;
  return same_warp && before.time.warp < now.warp;
}

void report(const Access& before, const void* at, bool was_write, bool write, const void* code) {
  if (++count > kShown) return;
  std::fprintf(stderr, "cuda_shim: threads %d (%s) and %d (%s) race for %p, code %p\n",
               before.thread, was_write ? "write" : "read", self, write ? "write" : "read", at,
               code);
}

// A reader takes the place of one that is no news to any later writer, else a free one.
void add_reader(Cell& cell, const Time& now) {
  Access* place = nullptr;
  int of_warp = 0;
  for (Access& read : cell.reads) {
    const bool same_warp =
        read.thread >= 0 && unsigned(read.thread) / kLanes == unsigned(self) / kLanes;
    if (read.thread == self || ordered(read, now)) {
      place = &read;
      break;
    }
    of_warp += same_warp;
  }
  for (Access& read : cell.reads) {
    if (place == nullptr && of_warp < 2 && read.thread < 0) place = &read;
  }
  if (place != nullptr) *place = {self, now};
}

void touch(const void* at, std::size_t bytes, bool write, const void* code) {
  const char* first = static_cast<const char*>(at);
  if (times.empty() || (first >= stack_begin && first < stack_end)) return;
  const Time now = times[std::size_t(self)];
  const uintptr_t begin = reinterpret_cast<uintptr_t>(at) / 2;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(at) + bytes + 1) / 2;
  for (uintptr_t i = begin; i < end; ++i) {
    Cell& cell = cells[i];
    if (!ordered(cell.write, now)) report(cell.write, at, true, write, code);
    if (!write) {
      add_reader(cell, now);
      continue;
    }
    for (const Access& read : cell.reads) {
      if (!ordered(read, now)) report(read, at, false, true, code);
    }
    cell = {};
    cell.write = {self, now};
  }
}

}  // namespace

void block_starts(unsigned threads) {
  times.assign(threads, Time{});
  cells.clear();
}
void block_ends() { times.clear(); }  // what the host does between launches counts for nothing
void thread_runs(unsigned thread, const void* stack, std::size_t bytes) {
  self = int(thread);
  stack_begin = static_cast<const char*>(stack);
  stack_end = stack_begin + bytes;
}
void warp_barrier(unsigned thread) { ++times[thread].warp; }
void block_barrier(unsigned thread) { ++times[thread].block; }
void access(const void* at, std::size_t bytes, bool write) {
  touch(at, bytes, write, __builtin_return_address(0));
}
int found() { return count; }

}  // namespace races

// What -fsanitize=thread calls.
#define ACCESS(name, bytes, write)                               \
  extern "C" void __tsan_##name(void* at) {                      \
    races::touch(at, bytes, write, __builtin_return_address(0)); \
  }
#define ACCESSES(bytes)                      \
  ACCESS(read##bytes, bytes, false)          \
  ACCESS(write##bytes, bytes, true)          \
  ACCESS(volatile_read##bytes, bytes, false) \
  ACCESS(volatile_write##bytes, bytes, true)
#define UNALIGNED(bytes)                               \
  ACCESS(unaligned_read##bytes, bytes, false)          \
  ACCESS(unaligned_write##bytes, bytes, true)          \
  ACCESS(unaligned_volatile_read##bytes, bytes, false) \
  ACCESS(unaligned_volatile_write##bytes, bytes, true)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
UNALIGNED(2)
UNALIGNED(4)
UNALIGNED(8)
UNALIGNED(16)
extern "C" void __tsan_read_range(void* at, std::size_t bytes) {
  races::touch(at, bytes, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* at, std::size_t bytes) {
  races::touch(at, bytes, true, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
#endif
