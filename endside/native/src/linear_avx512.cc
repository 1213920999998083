// AVX-512 VNNI kernels of `linear.h`.
//
// One register holds a step of both blocks of a tile: 16 rows x 4 k, so that every 32-bit lane is a
// row of W. vpdpbusd adds four products of unsigned codes and signed activations (4 of one row of
// x, broadcast to all lanes) into it: 64 products an instruction, exact for every kind.
//
// Direct kernels keep two sums per row of x, for even and odd steps, because they have few rows to
// hide the latency of vpdpbusd behind; wide ones have up to eight rows and need one each.
#include "linear_512.h"
#include "linear_ahead.h"
#include "linear_kernels.h"
#include "linear_rows.h"

namespace endside {
namespace {

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

// even, odd += one group, unpacked on the way.
template <Kind K, int T>
inline void group_direct(const Tile& tile, int64_t g, const Rows& rows, __m512i (&even)[T],
                         __m512i (&odd)[T]) {
  constexpr int S = LOADED<K>;
  const int64_t bytes = group_bytes(K, tile.group), steps = tile.group / STEP;
  const uint8_t *a = tile.codes[0] + g * bytes, *b = tile.codes[1] + g * bytes;
  const int8_t* const q = rows.q + g * tile.group;
  Stretch ahead = ask_ahead<Level::second>(rows.ahead, bytes, a);
  __m512i codes[S];
  int64_t s = 0;
  for (; s + S <= steps; s += S, a += STEP_CODES, b += STEP_CODES) {
    if (s / S % 2 == 0) {  // a line of each block
      ask_line<Level::second>(ahead.at);
      ask_line<Level::second>(ahead.at + ahead.gap);
      ahead.at += LINE_BYTES;
    }
    unpack<K>(a, b, codes);
#pragma GCC unroll 8
    for (int i = 0; i < S; ++i) {
      step<T>(codes[i], q + (s + i) * STEP, rows.stride, i % 2 == 0 ? even : odd);
    }
  }
  for (; s < steps; ++s, a += TAIL_BYTES, b += TAIL_BYTES) {
    step<T>(tail_step(a, b), q + s * STEP, rows.stride, odd);
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
        step<T>(_mm512_loadu_si512(wide + 64 * s), q + s * STEP, rows.stride, total);
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
        y[t] = _mm512_fmadd_ps(w, _mm512_set1_ps(rows.x[t * rows.stride + k]), y[t]);
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
