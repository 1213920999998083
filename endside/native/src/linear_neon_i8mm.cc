// NEON kernels of `linear.h` with int8 matrix products (smmla) for many rows of x; few rows take
// the dot products of linear_dot.h.
//
// smmla multiplies 2 rows of W x 8 k with 8 k x 2 rows of x into 4 sums: twice the products of an
// sdot. So the expanded layout puts two steps of two rows of W side by side, and rows of x go in
// pairs; where their number is odd the last one is its own partner and the copy is dropped.
#include "linear_dot.h"
#include "linear_kernels.h"
#include "linear_rows.h"

namespace endside {
namespace {

constexpr int PAIRS = 8;  // of rows of W in a tile

// total[i][pair]: rows of W 2 * pair and the next (halves) x rows of x 2 * i and the next.
template <int HALF>
using Squares = int32x4_t[HALF][PAIRS];

// Eight activations of row t, and of the row after it if there is one.
template <int T>
inline int8x16_t two_rows(const int8_t* q, int t, int64_t stride) {
  const int other = t + 1 < T ? t + 1 : t;
  return vcombine_s8(vld1_s8(q + t * stride), vld1_s8(q + other * stride));
}

template <int T>
inline void square_steps(const int8_t* codes, const int8_t* q, int64_t stride,
                         Squares<(T + 1) / 2>& total) {
  constexpr int HALF = (T + 1) / 2;
  int8x16_t x[HALF];
#pragma GCC unroll 4
  for (int i = 0; i < HALF; ++i) x[i] = two_rows<T>(q, 2 * i, stride);
#pragma GCC unroll 8
  for (int pair = 0; pair < PAIRS; ++pair) {
    const int8x16_t w = vld1q_s8(codes + pair * 16);
#pragma GCC unroll 4
    for (int i = 0; i < HALF; ++i) total[i][pair] = vmmlaq_s32(total[i][pair], w, x[i]);
  }
}

// Squares of rows of W and x -> rows of x, each with its sixteen rows of W.
template <int T>
inline void untangle(const Squares<(T + 1) / 2>& squares, Sums<T>& total) {
  for (int t = 0; t < T; ++t) {
    for (int quarter = 0; quarter < QUARTERS; ++quarter) {
      const int32x4_t a = squares[t / 2][2 * quarter], b = squares[t / 2][2 * quarter + 1];
      total[t][quarter] = t % 2 == 0 ? vuzp1q_s32(a, b) : vuzp2q_s32(a, b);
    }
  }
}

struct NeonI8mm {
  static constexpr int DIRECT_ROWS = 4, WIDE_ROWS = 4, FLOAT_ROWS = 4;
  static constexpr int64_t DIRECT_LIMIT = 4;
  static constexpr bool WIDE_LOOPS = false;

  template <Kind K, int T>
  static void direct(const Tile& tile, const Rows& rows, float* out) {
    direct_rows<K, T>(tile, rows, out);
  }

  // Expanded layout: [two steps][8 pairs of rows][2 rows][8 k], signed.
  template <Kind K>
  static void expand(const Tile& tile, int64_t g, uint8_t* wide) {
    each_step<K>(tile, g, [&](int64_t s, int quarter, int8x16_t codes) {
      // rows 0 .. 3 of four bytes go to every other four bytes
      uint8_t* const out = wide + s / 2 * 128 + quarter * 32 + s % 2 * 4;
      const uint32x4_t rows = vreinterpretq_u32_s8(codes);
      vst1q_lane_u32(reinterpret_cast<uint32_t*>(out), rows, 0);
      vst1q_lane_u32(reinterpret_cast<uint32_t*>(out + 8), rows, 1);
      vst1q_lane_u32(reinterpret_cast<uint32_t*>(out + 16), rows, 2);
      vst1q_lane_u32(reinterpret_cast<uint32_t*>(out + 24), rows, 3);
    });
  }

  template <Kind K, int T>
  static void wide(const Tile& tile, int64_t g, const uint8_t* wide, const Rows& rows,
                   float* out) {
    constexpr int HALF = (T + 1) / 2;
    const int8_t* const codes = reinterpret_cast<const int8_t*>(wide);
    const int8_t* const q = rows.q + g * tile.group;
    Squares<HALF> squares;
    for (int i = 0; i < HALF; ++i) {
      for (int pair = 0; pair < PAIRS; ++pair) squares[i][pair] = vdupq_n_s32(0);
    }
    for (int64_t s = 0; s < tile.group / STEP; s += 2) {
      square_steps<T>(codes + s * 64, q + s * STEP, rows.stride, squares);
    }
    Sums<T> total;
    untangle<T>(squares, total);
    add_group<K, T>(tile, g, rows, total, out);
  }

  template <Kind K, int T>
  static void floats(const Tile& tile, const Rows& rows, float* out) {
    float_rows<K, T>(tile, rows, out);
  }
};

}  // namespace

void apply_neon_i8mm(const Linear& linear, const Input& input, int64_t n_begin, int64_t n_end,
                     const Epilogue& epilogue, void* scratch) {
  apply_with<NeonI8mm>(linear, input, n_begin, n_end, epilogue, scratch);
}

void prepare_neon_i8mm(const Input& input, const float* x, int64_t width,
                       const float* norm_weight, float eps, int64_t row_begin, int64_t row_end) {
  prepare_rows(input, x, width, norm_weight, eps, row_begin, row_end);
}

}  // namespace endside
