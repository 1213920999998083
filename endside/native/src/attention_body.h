// The kernels of attention_kernels.h for whatever Vec is: included once per instruction set, after
// its vec_NAME.h. Scores have vector lanes = keys (keys lie transposed), sums of values lanes =
// channels, so nothing is added across lanes but totals.
#pragma once

#include "attention_common.h"

namespace endside {
namespace {

constexpr int64_t BATCH = 4;  // queries whose scores stay in the first-level cache together

void prepare_query(const HeadShape& shape, const float* q, float factor, float* prepared) {
  for (int64_t i = 0; i < shape.heads * shape.width; ++i) prepared[i] = q[i] * factor;
}

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

inline void score_slots(const HeadShape& shape, const View& view, const Slots& slots, float* s) {
  const float* q = view.q;
  if (slots.cell == Cell::f16) score_cells<F16>(shape, q, slots, s);
  if (slots.cell == Cell::bf16) score_cells<BF16>(shape, q, slots, s);
  for (int64_t i = 0; i < view.extra_count; ++i) {
    const Extra& extra = view.extras[i];
    for (int64_t head = 0; head < shape.heads; ++head) {
      float sum = 0;  // the same sum as in `tile`
      for (int64_t d = 0; d < shape.width; ++d) {
        sum = scalar_fma(q[head * shape.width + d], extra.summary[d], sum);
      }
      s[head * slots.slots + extra.slot] = sum;
    }
  }
}

// Scores s (I, slots) as `add_slots` and `sum_heads` ask for them.
inline auto as_rows(const float* s, int64_t slots) {
  return [=](int64_t head, int64_t at) { return load(s + head * slots + at); };
}
inline void nothing_meanwhile() {}

void normalise(const HeadShape& shape, const Slots& slots, const View* views, int64_t count) {
  alignas(64) float s[MAX_HEADS * FINE_SLOTS];
  for (int64_t i = 0; i < count; ++i) {
    if (views[i].begin >= views[i].end) continue;
    score_slots(shape, views[i], slots, s);
    add_slots(shape.heads, slots.slots, views[i], as_rows(s, slots.slots), nothing_meanwhile);
  }
}

void score(const HeadShape& shape, const Slots& slots, const View* views, int64_t count) {
  alignas(64) float s[MAX_HEADS * FINE_SLOTS];
  for (int64_t i = 0; i < count; ++i) {
    score_slots(shape, views[i], slots, s);
    sum_heads(shape.heads, views[i], as_rows(s, FINE_SLOTS), nothing_meanwhile);
  }
}

constexpr AttentionKernels KERNELS = {in_rows,       no_entry,     no_exit,
                                      prepare_query, attend_block, merge,     finish,
                                      normalise,     merge_totals, score,     count_all,
                                      widen_all,     narrow_all};

}  // namespace
}  // namespace endside
