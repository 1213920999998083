// AVX2 kernels of `linear.h`.
//
// vpmaddubsw multiplies 32 unsigned codes with 32 signed activations (4 of one row of x, broadcast
// to all 8 rows of W) and adds neighbours into 16 bits. Sums stay in 16 bits as long as they
// provably fit, so that most multiply-adds cost two instructions for 32 products:
//     4-bit codes    a pair is at most 2 * 15 * 127 = 3,810;  8 steps: 30,480 <= 32,767
//     ternary codes  a pair is at most 2 * 2 * 127 = 508;    32 steps: 16,256 (a group of 128)
//     8-bit codes    two planes of 4 bits, high and low, each like a 4-bit code
// then vpmaddwd with ones (16 for the high plane) widens to 32 bits: rows of the block in lanes.
//
// A kernel keeps two vectors of codes against T rows of x: two blocks of W, or two planes of one
// block. With T = 6 the twelve sums fill the registers.
#include <immintrin.h>

#include "linear_ahead.h"
#include "linear_body.h"
#include "linear_kernels.h"
#include "linear_rows.h"

namespace endside {
namespace {

inline __m256i load(const void* at) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(at));
}

// Loads that stay where they stand.
inline __m256i load_here(const uint8_t* at) {
  __m256i out;
  asm volatile("vmovdqu %1, %0" : "=x"(out) : "m"(*reinterpret_cast<const __m256i_u*>(at)));
  return out;
}

typedef int32_t Four __attribute__((may_alias));  // four activations

// Where T rows of x go on. The compiler is kept from knowing how they relate: it would make an
// address of its own for every access of an unrolled loop.
template <int T>
struct Cursors {
  const int8_t* row[T];
  inline Cursors(const int8_t* q, int64_t stride) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      row[t] = q + t * stride;
      asm("" : "+r"(row[t]));
    }
  }
};

// sums += codes (two vectors) x four activations, `at` and the next three, of T rows.
//
// Assembler because the order matters: twelve sums, two codes and two temporaries are all sixteen
// registers. Left to itself the compiler computes many products before it adds them and spills the
// sums, which halves the speed.
template <int T>
inline void step(__m256i a, __m256i b, const Cursors<T>& x_rows, int64_t at,
                 __m256i (&sums)[T][2]) {
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    __m256i x, product;
    asm volatile(
        "vpbroadcastd %[q], %[x]\n\t"
        "vpmaddubsw %[x], %[a], %[product]\n\t"
        "vpmaddubsw %[x], %[b], %[x]\n\t"
        "vpaddw %[product], %[first], %[first]\n\t"
        "vpaddw %[x], %[second], %[second]"
        : [first] "+x"(sums[t][0]), [second] "+x"(sums[t][1]), [x] "=&x"(x),
          [product] "=&x"(product)
        : [a] "x"(a), [b] "x"(b), [q] "m"(*reinterpret_cast<const Four*>(x_rows.row[t] + at)));
  }
}

template <int T>
inline void clear(__m256i (&sums)[T][2]) {
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) sums[t][0] = sums[t][1] = _mm256_setzero_si256();
}

// total = or += the 16-bit sums, neighbours added.
template <bool FIRST, int T>
inline void widen(const __m256i (&sums)[T][2], __m256i (&total)[T][2]) {
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
    for (int b = 0; b < 2; ++b) {
      const __m256i wider = _mm256_madd_epi16(sums[t][b], ones);
      total[t][b] = FIRST ? wider : _mm256_add_epi32(total[t][b], wider);
    }
  }
}

// Same for the two planes of a block: total[t][block] = or += low + 16 * high.
template <bool FIRST, int T>
inline void widen_planes(const __m256i (&sums)[T][2], int block, __m256i (&total)[T][2]) {
  const __m256i ones = _mm256_set1_epi16(1), sixteen = _mm256_set1_epi16(16);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const __m256i both = _mm256_add_epi32(_mm256_madd_epi16(sums[t][0], ones),
                                          _mm256_madd_epi16(sums[t][1], sixteen));
    total[t][block] = FIRST ? both : _mm256_add_epi32(total[t][block], both);
  }
}

inline __m256 scales_at(const Tile& tile, int block, int64_t g) {
  const __m128i half =
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(tile.scales[block] + g * ROWS));
  if (tile.scale_type == ScaleType::f16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

template <Kind K>
inline __m256i zeros_at(const Tile& tile, int block, int64_t g) {
  if (!tile.zeros[block]) return _mm256_set1_epi32(symmetric_zero(K));
  return _mm256_cvtepu8_epi32(
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(tile.zeros[block] + g * ROWS)));
}

// What one group adds to y: float(total - zero * sum) * (scale * s).
struct GroupTerm {
  __m256 scales[2];
  __m256i zeros[2];

  template <Kind K>
  static inline GroupTerm at(const Tile& tile, int64_t g) {
    return {{scales_at(tile, 0, g), scales_at(tile, 1, g)},
            {zeros_at<K>(tile, 0, g), zeros_at<K>(tile, 1, g)}};
  }
  // sum, s: of the group of one row of x.
  inline void add(const __m256i (&total)[2], int32_t sum, float s, __m256 (&y)[2]) const {
    // |sum| <= 128 * 127 fits 16 bits, and zeros have none above 8: vpmaddwd multiplies them.
    const __m256i sums = _mm256_set1_epi32(sum);
    const __m256 factor = _mm256_set1_ps(s);
#pragma GCC unroll 2
    for (int b = 0; b < 2; ++b) {
      const __m256i dot = _mm256_sub_epi32(total[b], _mm256_madd_epi16(zeros[b], sums));
      y[b] = _mm256_add_ps(y[b], _mm256_mul_ps(_mm256_cvtepi32_ps(dot),
                                               _mm256_mul_ps(scales[b], factor)));
    }
  }
};

constexpr int64_t PART = 8;  // steps of 4-bit codes that fit 16 bits

// Steps that one load of 32 bytes holds.
template <Kind K>
constexpr int LOADED = K == Kind::int4 ? 2 : K == Kind::ternary2 ? 4 : K == Kind::ternary3 ? 5 : 1;

// 32 bytes of codes that give up one step after the other.
template <Kind K>
struct Packed {
  __m256i raw;

  // Base 3: fractions are kept minus 128, so that signed comparisons find the digit that times 3
  // would carry out: 0 below 86, 1 below 171, else 2. Times 3 keeps the offset (mod 256).
  inline explicit Packed(const uint8_t* codes) : raw(load(codes)) {
    if (K == Kind::ternary3) raw = _mm256_xor_si256(raw, _mm256_set1_epi8(-128));
  }
  // Step s; they are asked for in order.
  inline __m256i next(int s) {
    if constexpr (K == Kind::ternary3) {
      const __m256i some = _mm256_cmpgt_epi8(raw, _mm256_set1_epi8(85 - 128));
      const __m256i two = _mm256_cmpgt_epi8(raw, _mm256_set1_epi8(170 - 128));
      raw = _mm256_add_epi8(raw, _mm256_add_epi8(raw, raw));
      return _mm256_abs_epi8(_mm256_add_epi8(some, two));
    } else {
      constexpr int BITS = 8 / LOADED<K>;
      const __m256i mask = _mm256_set1_epi8((1 << BITS) - 1);
      return _mm256_and_si256(s == 0 ? raw : _mm256_srli_epi16(raw, s * BITS), mask);
    }
  }
};

// A left-over step of base 3: quarter i in bit pair i of 8 bytes.
inline __m256i tail_step(const uint8_t* codes) {
  int64_t eight;
  std::memcpy(&eight, codes, sizeof eight);
  const __m256i shifted =
      _mm256_srlv_epi64(_mm256_set1_epi64x(eight), _mm256_setr_epi64x(0, 2, 4, 6));
  return _mm256_and_si256(shifted, _mm256_set1_epi8(3));
}

// sums += `steps` steps of both blocks, unpacked on the way.
template <Kind K, int T>
inline void run_steps(const uint8_t* a, const uint8_t* b, int64_t steps, const int8_t* q,
                      int64_t stride, __m256i (&sums)[T][2]) {
  constexpr int64_t S = LOADED<K>, LOADS = K == Kind::int4 ? PART / S : K == Kind::ternary2 ? 2 : 1;
  const int64_t whole = steps / S * S;
  for (int64_t s = 0; s < whole; s += S * LOADS, a += STEP_CODES * LOADS, b += STEP_CODES * LOADS) {
    const Cursors<T> x_rows(q + s * STEP, stride);
#pragma GCC unroll 4
    for (int64_t i = 0; i < LOADS; ++i) {
      Packed<K> left(a + i * STEP_CODES), right(b + i * STEP_CODES);
#pragma GCC unroll 8
      for (int j = 0; j < S; ++j) {
        const __m256i first = left.next(j), second = right.next(j);
        step<T>(first, second, x_rows, (i * S + j) * STEP, sums);
      }
    }
  }
  for (int64_t s = whole; s < steps; ++s, a += TAIL_BYTES, b += TAIL_BYTES) {
    const Cursors<T> x_rows(q + s * STEP, stride);
    step<T>(tail_step(a), tail_step(b), x_rows, 0, sums);
  }
}

// total += one group of int8: the planes of one block, then of the other.
template <int T>
inline void group_int8(const Tile& tile, int64_t g, const Rows& rows, __m256i (&total)[T][2]) {
  const __m256i mask = _mm256_set1_epi8(15);
  for (int64_t part = 0; part < tile.group / STEP; part += PART) {
    const Cursors<T> x_rows(rows.q + g * tile.group + part * STEP, rows.stride);
#pragma GCC unroll 2
    for (int b = 0; b < 2; ++b) {
      const uint8_t* const codes = tile.codes[b] + g * tile.group * ROWS + part * STEP_CODES;
      __m256i sums[T][2];
      clear<T>(sums);
#pragma GCC unroll 8
      for (int64_t s = 0; s < PART; ++s) {
        const __m256i raw = load(codes + s * STEP_CODES);
        step<T>(_mm256_and_si256(raw, mask), _mm256_and_si256(_mm256_srli_epi16(raw, 4), mask),
                x_rows, s * STEP, sums);
      }
      widen_planes<false, T>(sums, b, total);
    }
  }
}

template <Kind K, int T>
inline void group_direct(const Tile& tile, int64_t g, const Rows& rows, __m256i (&total)[T][2]) {
  if constexpr (K == Kind::int8) {
    group_int8<T>(tile, g, rows, total);
  } else {
    const int64_t bytes = group_bytes(K, tile.group), steps = tile.group / STEP;
    const int64_t part = K == Kind::int4 ? PART : steps;
    const uint8_t *a = tile.codes[0] + g * bytes, *b = tile.codes[1] + g * bytes;
    const int8_t* q = rows.q + g * tile.group;
    for (int64_t s = 0; s < steps; s += part) {
      __m256i sums[T][2];
      clear<T>(sums);
      run_steps<K, T>(a, b, part, q, rows.stride, sums);
      widen<false, T>(sums, total);
      a += part * STEP_CODES / 2, b += part * STEP_CODES / 2, q += part * STEP;
    }
  }
}

// Expanded layout: [step][2 blocks][32]; int8: [block][step][low, high plane][32].
template <Kind K>
inline void expand_two(const Tile& tile, int64_t g, uint8_t* wide) {
  const int64_t bytes = group_bytes(K, tile.group), steps = tile.group / STEP;
  constexpr int S = LOADED<K>;
  for (int64_t b = 0; b < 2; ++b) {
    const uint8_t* codes = tile.codes[b] + g * bytes;
    __m256i* const out = reinterpret_cast<__m256i*>(wide) + b;
    int64_t s = 0;
    for (; s + S <= steps; s += S, codes += STEP_CODES) {
      Packed<K> packed(codes);
#pragma GCC unroll 8
      for (int i = 0; i < S; ++i) _mm256_storeu_si256(out + 2 * (s + i), packed.next(i));
    }
    for (; s < steps; ++s, codes += TAIL_BYTES) _mm256_storeu_si256(out + 2 * s, tail_step(codes));
  }
}

inline void expand_planes(const Tile& tile, int64_t g, uint8_t* wide) {
  const __m256i mask = _mm256_set1_epi8(15);
  __m256i* out = reinterpret_cast<__m256i*>(wide);
  for (int64_t b = 0; b < 2; ++b) {
    const uint8_t* const codes = tile.codes[b] + g * tile.group * ROWS;
    for (int64_t s = 0; s < tile.group / STEP; ++s, out += 2) {
      const __m256i raw = load(codes + s * STEP_CODES);
      _mm256_storeu_si256(out, _mm256_and_si256(raw, mask));
      _mm256_storeu_si256(out + 1, _mm256_and_si256(_mm256_srli_epi16(raw, 4), mask));
    }
  }
}

// sums = `steps` steps of expanded codes, a multiple of 8.
template <int T>
inline void run_wide(const uint8_t* wide, const int8_t* q, int64_t stride, int64_t steps,
                     __m256i (&sums)[T][2]) {
  clear<T>(sums);
  for (int64_t s = 0; s < steps; s += PART, wide += 64 * PART, q += PART * STEP) {
    const Cursors<T> x_rows(q, stride);
#pragma GCC unroll 8
    for (int64_t i = 0; i < PART; ++i) {
      const __m256i a = load_here(wide + 64 * i), b = load_here(wide + 64 * i + 32);
      step<T>(a, b, x_rows, i * STEP, sums);
    }
  }
}

// total = the dots of one group, whose codes are expanded.
template <Kind K, int T>
inline void group_wide(const uint8_t* wide, const int8_t* q, int64_t stride, int64_t steps,
                       __m256i (&total)[T][2]) {
  __m256i sums[T][2];
  if constexpr (K == Kind::int8) {
    for (int b = 0; b < 2; ++b, wide += 64 * steps) {
      run_wide<T>(wide, q, stride, PART, sums);
      widen_planes<true, T>(sums, b, total);
      for (int64_t s = PART; s < steps; s += PART) {
        run_wide<T>(wide + 64 * s, q + s * STEP, stride, PART, sums);
        widen_planes<false, T>(sums, b, total);
      }
    }
  } else {
    const int64_t part = K == Kind::int4 ? PART : steps;
    run_wide<T>(wide, q, stride, part, sums);
    widen<true, T>(sums, total);
    for (int64_t s = part; s < steps; s += part) {
      run_wide<T>(wide + 64 * s, q + s * STEP, stride, part, sums);
      widen<false, T>(sums, total);
    }
  }
}

// A kernel of its own, so that registers are handed out for it alone.
#define ENDSIDE_KERNEL __attribute__((noinline))

struct Avx2 {
  static constexpr int DIRECT_ROWS = 4, WIDE_ROWS = 6, FLOAT_ROWS = 6;
  static constexpr int64_t DIRECT_LIMIT = 16;
  static constexpr bool WIDE_LOOPS = true;

  template <Kind K, int T>
  ENDSIDE_KERNEL static void direct(const Tile& tile, const Rows& rows, float* out) {
    __m256 y[T][2];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) y[t][0] = y[t][1] = _mm256_setzero_ps();
    for (int64_t g = 0; g < tile.groups; ++g) {
      __m256i total[T][2];
      clear<T>(total);
      const int64_t bytes = group_bytes(K, tile.group);
      const Stretch ahead = ask_ahead<Level::first>(rows.ahead, bytes, tile.codes[0] + g * bytes);
      ask_both<Level::first>(ahead, bytes);
      group_direct<K, T>(tile, g, rows, total);
      const GroupTerm term = GroupTerm::at<K>(tile, g);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const int64_t i = t * rows.groups + g;
        term.add(total[t], rows.sum[i], rows.scale[i], y[t]);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      _mm256_storeu_ps(out + t * ROW_TILE, y[t][0]);
      _mm256_storeu_ps(out + t * ROW_TILE + ROWS, y[t][1]);
    }
  }

  template <Kind K>
  static void expand(const Tile& tile, int64_t g, uint8_t* wide) {
    if constexpr (K == Kind::int8) expand_planes(tile, g, wide);
    else expand_two<K>(tile, g, wide);
  }

  template <Kind K, int T>
  ENDSIDE_KERNEL static void wide(const Tile& tile, int64_t g, const uint8_t* wide,
                                  const Rows& rows, int64_t parts, float* out) {
    const GroupTerm term = GroupTerm::at<K>(tile, g);
    const int64_t steps = tile.group / STEP, k = rows.stride, groups = rows.groups;
    const int8_t* q = rows.q + g * tile.group;
    const int32_t* sum = rows.sum + g;
    const float* scale = rows.scale + g;
    for (int64_t i = 0; i < parts; ++i, q += T * k) {
      __m256i total[T][2];
      group_wide<K, T>(wide, q, k, steps, total);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t, sum += groups, scale += groups, out += ROW_TILE) {
        __m256 y[2] = {_mm256_loadu_ps(out), _mm256_loadu_ps(out + ROWS)};
        term.add(total[t], *sum, *scale, y);
        _mm256_storeu_ps(out, y[0]);
        _mm256_storeu_ps(out + ROWS, y[1]);
      }
    }
  }

  template <Kind K, int T>
  ENDSIDE_KERNEL static void floats(const Tile& tile, const Rows& rows, float* out) {
    __m256 y[T][2];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) y[t][0] = y[t][1] = _mm256_setzero_ps();
    for (int64_t k = 0; k < tile.k; ++k) {
      const __m256 a = weights<K>(tile.codes[0], k), b = weights<K>(tile.codes[1], k);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const __m256 x = _mm256_broadcast_ss(rows.x + t * rows.stride + k);
        y[t][0] = _mm256_fmadd_ps(a, x, y[t][0]);
        y[t][1] = _mm256_fmadd_ps(b, x, y[t][1]);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      _mm256_storeu_ps(out + t * ROW_TILE, y[t][0]);
      _mm256_storeu_ps(out + t * ROW_TILE + ROWS, y[t][1]);
    }
  }

  template <Kind K>
  static inline __m256 weights(const uint8_t* block, int64_t k) {
    if constexpr (K == Kind::f32) {
      return _mm256_loadu_ps(reinterpret_cast<const float*>(block) + k * ROWS);
    } else {
      const uint16_t* const at = reinterpret_cast<const uint16_t*>(block) + k * ROWS;
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
  }
};

}  // namespace

void apply_avx2(const Linear& linear, const Input& input, int64_t n_begin, int64_t n_end,
                const Epilogue& epilogue, void* scratch) {
  apply_with<Avx2>(linear, input, n_begin, n_end, epilogue, scratch);
}

void prepare_avx2(const Input& input, const float* x, int64_t width, const float* norm_weight,
                  float eps, int64_t row_begin, int64_t row_end) {
  prepare_rows(input, x, width, norm_weight, eps, row_begin, row_end);
}

}  // namespace endside
