#include "attention_kernels.h"

#include <stdexcept>

namespace endside {

const AttentionKernels& attention_kernels(Isa isa) {
  switch (isa) {
    case Isa::portable: return attention_kernels_portable();
#if defined(ENDSIDE_X86)
    case Isa::avx2: return attention_kernels_avx2();
    case Isa::avx512: return attention_kernels_avx512();
#if defined(ENDSIDE_AMX)
    case Isa::amx: return attention_kernels_amx();
#endif
#elif defined(ENDSIDE_NEON)
    case Isa::neon: case Isa::neon_i8mm: return attention_kernels_neon();
#endif
    default: throw std::invalid_argument("attention was not built for this instruction set");
  }
}

}  // namespace endside
