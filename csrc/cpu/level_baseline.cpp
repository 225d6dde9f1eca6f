// The kernels for any processor.
#include "level_headers.h"

#define RECGRELA_LEVEL baseline
#define RECGRELA_LEVEL_NAME "baseline"
#define RECGRELA_REGISTER_BYTES 16
#define RECGRELA_KERNELS kBaselineKernels
#include "level.h"
