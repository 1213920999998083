// The kernels of gemm.h in tile registers: four tiles of sums, two of each factor.
//
// A tile of the first factor is 16 lines of 32 depths; one of the second 16 pairs of depths, in each
// the pairs of 16 lines side by side. So lines that lie along the depth are a first factor as they
// are, lines that lie across it a second factor as they are, and the other two cases are a transpose
// of 16 x 16 pairs away. The six products of a step are taken in an order in which each shares one
// factor with the one before: fourteen tiles are read for twenty-four products.
#include <immintrin.h>

#include <cstring>

#include "gemm.h"
#include "tile_shapes.h"

namespace endside {
namespace {

constexpr int64_t SIDE = TILE_ROWS_MOST;  // lines of a tile; pairs of depths too
constexpr int64_t TILE = SIDE * 32;       // bfloat16 numbers of one

void enter() {
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) {
    shapes.bytes[tile] = TILE_ROW_BYTES;
    shapes.rows[tile] = TILE_ROWS_MOST;
  }
  load_shapes(shapes);
}

void leave() { _tile_release(); }

// Term t of sixteen numbers in the upper halves of their lanes, and the rest of them. Two terms are
// rounded to the nearest, ties away from zero; what they leave is short enough for the third, which
// therefore takes the upper bits as they are, those of a NaN too.
template <int T>
inline __m512i take_term(__m512& x) {
  const __m512i bits = _mm512_castps_si512(x);
  if (T == GEMM_TERMS - 1) return bits;
  const __m512i up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x8000));
  const __m512i term = _mm512_and_si512(up, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  x = _mm512_sub_ps(x, _mm512_castsi512_ps(term));
  return term;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Sixteen numbers, or the first `count` of them, which may be none, and zeros.
template <bool WHOLE>
inline __m512 some(const float* from, int64_t count) {
  if (WHOLE) return _mm512_loadu_ps(from);
  const int64_t there = count < 0 ? 0 : smaller(count, SIDE);
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << there) - 1), from);
}

using Rows = __m512i[SIDE];  // of a tile

template <int T>
inline void put_line(__m512& low, __m512& high, __m512i upper_halves, __m512i& row) {
  const __m512i a = take_term<T>(low), b = take_term<T>(high);
  row = _mm512_permutex2var_epi16(a, upper_halves, b);
}

// `lines` lines of 32 depths, `depth` of them there: a row is a line.
template <bool WHOLE>
inline void take_lines(const GemmFactor& from, int64_t lines, int64_t depth, Rows* terms) {
  alignas(64) int16_t odd[32];
  for (int i = 0; i < 32; ++i) odd[i] = static_cast<int16_t>(2 * i + 1);
  const __m512i upper_halves = _mm512_load_si512(odd);
  for (int64_t i = 0; i < SIDE; ++i) {
    const bool there = WHOLE || i < lines;
    const float* line = from.data + (there ? i * from.step : 0);
    __m512 low = some<WHOLE>(line, there ? depth : 0);
    __m512 high = some<WHOLE>(WHOLE || depth > SIDE ? line + SIDE : line, there ? depth - SIDE : 0);
    put_line<0>(low, high, upper_halves, terms[0][i]);
    put_line<1>(low, high, upper_halves, terms[1][i]);
    put_line<2>(low, high, upper_halves, terms[2][i]);
  }
}

template <int T>
inline void put_pair(__m512& even, __m512& odd, __m512i& row) {
  const __m512i below = _mm512_srli_epi32(take_term<T>(even), 16), above = take_term<T>(odd);
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  constexpr int OR_MASKED = 0xf8;  // a | (b & c)
  row = _mm512_ternarylogic_epi32(below, above, mask, OR_MASKED);
}

// The same of lines that lie across: a row is a pair of depths.
template <bool WHOLE>
inline void take_pairs(const GemmFactor& from, int64_t lines, int64_t depth, Rows* terms) {
  for (int64_t i = 0; i < SIDE; ++i) {
    const bool first = WHOLE || 2 * i < depth, second = WHOLE || 2 * i + 1 < depth;
    const float* row = from.data + (first ? 2 * i * from.step : 0);
    // the next step's: rows far apart are nothing the processor would guess
    __builtin_prefetch(row + GEMM_STEP * from.step);
    __builtin_prefetch(row + (GEMM_STEP + 1) * from.step);
    __m512 even = some<WHOLE>(row, first ? lines : 0);
    __m512 odd = some<WHOLE>(second ? row + from.step : row, second ? lines : 0);
    put_pair<0>(even, odd, terms[0][i]);
    put_pair<1>(even, odd, terms[1][i]);
    put_pair<2>(even, odd, terms[2][i]);
  }
}

// 16 x 16 numbers of 32 bits, rows for columns.
inline void transpose(Rows& r) {
  __m512i t[SIDE];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < SIDE; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  constexpr int EVEN = 0x88, ODD = 0xdd;  // quarters of both
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], EVEN);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], ODD);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], EVEN);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], ODD);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], EVEN);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], ODD);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], EVEN);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], ODD);
  }
}

// Half a step: 16 lines, `lines` of them there.
template <bool INSIDE, bool LEFT, bool WHOLE>
void lay_half(const GemmFactor& from, int64_t lines, int64_t depth, uint16_t* half) {
  Rows terms[GEMM_TERMS];
  if (INSIDE) {
    take_lines<WHOLE>(from, lines, depth, terms);
  } else {
    take_pairs<WHOLE>(from, lines, depth, terms);
  }
  for (int64_t t = 0; t < GEMM_TERMS; ++t) {
    if (INSIDE != LEFT) transpose(terms[t]);
    uint16_t* tile = half + 2 * t * TILE;
    for (int64_t i = 0; i < SIDE; ++i) _mm512_store_si512(tile + 32 * i, terms[t][i]);
  }
}

template <bool INSIDE, bool LEFT>
void lay(const GemmFactor& from, int64_t lines, int64_t depth, uint16_t* step) {
  const GemmFactor second = {from.data + (INSIDE ? SIDE * from.step : SIDE), from.step, INSIDE};
  if (lines == GEMM_LINES && depth == GEMM_STEP) {
    lay_half<INSIDE, LEFT, true>(from, SIDE, depth, step);
    lay_half<INSIDE, LEFT, true>(second, SIDE, depth, step + TILE);
    return;
  }
  lay_half<INSIDE, LEFT, false>(from, smaller(lines, SIDE), depth, step);
  lay_half<INSIDE, LEFT, false>(lines > SIDE ? second : from, lines - SIDE, depth, step + TILE);
}

// Tiles 0 .. 3 are the sums, 4 and 5 a term of the first factor, 6 and 7 one of the second.
template <int TERM>
inline void load_left(const uint16_t* step) {
  _tile_loadd(4, step + 2 * TERM * TILE, TILE_ROW_BYTES);
  _tile_loadd(5, step + (2 * TERM + 1) * TILE, TILE_ROW_BYTES);
}
template <int TERM>
inline void load_right(const uint16_t* step) {
  _tile_loadd(6, step + 2 * TERM * TILE, TILE_ROW_BYTES);
  _tile_loadd(7, step + (2 * TERM + 1) * TILE, TILE_ROW_BYTES);
}
inline void add_products() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// The lines that will be written, while the products are made.
inline void ask_for_sums(const float* c, int64_t step) {
  for (int64_t i = 0; i < GEMM_LINES; ++i) {
    __builtin_prefetch(c + i * step, 1);
    __builtin_prefetch(c + i * step + SIDE, 1);
  }
}

inline void whole(const uint16_t* a, const uint16_t* b, int64_t steps, float* c, int64_t step,
                  bool add) {
  const int64_t bytes = step * int64_t{sizeof(float)};
  memory_is_used();
  ask_for_sums(c, step);
  if (add) {
    _tile_loadd(0, c, bytes);
    _tile_loadd(1, c + SIDE, bytes);
    _tile_loadd(2, c + SIDE * step, bytes);
    _tile_loadd(3, c + SIDE * step + SIDE, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s, a += GEMM_STEP_NUMBERS, b += GEMM_STEP_NUMBERS) {
    load_left<0>(a);
    load_right<2>(b);
    add_products();
    load_right<1>(b);
    add_products();
    load_left<1>(a);
    add_products();
    load_right<0>(b);
    add_products();
    load_left<2>(a);
    add_products();
    load_left<0>(a);
    add_products();
  }
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + SIDE, bytes);
  _tile_stored(2, c + SIDE * step, bytes);
  _tile_stored(3, c + SIDE * step + SIDE, bytes);
  memory_is_used();
}

// Between a piece and a dense 32 x 32 one.
inline void move(const float* from, int64_t from_step, float* to, int64_t to_step,
                 const GemmPiece& like) {
  for (int64_t i = 0; i < like.rows; ++i) {
    std::memcpy(to + i * to_step, from + i * from_step,
                static_cast<size_t>(like.columns) * sizeof(float));
  }
}

void multiply(const uint16_t* a, const uint16_t* b, int64_t steps, const GemmPiece& piece, bool add) {
  if (piece.rows == GEMM_LINES && piece.columns == GEMM_LINES) {
    return whole(a, b, steps, piece.c, piece.step, add);
  }
  alignas(64) float beside[GEMM_LINES * GEMM_LINES] = {};
  if (add) move(piece.c, piece.step, beside, GEMM_LINES, piece);
  whole(a, b, steps, beside, GEMM_LINES, add);
  move(beside, GEMM_LINES, piece.c, piece.step, piece);
}

}  // namespace

const GemmKernels& gemm_amx() {
  static const GemmKernels kernels = {
      enter, leave, {{lay<false, false>, lay<false, true>}, {lay<true, false>, lay<true, true>}},
      multiply};
  return kernels;
}

}  // namespace endside
