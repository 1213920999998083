// Memory of the AMX kernels, and the sizes they work in.
#pragma once

#include "linear.h"

namespace endside {

constexpr int64_t AMX_ROWS = 2;      // rows of x from which on tiles are faster (see decisions.md)
constexpr int64_t AMX_BLOCKS = 16;   // blocks of 16 rows of x in one pass over the weights, at most
constexpr int64_t AMX_BYTES = 1 << 20;  // and bytes of them, for the second-level cache

// Even, so that blocks come in pairs.
static inline constexpr int64_t amx_blocks(int64_t k) {
  const int64_t fit = AMX_BYTES / (16 * k) / 2 * 2;
  return fit < 2 ? 2 : fit < AMX_BLOCKS ? fit : AMX_BLOCKS;
}

struct alignas(64) AmxScratch {
  uint8_t wide[2 * ROW_TILE * MAX_GROUP];    // one group of two tiles of W, expanded
  int32_t sums[2][4 * 256];                  // integers of two steps
  float y[2 * AMX_BLOCKS * 256];             // [tile of W][block of x][16][16]
};

}  // namespace endside
