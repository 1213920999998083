// Where things lie inside a chunk: for the files that read and write the cache.
#pragma once

#include "cache.h"

namespace endside {

// The numbers of a block or a tile of summaries; f32 is for blocks that are put together in
// scratch.
enum class Cell : int32_t { f16 = 0, bf16 = 1, int8 = 2, f32 = 3 };

inline int64_t cell_bytes(Cell cell) {
  return cell == Cell::f32 ? 4 : cell == Cell::int8 ? 1 : 2;
}

// How the cells of a matrix of a block lie (keys [D][64], values [64][D], summaries [D][slots]): row
// after row; or as the right sides of tile products, in tiles of 32 rows by 16 columns, one row of
// tiles after the other, and in a tile pairs of rows side by side. The instruction set decides
// (AttentionKernels::order); both take the same room.
enum class Order { rows, tiles };
constexpr int64_t ORDER_ROWS = 32, ORDER_COLUMNS = 16;  // of a tile

// Which cell holds (row, column) of a matrix.
inline int64_t cell_at(Order order, int64_t row, int64_t column, int64_t columns) {
  if (order == Order::rows) return row * columns + column;
  const int64_t tile = row / ORDER_ROWS * (columns / ORDER_COLUMNS) + column / ORDER_COLUMNS;
  return tile * (ORDER_ROWS * ORDER_COLUMNS) + row % ORDER_ROWS / 2 * (2 * ORDER_COLUMNS) +
         column % ORDER_COLUMNS * 2 + row % 2;
}

// Bytes inside the part of one chunk that one layer and key head own.
struct CacheLayout {
  CacheLayout(const CacheShape& shape, Order order);
  CacheLayout(const CacheShape& shape, Isa isa);  // as that set's kernels read it

  Cell cell, summary_cell;
  Order order;
  int64_t width;                    // D
  size_t block_bytes;               // keys and values of one block, one after the other
  size_t keys, values;              // of the first block; further ones block_bytes later each
  size_t key_scales, value_scales;  // CHUNK float32 each, int8 only
  size_t head_bytes, layer_bytes, chunk_bytes;
  size_t fine_bytes, coarse_bytes;  // of a chunk's summaries, which lie elsewhere; 0 without them
  size_t parts;                     // of a chunk: layers times key heads
  size_t summary_bytes() const { return fine_bytes + coarse_bytes; }
};

inline uint8_t* head_part(const Cache& cache, const CacheLayout& layout, int64_t layer,
                          int64_t head, int32_t chunk) {
  return cache.base + static_cast<size_t>(chunk) * layout.chunk_bytes +
         static_cast<size_t>(layer) * layout.layer_bytes +
         static_cast<size_t>(head) * layout.head_bytes;
}

// Chunks of the run that `chunk` is in: the last run may be shorter.
inline size_t run_chunks(const Cache& cache, int32_t chunk) {
  const int64_t rest = cache.chunks - chunk / RUN * RUN;
  return static_cast<size_t>(rest < RUN ? rest : RUN);
}

// The coarse summaries of one layer and key head in a chunk, or the fine ones.
inline uint8_t* summaries_of(const Cache& cache, const CacheLayout& layout, int64_t layer,
                             int64_t head, int32_t chunk, bool fine) {
  const size_t first = static_cast<size_t>(chunk / RUN * RUN);
  const size_t inside = static_cast<size_t>(chunk % RUN), run = run_chunks(cache, chunk);
  const size_t part = static_cast<size_t>(layer * cache.shape.kv_heads + head);
  uint8_t* begin = cache.base + static_cast<size_t>(cache.chunks) * layout.chunk_bytes +
                   (first * layout.parts + part * run) * layout.summary_bytes();
  return fine ? begin + run * layout.coarse_bytes + inside * layout.fine_bytes
              : begin + inside * layout.coarse_bytes;
}

struct AttentionKernels;

// One key head of one sequence, for those who store and pool its tokens.
struct Place {
  const Cache& cache;
  const CacheLayout& layout;
  const AttentionKernels& kernels;
  int64_t layer, head;
  Table table;

  uint8_t* part(int64_t position) const {
    return head_part(cache, layout, layer, head, table.chunks[position / CHUNK]);
  }
  uint8_t* summaries(int64_t position, bool fine) const {
    return summaries_of(cache, layout, layer, head, table.chunks[position / CHUNK], fine);
  }
  // Stored keys of 16 neighbouring positions (the first a multiple of 16), one channel, as float32.
  void keys(int64_t position, int64_t channel, float* out) const;
};

// The sum of x[0 .. count), count a power of two, neighbours first; x is overwritten.
float pair_sum(float* x, int64_t count);

// One head of one token as int8: codes (width), returns the scale.
float quantize_row(const float* in, int64_t width, int8_t* codes);

// The mean of a window as it is defined for summaries: two halves, each summed by pair_sum.
float window_mean(float* x, int64_t size);

}  // namespace endside
