// Where the packed codes of a block of 8 rows lie; the rules are in linear.h.
#pragma once

#include "linear.h"

namespace endside {

constexpr int64_t STEP = 4;          // k per step
constexpr int64_t STEP_CODES = 32;   // codes per step: 8 rows x 4 k
constexpr int64_t TRITS = 5;         // steps per 32 bytes of base 3
constexpr int64_t TAIL_BYTES = 8;    // bytes of a base-3 step that is left over

// Bytes of one group of one block.
static inline constexpr int64_t group_bytes(Kind kind, int64_t group) {
  const int64_t steps = group / STEP;
  switch (kind) {
    case Kind::int8: return steps * STEP_CODES;
    case Kind::int4: return steps * STEP_CODES / 2;
    case Kind::ternary2: return steps * STEP_CODES / 4;
    case Kind::ternary3: return steps / TRITS * STEP_CODES + steps % TRITS * TAIL_BYTES;
    default: return 0;
  }
}

// Bytes of one block; k is padded.
static inline constexpr int64_t block_bytes(Kind kind, int64_t k, int64_t group) {
  if (kind == Kind::f32) return k * ROWS * 4;
  if (kind == Kind::bf16) return k * ROWS * 2;
  return k / group * group_bytes(kind, group);
}

// The code of weight zero when the matrix is symmetric, and the largest code.
static inline constexpr int32_t symmetric_zero(Kind kind) {
  return kind == Kind::int8 ? 128 : kind == Kind::int4 ? 8 : 1;
}
static inline constexpr int32_t largest_code(Kind kind) {
  return kind == Kind::int8 ? 255 : kind == Kind::int4 ? 15 : 2;
}

}  // namespace endside
