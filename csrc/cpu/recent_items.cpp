// recent_items on the CPU: the distinct items of spans of a log, by their last place. Each row is
// read twice, to count and to write, so that the rows can be shared out among threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "../ops.h"
#include "parallel.h"

namespace recgrela {
namespace {

constexpr const char* kOp = "recent_items";

// The number of places in all spans.
int64_t check(const Tensor& items, const Tensor& next, const Tensor& begin, const Tensor& end) {
  RECGRELA_CHECK(items.dim() == 1, kOp, ": items must have shape [T], got ", shape_text(items));
  RECGRELA_CHECK(begin.dim() == 1, kOp, ": begin must have shape [R], got ", shape_text(begin));
  const int64_t T = items.size(0), R = begin.size(0);
  check_dense(kOp, "items", items, {T}, ScalarType::Long, items);
  check_dense(kOp, "next", next, {T}, ScalarType::Long, items);
  check_dense(kOp, "begin", begin, {R}, ScalarType::Long, items);
  check_dense(kOp, "end", end, {R}, ScalarType::Long, items);
  const int64_t *first = integers(begin), *last = integers(end);
  int64_t places = 0;
  for (int64_t r = 0; r < R; ++r) {
    if (first[r] >= last[r]) continue;  // an empty span may lie anywhere
    RECGRELA_CHECK(first[r] >= 0 && last[r] <= T, kOp, ": spans must lie in 0..", T, ", got ",
                   first[r], " to ", last[r]);
    places += last[r] - first[r];
  }
  return places;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> recent_items_cpu(Tensor items, Tensor next, Tensor begin,
                                                    Tensor end) {
  const int64_t places = check(items, next, begin, end), R = begin.size(0);
  const int64_t *item = integers(items), *again = integers(next);
  const int64_t *first = integers(begin), *last = integers(end);
  const int64_t grain = 1 + (R * 16384) / (places + 1);

  Tensor offsets = torch::stable::new_empty(items, {R + 1});
  int64_t* bounds = static_cast<int64_t*>(offsets.mutable_data_ptr());
  bounds[0] = 0;
  run_parallel(kOp, R, grain, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      int64_t count = 0;
      for (int64_t p = first[r]; p < last[r]; ++p) count += again[p] >= last[r];
      bounds[r + 1] = count;
    }
  });
  for (int64_t r = 0; r < R; ++r) bounds[r + 1] += bounds[r];

  Tensor found = torch::stable::new_empty(items, {bounds[R]});
  Tensor recency = torch::stable::new_empty(items, {bounds[R]});
  int64_t* to_item = static_cast<int64_t*>(found.mutable_data_ptr());
  int64_t* to_recency = static_cast<int64_t*>(recency.mutable_data_ptr());
  run_parallel(kOp, R, grain, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      int64_t k = bounds[r];
      for (int64_t p = first[r]; p < last[r]; ++p) {
        if (again[p] < last[r]) continue;
        to_item[k] = item[p];
        to_recency[k] = bounds[r + 1] - k;
        ++k;
      }
    }
  });
  return {offsets, found, recency};
}

}  // namespace recgrela

STABLE_TORCH_LIBRARY_IMPL(recgrela, CPU, m) {
  m.impl("recent_items", TORCH_BOX(&recgrela::recent_items_cpu));
}
