#include "vec_avx2.h"
// the vectors of this instruction set come first
#include "fused_body.h"

namespace endside {

const FusedKernels& fused_avx2() { return KERNELS; }

}  // namespace endside
