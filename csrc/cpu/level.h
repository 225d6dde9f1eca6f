// Body of a level file: every kernel, compiled for the target its pragma names. The level file
// defines RECGRELA_VECTOR_BYTES, RECGRELA_LEVEL (a namespace) and RECGRELA_KERNELS (the table's
// name) first.
namespace recgrela {
namespace RECGRELA_LEVEL {
#include "simd.h"
// keep this order
#include "functions.h"
#include "storage.h"
// keep this order
#include "rows.h"
// keep this order
#include "rotation.h"
#include "running_state.h"
#include "scan.h"
// keep this order
#include "chunk.h"
// keep this order
#include "gated_rela_backward.h"
#include "gated_rela_forward.h"
#include "gated_rela_step.h"
// keep this order
#include "gelu.h"
// keep this order
#include "activation_dropout.h"
#include "encoder_step.h"
#include "matrix_blocks.h"
// keep this order
#include "feed_forward.h"
#include "recency_bias.h"
// keep this order
#include "softmax_loss.h"
#include "topk_scores.h"
}  // namespace RECGRELA_LEVEL

const Kernels RECGRELA_KERNELS = {
    RECGRELA_LEVEL_NAME,
    RECGRELA_LEVEL::rotation_tables,
    RECGRELA_LEVEL::segment_sums,
    RECGRELA_LEVEL::gated_rela,
    RECGRELA_LEVEL::gated_rela_backward,
    RECGRELA_LEVEL::gated_rela_step,
    RECGRELA_LEVEL::encoder_step,
    RECGRELA_LEVEL::topk_scores,
    RECGRELA_LEVEL::activation_dropout,
    RECGRELA_LEVEL::activation_dropout_backward,
    RECGRELA_LEVEL::loss_tile_rows,
    RECGRELA_LEVEL::softmax_loss,
    RECGRELA_LEVEL::softmax_class_gradients,
    RECGRELA_LEVEL::feed_forward_pack,
    RECGRELA_LEVEL::feed_forward,
    RECGRELA_LEVEL::feed_forward_backward,
};
}  // namespace recgrela
