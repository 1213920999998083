// The loops around the inner kernels of `linear.h`, compiled once per instruction set.
//
// A file for an instruction set defines a type `Arch` inside an anonymous namespace and uses it
// with `apply_with<Arch>`, and `prepare_rows` (linear_rows.h). Everything here is static or a
// template over that local type, so no two files share code compiled with different flags.
//
// The work of a thread: its tiles of 16 weight rows, one after the other, times the rows of x in
// chunks that fit the second-level cache. Few rows: `direct` unpacks codes on the fly while they
// stream from memory. More rows: one group of the tile is expanded to bytes in scratch (first-level
// cache) and every row of the chunk passes over it. The order of the float additions is that of the
// groups in both, so both give the same bits.
//
// struct Arch {
//   // rows of x handled at once by direct, wide and floats: T runs from 1 to these
//   static constexpr int DIRECT_ROWS, WIDE_ROWS, FLOAT_ROWS;
//   // direct is used up to this many rows of x (base 3: half); 0: never, direct may be left out
//   static constexpr int64_t DIRECT_LIMIT;
//   // out[t * 16 + r] = y of row r of the tile and row t of x, all groups
//   template <Kind K, int T> static void direct(const Tile&, const Rows&, float* out);
//   // group g of the tile -> `wide`, at most WIDE_BYTES in a layout of Arch's own
//   template <Kind K> static void expand(const Tile&, int64_t g, uint8_t* wide);
//   // out[t * 16 + r] += the term of group g; with WIDE_LOOPS there is an argument `int64_t parts`
//   // before out: so many times T rows, which saves fetching what belongs to the group again
//   static constexpr bool WIDE_LOOPS;
//   template <Kind K, int T>
//   static void wide(const Tile&, int64_t g, const uint8_t* wide, const Rows&, float* out);
//   // float kinds: out[t * 16 + r] = y
//   template <Kind K, int T> static void floats(const Tile&, const Rows&, float* out);
// };
#pragma once

#include <type_traits>

#include "linear.h"
#include "linear_epilogue.h"
#include "linear_layout.h"

namespace endside {

constexpr int64_t WIDE_BYTES = 16 * MAX_GROUP * 2;     // one expanded group of a tile
constexpr int64_t CHUNK_ROWS = 128;                // rows of x per pass over the weights, at most
constexpr int64_t CHUNK_BYTES = 192 * 1024;        // and bytes of them, for the second-level cache
constexpr int64_t CHUNK_UNIT = 24;                     // chunks are multiples of every WIDE_ROWS

// Sixteen rows of W: two packed blocks.
struct Tile {
  const uint8_t* codes[2];     // whole K of each block
  const uint16_t* scales[2];   // [groups][8]
  const uint8_t* zeros[2];     // [groups][8], null when symmetric
  int64_t k, group, groups;
  ScaleType scale_type;
};

// The first of some rows of x; row t lies t strides further.
struct Rows {
  const int8_t* q;             // stride `stride`
  const float* scale;          // stride groups
  const int32_t* sum;          // stride groups
  const float* x;              // stride `stride`, float kinds
  int64_t stride, groups;
  Ahead* ahead;                // null: nothing to ask for
};

static inline Tile tile_at(const Linear& linear, int64_t n) {
  Tile tile = {};
  tile.k = linear.padded_k();
  tile.group = linear.group;
  tile.groups = linear.quantized() ? tile.k / linear.group : 0;
  tile.scale_type = linear.scale_type;
  for (int64_t i = 0; i < 2; ++i) {
    const int64_t block = n / ROWS + i, at = block * tile.groups * ROWS;
    tile.codes[i] = linear.codes + block * block_bytes(linear.kind, tile.k, linear.group);
    tile.scales[i] = linear.quantized() ? linear.scales + at : nullptr;
    tile.zeros[i] = linear.asymmetric ? linear.zeros + at : nullptr;
  }
  return tile;
}

static inline Rows rows_at(const Input& input, int64_t p, Ahead* ahead = nullptr) {
  if (input.group == 0) {
    return {nullptr, nullptr, nullptr, input.x + p * input.stride, input.stride, 0, ahead};
  }
  const int64_t groups = input.k / input.group;
  return {input.q + p * input.stride, input.scale + p * groups, input.sum + p * groups,
          nullptr,                    input.stride,             groups,
          ahead};
}

// Rows of x per pass: few enough for the cache, many enough to pay for expanding the weights.
static inline int64_t chunk_rows(const Input& input) {
  const int64_t bytes = input.k * (input.group > 0 ? 1 : 4);
  const int64_t fit = CHUNK_BYTES / bytes / CHUNK_UNIT * CHUNK_UNIT;
  if (fit < CHUNK_UNIT) return CHUNK_UNIT;
  return fit < CHUNK_ROWS ? fit : CHUNK_ROWS;
}

// `count` rows in nearly equal parts of at most MOST: fn(constant T, first row, parts of T rows).
template <int MOST>
struct Parts {
  template <int T, class F>
  static inline void call(int64_t size, int64_t at, int64_t parts, F& fn) {
    if constexpr (T > 0) {
      if (size == T) return fn(std::integral_constant<int, T>{}, at, parts);
      call<T - 1>(size, at, parts, fn);
    }
  }
  template <class F>
  static inline void each(int64_t count, F fn) {
    const int64_t parts = (count + MOST - 1) / MOST, size = count / parts, larger = count % parts;
    if (larger > 0) call<MOST>(size + 1, 0, larger, fn);
    call<MOST>(size, larger * (size + 1), parts - larger, fn);
  }
};

// Calls fn for one part at a time.
template <int MOST, class F>
static inline void each_part(int64_t count, F fn) {
  Parts<MOST>::each(count, [&](auto rows, int64_t at, int64_t parts) {
    for (int64_t i = 0; i < parts; ++i) fn(rows, at + i * rows());
  });
}

template <class Arch, Kind K>
static void tile_direct(const Tile& tile, const Input& input, int64_t first, int64_t count,
                        Ahead* ahead, float* out) {
  each_part<Arch::DIRECT_ROWS>(count, [&](auto rows, int64_t p) {
    Ahead* const asks = p == 0 ? ahead : nullptr;  // the first part reads memory
    Arch::template direct<K, rows()>(tile, rows_at(input, first + p, asks), out + p * ROW_TILE);
  });
}

template <class Arch, Kind K>
static void tile_wide(const Tile& tile, const Input& input, int64_t first, int64_t count,
                      uint8_t* wide, float* out) {
  for (int64_t i = 0; i < count * ROW_TILE; ++i) out[i] = 0;
  for (int64_t g = 0; g < tile.groups; ++g) {
    Arch::template expand<K>(tile, g, wide);
    const auto part = [&](auto rows, int64_t p, auto... parts) {
      Arch::template wide<K, rows()>(tile, g, wide, rows_at(input, first + p), parts...,
                                     out + p * ROW_TILE);
    };
    if constexpr (Arch::WIDE_LOOPS) Parts<Arch::WIDE_ROWS>::each(count, part);
    else each_part<Arch::WIDE_ROWS>(count, part);
  }
}

template <class Arch, Kind K>
static void tile_floats(const Tile& tile, const Input& input, int64_t first, int64_t count,
                        float* out) {
  each_part<Arch::FLOAT_ROWS>(count, [&](auto rows, int64_t p) {
    Arch::template floats<K, rows()>(tile, rows_at(input, first + p), out + p * ROW_TILE);
  });
}

template <class Arch, Kind K>
static void apply_kind(const Linear& linear, const Input& input, int64_t n_begin, int64_t n_end,
                       const Epilogue& epilogue, void* scratch) {
  uint8_t* const wide = static_cast<uint8_t*>(scratch);
  float* const out = reinterpret_cast<float*>(wide + WIDE_BYTES);
  const int64_t end = n_end < linear.n ? n_end : linear.n;
  const int64_t chunk = chunk_rows(input);
  const Piece piece = piece_of(linear, n_begin, end);
  Ahead own = way_of(&piece, 1);
  Ahead* const ahead = input.ahead ? input.ahead : &own;
  for (int64_t first = 0; first < input.rows; first += chunk) {
    const int64_t left = input.rows - first, count = left < chunk ? left : chunk;
    for (int64_t n = n_begin; n < end; n += ROW_TILE) {
      const Tile tile = tile_at(linear, n);
      if constexpr (K == Kind::f32 || K == Kind::bf16) {
        tile_floats<Arch, K>(tile, input, first, count, out);
      } else if constexpr (Arch::DIRECT_LIMIT > 0) {
        // Base 3 costs more to unpack, so expanding it once pays earlier.
        constexpr int64_t limit = Arch::DIRECT_LIMIT / (K == Kind::ternary3 ? 2 : 1);
        if (input.rows <= limit) tile_direct<Arch, K>(tile, input, first, count, ahead, out);
        else tile_wide<Arch, K>(tile, input, first, count, wide, out);
      } else {
        tile_wide<Arch, K>(tile, input, first, count, wide, out);
      }
      finish(epilogue, out, first, count, n, end);
    }
  }
}

template <class Arch>
static void apply_with(const Linear& linear, const Input& input, int64_t n_begin, int64_t n_end,
                       const Epilogue& epilogue, void* scratch) {
  switch (linear.kind) {
#define ENDSIDE_CASE(K) \
  case Kind::K: return apply_kind<Arch, Kind::K>(linear, input, n_begin, n_end, epilogue, scratch)
    ENDSIDE_CASE(f32);
    ENDSIDE_CASE(bf16);
    ENDSIDE_CASE(int8);
    ENDSIDE_CASE(int4);
    ENDSIDE_CASE(ternary2);
    ENDSIDE_CASE(ternary3);
#undef ENDSIDE_CASE
  }
}

}  // namespace endside
