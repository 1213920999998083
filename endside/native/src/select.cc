// Which blocks a row attends to: coarse or fine summaries give each head's normaliser, fine ones
// the scores of blocks, and the best blocks fill the budget. Sections are those of infllmv2; the
// truth is ops/infllm/reference.py.
//
// Slot s of the fine summaries ends with token 16 s + 15, slot s of the coarse ones with 64 s + 63;
// slot 0 is empty. So a row at position p sees slots 1 .. (p + 1) / 16 - 1, and block B is touched
// by slots 4 B .. 4 B + 4, the last of which may lie in the next chunk.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention_rooms.h"

namespace endside {

// Chunks: memory is asked for them meanwhile. As many bytes of both kinds, because behind the last
// coarse summaries come the first fine ones.
constexpr int64_t KINDS = FINE_SLOTS / COARSE_SLOTS;
constexpr int64_t FINE_AHEAD = 4, COARSE_AHEAD = FINE_AHEAD * KINDS;

static int64_t local_blocks(const SparseShape& sparse) {
  return sparse.window_blocks + (sparse.selection_41 ? 1 : 0);
}

static int64_t free_blocks(const SparseShape& sparse) {
  return sparse.topk + sparse.window_blocks - sparse.init_blocks - local_blocks(sparse);
}

static int64_t first_local(const Row& row, const SparseShape& sparse) {
  const int64_t first = row.position / BLOCK - local_blocks(sparse) + 1;
  return first > 0 ? first : 0;
}


bool chooses(const Step& step, const Row& row) {
  const SparseShape& sparse = step.shape.sparse;
  if (!sparse.on || row.position + 1 < sparse.dense_len) return false;
  return first_local(row, sparse) - sparse.init_blocks > free_blocks(sparse);
}

int64_t normaliser_chunks(const Step& step, const Row& row) {
  const bool coarse = step.shape.sparse.coarse_lse;
  const int64_t slots = (row.position + 1) / (coarse ? COARSE_STRIDE : FINE_STRIDE);
  return ceil_div(slots, coarse ? COARSE_SLOTS : FINE_SLOTS);
}

int64_t score_chunks(const Step& step, const Row& row) {
  return first_local(row, step.shape.sparse) / CHUNK_BLOCKS + 1;
}

// Part of the first fine summaries, as large as the coarse ones of a chunk, or null behind the end.
static const uint8_t* fine_start(const Step& step, const Row& row, int64_t head, int64_t part) {
  const int64_t chunk = part / KINDS;
  if (chunk > row.position / CHUNK) return nullptr;
  return step.summaries(row, head, chunk, true) +
         static_cast<size_t>(part % KINDS) * step.layout.coarse_bytes;
}

void begin_choice(const Step& step, const Row& row, int64_t head) {
  if (!step.shape.sparse.coarse_lse) return;
  const int64_t chunks = std::min(COARSE_AHEAD, normaliser_chunks(step, row));
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    ask(step.summaries(row, head, chunk, false), step.layout.coarse_bytes);
  }
}

// The choosers of a chunk with views of it: each alone if it has extras of its own there, the others
// together.
template <class Kernel>
static void look(const Step& step, Kernel kernel, bool fine, int64_t head, int64_t chunk,
                 View* views, const Row* const* rows, int64_t count) {
  const int64_t slot_count = fine ? FINE_SLOTS : COARSE_SLOTS;
  const int64_t stride = fine ? FINE_STRIDE : COARSE_STRIDE;
  const Row& any = *rows[0];
  const int64_t last = any.position / CHUNK, later = chunk + (fine ? FINE_AHEAD : COARSE_AHEAD);
  const auto data = [&](int64_t at) {
    return at > last ? nullptr : step.summaries(any, head, at, fine);
  };
  const uint8_t* const ahead = later > last && !fine
                                   ? fine_start(step, any, head, later - last - 1)
                                   : data(later);
  const Slots slots = {step.layout.summary_cell, step.layout.order, data(chunk), data(chunk + 1),
                       ahead, slot_count};
  View shared[MAX_TILE];
  int64_t sharing = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Row& row = *rows[i];
    View& view = views[i];
    const int64_t seen = (row.position + 1) / stride - chunk * slot_count;
    view.q = step.query(row, head);
    view.begin = chunk == 0 ? 1 : 0;
    view.end = seen < 0 ? 0 : seen < slot_count ? seen : slot_count;
    Extra extras[MAX_DEPTH];
    view.extras = extras;
    view.extra_count =
        row.span->parents ? tree_extras(step, row, head, chunk, fine, extras) : 0;
    if (view.extra_count > 0) {
      kernel(step.heads, slots, &view, 1);
    } else {
      shared[sharing++] = view;
    }
  }
  if (sharing > 0) kernel(step.heads, slots, shared, sharing);
}

void normalise_chunk(const Step& step, const Chooser* choosers, int64_t count, int64_t head,
                     int64_t chunk) {
  View views[MAX_TILE];
  const Row* rows[MAX_TILE];
  int64_t looking = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (chunk >= normaliser_chunks(step, *choosers[i].row)) continue;
    views[looking].totals = choosers[i].totals;
    rows[looking++] = choosers[i].row;
  }
  if (looking == 0) return;
  look(step, step.kernels->normalise, !step.shape.sparse.coarse_lse, head, chunk, views, rows,
       looking);
}

void finish_normaliser(const Step& step, const Chooser& chooser) {
  const float *peak = chooser.totals, *total = chooser.totals + MAX_HEADS;
  for (int64_t head = 0; head < step.heads.heads; ++head) {
    // a row that sees no summary has no normaliser: it scores 0 everywhere
    chooser.lse[head] = total[head] > 0 ? peak[head] + std::log2(total[head])
                                        : std::numeric_limits<float>::infinity();
  }
}

// Scores (64) of a chunk's slots -> scores of its blocks.
static void pool_slots(const float* scores, float* block_scores) {
  constexpr int64_t per_block = BLOCK / FINE_STRIDE;
  for (int64_t block = 0; block < CHUNK_BLOCKS; ++block) {
    const float* s = scores + block * per_block;
    const float low = s[0] > s[1] ? s[0] : s[1], high = s[2] > s[3] ? s[2] : s[3];
    block_scores[block] = low > high ? low : high;
  }
  for (int64_t block = 0; block + 1 < CHUNK_BLOCKS; ++block) {
    const float next = scores[(block + 1) * per_block];
    if (next > block_scores[block]) block_scores[block] = next;
  }
}

void score_chunk(const Step& step, const Chooser* choosers, int64_t count, int64_t head,
                 int64_t chunk) {
  View views[MAX_TILE];
  const Row* rows[MAX_TILE];
  const Chooser* looker[MAX_TILE];
  alignas(64) float scores[MAX_TILE][FINE_SLOTS];
  int64_t looking = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (chunk >= score_chunks(step, *choosers[i].row)) continue;
    views[looking].lse = choosers[i].lse;
    views[looking].scores = scores[looking];
    rows[looking] = choosers[i].row;
    looker[looking++] = choosers + i;
  }
  if (looking == 0) return;
  look(step, step.kernels->score, true, head, chunk, views, rows, looking);
  for (int64_t i = 0; i < looking; ++i) {
    pool_slots(scores[i], looker[i]->block_scores + chunk * CHUNK_BLOCKS);
    looker[i]->edges[chunk] = scores[i][0];
  }
}

static float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The largest limit that at least `wanted` of the scores reach. Scores that count are not negative,
// so they are ordered as their bits are.
static uint32_t threshold(const Step& step, const float* scores, int64_t count, int64_t wanted) {
  uint32_t low = 0, high = 0x7f800001u;  // no score is above infinity
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    const int64_t found = step.kernels->count_at_least(scores, count, from_bits(middle));
    if (found == wanted) return middle;
    (found > wanted ? low : high) = middle;
  }
  return low;
}

int64_t choose(const Step& step, const Row& row, float* scores, const float* edges,
               int32_t* list) {
  const SparseShape& sparse = step.shape.sparse;
  const int64_t local = first_local(row, sparse), wanted = free_blocks(sparse);
  const int64_t count = ceil_div(local, 16) * 16;
  for (int64_t chunk = 1; chunk < score_chunks(step, row); ++chunk) {
    float& last = scores[chunk * CHUNK_BLOCKS - 1];
    if (edges[chunk] > last) last = edges[chunk];
  }
  for (int64_t block = 0; block < sparse.init_blocks; ++block) scores[block] = -1.0f;
  for (int64_t block = local; block < count; ++block) scores[block] = -1.0f;
  const uint32_t bits = threshold(step, scores, count, wanted);
  const float limit = from_bits(bits);
  // equal scores: the lower block first
  int64_t equals = wanted - step.kernels->count_at_least(scores, count, from_bits(bits + 1));
  int64_t found = 0;
  const auto take = [&](int64_t block) { list[found++] = static_cast<int32_t>(block); };
  for (int64_t block = 0; block < sparse.init_blocks; ++block) take(block);
  for (int64_t block = sparse.init_blocks; block < local; ++block) {
    if (scores[block] < limit || (scores[block] == limit && equals-- <= 0)) continue;
    take(block);
  }
  for (int64_t block = local; block <= row.position / BLOCK; ++block) take(block);
  return found;
}

}  // namespace endside
