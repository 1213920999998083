// One call of `attend`, as the files that carry it out see it.
//
//     attention.cc        who does what: rows, tiles, phases
//     attention_walk.cc   rows of a tile meet their blocks
//     attention_tree.cc   blocks and summaries that end in a draft tree
//     select.cc           which blocks a row attends to (infllmv2 §3 to §5)
#pragma once

#include "attention.h"
#include "attention_kernels.h"

namespace endside {

constexpr int64_t MAX_DEPTH = 64;  // rows of one path of a tree
constexpr int64_t MAX_TILE = 128;   // rows that are walked together

struct Row {
  const Span* span;
  int64_t place;     // row within the span
  int64_t index;     // row among all of this call
  int64_t position;  // of its token in the sequence
};

// Room for the parts of trees, as the cache would store and pool them. Index: (row, key head).
struct TreeRoom {
  float* keys;          // (D) codes when the cache is int8
  float* values;        // (D)
  float* key_scales;    // 1
  float* value_scales;  // 1
  float* fine;          // (D) the fine summary that ends with this row, if one does
  float* coarse;        // (D)
};

// What one thread keeps for itself, for the rows of a tile.
struct OwnRoom {
  float* segment;       // running softmaxes: see `softmax_at`
  float* whole;         // the same, over segments
  float* block_scores;  // (tile, blocks)
  float* edges;         // (tile, chunks)
  float* normaliser;    // (tile, 3, MAX_HEADS): peak, total, lse
  int32_t* chosen;      // (tile, choices)
  float* tail_keys;     // a block put together for one tree row
  float* tail_values;
  float* tail_scales;   // (2, 64)
};

struct Step {
  Cache cache;
  CacheLayout layout;
  int64_t layer;
  AttentionShape shape;
  HeadShape heads;  // of one key head
  const AttentionKernels* kernels;
  const Row* row;   // (P)
  const float* q;   // (P, G) prepared queries
  TreeRoom tree;

  const float* query(const Row& of, int64_t head) const {
    return q + (of.index * cache.shape.kv_heads + head) * heads.query_floats();
  }
  const uint8_t* part(const Row& of, int64_t head, int64_t chunk) const {
    return head_part(cache, layout, layer, head, of.span->table.chunks[chunk]);
  }
  const uint8_t* summaries(const Row& of, int64_t head, int64_t chunk, bool fine) const {
    return summaries_of(cache, layout, layer, head, of.span->table.chunks[chunk], fine);
  }
};

// Asks for memory that a lone row reads at once, into the second-level cache. Inlined early: GCC
// takes a function that only asks for one without effect, and drops its calls.
inline __attribute__((always_inline)) void ask(const void* from, size_t bytes, size_t step = 64) {
  const char* begin = static_cast<const char*>(from);
  for (size_t at = 0; at < bytes; at += step) __builtin_prefetch(begin + at, 0, 2);
}
constexpr size_t PAGE = 4096;  // bytes, where a huge one is not one to the processor

// Floats of one running softmax, padded so that neighbours share no cache line.
inline int64_t softmax_floats(const HeadShape& heads) {
  return 2 * MAX_HEADS + heads.heads * heads.stride;
}
inline Softmax softmax_at(float* room, const HeadShape& heads, int64_t index) {
  float* own = room + index * softmax_floats(heads);
  return {own, own + MAX_HEADS, own + 2 * MAX_HEADS};
}
void clear(const HeadShape& heads, const Softmax& state);

// The blocks a row attends to, ascending: the numbers of a list, or 0 .. count - 1 without one.
struct Blocks {
  const int32_t* list;
  int64_t count;
};

// select.cc -------------------------------------------------------------------------------------

// Whether sparsity leaves out any block for this row.
bool chooses(const Step& step, const Row& row);
int64_t normaliser_chunks(const Step& step, const Row& row);
int64_t score_chunks(const Step& step, const Row& row);
// What is kept of a row that chooses, while it does.
struct Chooser {
  const Row* row;
  float* totals;        // peak (MAX_HEADS), total (MAX_HEADS)
  float* lse;           // (MAX_HEADS)
  float* block_scores;  // (blocks)
  float* edges;         // (chunks)
};
// Asks for the first coarse summaries that a lone chooser is going to read.
void begin_choice(const Step& step, const Row& row, int64_t head);
// A chunk of summaries more for the normalisers of choosers that look at it.
void normalise_chunk(const Step& step, const Chooser* choosers, int64_t count, int64_t head,
                     int64_t chunk);
// lse from totals.
void finish_normaliser(const Step& step, const Chooser& chooser);
// Scores of the chunk's 16 blocks, without what the next chunk's first summary adds, and that
// summary's counterpart: the first slot of this chunk, in edges.
void score_chunk(const Step& step, const Chooser* choosers, int64_t count, int64_t head,
                 int64_t chunk);
// Blocks of the row into list, how many. scores and edges are those of score_chunks chunks; scores
// are overwritten.
int64_t choose(const Step& step, const Row& row, float* scores, const float* edges, int32_t* list);

// attention_tree.cc -----------------------------------------------------------------------------

int64_t tree_path(const Row& row, int64_t* path);  // rows of the span, root first; how many
void store_tree_row(const Step& step, const Row& row, int64_t head);
void pool_tree_row(const Step& step, const Row& row, int64_t head);
// Summaries of the row's path that belong into slots of a chunk; `fine` says which kind.
int64_t tree_extras(const Step& step, const Row& row, int64_t head, int64_t chunk, bool fine,
                    Extra* extras);
// The block as this row sees it: what is stored of it, then the row's path.
Block tree_tail(const Step& step, const Row& row, int64_t head, int64_t block, const OwnRoom& own);

// attention_walk.cc -----------------------------------------------------------------------------

// Attends `count` rows of one sequence and one key head to entries begin .. end of each one's
// blocks.
struct Walk {
  const Row* rows;
  const Blocks* blocks;
  int64_t count, head;
  int64_t begin, end;       // whole segments
  const Softmax* segments;  // one per row, cleared by the walk; the result when `whole` is null
  const Softmax* whole;     // one per row: every segment is merged into it; null: a single segment
};
void walk(const Step& step, const Walk& work, const OwnRoom& own);

}  // namespace endside
