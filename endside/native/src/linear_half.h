// 16-bit floats to and from float32, the same bits on every machine.
//
// Functions are static: files compiled for different instruction sets must not share one copy.
#pragma once

#include <cstdint>
#include <cstring>

namespace endside {

static inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float from_bf16(uint16_t half) {
  return bits_float(static_cast<uint32_t>(half) << 16);
}

// Exponent and mantissa move up by 13 bits, which is a float 2^112 times too small: one exact
// multiplication repairs normal and subnormal numbers alike. Infinity and NaN keep a full exponent.
static inline float from_f16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(half & 0x7fffu) << 13;
  if (rest >= 0x0f800000u) return bits_float(sign | rest | 0x7f800000u);
  return bits_float(sign | float_bits(bits_float(rest) * bits_float(0x77800000u)));
}

// Round to nearest, ties to even; a NaN stays one.
static inline uint16_t to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static inline uint16_t to_f16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above
  if (rest < 0x38800000u) {
    // Below 2^-14: adding 0.5 puts the unit of a subnormal half at the last bit of the sum.
    const uint32_t sum = float_bits(bits_float(rest) + 0.5f);
    return static_cast<uint16_t>(sign | (sum - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13));
}

}  // namespace endside
