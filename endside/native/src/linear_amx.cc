// AMX kernels of `linear.h`: products of 16 rows of x with 16 rows of W in tile registers.
//
// A group of 16 rows of W is expanded to signed bytes, zeros already subtracted, as [step][16 rows]
// [4 k]: just what a tile register wants of its second factor, 64 k at once. The first factor is 16
// rows of x as they lie. So one instruction makes 16 x 16 x 64 products, and what is left to do for
// a group is to turn 256 integers into floats, scale and add them: that costs about as much as the
// products. Both therefore run at the same time, the integers of one step being written to memory
// and added while the tiles make the next.
//
// Two blocks of rows of x and two tiles of W share what they load. When the rows are no multiple of
// 16 the last block reaches back into the one before it and computes some rows twice; fewer than 16
// rows make smaller tiles. Few rows, and float kinds, run as avx512.
#include "linear_512.h"
#include "linear_amx.h"
#include "linear_kernels.h"
#include "tile_shapes.h"

namespace endside {
namespace {

constexpr int64_t SIDE = 16;             // rows of x in a block
constexpr int64_t CELLS = SIDE * SIDE;   // of one tile of integers
constexpr int64_t TILE_DEPTH = 64;       // k in one tile

inline void configure(int64_t rows, int64_t group) {
  const int64_t depth = group < TILE_DEPTH ? group : TILE_DEPTH;
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) {
    const bool x = tile == 2 || tile == 3, w = tile > 3;
    shapes.bytes[tile] = static_cast<uint16_t>(x ? depth : 64);
    shapes.rows[tile] = static_cast<uint8_t>(w ? depth / STEP : rows);
  }
  load_shapes(shapes);
}

// Signed codes fit a byte unless 8-bit codes lose zeros of their own.
template <Kind K>
inline bool fits(const Tile& tile) {
  return K != Kind::int8 || !tile.zeros[0];
}

// Zeros of sixteen rows, each in the four bytes of its lane; nothing where codes stay unsigned.
template <Kind K>
inline __m512i zero_bytes(const Tile& tile, int64_t g) {
  if (!fits<K>(tile)) return _mm512_setzero_si512();
  return _mm512_mullo_epi32(zeros_at<K>(tile, g), _mm512_set1_epi32(0x01010101));
}

// Group g of a tile of W -> wide, [step][16 rows][4].
template <Kind K>
inline void expand(const Tile& tile, int64_t g, uint8_t* wide) {
  constexpr int S = LOADED<K>;
  const int64_t bytes = group_bytes(K, tile.group), steps = tile.group / STEP;
  const uint8_t *a = tile.codes[0] + g * bytes, *b = tile.codes[1] + g * bytes;
  const __m512i zero = zero_bytes<K>(tile, g);
  __m512i codes[S];
  int64_t s = 0;
  for (; s + S <= steps; s += S, a += STEP_CODES, b += STEP_CODES) {
    unpack<K>(a, b, codes);
#pragma GCC unroll 8
    for (int i = 0; i < S; ++i) {
      _mm512_store_si512(wide + 64 * (s + i), _mm512_sub_epi8(codes[i], zero));
    }
  }
  for (; s < steps; ++s, a += TAIL_BYTES, b += TAIL_BYTES) {
    _mm512_store_si512(wide + 64 * s, _mm512_sub_epi8(tail_step(a, b), zero));
  }
}

// Tile registers: 0 and 1 sums, 2 and 3 x, 4 to 7 W: [k][tile of W]. DEPTH: 64s of k in a group.
template <int DEPTH, int N>
inline void load_weights(const uint8_t* wide, int64_t group) {
  memory_is_used();
  _tile_loadd(4, wide, 64);
  if constexpr (N == 2) _tile_loadd(5, wide + group * SIDE, 64);
  if constexpr (DEPTH == 2) _tile_loadd(6, wide + CELLS * STEP, 64);
  if constexpr (DEPTH == 2 && N == 2) _tile_loadd(7, wide + (group * SIDE + CELLS * STEP), 64);
}

#define ENDSIDE_PRODUCT(sum, x, w)          \
  do {                                      \
    if constexpr (SIGNED) {                 \
      _tile_dpbssd(sum, x, w);              \
    } else {                                \
      _tile_dpbsud(sum, x, w);              \
    }                                       \
  } while (false)

// sums [N][16][16] of a block of x, whose rows are `stride` apart, with the weights loaded.
template <bool SIGNED, int DEPTH, int N>
inline void products(const int8_t* x, int64_t stride, int32_t* sums) {
  _tile_zero(0);
  _tile_loadd(2, x, stride);
  ENDSIDE_PRODUCT(0, 2, 4);
  if constexpr (N == 2) _tile_zero(1);
  if constexpr (N == 2) ENDSIDE_PRODUCT(1, 2, 5);
  if constexpr (DEPTH == 2) {
    _tile_loadd(3, x + TILE_DEPTH, stride);
    ENDSIDE_PRODUCT(0, 3, 6);
    if constexpr (N == 2) ENDSIDE_PRODUCT(1, 3, 7);
  }
  _tile_stored(0, sums, 64);
  if constexpr (N == 2) _tile_stored(1, sums + CELLS, 64);
}

#undef ENDSIDE_PRODUCT

// What one group of N tiles of W brings: scales, and zeros where codes kept theirs.
template <int N>
struct Group {
  __m512 scales[N];
  __m512i zeros[N];
};

// y [N][16][16] += float(sums - zero * sum) * (scale * s); s and sum are `groups` apart.
template <bool SIGNED, bool FIRST, int N>
inline void add_terms(const Group<N>& group, const int32_t* sums, const float* scale,
                      const int32_t* sum, int64_t groups, int64_t count, float* y) {
#pragma GCC unroll 4
  for (int64_t t = 0; t < count; ++t) {
    const __m512 s = _mm512_set1_ps(scale[t * groups]);
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      __m512i dot = _mm512_load_si512(sums + n * CELLS + t * SIDE);
      if constexpr (!SIGNED) {
        const __m512i all = _mm512_set1_epi32(sum[t * groups]);
        dot = _mm512_sub_epi32(dot, _mm512_madd_epi16(group.zeros[n], all));
      }
      const __m512 factor = _mm512_mul_ps(group.scales[n], s);
      const __m512 term = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), factor);
      float* const at = y + n * CELLS + t * SIDE;
      const __m512 before = FIRST ? _mm512_setzero_ps() : _mm512_load_ps(at);
      _mm512_store_ps(at, _mm512_add_ps(before, term));
    }
  }
}

// Rows of x in blocks of 16, the last of which may reach back.
struct Blocks {
  const Input& input;
  int64_t side() const { return input.rows < SIDE ? input.rows : SIDE; }
  int64_t count() const { return (input.rows + SIDE - 1) / SIDE; }
  int64_t start(int64_t block) const {
    const int64_t last = input.rows - side();
    return block * SIDE < last ? block * SIDE : last;
  }
};

// Group g of N tiles of W times blocks first .. first + count of x: into y [block][N][16][16].
template <bool SIGNED, bool FIRST, int DEPTH, int N>
__attribute__((noinline)) void group_times_blocks(Group<N> group, int64_t g, const Blocks& blocks,
                                                  int64_t first, int64_t count,
                                                  AmxScratch& scratch) {
  const Input& input = blocks.input;
  const int64_t groups = input.k / input.group, side = blocks.side();
  const int8_t* const q = input.q + g * input.group;
  load_weights<DEPTH, N>(scratch.wide, input.group);
  const auto multiply = [&](int64_t block) {
    products<SIGNED, DEPTH, N>(q + blocks.start(first + block) * input.stride, input.stride,
                               scratch.sums[block % 2]);
  };
  const auto add = [&](int64_t block) {
    const int64_t at = blocks.start(first + block) * groups + g;
    add_terms<SIGNED, FIRST, N>(group, scratch.sums[block % 2], input.scale + at, input.sum + at,
                                groups, side, scratch.y + block * 2 * CELLS);
  };
  multiply(0);
  for (int64_t block = 1; block < count; ++block) {
    multiply(block);
    add(block - 1);
  }
  add(count - 1);
}

// Asks for the lines of out that rows begin .. end will write: they are seldom in a near cache.
inline void ask_for_out(const Epilogue& epilogue, int64_t n, int64_t begin, int64_t end) {
  const bool halves = epilogue.then == Then::silu_mul;
  const float* at = epilogue.out + (halves ? n / 2 : n) + begin * epilogue.stride;
  for (int64_t row = begin; row < end; ++row, at += epilogue.stride) {
    __builtin_prefetch(at, 1);
    if (!halves) __builtin_prefetch(at + ROW_TILE, 1);
  }
}

// N tiles of W from row n on times blocks first .. first + count of x.
template <Kind K, bool SIGNED, int DEPTH, int N>
inline void tiles_times_blocks(const Linear& linear, int64_t n, const Blocks& blocks,
                               int64_t first, int64_t count, const Epilogue& epilogue,
                               AmxScratch& scratch) {
  const Tile tiles[2] = {tile_at(linear, n), tile_at(linear, n + (N - 1) * ROW_TILE)};
  const int64_t groups = tiles[0].groups;
  const int64_t begin = first * SIDE, end = blocks.start(first + count - 1) + blocks.side();
  for (int64_t g = 0; g < groups; ++g) {
    Group<N> group;
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) {
      expand<K>(tiles[i], g, scratch.wide + i * ROW_TILE * linear.group);
      group.scales[i] = scales_at(tiles[i], g);
      group.zeros[i] = zeros_at<K>(tiles[i], g);
    }
    ask_for_out(epilogue, n, begin + (end - begin) * g / groups,
                begin + (end - begin) * (g + 1) / groups);
    const auto times = g == 0 ? group_times_blocks<SIGNED, true, DEPTH, N>
                              : group_times_blocks<SIGNED, false, DEPTH, N>;
    times(group, g, blocks, first, count, scratch);
  }
}

// What comes after the sums of N tiles of W from column n on; rows that stood in two blocks once.
template <int N>
inline void finish_blocks(const Blocks& blocks, int64_t first, int64_t count,
                          const Epilogue& epilogue, int64_t n, int64_t end, const float* y) {
  for (int64_t block = first; block < first + count; ++block, y += 2 * CELLS) {
    const int64_t row = block * SIDE, again = row - blocks.start(block);
    for (int64_t i = 0; i < N; ++i) {
      finish(epilogue, y + i * CELLS + again * SIDE, row, blocks.side() - again, n + i * ROW_TILE,
             end);
    }
  }
}

template <Kind K, bool SIGNED, int DEPTH>
inline void apply_tiles(const Linear& linear, const Input& input, int64_t n_begin, int64_t n_end,
                        const Epilogue& epilogue, AmxScratch& scratch) {
  const int64_t end = n_end < linear.n ? n_end : linear.n;
  const Blocks blocks{input};
  for (int64_t first = 0; first < blocks.count(); first += AMX_BLOCKS) {
    const int64_t left = blocks.count() - first, count = left < AMX_BLOCKS ? left : AMX_BLOCKS;
    int64_t n = n_begin;
    for (; n + ROW_TILE < end; n += 2 * ROW_TILE) {
      tiles_times_blocks<K, SIGNED, DEPTH, 2>(linear, n, blocks, first, count, epilogue,
                                              scratch);
      finish_blocks<2>(blocks, first, count, epilogue, n, end, scratch.y);
    }
    if (n >= end) continue;
    tiles_times_blocks<K, SIGNED, DEPTH, 1>(linear, n, blocks, first, count, epilogue, scratch);
    finish_blocks<1>(blocks, first, count, epilogue, n, end, scratch.y);
  }
}

template <Kind K, bool SIGNED>
inline void apply_depth(const Linear& linear, const Input& input, int64_t n_begin, int64_t n_end,
                        const Epilogue& epilogue, AmxScratch& scratch) {
  if (linear.group > TILE_DEPTH) {
    apply_tiles<K, SIGNED, 2>(linear, input, n_begin, n_end, epilogue, scratch);
  } else {
    apply_tiles<K, SIGNED, 1>(linear, input, n_begin, n_end, epilogue, scratch);
  }
}

template <Kind K>
inline void apply_kind_amx(const Linear& linear, const Input& input, int64_t n_begin,
                           int64_t n_end, const Epilogue& epilogue, AmxScratch& scratch) {
  if constexpr (K == Kind::int8) {
    if (linear.asymmetric) {
      return apply_depth<K, false>(linear, input, n_begin, n_end, epilogue, scratch);
    }
  }
  apply_depth<K, true>(linear, input, n_begin, n_end, epilogue, scratch);
}

}  // namespace

void apply_amx(const Linear& linear, const Input& input, int64_t n_begin, int64_t n_end,
               const Epilogue& epilogue, void* memory) {
  if (!linear.quantized() || input.rows < AMX_ROWS) {
    return apply_avx512(linear, input, n_begin, n_end, epilogue, memory);
  }
  AmxScratch& scratch = *static_cast<AmxScratch*>(memory);
  configure(input.rows < SIDE ? input.rows : SIDE, input.group);
  switch (linear.kind) {
#define ENDSIDE_CASE(K) \
  case Kind::K: apply_kind_amx<Kind::K>(linear, input, n_begin, n_end, epilogue, scratch); break
    ENDSIDE_CASE(int8);
    ENDSIDE_CASE(int4);
    ENDSIDE_CASE(ternary2);
    ENDSIDE_CASE(ternary3);
#undef ENDSIDE_CASE
    default: break;
  }
  _tile_release();  // nothing to save at the next change of threads
}

}  // namespace endside
