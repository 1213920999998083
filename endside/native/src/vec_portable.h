// The operations of vec.h in plain C++ with four floats of a compiler's generic vector type: SSE2
// or NEON registers where there are such, ordinary floats elsewhere. fma rounds twice.
#pragma once

#include <cstdint>
#include <cstring>

namespace endside {
namespace {

typedef float Vec __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
constexpr int LANES = 4;
constexpr int TILE_ROWS = 4, TILE_VECS = 2;

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Vec broadcast(float x) { return Vec{x, x, x, x}; }
inline Vec zero() { return broadcast(0); }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline float scalar_fma(float a, float b, float c) { return a * b + c; }

inline Bits bits_of(Vec v) { return reinterpret_cast<Bits>(v); }
inline Vec as_floats(Bits b) { return reinterpret_cast<Vec>(b); }

inline Vec load_f16(const uint16_t* p) {
  const Bits half = {p[0], p[1], p[2], p[3]};
  // exponent and mantissa moved into place, then the difference of the exponents' biases, 127 - 15
  const Vec magnitude = as_floats((half & 0x7fffu) << 13) * broadcast(0x1p112f);
  const Bits beyond = (half & 0x7c00u) == 0x7c00u;  // infinities and what is no number
  return as_floats(bits_of(magnitude) | (beyond & 0x7f800000u) | ((half & 0x8000u) << 16));
}
inline Vec load_bf16(const uint16_t* p) {
  const Bits half = {p[0], p[1], p[2], p[3]};
  return as_floats(half << 16);
}
inline Vec load_i8(const int8_t* p) {
  return Vec{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
             static_cast<float>(p[3])};
}
inline uint16_t f16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // a subnormal: adding 1/2 rounds at the bit that weighs 2^-24
    float value;
    std::memcpy(&value, &magnitude, sizeof value);
    value += 0.5f;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}
inline void store_f16(uint16_t* p, Vec v) {
  for (int i = 0; i < LANES; ++i) p[i] = f16_bits(v[i]);
}
inline void store_bf16(uint16_t* p, Vec v) {
  const Bits bits = bits_of(v);
  const Bits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  for (int i = 0; i < LANES; ++i) p[i] = static_cast<uint16_t>(rounded[i]);
}

inline Vec first(int count, Vec v, Vec other) {
  for (int i = 0; i < LANES; ++i) v[i] = i < count ? v[i] : other[i];
  return v;
}
inline Vec power_of_two(Vec v, Vec t) { return as_floats(bits_of(v) + (bits_of(t) << 23)); }
inline int count_at_least(Vec v, Vec limit) {
  int count = 0;
  for (int i = 0; i < LANES; ++i) count += v[i] >= limit[i];
  return count;
}
inline float sum_of(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float max_of(Vec v) {
  float best = v[0];
  for (int i = 1; i < LANES; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

}  // namespace
}  // namespace endside

#include "vec.h"
