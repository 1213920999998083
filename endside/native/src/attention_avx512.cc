#include "vec_avx512.h"

#include "attention_body.h"

namespace endside {

const AttentionKernels& attention_kernels_avx512() { return KERNELS; }

}  // namespace endside
