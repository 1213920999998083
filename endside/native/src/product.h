// c = c * factor + a b in register tiles: the inner loop of attention, for every cell type.
//
// Included after a vec_NAME.h. a is read number by number, b and c in vectors along a row. The sum
// of one element of c runs over k upwards, one fma each, whatever the tile: its bits depend on its
// row of a and its column of b alone.
#pragma once

#include <cstdint>

namespace endside {
namespace {

// Numbers as the cache stores them; only their addresses are used.
struct F16 { uint16_t bits; };
struct BF16 { uint16_t bits; };

inline Vec widen(const float* p) { return load(p); }
inline Vec widen(const F16* p) { return load_f16(&p->bits); }
inline Vec widen(const BF16* p) { return load_bf16(&p->bits); }
inline Vec widen(const int8_t* p) { return load_i8(p); }

constexpr int UNROLL = 4;  // steps of k per jump

// Memory that will be read soon: a product asks for it line by line between its own steps, since a
// burst of requests would fill the queue that its own reads need.
struct Ahead {
  const char* line = nullptr;
  int64_t lines = 0;
};

// One product: a (rows, depth), b (depth, columns), c (rows, columns), each row `*_stride` apart.
// Columns are a multiple of LANES. factor (rows): c is multiplied by it first; null: c starts at 0.
template <class T>
struct Product {
  const float* a;
  int64_t a_stride;
  const T* b;
  int64_t b_stride;
  int64_t depth;
  float* c;
  int64_t c_stride;
  const float* factor;
  Ahead* ahead;
};

// Kept out of line, where its loop has all registers. Loops are unrolled by order, not by guess:
// `sum` must never be an array in memory. depth is a multiple of U.
template <int R, int V, int U, bool SCALED, class T>
__attribute__((noinline)) void tile(const float* __restrict a, int64_t a_stride,
                                    const T* __restrict b, int64_t b_stride, int64_t depth,
                                    float* __restrict c, int64_t c_stride, const float* factor,
                                    const char* ahead, int64_t ahead_step) {
  Vec sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sum[r][v] = zero();
  }
  if constexpr (SCALED) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec scale = broadcast(factor[r]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[r][v] = mul(load(c + r * c_stride + v * LANES), scale);
    }
  }
  for (int64_t k = 0; k < depth; k += U) {
    __builtin_prefetch(ahead, 0, 2);  // into the second level
    ahead += ahead_step;
#pragma GCC unroll 16
    for (int u = 0; u < U; ++u) {
      Vec right[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) right[v] = widen(b + v * LANES);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec left = broadcast(a[r * a_stride + k + u]);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
      }
      b += b_stride;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(c + r * c_stride + v * LANES, sum[r][v]);
  }
}

constexpr float ONES[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
static_assert(TILE_ROWS >= 4 && TILE_ROWS <= 16, "tiles of TILE_ROWS, 4, 2 and 1 rows");

template <int R, int V, class T>
inline void tile_at(const Product<T>& p, int64_t row, int64_t column) {
  const float* a = p.a + row * p.a_stride;
  const T* b = p.b + column;
  float* c = p.c + row * p.c_stride + column;
  const int64_t steps = p.depth / UNROLL, whole = steps * UNROLL;
  // with nothing to ask for, a line that is here anyway
  const bool asks = p.ahead->lines >= steps;
  const char* ahead = asks ? p.ahead->line : reinterpret_cast<const char*>(a);
  const int64_t step = asks ? 64 : 0;
  p.ahead->line += step * steps;
  p.ahead->lines -= asks ? steps : 0;
  if (p.factor) {
    tile<R, V, UNROLL, true>(a, p.a_stride, b, p.b_stride, whole, c, p.c_stride, p.factor + row,
                             ahead, step);
  } else {
    tile<R, V, UNROLL, false>(a, p.a_stride, b, p.b_stride, whole, c, p.c_stride, nullptr, ahead,
                              step);
  }
  if (whole == p.depth) return;
  tile<R, V, 1, true>(a + whole, p.a_stride, b + whole * p.b_stride, p.b_stride, p.depth - whole, c,
                      p.c_stride, ONES, reinterpret_cast<const char*>(a), 0);
}

// All rows of V vectors of columns: full tiles, then what is left.
template <int V, class T>
inline void strip(const Product<T>& p, int64_t rows, int64_t column) {
  int64_t row = 0;
  for (; row + TILE_ROWS <= rows; row += TILE_ROWS) tile_at<TILE_ROWS, V>(p, row, column);
  for (; row + 4 <= rows; row += 4) tile_at<4, V>(p, row, column);
  for (; row + 2 <= rows; row += 2) tile_at<2, V>(p, row, column);
  if (row < rows) tile_at<1, V>(p, row, column);
}

template <class T>
inline void multiply(const Product<T>& p, int64_t rows, int64_t columns) {
  int64_t column = 0;
  while (column < columns) {
    const int64_t left = (columns - column) / LANES;
    // two even strips rather than a wide and a thin one
    const int64_t even = left > TILE_VECS && left < 2 * TILE_VECS ? (left + 1) / 2 : left;
    const int64_t vecs = even < TILE_VECS ? even : TILE_VECS;
    if (vecs == TILE_VECS) strip<TILE_VECS>(p, rows, column);
    if (vecs != TILE_VECS && vecs >= 2) strip<2>(p, rows, column);
    column += (vecs == TILE_VECS || vecs == 1 ? vecs : 2) * LANES;
    if (vecs == 1) strip<1>(p, rows, column - LANES);
  }
}

}  // namespace
}  // namespace endside
