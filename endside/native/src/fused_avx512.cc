#include "vec_avx512.h"
// the vectors of this instruction set come first
#include "fused_body.h"

namespace endside {

const FusedKernels& fused_avx512() { return KERNELS; }

}  // namespace endside
