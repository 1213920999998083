// Attention over the chunked cache, dense and InfLLM v2, for a few queries or many.
//
// One algorithm for every caller, so that a row's bits never depend on its neighbours:
//     a row (query token, key head) has an ascending list of blocks of 64 keys: all (dense), or the
//     chosen ones (sparse). The list is cut into segments of SEGMENT blocks. A segment is an online
//     softmax over its blocks in order; segments are merged in order.
// The I = H / G query heads of one key head are handled together, so keys and values are read once
// for all of them; neighbouring queries share blocks the same way, without changing any row's
// order.
//
// Two ways to share the work, with the same bits. Many rows: a thread takes a tile of neighbouring
// rows and one key head through everything. Few rows: the parts of one row, (key head x chunk of
// summaries) and then (key head x segment), are shared out, and meet at barriers.
#pragma once

#include "cache.h"
#include "pool.h"

namespace endside {

constexpr int64_t SEGMENT = 8;  // blocks: 512 keys

struct SparseShape {  // infllmv2 §5; everything in blocks
  bool on = false;
  int64_t init_blocks = 1, window_blocks = 32, topk = 64;
  int64_t dense_len = 8192;     // position p is sparse iff p + 1 >= dense_len
  bool selection_41 = true;     // false: the 4.0 convention
  bool coarse_lse = true;       // false: exact
};

struct AttentionShape {
  int64_t heads = 0;  // H query heads in all, at most 16 per key head; G and D are the cache's
  float scale = 0;    // 1 / sqrt(D)
  SparseShape sparse;
};

// Rows of one sequence in this step. Append: row r stands at position start + r, its key is already
// in the cache. Tree (paths of at most 64 rows): parents[r] < r is a row of this span, or -1 for
// the last stored token; row r stands at start + depth(r) and sees what plain decoding would see on
// its root path, summaries of that path included. Keys and values of its rows lie beside the cache
// in tree_keys / tree_values (rows, G, D) f32, as `append` would be given them: they are rounded
// here.
struct Span {
  Table table;
  int64_t start = 0, rows = 0;
  const int32_t* parents = nullptr;  // null: append
  const float* tree_keys = nullptr;
  const float* tree_values = nullptr;
};

// Bytes of scratch shared by the team that `attend` needs for up to `rows` rows in all and
// sequences of up to `context` tokens.
size_t attention_scratch_bytes(const CacheShape& cache, const AttentionShape& shape, int64_t rows,
                               int64_t context, int threads);

// q (P, H, D) f32 rotated, out (P, H, D); spans cover the P rows in order. Called by every thread
// of the team with the same arguments; the result is complete after the call (it ends in a
// barrier). visible (P, G) int32 or null: keys each row attended to (tests and the Attended
// report).
void attend(Team& team, const Cache& cache, int64_t layer, const AttentionShape& shape,
            const Span* spans, int64_t span_count, const float* q, float* out, int32_t* visible,
            void* scratch, Isa isa);

// Makes the accepted path of a tree permanent: rows (count) of tree_keys / tree_values, root to
// leaf, appended at start ...
void accept(const Cache& cache, int64_t layer, Table table, int64_t start, const int32_t* rows,
            int64_t count, const float* tree_keys, const float* tree_values, Isa isa);

}  // namespace endside
