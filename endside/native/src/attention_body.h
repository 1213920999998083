// The kernels of attention_kernels.h for whatever Vec is: included once per instruction set, after
// its vec_NAME.h. Scores have vector lanes = keys (keys lie transposed), sums of values lanes =
// channels, so nothing is added across lanes but totals.
#pragma once

#include "attention_kernels.h"
#include "product.h"

namespace endside {
namespace {

constexpr int64_t BATCH = 4;  // queries whose scores stay in the first-level cache together
constexpr int BLOCK_VECS = BLOCK / LANES;
constexpr int HEAD_VECS = MAX_HEADS / LANES;

inline Vec nothing() { return broadcast(-__builtin_inff()); }

// Scores s (I, 64) of one query -> weights in place; the running peak, total are moved on, and
// factor (I) is what earlier sums are to be multiplied by.
inline void weigh(int64_t heads, const Block& block, const Query& query, float* s, float* factor) {
  float peaks[MAX_HEADS];
  for (int64_t head = 0; head < heads; ++head) {
    float* row = s + head * BLOCK;
    Vec best = nothing();
#pragma GCC unroll 16
    for (int v = 0; v < BLOCK_VECS; ++v) {
      Vec x = load(row + v * LANES);
      if (block.key_scales) x = mul(x, load(block.key_scales + v * LANES));
      if (query.keys < BLOCK) x = first(static_cast<int>(query.keys) - v * LANES, x, nothing());
      if (block.key_scales || query.keys < BLOCK) store(row + v * LANES, x);
      best = max(best, x);
    }
    const float peak = max_of(best), before = query.state.peak[head];
    peaks[head] = peak > before ? peak : before;
    factor[head] = before - peaks[head];
    query.state.peak[head] = peaks[head];
  }
  for (int64_t head = heads; head < MAX_HEADS; ++head) factor[head] = 0;
  for (int v = 0; v < HEAD_VECS; ++v) store(factor + v * LANES, exp2(load(factor + v * LANES)));
  for (int64_t head = 0; head < heads; ++head) {
    float* row = s + head * BLOCK;
    const Vec peak = broadcast(peaks[head]);
    const float added = fold<BLOCK_VECS>([&](int v) {
      const Vec weight = exp2(sub(load(row + v * LANES), peak));
      store(row + v * LANES, weight);
      return weight;
    });
    query.state.total[head] = scalar_fma(query.state.total[head], factor[head], added);
    if (block.value_scales == nullptr) continue;
    for (int v = 0; v < BLOCK_VECS; ++v) {
      const Vec scale = load(block.value_scales + v * LANES);
      store(row + v * LANES, mul(load(row + v * LANES), scale));
    }
  }
}

template <class T>
void attend_cells(const HeadShape& shape, const Block& block, const Query* queries, int64_t count) {
  alignas(64) float s[BATCH][MAX_HEADS * BLOCK];
  float factor[BATCH][MAX_HEADS];
  const T* keys = static_cast<const T*>(block.keys);
  const T* values = static_cast<const T*>(block.values);
  const int64_t bytes = BLOCK * shape.width * static_cast<int64_t>(sizeof(T));
  Ahead next_keys = {static_cast<const char*>(block.next_keys), block.next_keys ? bytes / 64 : 0};
  Ahead next_values = {static_cast<const char*>(block.next_values),
                       block.next_values ? bytes / 64 : 0};
  for (int64_t begin = 0; begin < count; begin += BATCH) {
    const int64_t batch = count - begin < BATCH ? count - begin : BATCH;
    for (int64_t i = 0; i < batch; ++i) {
      multiply(Product<T>{queries[begin + i].q, shape.width, keys, BLOCK, shape.width, s[i], BLOCK,
                          nullptr, &next_keys},
               shape.heads, BLOCK);
    }
    for (int64_t i = 0; i < batch; ++i) {
      weigh(shape.heads, block, queries[begin + i], s[i], factor[i]);
    }
    for (int64_t i = 0; i < batch; ++i) {
      const Query& query = queries[begin + i];
      multiply(Product<T>{s[i], BLOCK, values, shape.width, query.keys, query.state.sum,
                          shape.stride, factor[i], &next_values},
               shape.heads, shape.stride);
    }
  }
}

void attend_block(const HeadShape& shape, const Block& block, const Query* queries,
                  int64_t count) {
  switch (block.cell) {
    case Cell::f16: return attend_cells<F16>(shape, block, queries, count);
    case Cell::bf16: return attend_cells<BF16>(shape, block, queries, count);
    case Cell::int8: return attend_cells<int8_t>(shape, block, queries, count);
    case Cell::f32: return attend_cells<float>(shape, block, queries, count);
  }
}

// into (peak, total) = with the part added; the factors of both are left in `own` and `other` (16).
inline void add_totals(int64_t heads, float* peak, float* total, const float* part_peak,
                       const float* part_total, float* own, float* other) {
  for (int64_t head = 0; head < MAX_HEADS; ++head) own[head] = other[head] = 0;
  for (int64_t head = 0; head < heads; ++head) {
    const float best = part_peak[head] > peak[head] ? part_peak[head] : peak[head];
    own[head] = peak[head] - best;
    other[head] = part_peak[head] - best;
    peak[head] = best;
  }
  for (int v = 0; v < HEAD_VECS; ++v) {
    store(own + v * LANES, exp2(load(own + v * LANES)));
    store(other + v * LANES, exp2(load(other + v * LANES)));
  }
  for (int64_t head = 0; head < heads; ++head) {
    total[head] = scalar_fma(part_total[head], other[head], total[head] * own[head]);
  }
}

void merge_totals(int64_t heads, float* peak, float* total, const float* part_peak,
                  const float* part_total) {
  float own[MAX_HEADS], other[MAX_HEADS];
  add_totals(heads, peak, total, part_peak, part_total, own, other);
}

void merge(const HeadShape& shape, const Softmax& into, const Softmax& part) {
  float own[MAX_HEADS], other[MAX_HEADS];
  add_totals(shape.heads, into.peak, into.total, part.peak, part.total, own, other);
  for (int64_t head = 0; head < shape.heads; ++head) {
    float* sum = into.sum + head * shape.stride;
    const float* more = part.sum + head * shape.stride;
    const Vec left = broadcast(own[head]), right = broadcast(other[head]);
    for (int64_t d = 0; d < shape.stride; d += LANES) {
      store(sum + d, fma(load(more + d), right, mul(load(sum + d), left)));
    }
  }
}

void finish(const HeadShape& shape, const Softmax& state, float* out) {
  for (int64_t head = 0; head < shape.heads; ++head) {
    const float inverse = 1.0f / state.total[head];
    const float* sum = state.sum + head * shape.stride;
    for (int64_t d = 0; d < shape.width; ++d) out[head * shape.width + d] = sum[d] * inverse;
  }
}

// Scores s (I, slots) of all slots of a chunk; those of extras take the place of the cache's.
template <class T>
void score_cells(const HeadShape& shape, const float* q, const Slots& slots, float* s) {
  const T* data = static_cast<const T*>(slots.data);
  const int64_t bytes = shape.width * slots.slots * static_cast<int64_t>(sizeof(T));
  Ahead next = {static_cast<const char*>(slots.next), slots.next ? bytes / 64 : 0};
  multiply(Product<T>{q, shape.width, data, slots.slots, shape.width, s, slots.slots, nullptr,
                      &next},
           shape.heads, slots.slots);
}

inline void score_slots(const HeadShape& shape, const float* q, const Slots& slots, float* s) {
  if (slots.cell == Cell::f16) score_cells<F16>(shape, q, slots, s);
  if (slots.cell == Cell::bf16) score_cells<BF16>(shape, q, slots, s);
  for (int64_t i = 0; i < slots.extra_count; ++i) {
    const Extra& extra = slots.extras[i];
    for (int64_t head = 0; head < shape.heads; ++head) {
      float sum = 0;  // the same sum as in `tile`
      for (int64_t d = 0; d < shape.width; ++d) {
        sum = scalar_fma(q[head * shape.width + d], extra.summary[d], sum);
      }
      s[head * slots.slots + extra.slot] = sum;
    }
  }
}

template <int VECS>
inline void slot_totals(const Slots& slots, const float* row, float* peak, float* total) {
  Vec x[VECS];
  Vec best = nothing();
  for (int v = 0; v < VECS; ++v) {
    x[v] = first(static_cast<int>(slots.end) - v * LANES, load(row + v * LANES), nothing());
    if (v * LANES < slots.begin) {
      x[v] = first(static_cast<int>(slots.begin) - v * LANES, nothing(), x[v]);
    }
    best = max(best, x[v]);
  }
  *peak = max_of(best);
  *total = fold<VECS>([&](int v) { return exp2(sub(x[v], broadcast(*peak))); });
}

void normalise(const HeadShape& shape, const float* q, const Slots& slots, float* peak,
               float* total) {
  if (slots.begin >= slots.end) return;
  alignas(64) float s[MAX_HEADS * FINE_SLOTS];
  float part_peak[MAX_HEADS], part_total[MAX_HEADS];
  score_slots(shape, q, slots, s);
  for (int64_t head = 0; head < shape.heads; ++head) {
    const float* row = s + head * slots.slots;
    if (slots.slots == COARSE_SLOTS) {
      slot_totals<COARSE_SLOTS / LANES>(slots, row, part_peak + head, part_total + head);
    } else {
      slot_totals<FINE_SLOTS / LANES>(slots, row, part_peak + head, part_total + head);
    }
  }
  merge_totals(shape.heads, peak, total, part_peak, part_total);
}

void score(const HeadShape& shape, const float* q, const Slots& slots, const float* lse,
           float* out) {
  alignas(64) float s[MAX_HEADS * FINE_SLOTS];
  score_slots(shape, q, slots, s);
  for (int64_t at = 0; at < FINE_SLOTS; at += LANES) {
    Vec sum = zero();
    for (int64_t head = 0; head < shape.heads; ++head) {
      // a coarse normaliser may be below a fine logit, so the exponent may be positive
      const Vec x = sub(load(s + head * FINE_SLOTS + at), broadcast(lse[head]));
      sum = add(sum, exp2(min(x, broadcast(127.0f))));
    }
    sum = first(static_cast<int>(slots.end - at), sum, zero());
    if (at < slots.begin) sum = first(static_cast<int>(slots.begin - at), zero(), sum);
    store(out + at, sum);
  }
}

int64_t count_all(const float* x, int64_t count, float limit) {
  int64_t found = 0;
  const Vec bound = broadcast(limit);
  for (int64_t i = 0; i < count; i += LANES) found += count_at_least(load(x + i), bound);
  return found;
}

template <class T>
void widen_cells(const void* from, float* to, int64_t count) {
  const T* numbers = static_cast<const T*>(from);
  for (int64_t i = 0; i < (count + 15) / 16 * 16; i += LANES) store(to + i, widen(numbers + i));
}

void widen_all(Cell cell, const void* from, float* to, int64_t count) {
  switch (cell) {
    case Cell::f16: return widen_cells<F16>(from, to, count);
    case Cell::bf16: return widen_cells<BF16>(from, to, count);
    case Cell::int8: return widen_cells<int8_t>(from, to, count);
    case Cell::f32: return widen_cells<float>(from, to, count);
  }
}

void narrow_all(Cell cell, const float* from, void* to, int64_t count) {
  uint16_t* numbers = static_cast<uint16_t*>(to);
  for (int64_t i = 0; i < (count + 15) / 16 * 16; i += LANES) {
    if (cell == Cell::f16) store_f16(numbers + i, load(from + i));
    if (cell == Cell::bf16) store_bf16(numbers + i, load(from + i));
  }
}

constexpr AttentionKernels KERNELS = {attend_block, merge, finish,    normalise, merge_totals,
                                      score,        count_all, widen_all, narrow_all};

}  // namespace
}  // namespace endside
