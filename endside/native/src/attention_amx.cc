// Attention in AMX tiles (attention_tiles.h says how): products in tiles, all else in AVX-512.
//
#include "vec_avx512.h"

#include "attention_common.h"
#include "attention_tiles.h"

#include <cstring>

namespace endside {
namespace {

// Where the numbers of (term, head) stand in a left side of `steps` steps.
struct LeftPlace {
  int64_t step, term;  // bf16 numbers from one to the next
  LeftPlace(const TileRows& rows, int64_t heads, int64_t steps)
      : step(rows.rows * TILE_DEPTH), term((rows.tiles == 1 ? 1 : steps) * heads * TILE_DEPTH) {}
};

void prepare_query(const HeadShape& shape, const float* q, float factor, float* prepared) {
  const int64_t steps = tiles_of(shape.width, TILE_DEPTH);
  const LeftPlace place(TileRows(shape.heads), shape.heads, steps);
  uint16_t* out = reinterpret_cast<uint16_t*>(prepared);
  for (int64_t head = 0; head < shape.heads; ++head) {
    for (int64_t step = 0; step < steps; ++step) {
      alignas(64) float numbers[TILE_DEPTH] = {};
      for (int64_t i = 0; i < TILE_DEPTH && step * TILE_DEPTH + i < shape.width; ++i) {
        numbers[i] = q[head * shape.width + step * TILE_DEPTH + i] * factor;
      }
      uint16_t* high = out + step * place.step + head * TILE_DEPTH;
      store_terms(load(numbers), load(numbers + LANES), high, high + place.term);
    }
  }
}

// Lines asked for with each tile and each head of a block, with each tile of summaries.
constexpr int64_t LINES_A_TILE = 8, LINES_A_HEAD = 16, SLOT_LINES_A_TILE = 8;

// Scores s (2 I, 64) of one query, by terms -> weights as a left side; the running peak and total
// are moved on, and factor (I) is what earlier sums are to be multiplied by.
inline void weigh(const HeadShape& shape, const Block& block, const Query& query, const float* s,
                  uint16_t* weights, float* factor, Later& later) {
  const int64_t heads = shape.heads;
  const LeftPlace place(TileRows(heads), heads, BLOCK / TILE_DEPTH);
  const int keys = static_cast<int>(query.keys);
  alignas(64) float before[MAX_HEADS] = {}, after[MAX_HEADS] = {}, added[MAX_HEADS] = {};
  for (int64_t head = 0; head < heads; ++head) {
    const float* row = s + head * BLOCK;
    later.ask(LINES_A_HEAD);
    Vec x[BLOCK_VECS];
#pragma GCC unroll 4
    for (int v = 0; v < BLOCK_VECS; ++v) {
      x[v] = add(load(row + v * LANES), load(row + heads * BLOCK + v * LANES));
      if (block.key_scales) x[v] = mul(x[v], load(block.key_scales + v * LANES));
      if (keys < BLOCK) x[v] = first(keys - v * LANES, x[v], nothing());
    }
    const float peak = max_of(max(max(x[0], x[1]), max(x[2], x[3])));
    before[head] = query.state.peak[head];
    after[head] = peak > before[head] ? peak : before[head];
    const Vec highest = broadcast(after[head]);
#pragma GCC unroll 4
    for (int v = 0; v < BLOCK_VECS; ++v) x[v] = exp2(sub(x[v], highest));
    added[head] = sum_of(add(add(x[0], x[2]), add(x[1], x[3])));
#pragma GCC unroll 4
    for (int v = 0; v < BLOCK_VECS; ++v) {
      if (block.value_scales) x[v] = mul(x[v], load(block.value_scales + v * LANES));
      if (keys < BLOCK) x[v] = first(keys - v * LANES, x[v], zero());
    }
    uint16_t* high = weights + head * TILE_DEPTH;
    store_terms(x[0], x[1], high, high + place.term);
    store_terms(x[2], x[3], high + place.step, high + place.step + place.term);
  }
  const Vec scale = exp2(sub(load(before), load(after)));
  store(factor, scale);
  store(query.state.peak, load(after));
  store(query.state.total, fma(load(query.state.total), scale, load(added)));
}

// sum = sum * factor + products (2 I, stride), by terms.
inline void add_values(const HeadShape& shape, const Query& query, const float* products,
                       const float* factor) {
  const int64_t terms = shape.heads * shape.stride;
  for (int64_t head = 0; head < shape.heads; ++head) {
    const Vec scale = broadcast(factor[head]);
    for (int64_t d = 0; d < shape.stride; d += LANES) {
      const int64_t at = head * shape.stride + d;
      const Vec more = add(load(products + at), load(products + terms + at));
      store(query.state.sum + at, fma(load(query.state.sum + at), scale, more));
    }
  }
}

constexpr int64_t PLANES = 2 * 2;  // keys and values, two terms at most
constexpr int64_t MAX_ROWS = 2 * MAX_HEADS;

inline void prefetch(const float* floats, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(floats + i);
}

Right keys_of(const HeadShape& shape, const Block& block, uint8_t* room, Later* later) {
  if (block.order == Order::tiles) {
    return as_it_lies(block.keys, shape.width, BLOCK, later, LINES_A_TILE);
  }
  return pack(block.cell, block.stored, block.keys, block.next_keys, BLOCK, shape.width,
              shape.width, BLOCK, room);
}

// Values as a query sees them that sees so many keys: what it does not see may be no number.
Right values_of(const HeadShape& shape, const Block& block, int64_t keys, uint8_t* room,
                Later* later) {
  if (block.order == Order::rows) {
    return pack(block.cell, block.stored, block.values, block.next_values, shape.width, BLOCK,
                keys, shape.stride, room);
  }
  if (keys < BLOCK) return first_rows(block.values, BLOCK, keys, shape.width, room);
  return as_it_lies(block.values, BLOCK, shape.width, later, LINES_A_TILE);
}

void attend_block(const HeadShape& shape, const Block& block, const Query* queries,
                  int64_t count) {
  alignas(64) uint8_t planes[PLANES * BLOCK * MAX_HEAD_DIM * 2];
  alignas(64) float s[MAX_ROWS * BLOCK];
  alignas(64) float products[MAX_ROWS * MAX_HEAD_DIM];
  alignas(64) uint16_t weights[MAX_ROWS * BLOCK];
  alignas(64) float factor[MAX_HEADS];
  const TileRows rows(shape.heads);
  Later later(block.later, block.later_bytes);
  Right keys = keys_of(shape, block, planes, &later);
  // a lone query needs its keys no more when it comes to the values: less of the first-level cache
  uint8_t* const value_planes = planes + (count > 1 ? keys.terms * keys.plane_bytes() : 0);
  int64_t ready = 0;  // values, as this many keys are seen
  Right values = {};
  for (int64_t i = 0; i < count; ++i) {
    const Query& query = queries[i];
    tile_multiply(rows, query.q, keys, s, BLOCK);
    keys.later = nullptr;  // once is enough
    if (i + 1 < count) {
      prefetch(queries[i + 1].q, shape.query_floats());
      prefetch(queries[i + 1].state.sum, shape.heads * shape.stride);
    }
    weigh(shape, block, query, s, weights, factor, later);
    if (query.keys != ready) {
      values = values_of(shape, block, query.keys, value_planes, &later);
      ready = query.keys;
    }
    tile_multiply(rows, weights, values, products, shape.stride);
    values.later = nullptr;
    add_values(shape, query, products, factor);
  }
}

// Scores of views by tiles: s (2 I, slots) by terms.
class SlotScores {
 public:
  SlotScores(const HeadShape& shape, const Slots& slots)
      : shape_(shape), slots_(slots), rows_(shape.heads),
        later_(slots.order == Order::tiles ? slots.later : nullptr,
               slots.slots * shape.width * 2) {}

  // (head, slot) -> the scores of LANES slots, both terms added.
  auto of(const View& view) {
    const bool own = view.extra_count > 0;
    if (!ready_ || (own && right_.planes != planes_)) lay_out(own);
    ready_ = !own;
    for (int64_t i = 0; i < view.extra_count; ++i) replace(view.extras[i]);
    tile_multiply(rows_, view.q, right_, s_, slots_.slots);
    right_.later = nullptr;
    const float *high = s_, *low = s_ + shape_.heads * slots_.slots;
    return [=, slots = slots_.slots](int64_t head, int64_t slot) {
      const int64_t at = head * slots + slot;
      return add(load(high + at), load(low + at));
    };
  }
  // What is left to ask for, in `parts` equal parts.
  auto rest(int64_t parts) {
    const int64_t tiles = shape_.width / TILE_DEPTH * slots_.slots / TILE_COLUMNS;
    const int64_t lines = tiles * (TILE_BYTES / 64 - SLOT_LINES_A_TILE) / parts;
    return [this, lines] { later_.ask(lines); };
  }

 private:
  // own: some summaries are going to be replaced
  void lay_out(bool own) {
    if (slots_.order == Order::rows) {
      right_ = pack(slots_.cell, slots_.cell, slots_.data, slots_.next, slots_.slots,
                    shape_.width, shape_.width, slots_.slots, planes_);
    } else if (own) {
      right_ = first_rows(slots_.data, shape_.width, shape_.width, slots_.slots, planes_);
    } else {
      right_ = as_it_lies(slots_.data, shape_.width, slots_.slots, &later_, SLOT_LINES_A_TILE);
    }
  }
  void replace(const Extra& extra) {
    for (int64_t d = 0; d < shape_.width; ++d) {
      const int64_t tile = d / TILE_DEPTH * right_.columns + extra.slot / TILE_COLUMNS;
      uint8_t* to = planes_ + tile * TILE_BYTES + d % TILE_DEPTH / 2 * 64 +
                    extra.slot % TILE_COLUMNS * 4 + d % 2 * 2;
      float rest = extra.summary[d];
      for (int term = 0; term < right_.terms; ++term) {
        uint32_t bits;
        std::memcpy(&bits, &rest, sizeof bits);
        const uint16_t upper = static_cast<uint16_t>(bits >> 16);
        std::memcpy(to + term * right_.plane_bytes(), &upper, sizeof upper);
        bits &= 0xffff0000u;
        float taken;
        std::memcpy(&taken, &bits, sizeof taken);
        rest -= taken;
      }
    }
  }

  const HeadShape& shape_;
  const Slots& slots_;
  TileRows rows_;
  Later later_;
  bool ready_ = false;
  Right right_ = {};
  alignas(64) uint8_t planes_[2 * FINE_SLOTS * MAX_HEAD_DIM * 2];
  alignas(64) float s_[MAX_ROWS * FINE_SLOTS];
};

void normalise(const HeadShape& shape, const Slots& slots, const View* views, int64_t count) {
  SlotScores scores(shape, slots);
  for (int64_t i = 0; i < count; ++i) {
    if (views[i].begin >= views[i].end) continue;
    add_slots(shape.heads, slots.slots, views[i], scores.of(views[i]), scores.rest(shape.heads));
  }
}

void score(const HeadShape& shape, const Slots& slots, const View* views, int64_t count) {
  SlotScores scores(shape, slots);
  for (int64_t i = 0; i < count; ++i) {
    sum_heads(shape.heads, views[i], scores.of(views[i]), scores.rest(FINE_SLOTS / LANES));
  }
}

// bf16 cells are a product's right side as they are, where they fill whole tiles.
Order order(Cell cell, int64_t width) {
  return cell == Cell::bf16 && width % TILE_DEPTH == 0 ? Order::tiles : Order::rows;
}

void enter(const HeadShape& shape) { shape_tiles(TileRows(shape.heads).rows); }

constexpr AttentionKernels KERNELS = {order,        enter,     free_tiles, prepare_query,
                                      attend_block, merge,     finish,     normalise,
                                      merge_totals, score,     count_all,  widen_all,
                                      narrow_all};

}  // namespace

const AttentionKernels& attention_kernels_amx() { return KERNELS; }

}  // namespace endside
