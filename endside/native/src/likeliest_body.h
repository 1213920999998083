// likeliest.h for whatever Vec is: included once per instruction set, after its vec_NAME.h.
#pragma once

#include <cmath>

#include "likeliest.h"

namespace endside {
namespace {

constexpr int AT_ONCE = 4;  // vectors of one look
constexpr float LOG2E = 1.44269504f;

// The largest numbers met so far, in order: a list, since it changes for few of many numbers.
struct Best {
  const int64_t count;
  int32_t* tokens;
  float* values;
  int64_t found = 0;

  float least() const { return found < count ? -__builtin_inff() : values[count - 1]; }

  void meet(float value, int64_t token) {
    if (found == count && !(value > values[count - 1])) return;
    int64_t at = found < count ? found++ : count - 1;
    for (; at > 0 && value > values[at - 1]; --at) {
      values[at] = values[at - 1];
      tokens[at] = tokens[at - 1];
    }
    values[at] = value;
    tokens[at] = static_cast<int32_t>(token);
  }
};

inline void meet_all(Best& best, const float* x, int64_t size) {
  constexpr int64_t STEP = AT_ONCE * LANES;
  int64_t i = 0;
  for (; i < size && best.found < best.count; ++i) best.meet(x[i], i);
  for (; i + STEP <= size; i += STEP) {
    const Vec low = max(load(x + i), load(x + i + LANES));
    const Vec high = max(load(x + i + 2 * LANES), load(x + i + 3 * LANES));
    if (count_at_least(max(low, high), broadcast(best.least())) == 0) continue;
    for (int64_t j = i; j < i + STEP; ++j) best.meet(x[j], j);
  }
  for (; i < size; ++i) best.meet(x[i], i);
}

// Sum of exp(x - peak).
inline float total_of(const float* x, int64_t size, float peak) {
  constexpr int64_t STEP = AT_ONCE * LANES;
  const Vec shift = broadcast(peak), factor = broadcast(LOG2E);
  Vec sum[AT_ONCE];
  for (Vec& one : sum) one = zero();
  int64_t i = 0;
  for (; i + STEP <= size; i += STEP) {
#pragma GCC unroll 4
    for (int v = 0; v < AT_ONCE; ++v) {
      sum[v] = add(sum[v], exp2(mul(sub(load(x + i + v * LANES), shift), factor)));
    }
  }
  alignas(64) float rest[STEP];
  for (int64_t j = 0; j < STEP; ++j) rest[j] = i + j < size ? x[i + j] : -__builtin_inff();
#pragma GCC unroll 4
  for (int v = 0; v < AT_ONCE; ++v) {
    sum[v] = add(sum[v], exp2(mul(sub(load(rest + v * LANES), shift), factor)));
  }
  return sum_of(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
}

inline void likeliest_of(const float* x, int64_t size, int64_t count, int32_t* tokens,
                         float* chances) {
  Best best{count, tokens, chances};
  meet_all(best, x, size);
  const float peak = chances[0];
  const float total = std::log(total_of(x, size, peak));
  for (int64_t i = 0; i < count; ++i) chances[i] = chances[i] - peak - total;
}

}  // namespace
}  // namespace endside
