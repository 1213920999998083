#include "cache.h"

#include <cmath>
#include <cstring>

#include "attention_kernels.h"
#include "cache_layout.h"

namespace endside {

static size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

static Cell cell_of(CacheType type) { return static_cast<Cell>(static_cast<int32_t>(type)); }

CacheLayout::CacheLayout(const CacheShape& shape, Order lie) : order(lie) {
  cell = cell_of(shape.type);
  summary_cell = shape.type == CacheType::int8 ? Cell::f16 : cell;
  width = shape.head_dim;
  const size_t half = static_cast<size_t>(BLOCK * width * cell_bytes(cell));
  block_bytes = 2 * half;
  const size_t scales = shape.type == CacheType::int8 ? CHUNK * sizeof(float) : 0;
  keys = 0;
  values = keys + half;
  key_scales = keys + CHUNK_BLOCKS * block_bytes;
  value_scales = key_scales + scales;
  head_bytes = padded(value_scales + scales);
  layer_bytes = head_bytes * static_cast<size_t>(shape.kv_heads);
  chunk_bytes = layer_bytes * static_cast<size_t>(shape.layers);
  const int64_t slot = shape.summaries ? width * cell_bytes(summary_cell) : 0;
  fine_bytes = padded(static_cast<size_t>(FINE_SLOTS * slot));
  coarse_bytes = padded(static_cast<size_t>(COARSE_SLOTS * slot));
  parts = static_cast<size_t>(shape.layers * shape.kv_heads);
}

CacheLayout::CacheLayout(const CacheShape& shape, Isa isa)
    : CacheLayout(shape, attention_kernels(isa).order(cell_of(shape.type), shape.head_dim)) {}

size_t cache_bytes(const CacheShape& shape, int64_t chunks) {
  const CacheLayout layout(shape, Order::rows);
  const size_t summaries = layout.summary_bytes() * layout.parts;
  // vectors may read up to 64 bytes past the last row
  return static_cast<size_t>(chunks) * (layout.chunk_bytes + summaries) + 64;
}

std::vector<Pieces> pieces_of(const Cache& cache, int32_t chunk) {
  const CacheLayout layout(cache.shape, Order::rows);
  std::vector<Pieces> pieces = {
      {head_part(cache, layout, 0, 0, chunk), 1, layout.chunk_bytes, layout.chunk_bytes}};
  if (!cache.shape.summaries) return pieces;
  const size_t stride = run_chunks(cache, chunk) * layout.summary_bytes();
  for (const bool fine : {false, true}) {
    pieces.push_back({summaries_of(cache, layout, 0, 0, chunk, fine), layout.parts,
                      fine ? layout.fine_bytes : layout.coarse_bytes, stride});
  }
  return pieces;
}

void copy_chunk(const Cache& cache, int32_t source, int32_t target) {
  const std::vector<Pieces> from = pieces_of(cache, source), to = pieces_of(cache, target);
  for (size_t kind = 0; kind < from.size(); ++kind) {
    for (size_t i = 0; i < from[kind].count; ++i) {
      std::memcpy(to[kind].data + i * to[kind].stride, from[kind].data + i * from[kind].stride,
                  from[kind].bytes);
    }
  }
}

float pair_sum(float* x, int64_t count) {
  for (int64_t left = count / 2; left > 0; left /= 2) {
    for (int64_t i = 0; i < left; ++i) x[i] = x[2 * i] + x[2 * i + 1];
  }
  return x[0];
}

float window_mean(float* x, int64_t size) {
  const float older = pair_sum(x, size / 2), newer = pair_sum(x + size / 2, size / 2);
  return (older + newer) / static_cast<float>(size);
}

float quantize_row(const float* in, int64_t width, int8_t* codes) {
  float largest = 0;
  for (int64_t d = 0; d < width; ++d) largest = std::fmax(largest, std::fabs(in[d]));
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  for (int64_t d = 0; d < width; ++d) {
    codes[d] = static_cast<int8_t>(std::nearbyint(in[d] * inverse));
  }
  return largest / 127.0f;
}

void Place::keys(int64_t position, int64_t channel, float* out) const {
  const uint8_t* own = part(position);
  const int64_t block = position % CHUNK / BLOCK, lane = position % BLOCK;
  const size_t cells = static_cast<size_t>(cell_at(layout.order, channel, lane, BLOCK));
  const size_t at = static_cast<size_t>(block) * layout.block_bytes +
                    cells * static_cast<size_t>(cell_bytes(layout.cell));
  const uint8_t* from = own + layout.keys + at;
  if (layout.order == Order::tiles) {
    uint16_t row[ORDER_COLUMNS];
    for (int64_t i = 0; i < ORDER_COLUMNS; ++i) {
      row[i] = reinterpret_cast<const uint16_t*>(from)[2 * i];
    }
    return kernels.widen(layout.cell, row, out, ORDER_COLUMNS);
  }
  kernels.widen(layout.cell, from, out, 16);
  if (layout.cell != Cell::int8) return;
  const float* scales = reinterpret_cast<const float*>(own + layout.key_scales);
  for (int64_t i = 0; i < 16; ++i) out[i] *= scales[position % CHUNK + i];
}

// Numbers (count) -> column `column` of a matrix of so many columns.
template <class Number>
static void store_column(Order order, const Number* numbers, int64_t count, uint8_t* matrix,
                         int64_t column, int64_t columns) {
  Number* cells = reinterpret_cast<Number*>(matrix);
  for (int64_t row = 0; row < count; ++row) {
    cells[cell_at(order, row, column, columns)] = numbers[row];
  }
}

static void store_row(Order order, const uint16_t* numbers, uint8_t* matrix, int64_t row,
                      int64_t columns) {
  uint16_t* cells = reinterpret_cast<uint16_t*>(matrix);
  for (int64_t column = 0; column < columns; ++column) {
    cells[cell_at(order, row, column, columns)] = numbers[column];
  }
}

static void store_token(const Place& place, int64_t position, const float* key,
                        const float* value) {
  const CacheLayout& layout = place.layout;
  const int64_t width = layout.width, at = position % CHUNK, lane = at % BLOCK;
  uint8_t* own = place.part(position);
  uint8_t* keys = own + layout.keys + static_cast<size_t>(at / BLOCK) * layout.block_bytes;
  uint8_t* values = own + layout.values + static_cast<size_t>(at / BLOCK) * layout.block_bytes;
  if (layout.cell == Cell::int8) {
    int8_t codes[MAX_HEAD_DIM];
    reinterpret_cast<float*>(own + layout.key_scales)[at] = quantize_row(key, width, codes);
    store_column(Order::rows, codes, width, keys, lane, BLOCK);
    reinterpret_cast<float*>(own + layout.value_scales)[at] =
        quantize_row(value, width, reinterpret_cast<int8_t*>(values) + lane * width);
    return;
  }
  float padded_row[MAX_HEAD_DIM + 16] = {};
  uint16_t numbers[MAX_HEAD_DIM + 16];
  std::memcpy(padded_row, key, static_cast<size_t>(width) * sizeof(float));
  place.kernels.narrow(layout.cell, padded_row, numbers, width);
  store_column(layout.order, numbers, width, keys, lane, BLOCK);
  std::memcpy(padded_row, value, static_cast<size_t>(width) * sizeof(float));
  place.kernels.narrow(layout.cell, padded_row, numbers, width);
  store_row(layout.order, numbers, values, lane, width);
}

// The window of `size` tokens that ends at `position`, into slot `slot` of a matrix [D][slots].
static void pool_window(const Place& place, int64_t position, int64_t size, uint8_t* matrix,
                        int64_t slots, int64_t slot) {
  const CacheLayout& layout = place.layout;
  float means[MAX_HEAD_DIM + 16] = {};
  uint16_t numbers[MAX_HEAD_DIM + 16];
  for (int64_t d = 0; d < layout.width; ++d) {
    float window[COARSE_SIZE];
    for (int64_t i = 0; i < size; i += 16) place.keys(position + 1 - size + i, d, window + i);
    means[d] = window_mean(window, size);
  }
  place.kernels.narrow(layout.summary_cell, means, numbers, layout.width);
  store_column(layout.order, numbers, layout.width, matrix, slot, slots);
}

void append(const Cache& cache, int64_t layer, Table table, int64_t position, const float* key,
            const float* value, int64_t head_begin, int64_t head_end, Isa isa) {
  const CacheLayout layout(cache.shape, isa);
  const AttentionKernels& kernels = attention_kernels(isa);
  for (int64_t head = head_begin; head < head_end; ++head) {
    const Place place = {cache, layout, kernels, layer, head, table};
    store_token(place, position, key + head * layout.width, value + head * layout.width);
    if (!cache.shape.summaries) continue;
    const int64_t end = position + 1, inside = position % CHUNK;
    if (end % FINE_STRIDE == 0 && end >= FINE_SIZE) {
      pool_window(place, position, FINE_SIZE, place.summaries(position, true), FINE_SLOTS,
                  inside / FINE_STRIDE);
    }
    if (end % COARSE_STRIDE == 0 && end >= COARSE_SIZE) {
      pool_window(place, position, COARSE_SIZE, place.summaries(position, false), COARSE_SLOTS,
                  inside / COARSE_STRIDE);
    }
  }
}

}  // namespace endside
