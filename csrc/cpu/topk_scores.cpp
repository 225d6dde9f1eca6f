// topk_scores on the CPU: checks, memory, threads and the merging of parts. The scoring is in
// topk_scores.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>

#include "../arguments.h"
#include "kernels.h"
#include "parallel.h"

namespace recgrela {
namespace {

#define RECGRELA_HEAP_INLINE inline
#include "topk_heap.h"

constexpr int64_t kWorkItems = 32, kFewestItems = 1 << 14;  // when to split the items

// A function of the shapes; the result does not depend on it.
int64_t count_parts(int64_t users, int64_t items, bool own_lists) {
  if (own_lists) return 1;
  const int64_t groups = (users + kGroupUsers - 1) / kGroupUsers;
  return std::max<int64_t>(
      1, std::min(kWorkItems / std::max<int64_t>(groups, 1), items / kFewestItems));
}

void check_rows_of_table(const char* op, const Tensor& candidates, int64_t rows) {
  const int64_t* values = integers(candidates);
  for (int64_t i = 0; i < candidates.numel(); ++i) {
    RECGRELA_CHECK(values[i] >= 0 && values[i] < rows, op, ": candidates must lie in 0..", rows - 1,
                   ", got ", values[i]);
  }
}

void check(const char* op, const Tensor& hidden, const Tensor& table, const OptionalTensor& scale,
           int64_t k, const OptionalTensor& seen, const OptionalTensor& candidates) {
  RECGRELA_CHECK(hidden.dim() == 2, op, ": hidden must have shape [B, width], got ",
                 shape_text(hidden));
  const int64_t B = hidden.size(0), width = hidden.size(1);
  RECGRELA_CHECK(table.dim() == 2 && table.size(1) == width, op, ": table must have shape [N, ",
                 width, "], got ", shape_text(table));
  const ScalarType in = hidden.scalar_type(), rows = table.scalar_type();
  const bool wide = in == ScalarType::Double && rows == ScalarType::Double && !scale;
  const bool narrow = in == ScalarType::Float &&
                      (scale ? rows == ScalarType::Char
                             : rows == ScalarType::Float || rows == ScalarType::BFloat16 ||
                                   rows == ScalarType::Half);
  RECGRELA_CHECK(wide || narrow, op, ": table must suit hidden (float32 with float32, bfloat16, ",
                 "float16 or scaled int8, or float64 with float64), got ", rows, " and ", in);
  RECGRELA_CHECK(k >= 1, op, ": k must be at least 1, got ", k);
  RECGRELA_CHECK(table.numel() == 0 || table.stride(1) == 1, op,
                 ": table must have a contiguous last dimension");
  check_dense(op, "hidden", hidden, {B, width}, in, hidden);
  check_dense(op, "scale", scale, {table.size(0)}, ScalarType::Float, hidden);
  if (seen) {
    RECGRELA_CHECK(seen->dim() == 2, op, ": seen must have shape [B, S], got ", shape_text(*seen));
    check_dense(op, "seen", seen, {B, seen->size(1)}, ScalarType::Long, hidden);
  }
  if (!candidates) return;
  if (candidates->dim() == 2) {
    check_dense(op, "candidates", candidates, {B, candidates->size(1)}, ScalarType::Long, hidden);
  } else {
    check_dense(op, "candidates", candidates, {candidates->numel()}, ScalarType::Long, hidden);
  }
  check_rows_of_table(op, *candidates, table.size(0));
}

// Brings the parts' heaps of users [begin, end) together in scores and items [users, k], sorted.
// With one part these are the heaps themselves.
template <class A>
void merge_parts(const TopKParams& p, A* scores, int64_t* items, int64_t begin, int64_t end) {
  const A* heaps = static_cast<const A*>(p.scores);
  for (int64_t user = begin; user < end; ++user) {
    A* best = scores + user * p.k;
    int64_t* best_items = items + user * p.k;
    if (p.parts > 1) {
      std::copy_n(heaps + user * p.k, p.k, best);
      std::copy_n(p.items + user * p.k, p.k, best_items);
    }
    for (int64_t part = 1; part < p.parts; ++part) {
      const int64_t from = (part * p.users + user) * p.k;
      for (int64_t i = from; i < from + p.k; ++i) {
        if (heaps[i] > -std::numeric_limits<A>::infinity()) {
          offer(best, best_items, p.k, heaps[i], p.items[i]);
        }
      }
    }
    sort_heap(best, best_items, p.k);
  }
}

template <class A>
void run(const TopKParams& p, void* scores_out, int64_t* items_out) {
  const int64_t groups = (p.users + kGroupUsers - 1) / kGroupUsers;
  const int64_t places = p.parts * p.users * p.k;
  A* scores = static_cast<A*>(p.scores);
  std::fill(scores, scores + places, -std::numeric_limits<A>::infinity());
  std::fill(p.items, p.items + places, p.padding);
  const Kernels& level = kernels();
  torch::stable::parallel_for(0, groups * p.parts, 1, [&](int64_t begin, int64_t end) {
    level.topk_scores(p, begin, end);
  });
  torch::stable::parallel_for(0, p.users, 64, [&](int64_t begin, int64_t end) {
    merge_parts(p, static_cast<A*>(scores_out), items_out, begin, end);
  });
}

}  // namespace

std::tuple<Tensor, Tensor> topk_scores_cpu(Tensor hidden, Tensor table, OptionalTensor scale,
                                           int64_t k, int64_t padding_idx, OptionalTensor seen,
                                           OptionalTensor candidates) {
  check("topk_scores", hidden, table, scale, k, seen, candidates);
  const bool own_lists = candidates && candidates->dim() == 2;
  TopKParams p{};
  p.table_type = scale ? DType::kFloat : kernel_dtype(table.scalar_type());
  p.scale = static_cast<const float*>(data_or_null(scale));
  p.users = hidden.size(0);
  p.width = hidden.size(1);
  p.k = k;
  p.hidden = hidden.const_data_ptr();
  p.table = table.const_data_ptr();
  p.table_stride = table.stride(0);
  p.num_items = candidates ? candidates->size(candidates->dim() - 1) : table.size(0);
  p.candidates = static_cast<const int64_t*>(data_or_null(candidates));
  p.candidates_stride = own_lists ? p.num_items : 0;
  p.num_seen = seen ? seen->size(1) : 0;
  p.seen = p.num_seen > 0 ? integers(*seen) : nullptr;
  p.padding = padding_idx;
  p.parts = count_parts(p.users, p.num_items, own_lists);

  Tensor scores = torch::stable::new_empty(hidden, {p.users, k});
  Tensor items = torch::stable::new_empty(hidden, {p.users, k}, ScalarType::Long);
  Tensor heaps = scores, heap_items = items;
  if (p.parts > 1) {
    heaps = torch::stable::new_empty(scores, {p.parts, p.users, k});
    heap_items = torch::stable::new_empty(items, {p.parts, p.users, k});
  }
  p.scores = heaps.mutable_data_ptr();
  p.items = static_cast<int64_t*>(heap_items.mutable_data_ptr());
  void* scores_out = scores.mutable_data_ptr();
  int64_t* items_out = static_cast<int64_t*>(items.mutable_data_ptr());
  if (hidden.scalar_type() == ScalarType::Double) {
    run<double>(p, scores_out, items_out);
  } else {
    run<float>(p, scores_out, items_out);
  }
  return {scores, items};
}

}  // namespace recgrela

STABLE_TORCH_LIBRARY_IMPL(recgrela, CPU, m) {
  m.impl("topk_scores", TORCH_BOX(&recgrela::topk_scores_cpu));
}
