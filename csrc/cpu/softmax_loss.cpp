// softmax_loss on the CPU: checks, memory and threads. The loops are in softmax_loss.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "../arguments.h"
#include "kernels.h"
#include "parallel.h"

namespace recgrela {
namespace {

constexpr const char* kOp = "softmax_loss";
constexpr int64_t kGroupRows = 256, kFewestRows = 64;
constexpr int64_t kChunkScores = int64_t{1} << 24;  // 64 MiB of float32
constexpr int64_t kMostBuckets = 254;               // a byte each in recency_bias.h

void check(const Tensor& hidden, const Tensor& table, const Tensor& targets, int64_t ignore_index,
           bool exclude) {
  const ScalarType dtype = hidden.scalar_type();
  RECGRELA_CHECK(hidden.dim() == 2, kOp, ": hidden must have shape [T, width], got ",
                 shape_text(hidden));
  RECGRELA_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, kOp,
                 ": hidden must have dtype float32 or float64, got ", dtype);
  RECGRELA_CHECK(table.dim() == 2 && table.size(1) == hidden.size(1), kOp,
                 ": table must have shape [N, ", hidden.size(1), "], got ", shape_text(table));
  check_dense(kOp, "hidden", hidden, {hidden.size(0), hidden.size(1)}, dtype, hidden);
  check_dense(kOp, "table", table, {table.size(0), table.size(1)}, dtype, hidden);
  check_dense(kOp, "targets", targets, {hidden.size(0)}, ScalarType::Long, hidden);
  RECGRELA_CHECK(!exclude || (ignore_index >= 0 && ignore_index < table.size(0)), kOp,
                 ": ignore_index must be a row of table to be excluded, got ", ignore_index);
}

// One bias for some items of some rows; see SoftmaxLossParams.
void check_bias(const Tensor& hidden, int64_t n_items, const Tensor& offsets, const Tensor& items,
                const Tensor& values) {
  check_dense(kOp, "bias.offsets", offsets, {hidden.size(0) + 1}, ScalarType::Long, hidden);
  RECGRELA_CHECK(items.dim() == 1, kOp, ": bias.items must have shape [K], got ",
                 shape_text(items));
  check_dense(kOp, "bias.items", items, {items.size(0)}, ScalarType::Long, hidden);
  check_dense(kOp, "bias.values", values, {items.size(0)}, hidden.scalar_type(), hidden);
  const int64_t* bounds = integers(offsets);
  const int64_t* rows = integers(items);
  const int64_t last = hidden.size(0), count = items.size(0);
  RECGRELA_CHECK(bounds[0] == 0 && bounds[last] == count, kOp,
                 ": bias.offsets must rise from 0 to K=", count, ", got ", bounds[0], " to ",
                 bounds[last]);
  for (int64_t t = 0; t < last; ++t) {
    RECGRELA_CHECK(bounds[t] <= bounds[t + 1], kOp, ": bias.offsets must rise from 0 to K=", count,
                   ", got ", bounds[t], " before ", bounds[t + 1]);
  }
  for (int64_t k = 0; k < count; ++k) {
    RECGRELA_CHECK(rows[k] >= 0 && rows[k] < n_items, kOp, ": bias.items must lie in 0..",
                   n_items - 1, ", got ", rows[k]);
  }
}

// A bias by recency; see SoftmaxLossParams. The values of its tensors are checked too.
void check_recency(const Tensor& hidden, int64_t n_items, const Tensor& items, const Tensor& values,
                   const Tensor& begin, const Tensor& end, const Tensor& up_to) {
  const int64_t T = hidden.size(0);
  RECGRELA_CHECK(items.dim() == 1 && items.size(0) < INT32_MAX, kOp,
                 ": bias.items must have shape [S], S below 2**31 - 1, got ", shape_text(items));
  RECGRELA_CHECK(n_items <= INT32_MAX, kOp, ": table must have at most 2**31 - 1 rows, got ",
                 n_items);
  RECGRELA_CHECK(values.dim() == 1 && values.size(0) >= 1 && values.size(0) <= kMostBuckets, kOp,
                 ": bias.values must have shape [K], K from 1 to ", kMostBuckets, ", got ",
                 shape_text(values));
  check_dense(kOp, "bias.items", items, {items.size(0)}, ScalarType::Long, hidden);
  check_dense(kOp, "bias.values", values, {values.size(0)}, hidden.scalar_type(), hidden);
  check_dense(kOp, "bias.begin", begin, {T}, ScalarType::Long, hidden);
  check_dense(kOp, "bias.end", end, {T}, ScalarType::Long, hidden);
  check_dense(kOp, "bias.up_to", up_to, {values.size(0) - 1}, ScalarType::Long, hidden);
  const int64_t *from = integers(begin), *to = integers(end), *bounds = integers(up_to);
  for (int64_t t = 0; t < T; ++t) {
    RECGRELA_CHECK(from[t] >= to[t] || (from[t] >= 0 && to[t] <= items.size(0)), kOp,
                   ": spans must lie in 0..", items.size(0), ", got ", from[t], " to ", to[t]);
  }
  for (int64_t k = 0; k < up_to.numel(); ++k) {
    RECGRELA_CHECK(bounds[k] > (k ? bounds[k - 1] : 0), kOp,
                   ": bias.up_to must rise from 1 or more, got ", bounds[k], " at ", k);
  }
  const int64_t* rows = integers(items);
  for (int64_t s = 0; s < items.numel(); ++s) {
    RECGRELA_CHECK(rows[s] >= 0 && rows[s] < n_items, kOp, ": bias.items must lie in 0..",
                   n_items - 1, ", got ", rows[s]);
  }
}

// The table's rows that are classes: one slice, with a row in its middle masked where it is none.
struct Classes {
  int64_t first, count, masked;
};

Classes find_classes(int64_t rows, bool exclude, int64_t excluded) {
  if (!exclude) return {0, rows, -1};
  if (excluded == 0) return {1, rows - 1, -1};
  if (excluded == rows - 1) return {0, rows - 1, -1};
  return {0, rows, excluded};
}

// Rows of hidden that have a target, and the class of each.
void list_rows(const Tensor& targets, int64_t ignore_index, int64_t n_items, int64_t first,
               std::vector<int64_t>& rows, std::vector<int64_t>& wanted) {
  const int64_t* values = integers(targets);
  for (int64_t t = 0; t < targets.numel(); ++t) {
    if (values[t] == ignore_index) continue;
    RECGRELA_CHECK(values[t] >= 0 && values[t] < n_items, kOp,
                   ": targets must be below n_items=", n_items, ", got ", values[t]);
    rows.push_back(t);
    wanted.push_back(values[t] - first);
  }
}

// Of every place of a log, see SoftmaxLossParams.
struct Places {
  std::vector<int32_t> of_class, next, last;
};

Places list_places(const Tensor& items, int64_t n_items, const Classes& classes) {
  const int64_t* rows = integers(items);
  const int64_t S = items.numel();
  Places places{std::vector<int32_t>(S), std::vector<int32_t>(S, INT32_MAX),
                std::vector<int32_t>(S)};
  std::vector<int32_t> latest(n_items, -1);
  for (int64_t s = 0; s < S; ++s) {
    const int64_t j = rows[s] - classes.first;
    const bool counts = j >= 0 && j < classes.count && j != classes.masked;
    places.of_class[s] = counts ? static_cast<int32_t>(j) : -1;
    int32_t& before = latest[rows[s]];
    places.last[s] = before;
    if (before >= 0) places.next[before] = static_cast<int32_t>(s);
    before = static_cast<int32_t>(s);
  }
  return places;
}

// Rows [count, from_width] to rows of to_width, zero behind them.
void copy_rows(const void* from, int64_t from_width, void* to, int64_t to_width, int64_t count,
               std::size_t element) {
  const std::size_t bytes = std::size_t(std::min(from_width, to_width)) * element;
  const std::size_t step = std::size_t(to_width) * element;
  for (int64_t i = 0; i < count; ++i) {
    char* row = static_cast<char*>(to) + std::size_t(i) * step;
    std::memcpy(row, static_cast<const char*>(from) + std::size_t(i * from_width) * element, bytes);
    std::memset(row + bytes, 0, step - bytes);
  }
}

void store_number(double x, bool is_double, void* to, int64_t at) {
  if (is_double) {
    static_cast<double*>(to)[at] = x;
  } else {
    static_cast<float*>(to)[at] = static_cast<float>(x);
  }
}

// The tiles' sums of the gradients of every bucket, in the order of the tiles.
void sum_buckets(const std::vector<double>& tiles, int64_t buckets, bool is_double, void* to) {
  for (int64_t b = 0; b < buckets; ++b) {
    double sum = 0.0;
    for (std::size_t x = b; x < tiles.size(); x += buckets) sum += tiles[x];
    store_number(sum, is_double, to, b);
  }
}

char* row_of(void* data, int64_t row, int64_t width, std::size_t element) {
  return static_cast<char*>(data) + std::size_t(row * width) * element;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> softmax_loss_cpu(
    Tensor hidden, Tensor table, Tensor targets, int64_t ignore_index, bool exclude, bool gradients,
    OptionalTensor bias_offsets, OptionalTensor bias_items, OptionalTensor bias_values,
    OptionalTensor bias_begin, OptionalTensor bias_end, OptionalTensor bias_up_to) {
  check(hidden, table, targets, ignore_index, exclude);
  const bool bias = bias_values.has_value(), by_recency = bias_begin.has_value();
  RECGRELA_CHECK(bias == bias_items.has_value() &&
                     bias == (bias_offsets.has_value() || by_recency) &&
                     !(bias_offsets.has_value() && by_recency) &&
                     by_recency == bias_end.has_value() && by_recency == bias_up_to.has_value(),
                 kOp,
                 ": bias must be given as offsets, items and values or as items, values, "
                 "begin, end and up_to, got some of them");
  if (bias && by_recency) {
    check_recency(hidden, table.size(0), *bias_items, *bias_values, *bias_begin, *bias_end,
                  *bias_up_to);
  } else if (bias) {
    check_bias(hidden, table.size(0), *bias_offsets, *bias_items, *bias_values);
  }
  const int64_t n_items = table.size(0), width = hidden.size(1);
  const Classes classes = find_classes(n_items, exclude, ignore_index);
  std::vector<int64_t> rows, wanted;
  list_rows(targets, ignore_index, n_items, classes.first, rows, wanted);

  SoftmaxLossParams p{};
  p.gradients = gradients;
  p.is_double = hidden.scalar_type() == ScalarType::Double;
  const std::size_t element = p.is_double ? sizeof(double) : sizeof(float);
  const int64_t lanes = 64 / static_cast<int64_t>(element);
  p.width = width;
  p.class_stride = (width + lanes - 1) / lanes * lanes;
  p.classes = classes.count;
  p.masked = classes.masked;
  p.num_rows = static_cast<int64_t>(rows.size());
  p.rows = rows.data();
  p.targets = wanted.data();
  p.hidden = hidden.const_data_ptr();
  std::vector<double> losses(rows.size());
  p.losses = losses.data();

  Tensor loss = torch::stable::new_empty(hidden, {});
  Tensor grad_hidden = torch::stable::new_empty(hidden, {0});
  Tensor grad_table = torch::stable::new_empty(hidden, {0});
  Tensor grad_bias = torch::stable::new_empty(hidden, {0});
  Tensor padded_classes = grad_table, padded_gradient = grad_table;
  const bool padded = p.class_stride != width;
  const char* table_rows = static_cast<const char*>(table.const_data_ptr());
  p.first_class = classes.first;
  Places places;
  std::vector<double> bucket_gradients;
  if (bias) p.bias_values = bias_values->const_data_ptr();
  if (bias && !by_recency) {
    p.bias_offsets = integers(*bias_offsets);
    p.bias_items = integers(*bias_items);
  }
  if (bias && by_recency) {
    places = list_places(*bias_items, n_items, classes);
    p.place_class = places.of_class.data();
    p.next_place = places.next.data();
    p.last_place = places.last.data();
    p.span_begin = integers(*bias_begin);
    p.span_end = integers(*bias_end);
    p.up_to = integers(*bias_up_to);
    p.buckets = bias_values->numel();
  }
  p.class_rows = table_rows + std::size_t(classes.first * width) * element;
  if (padded) {
    padded_classes = torch::stable::new_empty(hidden, {p.classes, p.class_stride});
    copy_rows(p.class_rows, width, padded_classes.mutable_data_ptr(), p.class_stride, p.classes,
              element);
    p.class_rows = padded_classes.const_data_ptr();
  }
  if (gradients) {
    grad_hidden = p.num_rows < hidden.size(0)
                      ? torch::stable::new_zeros(hidden, {hidden.size(0), width})
                      : torch::stable::new_empty(hidden, {hidden.size(0), width});
    grad_table = p.num_rows == 0 ? torch::stable::new_zeros(table, {n_items, width})
                                 : torch::stable::new_empty(table, {n_items, width});
    if (bias) {  // zero for rows without a target
      grad_bias = torch::stable::new_zeros(hidden, {bias_values->numel()});
      p.grad_bias = grad_bias.mutable_data_ptr();
    }
    p.grad_hidden = grad_hidden.mutable_data_ptr();
    p.grad_classes = row_of(grad_table.mutable_data_ptr(), classes.first, width, element);
    if (padded) {
      padded_gradient = torch::stable::new_empty(hidden, {p.classes, p.class_stride});
      p.grad_classes = padded_gradient.mutable_data_ptr();
    }
  }

  const int64_t at_once = kChunkScores / std::max<int64_t>(n_items, 1) / kLossTile * kLossTile;
  p.group_rows = std::clamp(at_once, kFewestRows, kGroupRows);
  const int64_t busy = torch::stable::get_num_threads() * kLossTile;  // a tile for every thread
  int64_t chunk = std::min((busy + p.group_rows - 1) / p.group_rows, at_once / p.group_rows);
  chunk = std::min(std::max<int64_t>(chunk, 1) * p.group_rows,
                   (p.num_rows + kLossTile - 1) / kLossTile * kLossTile);
  Tensor scores = torch::stable::new_empty(hidden, {chunk * p.classes});
  Tensor scaled = torch::stable::new_zeros(hidden, {chunk * p.class_stride});
  p.scores = scores.mutable_data_ptr();
  p.scaled = scaled.mutable_data_ptr();

  const Kernels& level = kernels();
  const int64_t tile = level.loss_tile_rows(p);
  bucket_gradients.resize(std::size_t(gradients ? (p.num_rows + tile - 1) / tile * p.buckets : 0));
  p.bucket_gradients = bucket_gradients.data();
  for (p.chunk_begin = 0; p.chunk_begin < p.num_rows; p.chunk_begin += chunk) {
    p.chunk_end = std::min(p.chunk_begin + chunk, p.num_rows);
    const int64_t tiles = (p.chunk_end - p.chunk_begin + tile - 1) / tile;
    run_parallel(kOp, tiles, 1,
                 [&](int64_t begin, int64_t end) { level.softmax_loss(p, begin, end); });
    if (!gradients) continue;
    constexpr int64_t kGrain = 48;  // classes, whole blocks
    torch::stable::parallel_for(
        0, (p.classes + kGrain - 1) / kGrain, 1, [&](int64_t begin, int64_t end) {
          level.softmax_class_gradients(p, begin * kGrain, std::min(end * kGrain, p.classes));
        });
  }

  if (gradients && by_recency) {
    sum_buckets(bucket_gradients, p.buckets, p.is_double, grad_bias.mutable_data_ptr());
  }
  double total = 0.0;
  for (double x : losses) total += x;
  total /= static_cast<double>(std::max<int64_t>(p.num_rows, 1));
  store_number(total, p.is_double, loss.mutable_data_ptr(), 0);
  if (gradients && p.num_rows > 0) {
    if (padded) {
      char* to = row_of(grad_table.mutable_data_ptr(), classes.first, width, element);
      copy_rows(p.grad_classes, p.class_stride, to, width, p.classes, element);
    }
    if (exclude && width > 0) {
      std::memset(row_of(grad_table.mutable_data_ptr(), ignore_index, width, element), 0,
                  std::size_t(width) * element);
    }
  }
  return {loss, grad_hidden, grad_table, grad_bias};
}

}  // namespace recgrela

STABLE_TORCH_LIBRARY_IMPL(recgrela, CPU, m) {
  m.impl("softmax_loss", TORCH_BOX(&recgrela::softmax_loss_cpu));
}
