// What the NEON kernels of `linear.h` share: codes to bytes, dot products for few rows, the sum
// over groups. Compiled in each of their files.
//
// A register holds four rows of a step: 4 rows x 4 k, every 32-bit lane a row of W. sdot adds four
// products of signed bytes into each lane, the activations being one quarter of a register that
// holds 16 of them. Codes are made signed first: 8-bit ones lose 128 (their zero with them), the
// others are small. So every kind is exact.
#pragma once

#include <arm_neon.h>

#include "linear_body.h"

namespace endside {
namespace {

constexpr int QUARTERS = 4;   // registers for the sixteen rows of a tile
constexpr int64_t LOOK = 4;   // steps that one register of activations feeds

// Sixteen signed numbers, one for each row of a tile.
template <int T>
using Sums = int32x4_t[T][QUARTERS];

template <Kind K>
constexpr int32_t OFFSET = K == Kind::int8 ? 128 : 0;  // what codes lose to become signed

// Steps that one load of 32 bytes holds.
template <Kind K>
constexpr int LOADED = K == Kind::int4 ? 2 : K == Kind::ternary2 ? 4 : K == Kind::ternary3 ? 5 : 1;

// Base 3: the digit that times 3 would carry out is 0 below 86, 1 below 171, else 2.
inline uint8x16_t digit(uint8x16_t fraction) {
  const uint8x16_t some = vcgeq_u8(fraction, vdupq_n_u8(86));
  const uint8x16_t two = vcgeq_u8(fraction, vdupq_n_u8(171));
  return vsubq_u8(vdupq_n_u8(0), vaddq_u8(some, two));  // true is -1
}

inline uint8x16_t times3(uint8x16_t x) { return vaddq_u8(x, vaddq_u8(x, x)); }

inline int8x16_t as_signed(uint8x16_t v) { return vreinterpretq_s8_u8(v); }

// 16 of the 32 bytes of one load (rows 0-3 or 4-7 of the block) as signed codes of its steps.
template <Kind K>
inline void unpack(const uint8_t* codes, int8x16_t (&out)[LOADED<K>]) {
  const uint8x16_t raw = vld1q_u8(codes);
  if constexpr (K == Kind::int8) {
    out[0] = as_signed(veorq_u8(raw, vdupq_n_u8(128)));
  } else if constexpr (K == Kind::int4) {
    out[0] = as_signed(vandq_u8(raw, vdupq_n_u8(15)));
    out[1] = as_signed(vshrq_n_u8(raw, 4));
  } else if constexpr (K == Kind::ternary2) {
    const uint8x16_t mask = vdupq_n_u8(3);
    out[0] = as_signed(vandq_u8(raw, mask));
    out[1] = as_signed(vandq_u8(vshrq_n_u8(raw, 2), mask));
    out[2] = as_signed(vandq_u8(vshrq_n_u8(raw, 4), mask));
    out[3] = as_signed(vshrq_n_u8(raw, 6));
  } else {
    uint8x16_t fraction = raw;
    for (int s = 0; s < LOADED<K>; ++s) {
      out[s] = as_signed(digit(fraction));
      fraction = times3(fraction);
    }
  }
}

// Rows 0-3 (part 0) or 4-7 (part 1) of a left-over step of base 3: quarter i of the step lies in
// bit pair i of 8 bytes.
inline int8x16_t tail_step(const uint8_t* codes, int part) {
  const uint8x8_t raw = vld1_u8(codes), mask = vdup_n_u8(3);
  const uint8x8_t low = vand_u8(part == 0 ? raw : vshr_n_u8(raw, 4), mask);
  const uint8x8_t high = vand_u8(part == 0 ? vshr_n_u8(raw, 2) : vshr_n_u8(raw, 6), mask);
  return as_signed(vcombine_u8(low, high));
}

// take(step, quarter, 16 signed codes) for every step of group g.
template <Kind K, class F>
inline void each_step(const Tile& tile, int64_t g, F&& take) {
  constexpr int S = LOADED<K>;
  const int64_t bytes = group_bytes(K, tile.group), steps = tile.group / STEP;
  const int64_t whole = steps / S * S;
  int8x16_t codes[S];
  for (int64_t s = 0; s < whole; s += S) {
    const int64_t at = g * bytes + s / S * STEP_CODES;
#pragma GCC unroll 4
    for (int quarter = 0; quarter < QUARTERS; ++quarter) {
      unpack<K>(tile.codes[quarter / 2] + at + quarter % 2 * 16, codes);
#pragma GCC unroll 8
      for (int i = 0; i < S; ++i) take(s + i, quarter, codes[i]);
    }
  }
  for (int64_t s = whole; s < steps; ++s) {
    const int64_t at = g * bytes + whole / S * STEP_CODES + (s - whole) * TAIL_BYTES;
#pragma GCC unroll 4
    for (int quarter = 0; quarter < QUARTERS; ++quarter) {
      take(s, quarter, tail_step(tile.codes[quarter / 2] + at, quarter % 2));
    }
  }
}

// Four activations, in every lane.
inline int8x16_t spread(const int8_t* q) {
  int32_t four;
  std::memcpy(&four, q, sizeof four);
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

template <int T>
inline void clear(Sums<T>& sums) {
  for (int t = 0; t < T; ++t) {
    for (int quarter = 0; quarter < QUARTERS; ++quarter) sums[t][quarter] = vdupq_n_s32(0);
  }
}

inline float32x4_t scales_at(const Tile& tile, int64_t g, int quarter) {
  const uint16x4_t half = vld1_u16(tile.scales[quarter / 2] + g * ROWS + quarter % 2 * 4);
  if (tile.scale_type == ScaleType::f16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
  return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

// Zeros of signed codes.
template <Kind K>
inline int32x4_t zeros_at(const Tile& tile, int64_t g, int quarter) {
  const int32x4_t offset = vdupq_n_s32(OFFSET<K>);
  if (!tile.zeros[0]) return vsubq_s32(vdupq_n_s32(symmetric_zero(K)), offset);
  const uint16x8_t wide = vmovl_u8(vld1_u8(tile.zeros[quarter / 2] + g * ROWS));
  const uint16x4_t half = quarter % 2 == 0 ? vget_low_u16(wide) : vget_high_u16(wide);
  return vsubq_s32(vreinterpretq_s32_u32(vmovl_u16(half)), offset);
}

// out += float(total - zero * sum) * (scale * s) for one group.
template <Kind K, int T>
inline void add_group(const Tile& tile, int64_t g, const Rows& rows, const Sums<T>& total,
                      float* out) {
  for (int quarter = 0; quarter < QUARTERS; ++quarter) {
    const float32x4_t scales = scales_at(tile, g, quarter);
    const int32x4_t zeros = zeros_at<K>(tile, g, quarter);
    for (int t = 0; t < T; ++t) {
      const int32x4_t sum = vdupq_n_s32(rows.sum[t * rows.groups + g]);
      const int32x4_t dot = vsubq_s32(total[t][quarter], vmulq_s32(zeros, sum));
      const float32x4_t factor = vmulq_f32(scales, vdupq_n_f32(rows.scale[t * rows.groups + g]));
      float* const y = out + t * ROW_TILE + quarter * 4;
      vst1q_f32(y, vaddq_f32(vld1q_f32(y), vmulq_f32(vcvtq_f32_s32(dot), factor)));
    }
  }
}

// Codes unpacked on the way, for few rows of x.
template <Kind K, int T>
inline void direct_rows(const Tile& tile, const Rows& rows, float* out) {
  for (int64_t i = 0; i < T * ROW_TILE; ++i) out[i] = 0;
  for (int64_t g = 0; g < tile.groups; ++g) {
    const int8_t* const q = rows.q + g * tile.group;
    Sums<T> total;
    clear<T>(total);
    each_step<K>(tile, g, [&](int64_t s, int quarter, int8x16_t codes) {
      for (int t = 0; t < T; ++t) {
        const int8x16_t x = spread(q + t * rows.stride + s * STEP);
        total[t][quarter] = vdotq_s32(total[t][quarter], codes, x);
      }
    });
    add_group<K, T>(tile, g, rows, total, out);
  }
}

template <Kind K>
inline float32x4_t weights(const Tile& tile, int64_t k, int quarter) {
  const uint8_t* const block = tile.codes[quarter / 2];
  const int64_t at = k * ROWS + quarter % 2 * 4;
  if constexpr (K == Kind::f32) return vld1q_f32(reinterpret_cast<const float*>(block) + at);
  const uint16x4_t half = vld1_u16(reinterpret_cast<const uint16_t*>(block) + at);
  return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

template <Kind K, int T>
inline void float_rows(const Tile& tile, const Rows& rows, float* out) {
  float32x4_t y[T][QUARTERS];
  for (int t = 0; t < T; ++t) {
    for (int quarter = 0; quarter < QUARTERS; ++quarter) y[t][quarter] = vdupq_n_f32(0);
  }
  for (int64_t k = 0; k < tile.k; ++k) {
#pragma GCC unroll 4
    for (int quarter = 0; quarter < QUARTERS; ++quarter) {
      const float32x4_t w = weights<K>(tile, k, quarter);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        y[t][quarter] = vfmaq_n_f32(y[t][quarter], w, rows.x[t * rows.stride + k]);
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    for (int quarter = 0; quarter < QUARTERS; ++quarter) {
      vst1q_f32(out + t * ROW_TILE + quarter * 4, y[t][quarter]);
    }
  }
}

}  // namespace
}  // namespace endside
