// The arithmetic of attention, one table of functions per instruction set.
//
// "Heads" are the I query heads of one key head, worked on together. Their q (I, D) is multiplied by
// scale * log2(e), so that all exponentials are powers of two, and laid out once, by
// `prepare_query`, as the set's products read it. Every function treats each (query, head) by
// itself, in an order fixed by its own arguments; many queries come at once where they share what
// is read.
#pragma once

#include "cache_layout.h"
#include "isa.h"

namespace endside {

constexpr int64_t MAX_HEADS = 16;  // I at most

struct HeadShape {
  int64_t heads = 0, width = 0;  // I, D
  int64_t stride = 0;            // floats between rows of `sum`: D rounded up to 16
  // Floats of a prepared query: depth rounded up to what a tile product takes.
  int64_t query_floats() const { return heads * ((width + 31) / 32 * 32); }
};

// An online softmax of I heads: maximum, sum of weights, weighted sum of values.
struct Softmax {
  float* peak;   // (I)
  float* total;  // (I)
  float* sum;    // (I, stride)
};

// 64 keys and values; scales (64) are null unless they are stored as int8.
struct Block {
  Cell cell;
  Cell stored;  // what the numbers were rounded to, also where the cell is f32
  Order order;
  const void* keys;    // [D][64]
  const void* values;  // [64][D]
  const float* key_scales;
  const float* value_scales;
  const void* next_keys;    // read soon after this block, or null
  const void* next_values;
  const void* later;        // a block read some blocks after it, keys and values, or null
  int64_t later_bytes;
};

struct Query {
  const float* q;  // prepared
  int64_t keys;    // sees the first keys, 1 .. 64, of the block
  Softmax state;
};

// A summary that belongs into a slot but is not in the cache: windows that end in a draft.
struct Extra {
  int64_t slot;
  const float* summary;  // (D)
};

// The slots of one chunk.
struct Slots {
  Cell cell;
  Order order;
  const void* data;  // [D][slots]
  const void* next;   // read soon after, or null
  const void* later;  // as large, read some chunks after, or null
  int64_t slots;      // 16 or 64
};

// A query that looks at slots begin .. end of them.
struct View {
  const float* q;  // prepared
  int64_t begin, end;
  const Extra* extras;
  int64_t extra_count;
  float* totals;       // for `normalise`: peak (MAX_HEADS), total (MAX_HEADS)
  const float* lse;    // for `score`: (I)
  float* scores;       // of `score`: (slots)
};

struct AttentionKernels {
  // How the cells of a cache have to lie for the functions below.
  Order (*order)(Cell cell, int64_t width);
  // Before the first and after the last of a thread's calls of what follows, for one shape.
  void (*enter)(const HeadShape&);
  void (*leave)();
  // q (I, D) times factor -> what the functions below take as a query.
  void (*prepare_query)(const HeadShape&, const float* q, float factor, float* prepared);
  // One more block for each of `count` queries.
  void (*attend_block)(const HeadShape&, const Block&, const Query*, int64_t count);
  // into = softmax over the keys of both, `into` first.
  void (*merge)(const HeadShape&, const Softmax& into, const Softmax& part);
  // out (I, D) = sum / total.
  void (*finish)(const HeadShape&, const Softmax&, float* out);
  // One more chunk of slots for the normaliser of each view.
  void (*normalise)(const HeadShape&, const Slots&, const View*, int64_t count);
  // peak, total (I) = those of both, the first ones first.
  void (*merge_totals)(int64_t heads, float* peak, float* total, const float* part_peak,
                       const float* part_total);
  // scores[s] = sum over the heads of 2^(q . summary - lse), 0 where not visible; 64 slots.
  void (*score)(const HeadShape&, const Slots&, const View*, int64_t count);
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
const AttentionKernels& attention_kernels_amx();

}  // namespace endside
