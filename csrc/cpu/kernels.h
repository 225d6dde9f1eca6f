// The CPU kernels' interface: plain pointers and sizes, no torch. A kernel is compiled once per
// instruction-set level (level_*.cpp); levels.cpp picks the table of the machine at run time.
#pragma once
#include "../params.h"

namespace recgrela {

// Elements of a row that is as long as any level makes it.
inline int64_t padded_row(int64_t D, DType dtype) {
  const int64_t lanes = dtype == DType::kDouble ? 8 : 16;
  return (D + lanes - 1) / lanes * lanes;
}

constexpr int64_t kSegment = 64 * kChunk;  // items; a longer history is summed segment by segment

struct GatedRelaParams : SequenceParams {
  const double* step_rotation;  // [H, kChunk + 1, 2, D/2], see fill_step_rotation
  // Made by rotation_tables for sequences that start at 0: [H, kept_chunks, 2, kChunk, Dp], Dp the
  // head's width in whole vectors, for which padded_row() is enough.
  int64_t kept_chunks;
  void* rotations;
  // Where segments are work items of their own: their number, and per (sequence, head, segment) the
  // sums [D + 1, D] (kv, k_sum) of the items before it, from join_segments.
  int64_t segments;
  void* segment_sums;
};

struct GatedRelaBackwardParams : GradientParams {
  GatedRelaParams forward;                // out is not read
  void *dweight_partial, *dbias_partial;  // [groups, H*D, W], [groups, H*D]
  int64_t groups;                         // of consecutive sequences, a function of B alone
};

// All layers of one event per user. The weights are one buffer, matrices transposed to [in, out];
// layer after layer, C = H * D, M = mlp_width:
//   norm1 weight [C], bias [C] | gate [C, C], bias [C] if has_gate | in [C, C], bias [C]
//   q and k [C, 2C], bias [2C] | conv weight [C, W], bias [C] if W > 0 | out [C, C], bias [C]
//   norm2 weight [C], bias [C] | fc1 [C, M], bias [M] | fc2 [M, C], bias [C]
// then the final norm's weight [C] and bias [C] if has_final_norm.
struct EncoderStepParams {
  bool is_double, has_gate, has_final_norm;
  int64_t B, num_layers, H, D, W, mlp_width;  // W 0: no rank augmentation
  double eps, layer_norm_eps;
  const void* x;  // [B, C] rows, x_stride apart
  void* out;      // [B, C]
  int64_t x_stride;
  const void* weights;
  const double* inv_freq;  // [H, D/2]
  void* state;             // [B, F] rows, state_stride apart: per layer kv, k_sum, conv
  int64_t state_stride;
  const int64_t* position;  // [B]
  const bool* active;       // [B] or nullptr: all
};

// The k best inner products of each user. Work items: (group of kGroupUsers users, part of the
// items), group * parts + part. Each fills its users' heaps of that part; topk_scores.cpp merges.
struct TopKParams {
  DType table_type;    // of the table unless scale is given; double for double hidden
  const float* scale;  // [rows of table] for an int8 table, else nullptr
  int64_t users, width, k, parts;
  const void* hidden;  // [users, width] contiguous, float or double
  const void* table;   // rows table_stride apart
  int64_t table_stride;
  int64_t num_items;          // rows of the table, or the length of a candidate list
  const int64_t* candidates;  // nullptr: all rows; [num_items] ascending and distinct but for
                              // padding, one list per user where candidates_stride > 0
  int64_t candidates_stride;
  const int64_t* seen;  // [users, num_seen] ascending, or nullptr
  int64_t num_seen;
  int64_t padding;  // a row that is no item, or -1
  void* scores;     // heaps [parts, users, k], filled with (-inf, padding) before
  int64_t* items;
};

constexpr int kGroupUsers = 512, kBlockItems = 240;

// encoder_step: users that share one pass over the weights, columns to a panel of a weight.
constexpr int kUsersAtOnce = 16;
constexpr int64_t kPanelColumns = 64;

// y = [residual +] dropout(act(x)) on contiguous elements; backward: the gradient of x.
struct ActivationDropoutParams {
  DType dtype;
  bool gelu;  // act, the identity without it
  int64_t numel;
  uint64_t seed;
  uint32_t dropped;    // an element is dropped when its random word is below
  double scale;        // of the others
  const void* first;   // x; backward: the gradient of y
  const void* second;  // residual or nullptr; backward: x, nullptr without gelu
  void* out;
};

// Cross-entropy of the rows [chunk_begin, chunk_end) of a list, and its gradients. Rows of classes,
// scaled and grad_classes are class_stride elements apart, whole vectors of every level: what lies
// behind `width` is 0.
struct SoftmaxLossParams {
  bool is_double, gradients;
  int64_t width, class_stride, classes, masked;  // masked: a row that is no class, or -1
  int64_t num_rows, chunk_begin, chunk_end;
  int64_t group_rows;  // whose class gradients are summed by themselves, whole tiles of every level
  const int64_t *rows, *targets;     // [num_rows] rows of hidden, and the class of each
  const void* hidden;                // [T, width]
  const void* class_rows;            // [classes, class_stride]
  void* scores;                      // chunk: [tiles, classes, rows of a tile]
  void* scaled;                      // chunk: [rows, class_stride]
  double* losses;                    // [num_rows]
  void *grad_hidden, *grad_classes;  // [T, width], [classes, class_stride]
  // Added to scores: of row t, bias_values[k] to the score of table row bias_items[k], k from
  // bias_offsets[t] to bias_offsets[t + 1]; items that are no class are passed by. nullptr: none.
  const int64_t *bias_offsets, *bias_items;
  const void* bias_values;
  void* grad_bias;
  int64_t first_class;  // row of the table
  // Or by recency: row t has met the places [span_begin[t], span_end[t]) of a log. The class met
  // r-th last of them gets bias_values[b], b the number of bounds up_to below r. nullptr: none.
  const int64_t *span_begin, *span_end, *up_to;          // [T], [T], [buckets - 1]
  const int32_t *place_class, *next_place, *last_place;  // of every place: its class, -1 for none;
                                                         // where the same item stands next, or
                                                         // INT32_MAX, and stood before, or -1
  int64_t buckets;
  double* bucket_gradients;  // [tiles of all rows, buckets]
};

constexpr int64_t kLossTile = 32;  // rows, a multiple of every level's tile

constexpr int64_t kDropoutBlock = 1024;  // elements of activation_dropout with one pair of keys

// [residual +] dropout(W2 dropout(GELU(W1 x + b1)) + b2). Widths are whole vectors of every level.
// Backward, `out` is the gradient of x and `pre` is read.
struct FeedForwardParams {
  bool is_double;
  int64_t rows, width, inner;  // C, M
  uint64_t inner_seed, outer_seed;
  uint32_t dropped;  // these two as in ActivationDropoutParams
  double scale;
  const void *x, *residual;                  // [rows, C]; residual nullptr: none
  const void *first_weight, *first_bias;     // [M, C], [M]
  const void *second_weight, *second_bias;   // [C, M], [C]
  const void *first_panels, *second_panels;  // from feed_forward_pack, as many elements
  const void* grad_out;                      // backward: [rows, C]
  void *out, *pre;                           // [rows, C], W1 x + b1 [rows, M] or nullptr
  void* partial;                             // backward: [groups, 2 M C + M + C]
  int64_t group_tiles;                       // a function of rows alone
};

constexpr int64_t kTileRows = 64;  // times whole vectors: whole blocks of kDropoutBlock

// One call handles the work items [begin, end): (sequence, head) pairs b * H + h forward and in a
// step, (group, head) pairs backward, users in encoder_step, blocks of
// kDropoutBlock elements in activation_dropout, tiles of a chunk in softmax_loss and classes in
// softmax_class_gradients, which follows it, tiles of kTileRows rows in feed_forward and groups of
// them in its backward. Work items are independent of each other. Forward
// with segments they are ((b * H + h) * segments + s), and segment_sums must have run over all of
// them and join_segments after it.
struct Kernels {
  const char* level;
  void (*rotation_tables)(const GatedRelaParams&);
  void (*segment_sums)(const GatedRelaParams&, int64_t begin, int64_t end);
  void (*gated_rela)(const GatedRelaParams&, int64_t begin, int64_t end);
  void (*gated_rela_backward)(const GatedRelaBackwardParams&, int64_t begin, int64_t end);
  void (*gated_rela_step)(const GatedRelaStepParams&, int64_t begin, int64_t end);
  void (*encoder_step)(const EncoderStepParams&, int64_t begin, int64_t end);
  void (*topk_scores)(const TopKParams&, int64_t begin, int64_t end);
  void (*activation_dropout)(const ActivationDropoutParams&, int64_t begin, int64_t end);
  void (*activation_dropout_backward)(const ActivationDropoutParams&, int64_t begin, int64_t end);
  int64_t (*loss_tile_rows)(const SoftmaxLossParams&);
  void (*softmax_loss)(const SoftmaxLossParams&, int64_t begin, int64_t end);
  void (*softmax_class_gradients)(const SoftmaxLossParams&, int64_t begin, int64_t end);
  void (*feed_forward_pack)(const FeedForwardParams&, bool backward, void* first, void* second);
  void (*feed_forward)(const FeedForwardParams&, int64_t begin, int64_t end);
  void (*feed_forward_backward)(const FeedForwardParams&, int64_t begin, int64_t end);
};

extern const Kernels kBaselineKernels;
extern const Kernels kAvx2Kernels;    // defined on x86-64 only
extern const Kernels kAvx512Kernels;  // defined on x86-64 only

// The fastest level this machine runs, or the one named by RECGRELA_CPU_LEVEL (baseline, avx2,
// avx512). Throws std::invalid_argument for a name that is unknown or that the machine lacks.
const Kernels& kernels();

// The levels this machine can run, a comma between them.
const char* available_levels();

// cos and sin of j * inv_freq, j = 0 .. kChunk: table [H, kChunk + 1, 2, D/2].
void fill_step_rotation(double* table, const double* inv_freq, int64_t H, int64_t D, DType dtype);

// From the sums of each segment to those of all segments before it, the initial state included.
void join_segments(const GatedRelaParams& p);

// Where the saved chunk states of sequence b begin.
int64_t first_chunk(const GatedRelaParams& p, int64_t b);

}  // namespace recgrela
