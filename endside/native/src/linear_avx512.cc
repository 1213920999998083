// AVX-512 VNNI kernels of `linear.h`.
//
// One register holds a step of both blocks of a tile: 16 rows x 4 k, so that every 32-bit lane is a
// row of W. vpdpbusd adds four products of unsigned codes and signed activations (4 of one row of
// x, broadcast to all lanes) into it: 64 products an instruction, exact for every kind.
//
// Direct kernels keep two sums per row of x, for even and odd steps, because they have few rows to
// hide the latency of vpdpbusd behind; wide ones have up to eight rows and need one each.
#include <immintrin.h>

#include "linear_body.h"
#include "linear_kernels.h"
#include "linear_rows.h"

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

// Four activations, in every lane.
inline __m512i spread(const int8_t* q) {
  int32_t four;
  std::memcpy(&four, q, sizeof four);
  return _mm512_set1_epi32(four);
}

// sums += codes x the four activations of T rows that start at q.
template <int T>
inline void step(__m512i codes, const int8_t* q, int64_t stride, __m512i (&sums)[T]) {
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    sums[t] = _mm512_dpbusd_epi32(sums[t], codes, spread(q + t * stride));
  }
}

template <int T>
inline void clear(__m512i (&sums)[T]) {
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_si512();
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

// y += float(total - zero * sum) * (scale * s) for one group.
template <Kind K, int T>
inline void add_group(const Tile& tile, int64_t g, const Rows& rows, const __m512i (&total)[T],
                      __m512 (&y)[T]) {
  const __m512 scales = scales_at(tile, g);
  const __m512i zeros = zeros_at<K>(tile, g);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    // |sum| <= 128 * 127 fits 16 bits, and zeros have none above 8: vpmaddwd multiplies them.
    const __m512i sum = _mm512_set1_epi32(rows.sum[t * rows.groups + g]);
    const __m512i dot = _mm512_sub_epi32(total[t], _mm512_madd_epi16(zeros, sum));
    const __m512 factor = _mm512_mul_ps(scales, _mm512_set1_ps(rows.scale[t * rows.groups + g]));
    y[t] = _mm512_add_ps(y[t], _mm512_mul_ps(_mm512_cvtepi32_ps(dot), factor));
  }
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

// even, odd += one group, unpacked on the way.
template <Kind K, int T>
inline void group_direct(const Tile& tile, int64_t g, const Rows& rows, __m512i (&even)[T],
                         __m512i (&odd)[T]) {
  constexpr int S = LOADED<K>;
  const int64_t bytes = group_bytes(K, tile.group), steps = tile.group / STEP;
  const uint8_t *a = tile.codes[0] + g * bytes, *b = tile.codes[1] + g * bytes;
  const int8_t* const q = rows.q + g * tile.group;
  __m512i codes[S];
  int64_t s = 0;
  for (; s + S <= steps; s += S, a += STEP_CODES, b += STEP_CODES) {
    unpack<K>(a, b, codes);
#pragma GCC unroll 8
    for (int i = 0; i < S; ++i) {
      step<T>(codes[i], q + (s + i) * STEP, rows.k, i % 2 == 0 ? even : odd);
    }
  }
  for (; s < steps; ++s, a += TAIL_BYTES, b += TAIL_BYTES) {
    step<T>(tail_step(a, b), q + s * STEP, rows.k, odd);
  }
}

constexpr int64_t PART = 8;  // steps in one piece of straight code: a group of 32

template <int T>
inline void store_rows(const __m512 (&y)[T], float* out) {
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) _mm512_storeu_ps(out + t * ROW_TILE, y[t]);
}

struct Avx512 {
  static constexpr int DIRECT_ROWS = 4, WIDE_ROWS = 8, FLOAT_ROWS = 8;
  static constexpr int64_t DIRECT_LIMIT = 8;
  static constexpr bool WIDE_LOOPS = false;

  template <Kind K, int T>
  static void direct(const Tile& tile, const Rows& rows, float* out) {
    __m512 y[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) y[t] = _mm512_setzero_ps();
    for (int64_t g = 0; g < tile.groups; ++g) {
      __m512i even[T], odd[T];
      clear<T>(even);
      clear<T>(odd);
      group_direct<K, T>(tile, g, rows, even, odd);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) even[t] = _mm512_add_epi32(even[t], odd[t]);
      add_group<K, T>(tile, g, rows, even, y);
    }
    store_rows<T>(y, out);
  }

  // Expanded layout: [step][2 blocks][32].
  template <Kind K>
  static void expand(const Tile& tile, int64_t g, uint8_t* wide) {
    constexpr int S = LOADED<K>;
    const int64_t bytes = group_bytes(K, tile.group), steps = tile.group / STEP;
    const uint8_t *a = tile.codes[0] + g * bytes, *b = tile.codes[1] + g * bytes;
    __m512i codes[S];
    int64_t s = 0;
    for (; s + S <= steps; s += S, a += STEP_CODES, b += STEP_CODES) {
      unpack<K>(a, b, codes);
#pragma GCC unroll 8
      for (int i = 0; i < S; ++i) _mm512_storeu_si512(wide + 64 * (s + i), codes[i]);
    }
    for (; s < steps; ++s, a += TAIL_BYTES, b += TAIL_BYTES) {
      _mm512_storeu_si512(wide + 64 * s, tail_step(a, b));
    }
  }

  template <Kind K, int T>
  static void wide(const Tile& tile, int64_t g, const uint8_t* wide, const Rows& rows,
                   float* out) {
    const int8_t* const q = rows.q + g * tile.group;
    __m512i total[T];
    clear<T>(total);
    for (int64_t part = 0; part < tile.group / STEP; part += PART) {
#pragma GCC unroll 8
      for (int64_t s = part; s < part + PART; ++s) {
        step<T>(_mm512_loadu_si512(wide + 64 * s), q + s * STEP, rows.k, total);
      }
    }
    __m512 y[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) y[t] = _mm512_loadu_ps(out + t * ROW_TILE);
    add_group<K, T>(tile, g, rows, total, y);
    store_rows<T>(y, out);
  }

  template <Kind K, int T>
  static void floats(const Tile& tile, const Rows& rows, float* out) {
    __m512 y[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) y[t] = _mm512_setzero_ps();
    for (int64_t k = 0; k < tile.k; ++k) {
      const __m512 w = weights<K>(tile, k);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        y[t] = _mm512_fmadd_ps(w, _mm512_set1_ps(rows.x[t * rows.k + k]), y[t]);
      }
    }
    store_rows<T>(y, out);
  }

  template <Kind K>
  static inline __m512 weights(const Tile& tile, int64_t k) {
    if constexpr (K == Kind::f32) {
      const int64_t at = k * ROWS * 4;
      return _mm512_castsi512_ps(load_two(tile.codes[0] + at, tile.codes[1] + at));
    } else {
      return from_upper_halves(
          load_halves(reinterpret_cast<const uint16_t*>(tile.codes[0]) + k * ROWS,
                      reinterpret_cast<const uint16_t*>(tile.codes[1]) + k * ROWS));
    }
  }
};

}  // namespace

void apply_avx512(const Linear& linear, const Input& input, int64_t n_begin, int64_t n_end,
                  const Epilogue& epilogue, void* scratch) {
  apply_with<Avx512>(linear, input, n_begin, n_end, epilogue, scratch);
}

void prepare_avx512(const Input& input, const float* x, int64_t width, const float* norm_weight,
                    float eps, int64_t row_begin, int64_t row_end) {
  prepare_rows(input, x, width, norm_weight, eps, row_begin, row_end);
}

}  // namespace endside
