// Asking memory for weights before they are read.
//
// A core reads as fast as it has misses under way, and the processor's own foresight ends with each
// page and each product. So lines are asked for some KiB before they are used, in the order in
// which a thread will read them: its tiles of one product, in each the fronts of both blocks, then its
// tiles of the next product. The lead passes over the borders of products, so memory has work while
// threads meet there. The first-level cache has few places for misses: where arithmetic is cheap,
// asking into the second level is faster; where it is not, the way from there would cost more.
#pragma once

#include "linear.h"

namespace endside {

constexpr int64_t LINE_BYTES = 64;

enum class Level { first, second };
template <Level L>
constexpr int64_t LEAD = L == Level::first ? 8 * 1024 : 32 * 1024;

// Inlined early: GCC takes a function that only asks for one without effect, and drops its calls.
#define ENDSIDE_ASKS static inline __attribute__((always_inline))

template <Level L>
ENDSIDE_ASKS void ask_line(const uint8_t* at) {
  __builtin_prefetch(at, 0, L == Level::first ? 3 : 2);
}

// Lines of both blocks of a tile, which are read side by side.
struct Stretch {
  const uint8_t* at;
  int64_t gap;  // to the other block
};

template <Level L>
ENDSIDE_ASKS void ask_both(const Stretch& stretch, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += LINE_BYTES) {
    ask_line<L>(stretch.at + i);
    ask_line<L>(stretch.at + stretch.gap + i);
  }
}

// The next tile of the way; false at its end, and in front of a product without tiles.
static inline bool next_tile(Ahead& ahead) {
  if (ahead.tiles > 0) {
    --ahead.tiles;
    ahead.at += ahead.left + ahead.piece->block;
  } else {
    if (ahead.piece + 1 >= ahead.end) return false;
    ++ahead.piece;
    if (ahead.piece->tiles == 0) return false;
    ahead.at = ahead.piece->codes;
    ahead.tiles = ahead.piece->tiles - 1;
  }
  ahead.left = ahead.piece->block;
  return true;
}

// The next `bytes` of both blocks, for the caller to ask for; a shorter rest is asked for here. At
// the way's end there is nothing: `known`, which is in reach anyway.
template <Level L>
static inline Stretch next_stretch(Ahead& ahead, int64_t bytes, const uint8_t* known) {
  if (ahead.left < bytes) {
    if (ahead.left > 0) ask_both<L>({ahead.at, ahead.piece->block}, ahead.left);
    ahead.at += ahead.left;
    ahead.left = 0;
    if (!next_tile(ahead) || ahead.left < bytes) return {known, 0};
  }
  const Stretch found = {ahead.at, ahead.piece->block};
  ahead.at += bytes;
  ahead.left -= bytes;
  return found;
}

// Called when so many bytes of both blocks are about to be read.
template <Level L>
static inline Stretch ask_ahead(Ahead* ahead, int64_t bytes, const uint8_t* known) {
  if (!ahead) return {known, 0};
  if (ahead->lead < LEAD<L>) {  // at the start, and after what was read without asking
    ask_both<L>(next_stretch<L>(*ahead, bytes, known), bytes);
    ahead->lead += 2 * bytes;
  }
  return next_stretch<L>(*ahead, bytes, known);
}

}  // namespace endside
