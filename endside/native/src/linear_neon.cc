// NEON kernels of `linear.h` with int8 dot products (sdot); see linear_dot.h.
#include "linear_dot.h"
#include "linear_kernels.h"
#include "linear_rows.h"

namespace endside {
namespace {

// total += steps s .. s + 4 of the expanded codes times 16 activations of each row.
template <int T>
inline void look(const int8_t* codes, const int8_t* q, int64_t stride, Sums<T>& total) {
  int8x16_t x[T];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) x[t] = vld1q_s8(q + t * stride);
#pragma GCC unroll 4
  for (int quarter = 0; quarter < QUARTERS; ++quarter) {
    const int8x16_t first = vld1q_s8(codes + quarter * 16);
    const int8x16_t second = vld1q_s8(codes + 64 + quarter * 16);
    const int8x16_t third = vld1q_s8(codes + 128 + quarter * 16);
    const int8x16_t fourth = vld1q_s8(codes + 192 + quarter * 16);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      int32x4_t sum = total[t][quarter];
      sum = vdotq_laneq_s32(sum, first, x[t], 0);
      sum = vdotq_laneq_s32(sum, second, x[t], 1);
      sum = vdotq_laneq_s32(sum, third, x[t], 2);
      total[t][quarter] = vdotq_laneq_s32(sum, fourth, x[t], 3);
    }
  }
}

struct Neon {
  static constexpr int DIRECT_ROWS = 4, WIDE_ROWS = 4, FLOAT_ROWS = 4;
  static constexpr int64_t DIRECT_LIMIT = 8;
  static constexpr bool WIDE_LOOPS = false;

  template <Kind K, int T>
  static void direct(const Tile& tile, const Rows& rows, float* out) {
    direct_rows<K, T>(tile, rows, out);
  }

  // Expanded layout: [step][16 rows][4], signed.
  template <Kind K>
  static void expand(const Tile& tile, int64_t g, uint8_t* wide) {
    int8_t* const out = reinterpret_cast<int8_t*>(wide);
    each_step<K>(tile, g, [&](int64_t s, int quarter, int8x16_t codes) {
      vst1q_s8(out + s * 64 + quarter * 16, codes);
    });
  }

  template <Kind K, int T>
  static void wide(const Tile& tile, int64_t g, const uint8_t* wide, const Rows& rows,
                   float* out) {
    const int8_t* const codes = reinterpret_cast<const int8_t*>(wide);
    const int8_t* const q = rows.q + g * tile.group;
    Sums<T> total;
    clear<T>(total);
    for (int64_t s = 0; s < tile.group / STEP; s += LOOK) {
      look<T>(codes + s * 64, q + s * STEP, rows.stride, total);
    }
    add_group<K, T>(tile, g, rows, total, out);
  }

  template <Kind K, int T>
  static void floats(const Tile& tile, const Rows& rows, float* out) {
    float_rows<K, T>(tile, rows, out);
  }
};

}  // namespace

void apply_neon(const Linear& linear, const Input& input, int64_t n_begin, int64_t n_end,
                const Epilogue& epilogue, void* scratch) {
  apply_with<Neon>(linear, input, n_begin, n_end, epilogue, scratch);
}

void prepare_neon(const Input& input, const float* x, int64_t width, const float* norm_weight,
                  float eps, int64_t row_begin, int64_t row_end) {
  prepare_rows(input, x, width, norm_weight, eps, row_begin, row_end);
}

}  // namespace endside
