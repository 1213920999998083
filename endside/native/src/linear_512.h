// What the kernels in 512-bit registers share: codes to bytes, scales and zeros of a tile. Compiled
// in each of their files. A register holds a step of both blocks: 16 rows x 4 k.
#pragma once

#include <immintrin.h>

#include "linear_body.h"

namespace endside {
namespace {

// 32 bytes of each block.
inline __m512i load_two(const uint8_t* a, const uint8_t* b) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// 16 bytes of each block: eight 16-bit numbers.
inline __m256i load_halves(const uint16_t* a, const uint16_t* b) {
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

inline __m512 from_upper_halves(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

inline __m512 scales_at(const Tile& tile, int64_t g) {
  const __m256i half = load_halves(tile.scales[0] + g * ROWS, tile.scales[1] + g * ROWS);
  return tile.scale_type == ScaleType::f16 ? _mm512_cvtph_ps(half) : from_upper_halves(half);
}

template <Kind K>
inline __m512i zeros_at(const Tile& tile, int64_t g) {
  if (!tile.zeros[0]) return _mm512_set1_epi32(symmetric_zero(K));
  const __m128i a = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(tile.zeros[0] + g * ROWS));
  const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(tile.zeros[1] + g * ROWS));
  return _mm512_cvtepu8_epi32(_mm_unpacklo_epi64(a, b));
}

// Base 3: the digit that times 3 would carry out is 0 below 86, 1 below 171, else 2.
inline __m512i digit(__m512i fraction) {
  const __m512i one = _mm512_set1_epi8(1);
  const __mmask64 some = _mm512_cmpge_epu8_mask(fraction, _mm512_set1_epi8(86));
  const __mmask64 two = _mm512_cmpge_epu8_mask(fraction, _mm512_set1_epi8(-85));  // 171
  const __m512i first = _mm512_maskz_mov_epi8(some, one);
  return _mm512_mask_add_epi8(first, two, first, one);
}

inline __m512i times3(__m512i x) { return _mm512_add_epi8(x, _mm512_add_epi8(x, x)); }

// A left-over step of base 3: quarter i in bit pair i of 8 bytes of each block.
inline __m512i tail_step(const uint8_t* a, const uint8_t* b) {
  int64_t low, high;
  std::memcpy(&low, a, sizeof low);
  std::memcpy(&high, b, sizeof high);
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set1_epi64x(low)),
                                          _mm256_set1_epi64x(high), 1);
  const __m512i shifts = _mm512_setr_epi64(0, 2, 4, 6, 0, 2, 4, 6);
  return _mm512_and_si512(_mm512_srlv_epi64(both, shifts), _mm512_set1_epi8(3));
}

// Steps that one load of 32 bytes of each block holds.
template <Kind K>
constexpr int LOADED = K == Kind::int4 ? 2 : K == Kind::ternary2 ? 4 : K == Kind::ternary3 ? 5 : 1;

// The steps of one load as bytes.
template <Kind K>
inline void unpack(const uint8_t* a, const uint8_t* b, __m512i (&out)[LOADED<K>]) {
  const __m512i raw = load_two(a, b);
  if constexpr (K == Kind::int8) {
    out[0] = raw;
  } else if constexpr (K == Kind::int4) {
    const __m512i mask = _mm512_set1_epi8(15);
    out[0] = _mm512_and_si512(raw, mask);
    out[1] = _mm512_and_si512(_mm512_srli_epi16(raw, 4), mask);
  } else if constexpr (K == Kind::ternary2) {
    const __m512i mask = _mm512_set1_epi8(3);
    out[0] = _mm512_and_si512(raw, mask);
    out[1] = _mm512_and_si512(_mm512_srli_epi16(raw, 2), mask);
    out[2] = _mm512_and_si512(_mm512_srli_epi16(raw, 4), mask);
    out[3] = _mm512_and_si512(_mm512_srli_epi16(raw, 6), mask);
  } else {
    __m512i fraction = raw;
#pragma GCC unroll 8
    for (int s = 0; s < LOADED<K>; ++s) {
      out[s] = digit(fraction);
      fraction = times3(fraction);
    }
  }
}

}  // namespace
}  // namespace endside
