#include "attention_rooms.h"

#include <algorithm>

namespace endside {

constexpr int64_t WAVE_SEGMENTS = 1024;    // of all rows of a wave, unless one row has more
constexpr int64_t TILE_BYTES = 768 << 10;  // queries and sums of a tile

Sizes::Sizes(const CacheShape& cache, const AttentionShape& shape, int64_t row_count,
             int64_t context, int team) {
  rows = row_count;
  kv_heads = cache.kv_heads;
  query_heads = shape.heads;
  width = cache.head_dim;
  threads = team;
  heads = {shape.heads / kv_heads, width, ceil_div(width, 16) * 16};
  blocks = ceil_div(context, CHUNK) * CHUNK_BLOCKS;
  chunks = blocks / CHUNK_BLOCKS;
  sparse = shape.sparse.on;
  choices = sparse ? shape.sparse.topk + shape.sparse.window_blocks : 0;
  const int64_t dense = std::max<int64_t>(ceil_div(shape.sparse.dense_len, BLOCK), choices);
  segments = ceil_div(sparse ? std::min(blocks, dense) : blocks, SEGMENT);
  wave = std::max<int64_t>(1, std::min(WAVE, WAVE_SEGMENTS / std::max<int64_t>(1, segments)));
  const int64_t row_bytes = 3 * heads.heads * heads.stride * static_cast<int64_t>(sizeof(float));
  tile = std::max<int64_t>(4, std::min(MAX_TILE, TILE_BYTES / row_bytes));
}

// Cuts aligned pieces off a buffer; without a buffer it only counts.
struct Cutter {
  uint8_t* base;
  size_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

static OwnRoom cut_own(Cutter& cut, const Sizes& sizes) {
  OwnRoom own;
  const int64_t states = sizes.tile * softmax_floats(sizes.heads);
  const int64_t scored = sizes.sparse ? sizes.tile : 0;
  own.segment = cut.take<float>(states);
  own.whole = cut.take<float>(states);
  own.block_scores = cut.take<float>(scored * sizes.blocks);
  own.edges = cut.take<float>(scored * sizes.chunks);
  own.normaliser = cut.take<float>(scored * 3 * MAX_HEADS);
  own.chosen = cut.take<int32_t>(scored * sizes.choices);
  own.tail_keys = cut.take<float>(BLOCK * sizes.heads.stride + 16);
  own.tail_values = cut.take<float>(BLOCK * sizes.heads.stride + 16);
  own.tail_scales = cut.take<float>(2 * BLOCK);
  return own;
}

size_t cut_rooms(uint8_t* base, const Sizes& sizes, int64_t rank, Rooms* out, OwnRoom* own) {
  Cutter cut = {base};
  Rooms& rooms = *out;
  const int64_t pairs = sizes.rows * sizes.kv_heads, width = sizes.width;
  rooms.row = cut.take<Row>(sizes.rows);
  rooms.tiles = cut.take<Tile>(sizes.rows);
  rooms.tile_count = cut.take<int64_t>(1);
  rooms.q = cut.take<float>(pairs * sizes.heads.query_floats());
  rooms.tree.keys = cut.take<float>(pairs * width);
  rooms.tree.values = cut.take<float>(pairs * width);
  rooms.tree.key_scales = cut.take<float>(pairs);
  rooms.tree.value_scales = cut.take<float>(pairs);
  rooms.tree.fine = cut.take<float>(sizes.sparse ? pairs * width : 0);
  rooms.tree.coarse = cut.take<float>(sizes.sparse ? pairs * width : 0);
  const int64_t slots = std::max(std::min(WAVE * sizes.segments, WAVE_SEGMENTS), sizes.segments);
  rooms.parts = cut.take<float>(slots * sizes.kv_heads * softmax_floats(sizes.heads));
  const int64_t wave = sizes.sparse ? WAVE * sizes.kv_heads : 0;
  rooms.totals = cut.take<float>(wave * sizes.chunks * 2 * MAX_HEADS);
  rooms.lse = cut.take<float>(wave * MAX_HEADS);
  rooms.block_scores = cut.take<float>(wave * sizes.blocks);
  rooms.edges = cut.take<float>(wave * sizes.chunks);
  rooms.chosen = cut.take<int32_t>(wave * sizes.choices);
  rooms.chosen_count = cut.take<int64_t>(wave);
  for (int64_t thread = 0; thread < sizes.threads; ++thread) {
    const OwnRoom room = cut_own(cut, sizes);
    if (thread == rank) *own = room;
  }
  return cut.used;
}

}  // namespace endside
