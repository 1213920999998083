// Portable kernels of `linear.h`: plain loops, which a compiler turns into the vectors it has.
#include <cmath>

#include "linear_body.h"
#include "linear_kernels.h"
#include "linear_rows.h"

namespace endside {
namespace {

// a * b + c rounded once, without asking for a fused instruction: the product of two floats is
// exact in double; the sum is rounded to odd (its last bit tells that something was cut off), and a
// number rounded to odd with two bits to spare rounds to the same float as the exact one.
inline float fused(float a, float b, float c) {
  const double product = static_cast<double>(a) * static_cast<double>(b), addend = c;
  const double sum = product + addend;
  const double back = sum - product;
  const double error = (product - (sum - back)) + (addend - back);
  uint64_t bits;
  std::memcpy(&bits, &sum, sizeof bits);
  const bool inexact = error > 0 || error < 0;  // false for NaN
  if (inexact && (bits & 1) == 0) bits += (error > 0) == (sum > 0) ? 1 : -1;
  double odd;
  std::memcpy(&odd, &bits, sizeof odd);
  return static_cast<float>(odd);
}

// The 32 codes of step s of one group of one block.
template <Kind K>
void unpack_step(const uint8_t* codes, int64_t s, int64_t steps, uint8_t* out) {
  if constexpr (K == Kind::int8) {
    std::memcpy(out, codes + s * STEP_CODES, STEP_CODES);
  } else if constexpr (K == Kind::int4) {
    const int shift = static_cast<int>(s % 2 * 4);
    for (int64_t i = 0; i < STEP_CODES; ++i) out[i] = codes[s / 2 * 32 + i] >> shift & 15;
  } else if constexpr (K == Kind::ternary2) {
    const int shift = static_cast<int>(s % 4 * 2);
    for (int64_t i = 0; i < STEP_CODES; ++i) out[i] = codes[s / 4 * 32 + i] >> shift & 3;
  } else if (const int64_t whole = steps / TRITS * TRITS; s < whole) {
    const uint8_t power[TRITS] = {1, 3, 9, 27, 81};
    for (int64_t i = 0; i < STEP_CODES; ++i) {
      const uint8_t fraction = static_cast<uint8_t>(codes[s / TRITS * 32 + i] * power[s % TRITS]);
      out[i] = static_cast<uint8_t>(fraction * 3 >> 8);
    }
  } else {
    const uint8_t* const tail = codes + whole / TRITS * STEP_CODES + (s - whole) * TAIL_BYTES;
    for (int64_t i = 0; i < STEP_CODES; ++i) out[i] = tail[i % 8] >> (i / 8 * 2) & 3;
  }
}

float scale_of(const Tile& tile, int64_t block, int64_t at) {
  const uint16_t bits = tile.scales[block][at];
  return tile.scale_type == ScaleType::f16 ? from_f16(bits) : from_bf16(bits);
}

struct Portable {
  static constexpr int WIDE_ROWS = 1, FLOAT_ROWS = 4;
  static constexpr int64_t DIRECT_LIMIT = 0;
  static constexpr bool WIDE_LOOPS = false;

  // wide: int16 [16 rows][group].
  template <Kind K>
  static void expand(const Tile& tile, int64_t g, uint8_t* wide) {
    int16_t* const out = reinterpret_cast<int16_t*>(wide);
    const int64_t bytes = group_bytes(K, tile.group), steps = tile.group / STEP;
    uint8_t step[STEP_CODES];
    for (int64_t i = 0; i < 2 * steps; ++i) {
      const int64_t block = i / steps, s = i % steps;
      unpack_step<K>(tile.codes[block] + g * bytes, s, steps, step);
      for (int64_t c = 0; c < STEP_CODES; ++c) {
        out[(block * ROWS + c / STEP) * tile.group + s * STEP + c % STEP] = step[c];
      }
    }
  }

  template <Kind K, int T>
  static void wide(const Tile& tile, int64_t g, const uint8_t* wide, const Rows& rows,
                   float* out) {
    const int16_t* const codes = reinterpret_cast<const int16_t*>(wide);
    int16_t x[MAX_GROUP];
    for (int64_t c = 0; c < tile.group; ++c) x[c] = rows.q[g * tile.group + c];
    for (int64_t r = 0; r < ROW_TILE; ++r) {
      const int16_t* const row = codes + r * tile.group;
      int32_t dot = 0;
      for (int64_t c = 0; c < tile.group; ++c) dot += static_cast<int32_t>(row[c]) * x[c];
      const int64_t block = r / ROWS, at = g * ROWS + r % ROWS;
      const int32_t zero = tile.zeros[block] ? tile.zeros[block][at] : symmetric_zero(K);
      const float factor = scale_of(tile, block, at) * rows.scale[g];
      out[r] += static_cast<float>(dot - zero * rows.sum[g]) * factor;
    }
  }

  template <Kind K, int T>
  static void floats(const Tile& tile, const Rows& rows, float* out) {
    float y[T][ROW_TILE] = {};
    for (int64_t k = 0; k < tile.k; ++k) {
      float w[ROW_TILE];
      for (int64_t r = 0; r < ROW_TILE; ++r) {
        const uint8_t* const block = tile.codes[r / ROWS];
        const int64_t at = k * ROWS + r % ROWS;
        w[r] = K == Kind::f32 ? reinterpret_cast<const float*>(block)[at]
                              : from_bf16(reinterpret_cast<const uint16_t*>(block)[at]);
      }
      for (int t = 0; t < T; ++t) {
        const float x = rows.x[t * rows.stride + k];
        for (int64_t r = 0; r < ROW_TILE; ++r) y[t][r] = fused(w[r], x, y[t][r]);
      }
    }
    std::memcpy(out, y, sizeof y);
  }
};

}  // namespace

void apply_portable(const Linear& linear, const Input& input, int64_t n_begin, int64_t n_end,
                    const Epilogue& epilogue, void* scratch) {
  apply_with<Portable>(linear, input, n_begin, n_end, epilogue, scratch);
}

void prepare_portable(const Input& input, const float* x, int64_t width, const float* norm_weight,
                      float eps, int64_t row_begin, int64_t row_end) {
  prepare_rows(input, x, width, norm_weight, eps, row_begin, row_end);
}

}  // namespace endside
