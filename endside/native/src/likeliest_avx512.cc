#include "vec_avx512.h"

#include "likeliest_body.h"

namespace endside {

void likeliest_avx512(const float* x, int64_t size, int64_t count, int32_t* tokens, float* chances) {
  likeliest_of(x, size, count, tokens, chances);
}

}  // namespace endside
