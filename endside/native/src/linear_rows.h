// `prepare`: RMSNorm and int8 quantization of rows of x, compiled once per instruction set.
//
// Plain loops that any compiler turns into vectors, in an order of additions that is written down,
// so that every instruction set gives the same bits: the squares are added into 16 lanes, lane =
// index mod 16, and the lanes are folded in halves. Rounding to nearest even adds and drops 1.5 *
// 2^23, whose last bit is 1. The largest magnitude is found on the bits, which order like floats.
#pragma once

#include <cmath>

#include "linear.h"
#include "linear_half.h"

namespace endside {

constexpr int64_t NORM_LANES = 16;
constexpr float ROUNDER = 12582912.0f;     // 1.5 * 2^23
constexpr float SMALLEST = 0x1p-100f;      // a group below this is taken for zero

static inline float sum_of_squares(const float* x, int64_t width) {
  float part[NORM_LANES] = {};
  int64_t c = 0;
  for (; c + NORM_LANES <= width; c += NORM_LANES) {
    for (int64_t lane = 0; lane < NORM_LANES; ++lane) part[lane] += x[c + lane] * x[c + lane];
  }
  for (int64_t lane = 0; c < width; ++c, ++lane) part[lane] += x[c] * x[c];
  for (int64_t half = NORM_LANES / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) part[lane] += part[lane + half];
  }
  return part[0];
}

static inline float inverse_rms(const float* x, int64_t width, float eps) {
  return 1.0f / std::sqrt(sum_of_squares(x, width) / static_cast<float>(width) + eps);
}

// x[0 .. count) times inverse and weight when there is one -> out; 0 up to `padded`.
static inline void scale_row(const float* x, const float* weight, float inverse, int64_t count,
                             int64_t padded, float* out) {
  if (weight) {
    for (int64_t c = 0; c < count; ++c) out[c] = x[c] * inverse * weight[c];
  } else {
    for (int64_t c = 0; c < count; ++c) out[c] = x[c];
  }
  for (int64_t c = count; c < padded; ++c) out[c] = 0;
}

// x (group), a multiple of 32 -> q (group), its scale and its sum.
static inline void quantize_group(const float* x, int64_t group, int8_t* q, float* scale,
                                  int32_t* sum) {
  int32_t largest = 0;
  for (int64_t c = 0; c < group; ++c) {
    const int32_t bits = static_cast<int32_t>(float_bits(x[c]) & 0x7fffffffu);
    largest = bits > largest ? bits : largest;
  }
  const float most = bits_float(static_cast<uint32_t>(largest));
  // A NaN is not below the limit: it goes on into the scale and from there into y.
  const bool zero = most < SMALLEST;
  const float factor = zero ? 0.0f : 127.0f / most;
  int32_t total = 0;
  for (int64_t c = 0; c < group; ++c) {
    const uint32_t rounded = float_bits(x[c] * factor + ROUNDER) - float_bits(ROUNDER);
    const int8_t code = static_cast<int8_t>(rounded & 0xffu);
    q[c] = code;
    total += code;
  }
  *scale = zero ? 0.0f : most / 127.0f;
  *sum = total;
}

static inline void prepare_rows(const Input& input, const float* x, int64_t width,
                                const float* norm_weight, float eps, int64_t row_begin,
                                int64_t row_end) {
  const int64_t groups = input.group > 0 ? input.k / input.group : 0;
  float part[MAX_GROUP];
  for (int64_t p = row_begin; p < row_end; ++p) {
    const float* const row = x + p * width;
    const float inverse = norm_weight ? inverse_rms(row, width, eps) : 1.0f;
    if (input.group == 0) {
      scale_row(row, norm_weight, inverse, width, input.k, input.x + p * input.stride);
    }
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = g * input.group, left = width > at ? width - at : 0;
      const float* const weight = norm_weight ? norm_weight + at : nullptr;
      const int64_t count = left < input.group ? left : input.group;
      scale_row(row + at, weight, inverse, count, input.group, part);
      quantize_group(part, input.group, input.q + p * input.stride + at, input.scale + p * groups + g,
                     input.sum + p * groups + g);
    }
  }
}

}  // namespace endside
