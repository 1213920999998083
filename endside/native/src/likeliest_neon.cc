#include "vec_neon.h"

#include "likeliest_body.h"

namespace endside {

void likeliest_neon(const float* x, int64_t size, int64_t count, int32_t* tokens, float* chances) {
  likeliest_of(x, size, count, tokens, chances);
}

}  // namespace endside
