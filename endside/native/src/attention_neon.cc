#include "vec_neon.h"

#include "attention_body.h"

namespace endside {

const AttentionKernels& attention_kernels_neon() { return KERNELS; }

}  // namespace endside
