#include "vec_portable.h"

#include "attention_body.h"

namespace endside {

const AttentionKernels& attention_kernels_portable() { return KERNELS; }

}  // namespace endside
