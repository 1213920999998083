// The operations of vec.h in NEON: four floats.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace endside {
namespace {

using Vec = float32x4_t;
constexpr int LANES = 4;
// 16 accumulators and 4 columns leave a third of the 32 registers for what a and b are read into.
constexpr int TILE_ROWS = 4, TILE_VECS = 4;

inline Vec load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Vec v) { vst1q_f32(p, v); }
inline Vec broadcast(float x) { return vdupq_n_f32(x); }
inline Vec zero() { return vdupq_n_f32(0); }
inline Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
inline Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
inline Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
// The processor's own maximum is no number where one of the two is none.
inline Vec max(Vec a, Vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline Vec min(Vec a, Vec b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
inline float scalar_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

inline Vec load_f16(const uint16_t* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
inline Vec load_bf16(const uint16_t* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
inline Vec load_i8(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof four);
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}
inline void store_f16(uint16_t* p, Vec v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
inline void store_bf16(uint16_t* p, Vec v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t bias = vaddq_u32(odd, vdupq_n_u32(0x7fff));
  vst1_u16(p, vshrn_n_u32(vaddq_u32(bits, bias), 16));
}

inline Vec first(int count, Vec v, Vec other) {
  const int32_t lane[LANES] = {0, 1, 2, 3};
  return vbslq_f32(vcgtq_s32(vdupq_n_s32(count), vld1q_s32(lane)), v, other);
}
inline Vec where_above(Vec v, Vec x, Vec limit) {
  return vbslq_f32(vcgtq_f32(x, limit), v, zero());
}
inline Vec power_of_two(Vec v, Vec t) {
  // the low bits of t hold n; what the constant adds to them is shifted out
  const uint32x4_t n = vshlq_n_u32(vreinterpretq_u32_f32(t), 23);
  return vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(v), n));
}
inline int count_at_least(Vec v, Vec limit) {
  return static_cast<int>(vaddvq_u32(vshrq_n_u32(vcgeq_f32(v, limit), 31)));
}
inline float sum_of(Vec v) {
  const float32x2_t half = vadd_f32(vget_low_f32(v), vget_high_f32(v));
  return vget_lane_f32(half, 0) + vget_lane_f32(half, 1);
}
inline float max_of(Vec v) { return vmaxvq_f32(v); }

}  // namespace
}  // namespace endside

#include "vec.h"
