// Memory of the AMX kernels, and the sizes they work in.
#pragma once

#include "linear.h"

namespace endside {

constexpr int64_t AMX_ROWS = 5;    // rows of x from which on tiles beat avx512
constexpr int64_t AMX_BLOCKS = 16;  // blocks of 16 rows of x whose y stays in the nearest cache

struct alignas(64) AmxScratch {
  uint8_t wide[2 * ROW_TILE * MAX_GROUP];  // one group of two tiles of W, expanded
  int32_t sums[2][2 * 256];                // integers of two blocks of x, [tile of W][16][16]
  float y[AMX_BLOCKS * 2 * 256];           // [block of x][tile of W][16][16]
};

}  // namespace endside
