// The arithmetic of attention, one table of functions per instruction set.
//
// "Heads" are the I query heads of one key head, worked on together: q (I, D) has been multiplied
// by scale * log2(e), so that all exponentials are powers of two. Every function treats each
// (query, head) by itself, in an order fixed by its own arguments.
#pragma once

#include "cache_layout.h"
#include "isa.h"

namespace endside {

constexpr int64_t MAX_HEADS = 16;  // I at most

struct HeadShape {
  int64_t heads = 0, width = 0;  // I, D
  int64_t stride = 0;            // floats between rows of `sum`: D rounded up to 16
};

// An online softmax of I heads: maximum, sum of weights, weighted sum of values.
struct Softmax {
  float* peak;   // (I)
  float* total;  // (I)
  float* sum;    // (I, stride)
};

// 64 keys and values; scales (64) are null unless the cell is int8 or stands for it.
struct Block {
  Cell cell;
  const void* keys;    // [D][64]
  const void* values;  // [64][D]
  const float* key_scales;
  const float* value_scales;
  const void* next_keys;    // read soon after this block, or null
  const void* next_values;
};

struct Query {
  const float* q;  // (I, D)
  int64_t keys;    // sees the first keys, 1 .. 64, of the block
  Softmax state;
};

// A summary that belongs into a slot but is not in the cache: windows that end in a draft.
struct Extra {
  int64_t slot;
  const float* summary;  // (D)
};

// The slots of one chunk, of which begin .. end are visible.
struct Slots {
  Cell cell;
  const void* data;  // [D][slots]
  const void* next;  // read soon after, or null
  int64_t slots;     // 16 or 64
  int64_t begin, end;
  const Extra* extras;
  int64_t extra_count;
};

struct AttentionKernels {
  // One more block for each of `count` queries.
  void (*attend_block)(const HeadShape&, const Block&, const Query*, int64_t count);
  // into = softmax over the keys of both, `into` first.
  void (*merge)(const HeadShape&, const Softmax& into, const Softmax& part);
  // out (I, D) = sum / total.
  void (*finish)(const HeadShape&, const Softmax&, float* out);
  // One more chunk of slots for the normaliser of a query: peak (I), total (I).
  void (*normalise)(const HeadShape&, const float* q, const Slots&, float* peak, float* total);
  // peak, total (I) = those of both, the first ones first.
  void (*merge_totals)(int64_t heads, float* peak, float* total, const float* part_peak,
                       const float* part_total);
  // out[s] = sum over the heads of 2^(q . summary - lse), 0 where not visible; 64 slots.
  void (*score)(const HeadShape&, const float* q, const Slots&, const float* lse, float* out);
  // How many of x[0 .. count) are >= limit; count a multiple of 16.
  int64_t (*count_at_least)(const float* x, int64_t count, float limit);
  // Numbers of a cell to float32 and back, rounded to nearest; count is rounded up to 16. No int8.
  void (*widen)(Cell cell, const void* from, float* to, int64_t count);
  void (*narrow)(Cell cell, const float* from, void* to, int64_t count);
};

const AttentionKernels& attention_kernels(Isa isa);

const AttentionKernels& attention_kernels_portable();
const AttentionKernels& attention_kernels_neon();
const AttentionKernels& attention_kernels_avx2();
const AttentionKernels& attention_kernels_avx512();

}  // namespace endside
