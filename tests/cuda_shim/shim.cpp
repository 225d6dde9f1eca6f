// The scheduler behind cuda_runtime.h: fibers by ucontext, told to AddressSanitizer where it runs.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"
#include "races.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define TELL_START(save, stack, size) __sanitizer_start_switch_fiber(save, stack, size)
#define TELL_FINISH(save, stack, size) __sanitizer_finish_switch_fiber(save, stack, size)
#else
#define TELL_START(save, stack, size) (void)0
#define TELL_FINISH(save, stack, size) (void)0
#endif

namespace shim {

Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr std::size_t kStack = 256 * 1024;
constexpr unsigned kLanes = 32;

enum class State { kReady, kAtBlockBarrier, kAtWarp, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state;
  void* fake_stack = nullptr;
};

struct Warp {
  Deposit values[2][kLanes];  // of this collective and of the one before
  unsigned arrived, round;
};

// An asynchronous copy that has been issued and not waited for.
struct Copy {
  void* to;
  const void* from;
  int bytes;
};
constexpr int kCopied = 16;

Order order = Order::kForward;
bool one_warp_at_a_time = true;
std::mt19937 generator;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
std::vector<std::vector<Copy>> copies;  // of every thread
std::vector<unsigned char> shared;
unsigned char* shared_start = nullptr;
ucontext_t scheduler;
[[maybe_unused]] const void* scheduler_stack = nullptr;
[[maybe_unused]] std::size_t scheduler_size = 0;
[[maybe_unused]] void* scheduler_fake = nullptr;
const std::function<void()>* body = nullptr;

[[noreturn]] void stop(const char* what) {
  std::fprintf(stderr, "cuda_shim: %s (block %u)\n", what, block_index.x);
  std::abort();
}

// From the running fiber back to the scheduler.
void give_way(State state) {
  const unsigned self = thread_index.x;
  Fiber& fiber = *fibers[self];
  fiber.state = state;
  TELL_START(state == State::kDone ? nullptr : &fiber.fake_stack, scheduler_stack, scheduler_size);
  swapcontext(&fiber.context, &scheduler);
  TELL_FINISH(fiber.fake_stack, nullptr, nullptr);
  thread_index.x = self;
}

void entry() {
  TELL_FINISH(nullptr, &scheduler_stack, &scheduler_size);
  (*body)();
  give_way(State::kDone);
}

void resume(unsigned thread) {
  Fiber& fiber = *fibers[thread];
  thread_index.x = thread;
  races::thread_runs(thread, fiber.stack.get(), kStack);
  TELL_START(&scheduler_fake, fiber.stack.get(), kStack);
  swapcontext(&scheduler, &fiber.context);
  TELL_FINISH(scheduler_fake, nullptr, nullptr);
}

std::vector<unsigned> in_order(unsigned count) {
  std::vector<unsigned> list(count);
  std::iota(list.begin(), list.end(), 0u);
  if (order == Order::kReverse) std::reverse(list.begin(), list.end());
  if (order == Order::kShuffled) std::shuffle(list.begin(), list.end(), generator);
  return list;
}

void start(unsigned threads) {
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  warps.assign((threads + kLanes - 1) / kLanes, Warp{});
  copies.assign(threads, {});
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = *fibers[t];
    fiber.state = State::kReady;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
  }
}

bool is_ready(unsigned warp) {
  for (unsigned t = warp * kLanes; t < (warp + 1) * kLanes; ++t) {
    if (fibers[t]->state == State::kReady) return true;
  }
  return false;
}

// Every thread of a warp that can goes on to its next collective or barrier.
void run_warp(unsigned warp) {
  for (unsigned lane : in_order(kLanes)) {
    const unsigned t = warp * kLanes + lane;
    if (fibers[t]->state == State::kReady) resume(t);
  }
}

// Until every thread waits or is done: a warp runs as far ahead of the others as it can, or the
// warps take turns and miss every other one. A missing barrier between them shows.
void run_warps(unsigned count) {
  for (bool moved = true; moved;) {
    moved = false;
    for (unsigned w : in_order(count)) {
      while (is_ready(w)) {
        moved = true;
        if (one_warp_at_a_time || generator() % 2 == 0) run_warp(w);
        if (!one_warp_at_a_time) break;
      }
    }
  }
}

// Opens the block's barrier when all threads wait there.
bool open_barrier(unsigned threads) {
  for (unsigned t = 0; t < threads; ++t) {
    if (fibers[t]->state != State::kAtBlockBarrier) return false;
  }
  for (unsigned t = 0; t < threads; ++t) fibers[t]->state = State::kReady;
  return true;
}

void run_block(unsigned threads, std::size_t shared_bytes) {
  const float nan = std::nanf("");
  // Exactly as large as asked for, so that AddressSanitizer sees an access behind it.
  shared = std::vector<unsigned char>();
  shared.resize(shared_bytes);
  shared.shrink_to_fit();
  for (std::size_t i = 0; i + sizeof(nan) <= shared_bytes; i += sizeof(nan)) {
    std::memcpy(shared.data() + i, &nan, sizeof(nan));
  }
  shared_start = shared.data();
  start(threads);
  races::block_starts(threads);
  do {
    run_warps(threads / kLanes);
  } while (open_barrier(threads));
  races::block_ends();
  for (unsigned t = 0; t < threads; ++t) {
    if (fibers[t]->state != State::kDone) stop("a barrier never fills");
  }
  for (const std::vector<Copy>& open : copies) {
    if (!open.empty()) stop("a copy was never waited for");
  }
}

}  // namespace

void set_order(Order wanted, unsigned seed) {
  order = wanted;
  one_warp_at_a_time = wanted != Order::kShuffled || seed % 2 == 1;
  generator.seed(seed);
}

void run(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& kernel) {
  if (threads % int(kLanes) != 0 || threads > 1024) stop("a block must be whole warps");
  // sm_86, sm_89 and sm_120 give a block no more; sm_75, which gives less, is not built for.
  if (shared_bytes > 99 * 1024) stop("more shared memory than a block gets everywhere");
  body = &kernel;
  block_size.x = unsigned(threads);
  grid_size.x = unsigned(blocks);
  for (unsigned block : in_order(unsigned(blocks))) {
    block_index.x = block;
    run_block(unsigned(threads), std::size_t(shared_bytes));
  }
}

unsigned char* shared_memory() { return shared_start; }

void block_barrier() {
  give_way(State::kAtBlockBarrier);
  races::block_barrier(thread_index.x);
}

void warp_barrier() {
  gather({});
  races::warp_barrier(thread_index.x);
}

const Deposit* gather(const Deposit& deposit) {
  const unsigned self = thread_index.x, lane = self % kLanes, first = self - lane;
  Warp& warp = warps[self / kLanes];
  const unsigned buffer = warp.round % 2;
  warp.values[buffer][lane] = deposit;
  if (++warp.arrived < kLanes) {
    give_way(State::kAtWarp);
  } else {
    warp.arrived = 0;
    ++warp.round;
    for (unsigned t = first; t < first + kLanes; ++t) {
      if (fibers[t]->state == State::kAtWarp) fibers[t]->state = State::kReady;
    }
    give_way(State::kReady);  // not always the first to go on
  }
  return warp.values[buffer];
}

uint64_t exchange(uint64_t value, unsigned source) { return gather({{value}})[source].at[0]; }

// The destination is garbage until the copy has been waited for: it may arrive at any time.
void copy_async(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % kCopied != 0) stop("a copy to an odd address");
  if (bytes != 0 && reinterpret_cast<uintptr_t>(from) % kCopied != 0) stop("a copy from there");
  std::memset(to, 0xff, kCopied);
  races::access(to, kCopied, true);
  copies[thread_index.x].push_back({to, from, bytes});
}

void wait_for_copies() {
  for (const Copy& copy : copies[thread_index.x]) {
    std::memset(copy.to, 0, kCopied);
    races::access(copy.to, kCopied, true);
    if (copy.bytes > 0) std::memcpy(copy.to, copy.from, std::size_t(copy.bytes));
  }
  copies[thread_index.x].clear();
}

void need_full_mask(unsigned mask) {
  if (mask != 0xffffffffu) stop("a warp collective must name all 32 lanes");
}

float half_to_float(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, sizeof(x));
  return float(x);
}

uint16_t float_to_half(float x) {
  const _Float16 rounded = _Float16(x);
  uint16_t bits;
  std::memcpy(&bits, &rounded, sizeof(bits));
  return bits;
}

uint16_t float_to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (x != x) return 0x7fff;
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace shim
