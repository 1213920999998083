// Products of attention in AMX tiles, close to float32 although tiles multiply bf16.
//
// A number is split into terms that bf16 holds, high + low, and all products of terms are summed
// in float32:
//     a row of the left side (query, weight): two terms, together 16 bits of a mantissa's 24;
//     a number of the cache: f16 is exactly two terms (8 and 3 bits), bf16 and int8 codes are one.
// So the only error beyond float32's own is what a row's second term rounds away, at most 2^-17 of
// each factor. The terms of a row are rows of their own: the I heads of a query make 2 I rows, high
// ones first, which for I = 8 fill a tile; the results of both are added by whoever reads them.
//
// A tile product (TDPBF16PS) sums an element's 32 factors in two chains, even and odd, and adds
// them to what is there; nothing depends on other rows or columns, nor on how many there are. So a
// row has the same bits beside any neighbours, as everywhere in the core. Numbers below 2^-126 count
// as zero.
//
// The right side has pairs of rows side by side, in tiles of 16 pairs by 16 columns. A bf16 cache
// lies so (Order::tiles) and is multiplied where it lies, for a lone query as fast as memory gives
// it; other cells are repacked, which costs about what one query's products do and is shared by many.
#pragma once

#include <immintrin.h>

#include "product.h"
#include "tile_shapes.h"

#include <type_traits>

namespace endside {
namespace {

constexpr int64_t TILE_BYTES = 1024;  // 16 rows of 64 bytes
constexpr int64_t TILE_DEPTH = 32;    // bf16 factors of one tile product
constexpr int64_t TILE_COLUMNS = 16;  // float32 sums in a row of a tile

inline int64_t tiles_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// How the 2 I rows of a query lie in tiles: one, or one for each term.
struct TileRows {
  int64_t tiles, rows;  // of each
  explicit TileRows(int64_t heads) : tiles(heads > 8 ? 2 : 1), rows(2 * heads / tiles) {}
};

// Shapes this thread's tiles for left sides of `rows` rows, until `free_tiles`. Registers 0 .. 3 are
// sums, 4 is the left side, 5 and 6 the right.
inline void shape_tiles(int64_t rows) {
  TileShapes shapes;
  for (int i = 0; i < 7; ++i) {
    shapes.bytes[i] = TILE_ROW_BYTES;
    shapes.rows[i] = i < 5 ? static_cast<uint8_t>(rows) : TILE_ROWS_MOST;
  }
  load_shapes(shapes);
}
inline void free_tiles() { _tile_release(); }

// What will be read later: asked for a few lines at a time between other work, into the second-level
// cache, which has room for more requests under way than the first.
struct Later {
  const uint8_t* line = nullptr;
  int64_t lines = 0;
  Later() = default;
  Later(const void* from, int64_t bytes)
      : line(static_cast<const uint8_t*>(from)), lines(from ? bytes / 64 : 0) {}
  void ask(int64_t count) {
    if (lines < count) return;
    for (int64_t i = 0; i < count; ++i) __builtin_prefetch(line + i * 64, 0, 2);
    line += count * 64;
    lines -= count;
  }
};

// Right side of a product: `terms` planes of (depth / 32) x (columns / 16) tiles. At each of them
// `lines` of `later` are asked for; null for none.
struct Right {
  const uint8_t* planes;
  int terms;
  int64_t steps, columns;  // in tiles
  Later* later = nullptr;
  int64_t lines = 0;
  int64_t plane_bytes() const { return steps * columns * TILE_BYTES; }
};

// N tiles of columns, from `column` on, of one tile of rows.
template <int N, int TERMS, bool AHEAD>
inline void tile_strip(const uint8_t* a, int64_t a_bytes, const Right& right, int64_t column,
                       float* c, int64_t c_bytes) {
  const int64_t plane = right.plane_bytes();
  _tile_zero(0);
  if constexpr (N > 1) _tile_zero(1);
  if constexpr (N > 2) _tile_zero(2);
  if constexpr (N > 3) _tile_zero(3);
  const uint8_t* b = right.planes + column * TILE_BYTES;
  for (int64_t k = 0; k < right.steps; ++k, b += right.columns * TILE_BYTES) {
    _tile_loadd(4, a + k * a_bytes, 64);
// registers are part of an instruction, so their numbers must be literal
#define ENDSIDE_ADD(n)                                    \
  if constexpr (N > n) {                                  \
    _tile_loadd(5, b + n * TILE_BYTES, 64);               \
    if constexpr (AHEAD) right.later->ask(right.lines);   \
    _tile_dpbf16ps(n, 4, 5);                              \
    if constexpr (TERMS > 1) {                            \
      _tile_loadd(6, b + plane + n * TILE_BYTES, 64);     \
      _tile_dpbf16ps(n, 4, 6);                            \
    }                                                     \
  }
    ENDSIDE_ADD(0)
    ENDSIDE_ADD(1)
    ENDSIDE_ADD(2)
    ENDSIDE_ADD(3)
#undef ENDSIDE_ADD
  }
  float* to = c + column * TILE_COLUMNS;
  _tile_stored(0, to, c_bytes);
  if constexpr (N > 1) _tile_stored(1, to + TILE_COLUMNS, c_bytes);
  if constexpr (N > 2) _tile_stored(2, to + 2 * TILE_COLUMNS, c_bytes);
  if constexpr (N > 3) _tile_stored(3, to + 3 * TILE_COLUMNS, c_bytes);
}

template <int TERMS, bool AHEAD = false>
inline void tile_multiply_terms(const TileRows& left, const uint8_t* a, const Right& right,
                                float* c, int64_t c_stride) {
  const int64_t a_bytes = left.rows * 64, c_bytes = c_stride * static_cast<int64_t>(sizeof(float));
  for (int64_t t = 0; t < left.tiles; ++t) {
    for (int64_t column = 0; column < right.columns; column += 4) {
      const int64_t count = right.columns - column;
      if (count >= 4) tile_strip<4, TERMS, AHEAD>(a, a_bytes, right, column, c, c_bytes);
      if (count == 3) tile_strip<3, TERMS, AHEAD>(a, a_bytes, right, column, c, c_bytes);
      if (count == 2) tile_strip<2, TERMS, AHEAD>(a, a_bytes, right, column, c, c_bytes);
      if (count == 1) tile_strip<1, TERMS, AHEAD>(a, a_bytes, right, column, c, c_bytes);
    }
    a += right.steps * a_bytes;
    c += left.rows * c_stride;
  }
}

// c (2 I, columns) = a b. a: for each tile of rows, for each step of the depth, its rows of 64
// bytes.
inline void tile_multiply(const TileRows& left, const void* a, const Right& right, float* c,
                          int64_t c_stride) {
  memory_is_used();
  const uint8_t* rows = static_cast<const uint8_t*>(a);
  if (right.terms == 1 && right.later) tile_multiply_terms<1, true>(left, rows, right, c, c_stride);
  if (right.terms == 1 && !right.later) tile_multiply_terms<1>(left, rows, right, c, c_stride);
  if (right.terms == 2) tile_multiply_terms<2>(left, rows, right, c, c_stride);
  memory_is_used();
}

inline __m512i bits_of(Vec x) { return _mm512_castps_si512(x); }

// 32 numbers as left-side rows have them: the nearest bf16 ones, then those nearest to what is left.
inline void store_terms(Vec x, Vec y, uint16_t* high, uint16_t* low) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512i half = _mm512_set1_epi32(0x8000);
  // half up instead of half to even: the remainder is as small
  const auto rounded = [&](Vec v) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_add_epi32(bits_of(v), half), upper));
  };
  const Vec a = rounded(x), b = rounded(y);
  _mm512_storeu_si512(high, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
  _mm512_storeu_si512(low, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(sub(y, b), sub(x, a))));
}

// Pairs (x, y) of bf16 numbers, lane by lane; the lower halves of x and y are cut off.
inline __m512i paired(Vec x, Vec y) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  // bits of y where upper is set, else those of x moved down
  return _mm512_ternarylogic_epi32(upper, bits_of(y), _mm512_srli_epi32(bits_of(x), 16), 0xca);
}
inline Vec cut(Vec x) {
  return _mm512_castsi512_ps(
      _mm512_and_si512(bits_of(x), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// The same of numbers that are bf16 as they lie.
inline __m256i sixteen(const BF16* cells) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(cells));
}
inline __m512i paired(__m256i x, __m256i y) {
  alignas(64) static constexpr uint16_t ORDER[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(x), y, 1);
  return _mm512_permutexvar_epi16(_mm512_load_si512(ORDER), both);
}

// Numbers of the cache, `rows` rows of `stride`, of which the first `limit` count and the others are
// zero, as the right side of a product. Columns are read up to the next multiple of 16. `ahead`, as
// large as the cells, will be read soon; null for none.
template <int TERMS, class T>
inline void pack_cells(const T* cells, const void* ahead, int64_t stride, int64_t rows,
                       int64_t limit, int64_t columns, uint8_t* planes, int64_t plane) {
  constexpr int64_t AT_ONCE = 2 * LANES * static_cast<int64_t>(sizeof(T));
  // with nothing to ask for, a line that is here anyway
  const char* line = static_cast<const char*>(ahead ? ahead : planes);
  const int64_t line_step = ahead ? AT_ONCE : 0;
  const int64_t wide = tiles_of(columns, TILE_COLUMNS);
  for (int64_t row = 0; row < tiles_of(rows, TILE_DEPTH) * TILE_DEPTH; row += 2) {
    uint8_t* to = planes + row / TILE_DEPTH * wide * TILE_BYTES + row % TILE_DEPTH * 32;
    const T* from = cells + row * stride;
    for (int64_t column = 0; column < wide; ++column, to += TILE_BYTES) {
      __builtin_prefetch(line, 0, 2);  // into the second level
      line += line_step;
      if constexpr (std::is_same_v<T, BF16>) {
        const __m256i none = _mm256_setzero_si256();
        const __m256i x = row < limit ? sixteen(from + column * LANES) : none;
        const __m256i y = row + 1 < limit ? sixteen(from + stride + column * LANES) : none;
        _mm512_store_si512(to, paired(x, y));
      } else {
        const Vec x = row < limit ? widen(from + column * LANES) : zero();
        const Vec y = row + 1 < limit ? widen(from + stride + column * LANES) : zero();
        _mm512_store_si512(to, paired(x, y));
        if constexpr (TERMS > 1) {
          _mm512_store_si512(to + plane, paired(sub(x, cut(x)), sub(y, cut(y))));
        }
      }
    }
  }
}

// The right side of cells that lie as tiles.
inline Right as_it_lies(const void* cells, int64_t rows, int64_t columns, Later* later = nullptr,
                        int64_t lines = 0) {
  return {static_cast<const uint8_t*>(cells), 1, rows / TILE_DEPTH, columns / TILE_COLUMNS, later,
          lines};
}

// The same where only the first `limit` rows count: the others may be no numbers.
inline Right first_rows(const void* cells, int64_t rows, int64_t limit, int64_t columns,
                        uint8_t* room) {
  const Right right = as_it_lies(room, rows, columns);
  const uint8_t* from = static_cast<const uint8_t*>(cells);
  for (int64_t row = 0; row < rows; row += 2) {
    const int64_t at = row / TILE_DEPTH * right.columns * TILE_BYTES + row % TILE_DEPTH * 32;
    const uint32_t kept = row + 1 < limit ? 0xffffffffu : row < limit ? 0xffffu : 0;
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(kept));
    for (int64_t column = 0; column < right.columns; ++column) {
      const int64_t line = at + column * TILE_BYTES;
      _mm512_store_si512(room + line, _mm512_and_si512(_mm512_loadu_si512(from + line), mask));
    }
  }
  return right;
}

inline int terms_of(Cell stored) { return stored == Cell::f16 ? 2 : 1; }

// `stored` is what the cells were rounded to, when they are f32 themselves.
inline Right pack(Cell cell, Cell stored, const void* cells, const void* ahead, int64_t stride,
                  int64_t rows, int64_t limit, int64_t columns, uint8_t* room) {
  const Right right = {room, terms_of(stored), tiles_of(rows, TILE_DEPTH),
                       tiles_of(columns, TILE_COLUMNS), nullptr, 0};
  const auto as = [&](auto* numbers) {
    if (right.terms == 1) {
      pack_cells<1>(numbers, ahead, stride, rows, limit, columns, room, 0);
    } else {
      pack_cells<2>(numbers, ahead, stride, rows, limit, columns, room, right.plane_bytes());
    }
  };
  switch (cell) {
    case Cell::f16: as(static_cast<const F16*>(cells)); break;
    case Cell::bf16: as(static_cast<const BF16*>(cells)); break;
    case Cell::int8: as(static_cast<const int8_t*>(cells)); break;
    case Cell::f32: as(static_cast<const float*>(cells)); break;
  }
  return right;
}

}  // namespace
}  // namespace endside
