// What happens to the sixteen columns of y that a tile made, compiled once per instruction set.
//
// Plain operations in a written order without fused operations: the same bits everywhere. exp is 2^n
// times a Taylor polynomial of degree 7 on |r| <= ln(2) / 2, whose remainder is below 2^-27.
#pragma once

#include <cstring>

#include "linear.h"
#include "linear_half.h"

namespace endside {

// Eight floats, or eight 32-bit words, as the compiler's own vector type: every compiler turns it
// into what the instruction set has, and the written order of operations stays.
typedef float Eight __attribute__((vector_size(32)));
typedef int32_t Words __attribute__((vector_size(32)));

// x becomes exp(x) for -87 <= x <= 88; outside, the value at that end. A NaN stays one.
static inline void bounded_exp(Eight& x) {
  const Eight low = Eight{} - 87.0f, high = Eight{} + 88.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Eight shifted = x * 1.44269504f + 12582912.0f;  // n = round(x / ln 2) in the last bits
  const Eight n = shifted - 12582912.0f;
  // ln 2 in two parts, the first short enough for n times it to be exact.
  const Eight r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Eight p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t bias = static_cast<int32_t>(float_bits(12582912.0f));
  x = p * (Eight)(((Words)shifted - bias + 127) << 23);
}

// out (8) = silu(gate) * up
static inline void silu_mul(const float* gate, const float* up, float* out) {
  Eight g, u;
  std::memcpy(&g, gate, sizeof g);
  std::memcpy(&u, up, sizeof u);
  Eight e = -g;
  bounded_exp(e);
  const Eight y = g / (1.0f + e) * u;
  std::memcpy(out, &y, sizeof y);
}

// out (8) = alpha * y, or out += alpha * y
static inline void finish_eight(bool add, float alpha, const float* y, float* out) {
  Eight sum = {}, term;
  std::memcpy(&term, y, sizeof term);
  term = term * alpha;
  if (add) {
    std::memcpy(&sum, out, sizeof sum);
    term = sum + term;
  }
  std::memcpy(out, &term, sizeof term);
}

// y (count, 16): columns n .. n + 16 of W's rows, those below `end` exist; rows first ... of out.
static inline void finish(const Epilogue& epilogue, const float* y, int64_t first, int64_t count,
                          int64_t n, int64_t end) {
  const int64_t columns = end - n < ROW_TILE ? end - n : ROW_TILE;
  const float alpha = epilogue.alpha;
  const bool add = epilogue.then == Then::add;
  for (int64_t p = 0; p < count; ++p, y += ROW_TILE) {
    float* const row = epilogue.out + (first + p) * epilogue.stride;
    if (epilogue.then == Then::silu_mul) {
      silu_mul(y, y + ROWS, row + n / 2);
    } else if (columns == ROW_TILE) {
      finish_eight(add, alpha, y, row + n);
      finish_eight(add, alpha, y + ROWS, row + n + ROWS);
    } else {
      for (int64_t i = 0; i < columns; ++i) {
        const float term = alpha * y[i];
        row[n + i] = add ? row[n + i] + term : term;
      }
    }
  }
}

}  // namespace endside
