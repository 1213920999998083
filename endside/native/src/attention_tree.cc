// Rows of a draft tree: a row sees what plain decoding of its path, root to itself, would have
// stored.
//
// Keys and values of drafts are rounded as `append` rounds them. A block that holds drafts is put
// together per row, what is stored of it first; it is then walked like any other. A summary whose
// window ends with a row is pooled once and serves all rows below that one.
#include <cstring>

#include "attention_step.h"

namespace endside {

int64_t tree_path(const Row& row, int64_t* path) {
  int64_t count = 0;
  for (int64_t at = row.place; at >= 0; at = row.span->parents[at]) path[count++] = at;
  for (int64_t i = 0; i < count / 2; ++i) {
    const int64_t kept = path[i];
    path[i] = path[count - 1 - i];
    path[count - 1 - i] = kept;
  }
  return count;
}

// Room of another row of the same span.
static int64_t room_of(const Step& step, const Row& row, int64_t place, int64_t head) {
  return (row.index - row.place + place) * step.cache.shape.kv_heads + head;
}

static float round_row(const Step& step, const float* in, float* out) {
  const int64_t width = step.heads.width;
  if (step.layout.cell == Cell::int8) {
    int8_t codes[MAX_HEAD_DIM];
    const float scale = quantize_row(in, width, codes);
    for (int64_t d = 0; d < width; ++d) out[d] = codes[d];
    return scale;
  }
  float wide[MAX_HEAD_DIM + 16] = {};
  uint16_t numbers[MAX_HEAD_DIM + 16];
  std::memcpy(wide, in, static_cast<size_t>(width) * sizeof(float));
  step.kernels->narrow(step.layout.cell, wide, numbers, width);
  step.kernels->widen(step.layout.cell, numbers, wide, width);
  std::memcpy(out, wide, static_cast<size_t>(width) * sizeof(float));
  return 1;
}

void store_tree_row(const Step& step, const Row& row, int64_t head) {
  const int64_t width = step.heads.width;
  const int64_t from = (row.place * step.cache.shape.kv_heads + head) * width;
  const int64_t to = room_of(step, row, row.place, head);
  step.tree.key_scales[to] =
      round_row(step, row.span->tree_keys + from, step.tree.keys + to * width);
  step.tree.value_scales[to] =
      round_row(step, row.span->tree_values + from, step.tree.values + to * width);
}

// The mean of `size` keys up to and including the row's own -> out (D).
static void pool_path(const Step& step, const Row& row, int64_t head, int64_t size, float* out) {
  int64_t path[MAX_DEPTH];
  const int64_t drafts = tree_path(row, path);
  const int64_t width = step.heads.width, begin = row.position + 1 - size;
  const Place place = {step.cache, step.layout, *step.kernels, step.layer, head, row.span->table};
  float means[MAX_HEAD_DIM + 16] = {};
  uint16_t numbers[MAX_HEAD_DIM + 16];
  for (int64_t d = 0; d < width; ++d) {
    float window[COARSE_SIZE];
    for (int64_t i = 0; i < size; i += 16) {
      if (begin + i < row.span->start) place.keys(begin + i, d, window + i);
    }
    for (int64_t i = 0; i < drafts; ++i) {
      const int64_t at = row.span->start + i - begin;
      if (at < 0) continue;
      const int64_t room = room_of(step, row, path[i], head);
      window[at] = step.tree.keys[room * width + d];
      if (step.layout.cell == Cell::int8) window[at] *= step.tree.key_scales[room];
    }
    means[d] = window_mean(window, size);
  }
  step.kernels->narrow(step.layout.summary_cell, means, numbers, width);
  step.kernels->widen(step.layout.summary_cell, numbers, means, width);
  std::memcpy(out, means, static_cast<size_t>(width) * sizeof(float));
}

static bool ends_window(int64_t position, bool fine) {
  const int64_t end = position + 1;
  return fine ? end % FINE_STRIDE == 0 && end >= FINE_SIZE
              : end % COARSE_STRIDE == 0 && end >= COARSE_SIZE;
}

void pool_tree_row(const Step& step, const Row& row, int64_t head) {
  const int64_t at = room_of(step, row, row.place, head) * step.heads.width;
  if (ends_window(row.position, true)) pool_path(step, row, head, FINE_SIZE, step.tree.fine + at);
  if (ends_window(row.position, false)) {
    pool_path(step, row, head, COARSE_SIZE, step.tree.coarse + at);
  }
}

int64_t tree_extras(const Step& step, const Row& row, int64_t head, int64_t chunk, bool fine,
                    Extra* extras) {
  if (row.position / CHUNK < chunk || (chunk + 1) * CHUNK <= row.span->start) return 0;
  int64_t path[MAX_DEPTH];
  const int64_t drafts = tree_path(row, path);
  int64_t count = 0;
  for (int64_t i = 0; i < drafts; ++i) {
    const int64_t position = row.span->start + i;
    if (position / CHUNK != chunk || !ends_window(position, fine)) continue;
    const int64_t room = room_of(step, row, path[i], head) * step.heads.width;
    extras[count++] = {position % CHUNK / (fine ? FINE_STRIDE : COARSE_STRIDE),
                       (fine ? step.tree.fine : step.tree.coarse) + room};
  }
  return count;
}

// A matrix of the cache, however it lies -> row after row as float32.
static void widen_matrix(const Step& step, const uint8_t* matrix, int64_t rows, int64_t columns,
                         float* out) {
  const Cell cell = step.layout.cell;
  if (step.layout.order == Order::rows) {
    return step.kernels->widen(cell, matrix, out, rows * columns);
  }
  uint16_t in_rows[BLOCK * MAX_HEAD_DIM];
  const uint16_t* cells = reinterpret_cast<const uint16_t*>(matrix);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; column += ORDER_COLUMNS) {
      const uint16_t* from = cells + cell_at(Order::tiles, row, column, columns);
      uint16_t* to = in_rows + row * columns + column;
      for (int64_t i = 0; i < ORDER_COLUMNS; ++i) to[i] = from[2 * i];
    }
  }
  step.kernels->widen(cell, in_rows, out, rows * columns);
}

// What is stored of the block -> the room for tails.
static void copy_stored(const Step& step, const Row& row, int64_t head, int64_t block,
                        const OwnRoom& own) {
  const CacheLayout& layout = step.layout;
  const uint8_t* part = step.part(row, head, block / CHUNK_BLOCKS);
  const int64_t inside = block % CHUNK_BLOCKS;
  const size_t at = static_cast<size_t>(inside) * layout.block_bytes;
  widen_matrix(step, part + layout.keys + at, layout.width, BLOCK, own.tail_keys);
  widen_matrix(step, part + layout.values + at, BLOCK, layout.width, own.tail_values);
  if (layout.cell != Cell::int8) return;
  const size_t scale = static_cast<size_t>(inside * BLOCK) * sizeof(float);
  std::memcpy(own.tail_scales, part + layout.key_scales + scale, BLOCK * sizeof(float));
  std::memcpy(own.tail_scales + BLOCK, part + layout.value_scales + scale, BLOCK * sizeof(float));
}

Block tree_tail(const Step& step, const Row& row, int64_t head, int64_t block, const OwnRoom& own) {
  const int64_t width = step.heads.width, first = block * BLOCK, start = row.span->start;
  if (start > first) copy_stored(step, row, head, block, own);
  int64_t path[MAX_DEPTH];
  const int64_t drafts = tree_path(row, path);
  for (int64_t i = 0; i < drafts; ++i) {
    const int64_t lane = start + i - first;
    if (lane < 0 || lane >= BLOCK) continue;
    const int64_t room = room_of(step, row, path[i], head);
    const float* key = step.tree.keys + room * width;
    for (int64_t d = 0; d < width; ++d) own.tail_keys[d * BLOCK + lane] = key[d];
    std::memcpy(own.tail_values + lane * width, step.tree.values + room * width,
                static_cast<size_t>(width) * sizeof(float));
    own.tail_scales[lane] = step.tree.key_scales[room];
    own.tail_scales[BLOCK + lane] = step.tree.value_scales[room];
  }
  const bool scaled = step.layout.cell == Cell::int8;
  return {Cell::f32, step.layout.cell, Order::rows, own.tail_keys, own.tail_values,
          scaled ? own.tail_scales : nullptr,
          scaled ? own.tail_scales + BLOCK : nullptr, nullptr, nullptr, nullptr, 0};
}

void accept(const Cache& cache, int64_t layer, Table table, int64_t start, const int32_t* rows,
            int64_t count, const float* tree_keys, const float* tree_values, Isa isa) {
  const int64_t row = cache.shape.kv_heads * cache.shape.head_dim;
  for (int64_t i = 0; i < count; ++i) {
    append(cache, layer, table, start + i, tree_keys + rows[i] * row,
           tree_values + rows[i] * row, 0, cache.shape.kv_heads, isa);
  }
}

}  // namespace endside
