// Matrix products of training: C = A B in float32, out of bfloat16 tiles.
//
// A float32 number is the sum of three bfloat16 numbers, each the rounding of what the ones before
// it leave: x = x1 + x2 + x3 with |x2| <= 2^-8 |x|, |x3| <= 2^-16 |x|. Of the nine products of two
// such numbers the six largest are taken,
//     a b = a1 b1 + a1 b2 + a2 b1 + a2 b2 + a1 b3 + a3 b1,
// and what is left out is below 2^-23 of |a b|. Each is exact in float32, where they are summed.
// Matrix units multiply bfloat16 so much faster than vector units multiply float32 that six products
// are still the faster ones (bench/train_cpu.py prints what both take).
//
// Numbers below 2^-126 count as zero, terms too. Infinities become no number, as do finite numbers
// that bfloat16 rounds to one (from 2^128 - 2^119 on). The order of a sum depends on its length
// alone: bits depend neither on the number of threads nor on what other rows and columns there are.
//
// Both factors are cut into panels of 32 lines, their terms laid out as tiles want them. The factor
// with fewer lines is laid out once for all threads; each unit of work takes some panels of the
// other, which then stay in its second-level cache while the shared ones pass.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace endside {

constexpr int64_t GEMM_LINES = 32;   // of a panel
constexpr int64_t GEMM_STEP = 32;    // depths of one tile
constexpr int64_t GEMM_DEPTH = 1024;  // depths that are laid out at once
constexpr int64_t GEMM_TERMS = 3;
// Numbers of one panel's step: two tiles of 16 lines for each term.
constexpr int64_t GEMM_STEP_NUMBERS = GEMM_TERMS * GEMM_LINES * GEMM_STEP;

// A factor, to be summed along `depth`: (lines, depth) with `step` numbers between two lines where
// depth is inside, else (depth, lines) with `step` between two depths.
struct GemmFactor {
  const float* data;
  int64_t step;
  bool depth_inside;
};

// C (rows, columns), `step` numbers between two rows = A, whose lines are its rows, times B, whose
// lines are its columns.
struct Gemm {
  GemmFactor a, b;
  float* c;
  int64_t step;
  int64_t rows, columns, depth;
};

// A 32 x 32 piece of C, or what of it there is.
struct GemmPiece {
  float* c;
  int64_t step, rows, columns;
};

struct GemmKernels {
  // Before the first and after the last of a thread's calls.
  void (*enter)();
  void (*leave)();
  // The terms of a step, `lines` and `depth` of 1 .. 32 -> [term][2][16][32]; what is missing is
  // zero. [depth inside][for the first factor].
  void (*lay[2][2])(const GemmFactor&, int64_t lines, int64_t depth, uint16_t* step);
  // piece (+)= a b over so many steps.
  void (*multiply)(const uint16_t* a, const uint16_t* b, int64_t steps, const GemmPiece&, bool add);
};

const GemmKernels& gemm_amx();

// Whether the instruction set has tiles to do it in.
bool gemm_able(Isa isa);

// On up to `threads` threads of the borrowed team (fused.h). Throws where the instruction set is
// not able, or the system has no memory for the terms.
void gemm(const Gemm& product, int threads, Isa isa);

}  // namespace endside
