// The kernels of fused.h, written once on vec.h. Each file of an instruction set includes its
// vectors first, then this.
#pragma once

#include <cmath>
#include <cstring>

#include "fused.h"

namespace endside {
namespace {

constexpr float LOG2_E = 1.44269504f;
using Half = uint16_t;  // bfloat16

inline Vec get(const float* p) { return load(p); }
inline Vec get(const Half* p) { return load_bf16(p); }
inline void put(float* p, Vec v) { store(p, v); }
inline void put(Half* p, Vec v) { store_bf16(p, v); }

// As above for the first `count` < LANES numbers; the other lanes are `rest`.
template <class T>
inline Vec get(const T* p, int64_t count, float rest = 0) {
  T part[LANES];
  put(part, broadcast(rest));
  std::memcpy(part, p, static_cast<std::size_t>(count) * sizeof(T));
  return get(part);
}
template <class T>
inline void put(T* p, Vec v, int64_t count) {
  T part[LANES];
  put(part, v);
  std::memcpy(p, part, static_cast<std::size_t>(count) * sizeof(T));
}

// read(p) and write(p, v) of whole vectors, then of what is left, for each step of a row.
struct Whole {
  template <class T>
  Vec get(const T* p, float = 0) const { return endside::get(p); }
  template <class T>
  void put(T* p, Vec v) const { endside::put(p, v); }
};
struct Rest {
  int64_t count;
  template <class T>
  Vec get(const T* p, float rest = 0) const { return endside::get(p, count, rest); }
  template <class T>
  void put(T* p, Vec v) const { endside::put(p, v, count); }
};
template <class F>
inline void along(int64_t width, F&& fn) {
  int64_t c = 0;
  for (; c + LANES <= width; c += LANES) fn(c, Whole{});
  if (c < width) fn(c, Rest{width - c});
}

template <class F>
inline void each_row(int64_t unit, int64_t rows, F&& fn) {
  const int64_t end = (unit + 1) * FUSED_ROWS < rows ? (unit + 1) * FUSED_ROWS : rows;
  for (int64_t row = unit * FUSED_ROWS; row < end; ++row) fn(row);
}

template <class B, class Y>
void norm_forward_rows(const NormForward& a, int64_t unit) {
  each_row(unit, a.rows, [&](int64_t row) {
    const float* x = a.x + row * a.width;
    Vec squares = zero();
    if (a.branch != nullptr) {
      const B* branch = static_cast<const B*>(a.branch) + row * a.width;
      float* out = a.out + row * a.width;
      const Vec scale = broadcast(a.scale);
      along(a.width, [&](int64_t c, auto at) {
        const Vec sum = fma(at.get(branch + c), scale, at.get(x + c));
        at.put(out + c, sum);
        squares = fma(sum, sum, squares);
      });
      x = out;
    } else {
      along(a.width, [&](int64_t c, auto at) {
        const Vec v = at.get(x + c);
        squares = fma(v, v, squares);
      });
    }
    const float r = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(a.width) + a.eps);
    a.r[row] = r;
    Y* y = static_cast<Y*>(a.y) + row * a.width;
    const Vec by = broadcast(r);
    along(a.width, [&](int64_t c, auto at) {
      at.put(y + c, mul(mul(at.get(x + c), by), at.get(a.weight + c)));
    });
  });
}

template <class B, class Y>
void norm_backward_rows(const NormBackward& a, int64_t unit) {
  float* to_weight = a.to_weight + unit * a.width;
  std::memset(to_weight, 0, static_cast<std::size_t>(a.width) * sizeof(float));
  each_row(unit, a.rows, [&](int64_t row) {
    const int64_t start = row * a.width;
    const float *x = a.x + start, *beside = a.beside == nullptr ? nullptr : a.beside + start;
    const Y* dy = static_cast<const Y*>(a.dy) + start;
    const Vec r = broadcast(a.r[row]);
    Vec dot = zero();
    along(a.width, [&](int64_t c, auto at) {
      const Vec product = mul(at.get(dy + c), mul(at.get(x + c), r));
      at.put(to_weight + c, add(at.get(to_weight + c), product));
      dot = fma(product, at.get(a.weight + c), dot);
    });
    const Vec mean = broadcast(sum_of(dot) / static_cast<float>(a.width));
    float* to_x = a.to_x + start;
    B* to_branch = a.to_branch == nullptr ? nullptr : static_cast<B*>(a.to_branch) + start;
    const Vec scale = broadcast(a.scale);
    along(a.width, [&](int64_t c, auto at) {
      const Vec unit_x = mul(at.get(x + c), r);
      const Vec inner = sub(mul(at.get(dy + c), at.get(a.weight + c)), mul(unit_x, mean));
      Vec whole = mul(inner, r);
      if (beside != nullptr) whole = add(whole, at.get(beside + c));
      at.put(to_x + c, whole);
      if (to_branch != nullptr) at.put(to_branch + c, mul(whole, scale));
    });
  });
}

// 1 / (1 + exp(-x)); the exponent is bounded so that nothing overflows
inline Vec sigmoid(Vec x) {
  const Vec power = min(mul(x, broadcast(-LOG2_E)), broadcast(126.0f));
  return broadcast(1.0f) / add(broadcast(1.0f), exp2(power));
}

template <class F>
inline void each_number(int64_t unit, int64_t count, F&& fn) {
  const int64_t begin = unit * FUSED_NUMBERS;
  const int64_t here = count - begin < FUSED_NUMBERS ? count - begin : FUSED_NUMBERS;
  along(here, [&](int64_t c, auto at) { fn(begin + c, at); });
}

template <class T>
void gate_forward_of(const Gate& a, int64_t unit) {
  const T *gate = static_cast<const T*>(a.gate), *up = static_cast<const T*>(a.up);
  T* out = static_cast<T*>(a.out);
  each_number(unit, a.count, [&](int64_t c, auto at) {
    const Vec g = at.get(gate + c);
    at.put(out + c, mul(mul(g, sigmoid(g)), at.get(up + c)));
  });
}

template <class T>
void gate_backward_of(const Gate& a, int64_t unit) {
  const T *gate = static_cast<const T*>(a.gate), *up = static_cast<const T*>(a.up);
  const T* dout = static_cast<const T*>(a.dout);
  T *to_gate = static_cast<T*>(a.to_gate), *to_up = static_cast<T*>(a.to_up);
  const Vec one = broadcast(1.0f);
  each_number(unit, a.count, [&](int64_t c, auto at) {
    const Vec g = at.get(gate + c), u = at.get(up + c), d = at.get(dout + c);
    const Vec s = sigmoid(g);
    const Vec slope = mul(s, fma(g, sub(one, s), one));
    at.put(to_gate + c, mul(mul(d, u), slope));
    at.put(to_up + c, mul(d, mul(g, s)));
  });
}

template <class T>
void head_rows_of(const HeadRows& a, int64_t row) {
  T* logits = static_cast<T*>(a.logits) + row * a.width;
  const int64_t target = a.targets[row];
  if (target < 0) {
    a.losses[row] = 0;
    if (a.wanted) std::memset(logits, 0, static_cast<std::size_t>(a.width) * sizeof(T));
    return;
  }
  // 0 x is 0 for every number: what is none survives here, though not in max
  Vec largest = broadcast(-INFINITY), odd = zero();
  along(a.width, [&](int64_t c, auto at) {
    const Vec x = at.get(logits + c, -3e38f);
    largest = max(largest, x);
    odd = fma(x, zero(), odd);
  });
  const float top = max_of(largest);
  const Vec shift = broadcast(-top * LOG2_E), by = broadcast(LOG2_E);
  Vec total = zero();
  along(a.width, [&](int64_t c, auto at) {
    total = add(total, exp2(fma(at.get(logits + c, -3e38f), by, shift)));
  });
  const float sum = sum_of(total);
  float chosen[LANES];
  store(chosen, get(logits + target, 1));
  a.losses[row] = top + std::log(sum) - chosen[0] + sum_of(odd);
  if (!a.wanted) return;
  const float p_target = std::exp(chosen[0] - top) / sum;
  const Vec inverse = broadcast(1.0f / sum);
  along(a.width, [&](int64_t c, auto at) {
    const Vec p = exp2(fma(at.get(logits + c, -3e38f), by, shift));
    at.put(logits + c, mul(p, inverse));
  });
  put(logits + target, broadcast(p_target - 1.0f), 1);
}

template <class T>
void turn_of(const Turn& a, int64_t unit) {
  const int64_t half = a.width / 2;
  const Vec way = broadcast(a.direction);
  each_row(unit, a.rows, [&](int64_t row) {
    const T* x = static_cast<const T*>(a.x) + row * a.step;
    T* out = static_cast<T*>(a.out) + row * a.heads * a.width;
    const float *cos = a.cos + row * half, *sin = a.sin + row * half;
    for (int64_t head = 0; head < a.heads; ++head, x += a.width, out += a.width) {
      along(half, [&](int64_t c, auto at) {
        const Vec one = at.get(x + c), two = at.get(x + half + c);
        const Vec cosine = at.get(cos + c), sine = mul(at.get(sin + c), way);
        at.put(out + c, sub(mul(one, cosine), mul(two, sine)));
        at.put(out + half + c, fma(two, cosine, mul(one, sine)));
      });
    }
  });
}

// Zeros outside from .. to of a row.
template <class T>
void clear_outside(T* line, int64_t from, int64_t to, int64_t keys) {
  std::memset(line, 0, static_cast<std::size_t>(from) * sizeof(T));
  std::memset(line + to, 0, static_cast<std::size_t>(keys - to) * sizeof(T));
}

template <class T>
void softmax_forward_of(const SoftmaxForward& a, int64_t line) {
  const int64_t row = line % a.rows, start = line * a.keys;
  const int64_t from = a.from[row], to = a.to[row];
  T* weights = static_cast<T*>(a.weights) + start;
  clear_outside(weights, from, to, a.keys);
  const float* scores = a.scores + start;
  Vec largest = broadcast(-INFINITY);
  along(to - from, [&](int64_t c, auto at) {
    largest = max(largest, at.get(scores + from + c, -3e38f));
  });
  const float top = max_of(largest) * a.scale;
  const Vec by = broadcast(a.scale * LOG2_E), shift = broadcast(-top * LOG2_E);
  Vec total = zero();
  along(to - from, [&](int64_t c, auto at) {
    total = add(total, exp2(fma(at.get(scores + from + c, -3e38f), by, shift)));
  });
  const float sum = sum_of(total);
  a.lse[line] = top + std::log(sum);
  const Vec inverse = broadcast(1.0f / sum);
  along(to - from, [&](int64_t c, auto at) {
    const Vec p = exp2(fma(at.get(scores + from + c, -3e38f), by, shift));
    at.put(weights + from + c, mul(p, inverse));
  });
}

template <class T>
void softmax_backward_of(const SoftmaxBackward& a, int64_t line) {
  const int64_t row = line % a.rows, start = line * a.keys;
  const int64_t from = a.from[row], to = a.to[row];
  T* weights = static_cast<T*>(a.weights) + start;
  T* to_scores = static_cast<T*>(a.to_scores) + start;
  clear_outside(weights, from, to, a.keys);
  clear_outside(to_scores, from, to, a.keys);
  const float *scores = a.scores + start, *to_weights = a.to_weights + start;
  const Vec by = broadcast(a.scale * LOG2_E), shift = broadcast(-a.lse[line] * LOG2_E);
  const Vec mean = broadcast(a.mean[line]), scale = broadcast(a.scale);
  along(to - from, [&](int64_t c, auto at) {
    const Vec p = exp2(fma(at.get(scores + from + c), by, shift));
    at.put(weights + from + c, p);
    at.put(to_scores + from + c, mul(mul(p, scale), sub(at.get(to_weights + from + c), mean)));
  });
}

void norm_forward(const NormForward& a, int64_t unit) {
  if (a.narrow_y) {
    a.narrow_branch ? norm_forward_rows<Half, Half>(a, unit)
                    : norm_forward_rows<float, Half>(a, unit);
  } else {
    a.narrow_branch ? norm_forward_rows<Half, float>(a, unit)
                    : norm_forward_rows<float, float>(a, unit);
  }
}
void norm_backward(const NormBackward& a, int64_t unit) {
  if (a.narrow_y) {
    a.narrow_branch ? norm_backward_rows<Half, Half>(a, unit)
                    : norm_backward_rows<float, Half>(a, unit);
  } else {
    a.narrow_branch ? norm_backward_rows<Half, float>(a, unit)
                    : norm_backward_rows<float, float>(a, unit);
  }
}
void gate_forward(const Gate& a, int64_t unit) {
  a.narrow ? gate_forward_of<Half>(a, unit) : gate_forward_of<float>(a, unit);
}
void gate_backward(const Gate& a, int64_t unit) {
  a.narrow ? gate_backward_of<Half>(a, unit) : gate_backward_of<float>(a, unit);
}
void head_rows(const HeadRows& a, int64_t row) {
  a.narrow ? head_rows_of<Half>(a, row) : head_rows_of<float>(a, row);
}
void turn(const Turn& a, int64_t unit) {
  a.narrow ? turn_of<Half>(a, unit) : turn_of<float>(a, unit);
}
void softmax_forward(const SoftmaxForward& a, int64_t unit) {
  each_row(unit, a.heads * a.rows, [&](int64_t line) {
    a.narrow ? softmax_forward_of<Half>(a, line) : softmax_forward_of<float>(a, line);
  });
}
void softmax_backward(const SoftmaxBackward& a, int64_t unit) {
  each_row(unit, a.heads * a.rows, [&](int64_t line) {
    a.narrow ? softmax_backward_of<Half>(a, line) : softmax_backward_of<float>(a, line);
  });
}

constexpr FusedKernels KERNELS{norm_forward, norm_backward, gate_forward,    gate_backward,
                               head_rows,    turn,          softmax_forward, softmax_backward};

}  // namespace
}  // namespace endside
