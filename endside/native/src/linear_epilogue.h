// What happens to the sixteen columns of y that a tile made, compiled once per instruction set.
//
// Plain loops in a written order without fused operations: the same bits everywhere. exp is 2^n
// times a Taylor polynomial of degree 7 on |r| <= ln(2) / 2, whose remainder is below 2^-27.
#pragma once

#include "linear.h"
#include "linear_half.h"

namespace endside {

// exp(x) for -87 <= x <= 88; outside, the value at that end. A NaN stays one.
static inline float bounded_exp(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // n = round(x / ln 2) in the last bits
  const float n = shifted - 12582912.0f;
  // ln 2 in two parts, the first short enough for n times it to be exact.
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t exponent = float_bits(shifted) - float_bits(12582912.0f) + 127u;
  return p * bits_float(exponent << 23);
}

static inline float silu(float x) { return x / (1.0f + bounded_exp(-x)); }

// y (count, 16): columns n .. n + 16 of W's rows, those below `end` exist; rows first ... of out.
static inline void finish(const Epilogue& epilogue, const float* y, int64_t first, int64_t count,
                          int64_t n, int64_t end) {
  const int64_t columns = end - n < ROW_TILE ? end - n : ROW_TILE;
  const float alpha = epilogue.alpha;
  for (int64_t p = 0; p < count; ++p, y += ROW_TILE) {
    float* const row = epilogue.out + (first + p) * epilogue.stride;
    if (epilogue.then == Then::silu_mul) {
      for (int64_t i = 0; i < ROWS; ++i) row[n / 2 + i] = silu(y[i]) * y[i + ROWS];
    } else if (epilogue.then == Then::add) {
      for (int64_t i = 0; i < columns; ++i) row[n + i] += alpha * y[i];
    } else {
      for (int64_t i = 0; i < columns; ++i) row[n + i] = alpha * y[i];
    }
  }
}

}  // namespace endside
