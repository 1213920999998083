// What all instruction sets' kernels of attention share, for whatever Vec is: merging softmaxes,
// counting, numbers of cells. Included after a vec_NAME.h.
#pragma once

#include "attention_kernels.h"
#include "product.h"

namespace endside {
namespace {

constexpr int BLOCK_VECS = BLOCK / LANES;
constexpr int HEAD_VECS = MAX_HEADS / LANES;

inline Vec nothing() { return broadcast(-__builtin_inff()); }

// into (peak, total) = with the part added; the factors of both are left in `own` and `other` (16).
inline void add_totals(int64_t heads, float* peak, float* total, const float* part_peak,
                       const float* part_total, float* own, float* other) {
  for (int v = 0; v < HEAD_VECS; ++v) {
    const int64_t at = v * LANES;
    const int count = static_cast<int>(heads - at);  // lanes behind it hold no head
    const Vec before = first(count, load(peak + at), zero());
    const Vec there = first(count, load(part_peak + at), zero());
    const Vec best = max(there, before);
    const Vec left = exp2(sub(before, best)), right = exp2(sub(there, best));
    store(own + at, left);
    store(other + at, right);
    store(peak + at, best);
    const Vec here = first(count, load(total + at), zero());
    const Vec more = first(count, load(part_total + at), zero());
    store(total + at, fma(more, right, mul(here, left)));
  }
}

// What a set needs that reads cells row after row and has nothing to set up.
inline Order in_rows(Cell, int64_t) { return Order::rows; }
inline void no_entry(const HeadShape&) {}
inline void no_exit() {}

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

// row(v): the scores of LANES slots.
template <int VECS, class Row>
inline void slot_totals(const View& slots, const Row& row, float* peak, float* total) {
  Vec x[VECS];
  Vec best = nothing();
  for (int v = 0; v < VECS; ++v) {
    x[v] = first(static_cast<int>(slots.end) - v * LANES, row(v), nothing());
    if (v * LANES < slots.begin) {
      x[v] = first(static_cast<int>(slots.begin) - v * LANES, nothing(), x[v]);
    }
    best = max(best, x[v]);
  }
  *peak = max_of(best);
  *total = fold<VECS>([&](int v) { return exp2(sub(x[v], broadcast(*peak))); });
}

// Scores s (I, slots) of a view into its normaliser. s(head, slot): those of LANES slots from one
// on; meanwhile() is called once for each head, to ask memory for what is next.
template <class Scores, class Meanwhile>
inline void add_slots(int64_t heads, int64_t slots, const View& view, const Scores& s,
                      const Meanwhile& meanwhile) {
  alignas(64) float peak[MAX_HEADS] = {}, total[MAX_HEADS] = {};
  for (int64_t head = 0; head < heads; ++head) {
    const auto row = [&](int v) { return s(head, v * LANES); };
    meanwhile();
    if (slots == COARSE_SLOTS) {
      slot_totals<COARSE_SLOTS / LANES>(view, row, peak + head, total + head);
    } else {
      slot_totals<FINE_SLOTS / LANES>(view, row, peak + head, total + head);
    }
  }
  merge_totals(heads, view.totals, view.totals + MAX_HEADS, peak, total);
}

// Scores s (I, 64) of a view -> its sums over the heads of weights; s and meanwhile as above, once
// for each LANES slots.
template <class Scores, class Meanwhile>
inline void sum_heads(int64_t heads, const View& view, const Scores& s,
                      const Meanwhile& meanwhile) {
  for (int64_t at = 0; at < FINE_SLOTS; at += LANES) {
    Vec sum = zero();
    meanwhile();
    for (int64_t head = 0; head < heads; ++head) {
      // a coarse normaliser may be below a fine logit, so the exponent may be positive
      const Vec x = sub(s(head, at), broadcast(view.lse[head]));
      sum = add(sum, exp2(min(x, broadcast(127.0f))));
    }
    sum = first(static_cast<int>(view.end - at), sum, zero());
    if (at < view.begin) sum = first(static_cast<int>(view.begin - at), zero(), sum);
    store(view.scores + at, sum);
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

}  // namespace
}  // namespace endside
