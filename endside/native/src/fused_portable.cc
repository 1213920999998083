#include "vec_portable.h"
// the vectors of this instruction set come first
#include "fused_body.h"

namespace endside {

const FusedKernels& fused_portable() { return KERNELS; }

}  // namespace endside
