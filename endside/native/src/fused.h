// What a training step does between its matrix products, each in one pass over memory, forward and
// backward. Numbers are float32 or bfloat16 (`narrow`), sums float32.
//
// Work is cut into units whose size does not depend on the number of threads, and each unit writes
// memory of its own: the bits do not depend on how many threads there are.
//
// The threads are borrowed: a second team beside the tensor library's own would fight with it for
// the processor, because its threads spin for a while after every operation. Where the process has
// loaded GNU's OpenMP, `run_fused` asks it for the team that is there.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace endside {

constexpr int64_t FUSED_ROWS = 16;        // rows of a unit; of the norms' partial sums too
constexpr int64_t FUSED_NUMBERS = 8192;   // numbers of a unit where there are no rows

// out = x + scale branch (branch may be null: then out is not written); r = 1 / sqrt(mean out^2 +
// eps); y = out r weight. x, out (P, C) and r (P) float32; branch and y (P, C).
struct NormForward {
  const float *x, *weight;
  const void* branch;
  float *out, *r;
  void* y;
  float scale, eps;
  int64_t rows, width;
  bool narrow_branch, narrow_y;
};

// From dy and the gradient that the sum has from elsewhere (`beside`, may be null): to_x (P, C), to
// the branch where there was one (scale times it), and to the weight in units of FUSED_ROWS rows
// (ceil(P / FUSED_ROWS), C).
struct NormBackward {
  const float *x, *weight, *r, *beside;
  const void* dy;
  float* to_x;
  void* to_branch;
  float* to_weight;
  float scale;
  int64_t rows, width;
  bool narrow_branch, narrow_y;
};

// out = silu(gate) up; backward: the gradients of both from `dout`. All (count).
struct Gate {
  const void *gate, *up, *dout;
  void *out, *to_gate, *to_up;
  int64_t count;
  bool narrow;
};

// logits (P, V) become their own gradient where `wanted`: softmax - onehot, 0 in rows whose target
// is below 0. losses (P) float32; a row that holds no number or infinity has a loss that is none.
struct HeadRows {
  void* logits;
  const int64_t* targets;
  float* losses;
  int64_t rows, width;
  bool wanted, narrow;
};

// x (P, H, D), its rows `step` numbers apart, turned by cos, sin (P, D / 2) -> out (P, H, D), dense;
// direction -1 turns back.
struct Turn {
  const void* x;
  const float *cos, *sin;
  void* out;
  int64_t rows, heads, width, step;
  float direction;
  bool narrow;
};

// Attention's weights: softmax of scale scores over the keys that a query sees, from[i] <= s < to[i]
// (never none), zero elsewhere. scores (H, P, S) float32, weights (H, P, S), lse (H, P), from and
// to (P).
struct SoftmaxForward {
  const float* scores;
  const int64_t *from, *to;
  void* weights;
  float* lse;
  int64_t heads, rows, keys;
  float scale;
  bool narrow;
};

// And backward: the weights again, from scores and lse, and to_scores = scale weights (to_weights -
// mean), mean (H, P) = sum of out dout. Shapes as above.
struct SoftmaxBackward {
  const float *scores, *to_weights, *lse, *mean;
  const int64_t *from, *to;
  void *weights, *to_scores;
  int64_t heads, rows, keys;
  float scale;
  bool narrow;
};

// A kernel for one unit of each, for one instruction set.
struct FusedKernels {
  void (*norm_forward)(const NormForward&, int64_t unit);
  void (*norm_backward)(const NormBackward&, int64_t unit);
  void (*gate_forward)(const Gate&, int64_t unit);
  void (*gate_backward)(const Gate&, int64_t unit);
  void (*head_rows)(const HeadRows&, int64_t unit);
  void (*turn)(const Turn&, int64_t unit);
  void (*softmax_forward)(const SoftmaxForward&, int64_t unit);
  void (*softmax_backward)(const SoftmaxBackward&, int64_t unit);
};

const FusedKernels& fused_portable();
const FusedKernels& fused_neon();
const FusedKernels& fused_avx2();
const FusedKernels& fused_avx512();
const FusedKernels& fused_kernels(Isa isa);

// Whether there is a team to borrow.
bool fused_team();

// fn(data, unit) for 0 <= unit < units, on up to `threads` threads of the borrowed team. What a unit
// throws is thrown again here, once all threads have stopped.
void run_fused(int64_t units, int threads, void (*fn)(const void*, int64_t), const void* data);

// Whether the calling thread and the others of a borrowed team of `threads` take numbers too small
// for a full mantissa as zero from here on; the processor computes with them many times slower.
void flush_denormals(int threads, bool wanted);

inline int64_t units_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace endside
