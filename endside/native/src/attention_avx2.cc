#include "vec_avx2.h"

#include "attention_body.h"

namespace endside {

const AttentionKernels& attention_kernels_avx2() { return KERNELS; }

}  // namespace endside
