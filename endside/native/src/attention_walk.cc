// Rows of a tile meet their blocks in ascending order: each step takes the lowest block that any
// row still waits for, and all rows that wait for it. A row counts its own blocks, so where its
// segments begin and end has nothing to do with its neighbours.
#include <limits>

#include "attention_step.h"

namespace endside {

void clear(const HeadShape& heads, const Softmax& state) {
  for (int64_t head = 0; head < heads.heads; ++head) {
    state.peak[head] = -std::numeric_limits<float>::infinity();
    state.total[head] = 0;
  }
  for (int64_t i = 0; i < heads.heads * heads.stride; ++i) state.sum[i] = 0;
}

constexpr int64_t NO_BLOCK = std::numeric_limits<int64_t>::max();

// From the next block to the one that memory is asked for, and to the one whose pages are found: a
// request that waits for its page holds up those behind it.
constexpr int64_t BLOCKS_AHEAD = 2, PAGES_AHEAD = 4;

// How far each row has come.
struct Cursor {
  const Walk& work;
  int64_t next[MAX_TILE], stop[MAX_TILE], block[MAX_TILE];

  explicit Cursor(const Walk& walk) : work(walk) {
    for (int64_t i = 0; i < work.count; ++i) {
      next[i] = work.begin - 1;
      stop[i] = work.end < work.blocks[i].count ? work.end : work.blocks[i].count;
      advance(i);
    }
  }
  void advance(int64_t i) {
    const int64_t at = ++next[i];
    const int32_t* list = work.blocks[i].list;
    block[i] = at >= stop[i] ? NO_BLOCK : list ? list[at] : at;
  }
  // The block that row i meets `count` blocks after the one it waits for.
  int64_t after(int64_t i, int64_t count) const {
    const int64_t at = next[i] + count;
    const int32_t* list = work.blocks[i].list;
    return at >= stop[i] ? NO_BLOCK : list ? list[at] : at;
  }
  int64_t lowest() const {
    int64_t low = NO_BLOCK;
    for (int64_t i = 0; i < work.count; ++i) low = block[i] < low ? block[i] : low;
    return low;
  }
};

// Keys and values of a block of the cache.
static Block stored_block(const Step& step, const Row& row, int64_t head, int64_t block) {
  const CacheLayout& layout = step.layout;
  const uint8_t* part = step.part(row, head, block / CHUNK_BLOCKS);
  const int64_t inside = block % CHUNK_BLOCKS;
  const size_t at = static_cast<size_t>(inside) * layout.block_bytes;
  Block found = {layout.cell, layout.cell, layout.order, part + layout.keys + at,
                 part + layout.values + at, nullptr, nullptr, nullptr, nullptr, nullptr, 0};
  if (layout.cell == Cell::int8) {
    found.key_scales = reinterpret_cast<const float*>(part + layout.key_scales) + inside * BLOCK;
    found.value_scales =
        reinterpret_cast<const float*>(part + layout.value_scales) + inside * BLOCK;
  }
  return found;
}

// Segments that are complete go where they belong, and the next ones start empty.
static void end_segments(const Step& step, const Walk& work, const Cursor& cursor,
                         const int64_t* met, int64_t count) {
  for (int64_t m = 0; m < count; ++m) {
    const int64_t i = met[m];
    if (cursor.next[i] % SEGMENT != 0 && cursor.block[i] != NO_BLOCK) continue;
    step.kernels->merge(step.heads, work.whole[i], work.segments[i]);
    clear(step.heads, work.segments[i]);
  }
}

void walk(const Step& step, const Walk& work, const OwnRoom& own) {
  Cursor cursor(work);
  for (int64_t i = 0; i < work.count; ++i) clear(step.heads, work.segments[i]);
  const Span& span = *work.rows[0].span;
  // from here on a tree's rows see different keys
  const int64_t tail = span.parents ? span.start / BLOCK : NO_BLOCK;
  int64_t block = cursor.lowest();
  for (int64_t i = 0; work.count == 1 && i <= PAGES_AHEAD; ++i) {
    const int64_t early = cursor.after(0, i);
    if (early >= tail) break;
    ask(stored_block(step, work.rows[0], work.head, early).keys, step.layout.block_bytes,
        i <= BLOCKS_AHEAD ? 64 : PAGE);
  }
  while (block != NO_BLOCK) {
    Query queries[MAX_TILE];
    int64_t met[MAX_TILE], count = 0;
    for (int64_t i = 0; i < work.count; ++i) {
      if (cursor.block[i] != block) continue;
      const Row& row = work.rows[i];
      const int64_t seen = row.position + 1 - block * BLOCK;
      queries[count] = {step.query(row, work.head), seen < BLOCK ? seen : BLOCK,
                        work.segments[i]};
      met[count++] = i;
      cursor.advance(i);
    }
    const int64_t next = cursor.lowest();
    if (block < tail) {
      Block stored = stored_block(step, work.rows[0], work.head, block);
      if (next < tail) {
        const Block later = stored_block(step, work.rows[0], work.head, next);
        stored.next_keys = later.keys;
        stored.next_values = later.values;
      }
      // many rows have work enough between two blocks
      const int64_t ahead = work.count == 1 ? cursor.after(0, BLOCKS_AHEAD) : NO_BLOCK;
      // the pages of all blocks in turn are found by the processor itself
      const bool jumps = work.count == 1 && work.blocks[0].list;
      const int64_t far = jumps ? cursor.after(0, PAGES_AHEAD) : NO_BLOCK;
      if (far < tail) {
        ask(stored_block(step, work.rows[0], work.head, far).keys, step.layout.block_bytes, PAGE);
      }
      if (ahead < tail) {
        stored.later = stored_block(step, work.rows[0], work.head, ahead).keys;
        stored.later_bytes = static_cast<int64_t>(step.layout.block_bytes);
      }
      step.kernels->attend_block(step.heads, stored, queries, count);
    } else {
      for (int64_t m = 0; m < count; ++m) {
        const Block own_block = tree_tail(step, work.rows[met[m]], work.head, block, own);
        step.kernels->attend_block(step.heads, own_block, queries + m, 1);
      }
    }
    if (work.whole) end_segments(step, work, cursor, met, count);
    block = next;
  }
}

}  // namespace endside
