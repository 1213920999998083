#include "likeliest.h"

#include <stdexcept>

namespace endside {

void likeliest(const float* x, int64_t size, int64_t count, int32_t* tokens, float* chances,
               Isa isa) {
  switch (isa) {
    case Isa::portable: return likeliest_portable(x, size, count, tokens, chances);
#if defined(ENDSIDE_X86)
    case Isa::avx2: return likeliest_avx2(x, size, count, tokens, chances);
    case Isa::avx512:
    case Isa::amx: return likeliest_avx512(x, size, count, tokens, chances);
#elif defined(ENDSIDE_NEON)
    case Isa::neon:
    case Isa::neon_i8mm: return likeliest_neon(x, size, count, tokens, chances);
#endif
    default: throw std::invalid_argument("likeliest was not built for this instruction set");
  }
}

}  // namespace endside
