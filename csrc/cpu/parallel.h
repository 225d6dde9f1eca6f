// A kernel on the threads of torch. What a work item throws inside torch's loop reaches the caller
// without its text, so running out of scratch memory is noted there and reported here.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <new>
#include <stdexcept>
#include <string>

namespace recgrela {

// Work items a thread should get at least, so that starting it pays.
inline int64_t grain_size(int64_t items, int64_t D) { return 1 + 16384 / (items * D + 1); }

// Calls body(begin, end) on ranges of [0, count) of `grain` work items at least. Throws
// std::runtime_error, naming `op`, where a thread finds no memory for its scratch.
template <class Body>
void run_parallel(const char* op, int64_t count, int64_t grain, Body&& body) {
  std::atomic<bool> no_memory{false};
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    try {
      body(begin, end);
    } catch (const std::bad_alloc&) {
      no_memory = true;
    }
  });
  if (!no_memory) return;
  throw std::runtime_error(std::string("not enough memory for the scratch of ") + op);
}

}  // namespace recgrela
