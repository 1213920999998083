// Float vectors: kernels are written once against these few operations.
//
// The file of one instruction set first includes `vec_NAME.h`, which defines the operations below
// in an unnamed namespace of endside (two sets must never share a compiled function), and includes
// this file at its end for what all have in common. The kernel bodies come after.
//
//     Vec                        a register of LANES floats (4, 8 or 16)
//     TILE_ROWS, TILE_VECS       register tile of a product; TILE_ROWS * TILE_VECS accumulators
//     load(p), store(p, v)       any alignment
//     broadcast(x), zero()
//     add sub mul max min        max(a, b) and min(a, b): b where a or b is no number
//     fma(a, b, c)               a b + c; scalar_fma: the same on floats; both rounded once, or
//                                both twice where there is no such instruction
//     load_f16, load_bf16 (const uint16_t*), load_i8 (const int8_t*)    widened exactly
//     store_f16, store_bf16 (uint16_t*, Vec)                            nearest, ties to even
//     first(count, v, other)     lanes below count from v, the rest from other
//     power_of_two(v, t)         v 2^n; t = ROUNDING + n, n an integer within -125 .. 127
//     count_at_least(v, limit)   int: lanes with v >= limit
//     sum_of(v), max_of(v)       of all lanes; sum_of folds the upper half onto the lower, repeated
//
// Longer sums fold halves the same way (`fold`), so sets with an fma agree in every bit whatever
// their width.
#pragma once

#include <cstdint>

namespace endside {
namespace {

// 2^23 + 2^22: adding it to a small float leaves the nearest integer in the low bits of the sum.
constexpr float ROUNDING = 12582912.0f;

// 2^x for x <= 127, never below 2^-125 (also of minus infinity: a weight that small changes no
// sum); relative error below 2e-7. x = n + f, |f| <= 1/2, and 2^f is the polynomial of degree 5
// with the least relative error.
inline Vec exp2(Vec x) {
  const Vec clamped = max(x, broadcast(-125.0f));
  const Vec shifted = add(clamped, broadcast(ROUNDING));
  const Vec f = sub(clamped, sub(shifted, broadcast(ROUNDING)));
  Vec p = broadcast(0.0013264727f);
  p = fma(p, f, broadcast(0.009671513f));
  p = fma(p, f, broadcast(0.055507336f));
  p = fma(p, f, broadcast(0.24022242f));
  p = fma(p, f, broadcast(0.693147f));
  p = fma(p, f, broadcast(1.0f));
  return power_of_two(p, shifted);
}

// The sum of all numbers of v(0) .. v(VECS - 1), VECS a power of two. v is called in the order in
// which sums are formed, so that few vectors are alive at once.
template <int VECS, int STEP, class F>
inline Vec fold_from(int at, const F& v) {
  if constexpr (STEP >= VECS) {
    return v(at);
  } else {
    const Vec low = fold_from<VECS, 2 * STEP>(at, v);
    return add(low, fold_from<VECS, 2 * STEP>(at + STEP, v));
  }
}
template <int VECS, class F>
inline float fold(const F& v) {
  return sum_of(fold_from<VECS, 1>(0, v));
}

}  // namespace
}  // namespace endside
