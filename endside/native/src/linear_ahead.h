// Asking memory for weights before they are read.
//
// A core reads as fast as it has misses under way, and the first-level cache has few places for
// them. So lines are asked into the second level, LEAD bytes before they are used, in the order in
// which a thread will read them: its tiles of one product, then its tiles of the next. The lead
// passes over the borders of products, so memory has work while threads meet there.
#pragma once

#include "linear.h"

namespace endside {

constexpr int64_t LINE_BYTES = 64;
constexpr int64_t LEAD = 32 * 1024;

// Inlined early: GCC takes a function that only asks for one without effect, and drops its calls.
#define ENDSIDE_ASKS static inline __attribute__((always_inline))

ENDSIDE_ASKS void ask_line(const uint8_t* at) {
  __builtin_prefetch(at, 0, 2);  // into the second level
}

ENDSIDE_ASKS void ask_lines(const uint8_t* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += LINE_BYTES) ask_line(at + i);
}

// The next `bytes` of the way, which the caller asks for as one stretch; what is left of a shorter
// piece is asked for here. At the way's end there is nothing: `known`, which is in reach anyway.
static inline const uint8_t* next_stretch(Ahead& ahead, int64_t bytes, const uint8_t* known) {
  if (ahead.left < bytes) {
    ask_lines(ahead.at, ahead.left);
    if (ahead.piece + 1 >= ahead.end) {
      ahead.left = 0;
      return known;
    }
    ++ahead.piece;
    ahead.at = ahead.piece->codes;
    ahead.left = ahead.piece->bytes;
    if (ahead.left < bytes) return known;
  }
  const uint8_t* const found = ahead.at;
  ahead.at += bytes;
  ahead.left -= bytes;
  return found;
}

// Called for every `bytes` that are about to be read.
static inline const uint8_t* ask_ahead(Ahead* ahead, int64_t bytes, const uint8_t* known) {
  if (!ahead) return known;
  if (ahead->lead < LEAD) {  // at the start, and after what was read without asking
    ask_lines(next_stretch(*ahead, bytes, known), bytes);
    ahead->lead += bytes;
  }
  return next_stretch(*ahead, bytes, known);
}

}  // namespace endside
