#include "vec_neon.h"
// the vectors of this instruction set come first
#include "fused_body.h"

namespace endside {

const FusedKernels& fused_neon() { return KERNELS; }

}  // namespace endside
