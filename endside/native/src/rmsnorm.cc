#include "rmsnorm.h"

#include <stdexcept>

namespace endside {

void rmsnorm(const float* x, const float* weight, float eps, float* out, std::size_t rows,
             std::size_t width, Isa isa) {
  switch (isa) {
    case Isa::portable: return rmsnorm_portable(x, weight, eps, out, rows, width);
#if defined(ENDSIDE_X86)
    case Isa::avx2: return rmsnorm_avx2(x, weight, eps, out, rows, width);
    case Isa::avx512:
    case Isa::amx: return rmsnorm_avx512(x, weight, eps, out, rows, width);
#elif defined(ENDSIDE_NEON)
    case Isa::neon:
    case Isa::neon_i8mm: return rmsnorm_neon(x, weight, eps, out, rows, width);
#endif
    default: throw std::invalid_argument("rmsnorm was not built for this instruction set");
  }
}

}  // namespace endside
