// Whole-row selection: chunks of summaries outside, rows inside, so that a chunk is read from
// memory once for all rows that look at it. One thread does a tile, or all threads share a wave's
// chunks.
#include <algorithm>

#include "attention_rooms.h"

namespace endside {

constexpr int64_t CHUNKS_AT_ONCE = 8;  // neighbouring chunks a thread takes, at most

// A normaliser in the making: peak (MAX_HEADS), total (MAX_HEADS).
static void clear_totals(float* room) {
  for (int64_t h = 0; h < MAX_HEADS; ++h) room[h] = -__builtin_inff();
  for (int64_t h = 0; h < MAX_HEADS; ++h) room[MAX_HEADS + h] = 0;
}

void choose_tile(const Step& step, const Sizes& sizes, const OwnRoom& own, const Row* rows,
                 int64_t count, int64_t head, Blocks* blocks) {
  int64_t chooser[MAX_TILE], choosers = 0, chunks = 0, scored = 0;
  for (int64_t i = 0; i < count; ++i) {
    blocks[i] = {nullptr, rows[i].position / BLOCK + 1};
    if (!chooses(step, rows[i])) continue;
    chooser[choosers++] = i;
    chunks = std::max(chunks, normaliser_chunks(step, rows[i]));
    scored = std::max(scored, score_chunks(step, rows[i]));
    clear_totals(own.normaliser + i * 3 * MAX_HEADS);
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t c = 0; c < choosers; ++c) {
      const Row& row = rows[chooser[c]];
      if (chunk >= normaliser_chunks(step, row)) continue;
      float* room = own.normaliser + chooser[c] * 3 * MAX_HEADS;
      normalise_chunk(step, row, head, chunk, room, room + MAX_HEADS);
    }
  }
  for (int64_t c = 0; c < choosers; ++c) {
    float* room = own.normaliser + chooser[c] * 3 * MAX_HEADS;
    finish_normaliser(step, room, room + MAX_HEADS, room + 2 * MAX_HEADS);
  }
  for (int64_t chunk = 0; chunk < scored; ++chunk) {
    for (int64_t c = 0; c < choosers; ++c) {
      const int64_t i = chooser[c];
      if (chunk >= score_chunks(step, rows[i])) continue;
      score_chunk(step, rows[i], head, chunk, own.normaliser + (i * 3 + 2) * MAX_HEADS,
                  own.block_scores + i * sizes.blocks + chunk * CHUNK_BLOCKS,
                  own.edges + i * sizes.chunks + chunk);
    }
  }
  for (int64_t c = 0; c < choosers; ++c) {
    const int64_t i = chooser[c];
    int32_t* list = own.chosen + i * sizes.choices;
    blocks[i] = {list, choose(step, rows[i], own.block_scores + i * sizes.blocks,
                              own.edges + i * sizes.chunks, list)};
  }
}

// A wave's work, shared out. A pair is (row of the wave, key head).
struct WaveChoice {
  Team& team;
  const Step& step;
  const Sizes& sizes;
  const Rooms& rooms;
  const Wave& wave;

  // fn(row, pair, head, chunk) for the chunks below limit(row) of every row that chooses.
  template <class Limit, class Fn>
  void each_chunk(int64_t most, Limit limit, Fn fn) {
    const int64_t heads = sizes.kv_heads;
    const int64_t shares = ceil_div(wave.tile_count * heads * most, 4 * team.size());
    const int64_t at_once = std::min(CHUNKS_AT_ONCE, shares), groups = ceil_div(most, at_once);
    team.each(wave.tile_count * heads * groups, [&](int64_t item) {
      const Tile tile = wave.tiles[item / (heads * groups)];
      const int64_t head = item / groups % heads, begin = item % groups * at_once;
      for (int64_t chunk = begin; chunk < begin + at_once; ++chunk) {
        for (int64_t i = tile.first; i < tile.first + tile.count; ++i) {
          if (!chooses(step, step.row[i]) || chunk >= limit(step.row[i])) continue;
          fn(step.row[i], (i - wave.first) * heads + head, head, chunk);
        }
      }
    });
  }
  template <class Fn>
  void each_pair(Fn fn) {
    team.each(wave.count * sizes.kv_heads, [&](int64_t pair) {
      const Row& row = step.row[wave.first + pair / sizes.kv_heads];
      if (chooses(step, row)) fn(row, pair);
    });
  }
  float* totals(int64_t pair, int64_t chunk) const {
    return rooms.totals + (pair * sizes.chunks + chunk) * 2 * MAX_HEADS;
  }
  float* scores(int64_t pair) const { return rooms.block_scores + pair * sizes.blocks; }
  float* edges(int64_t pair) const { return rooms.edges + pair * sizes.chunks; }
  float* lse(int64_t pair) const { return rooms.lse + pair * MAX_HEADS; }

  void normalise(int64_t chunks) {
    each_chunk(chunks, [&](const Row& row) { return normaliser_chunks(step, row); },
               [&](const Row& row, int64_t pair, int64_t head, int64_t chunk) {
                 float* part = totals(pair, chunk);
                 clear_totals(part);
                 normalise_chunk(step, row, head, chunk, part, part + MAX_HEADS);
               });
    each_pair([&](const Row& row, int64_t pair) {
      float sum[2 * MAX_HEADS];
      clear_totals(sum);
      for (int64_t chunk = 0; chunk < normaliser_chunks(step, row); ++chunk) {
        const float* part = totals(pair, chunk);
        step.kernels->merge_totals(step.heads.heads, sum, sum + MAX_HEADS, part, part + MAX_HEADS);
      }
      finish_normaliser(step, sum, sum + MAX_HEADS, lse(pair));
    });
  }
  void choose_blocks(int64_t chunks) {
    each_chunk(chunks, [&](const Row& row) { return score_chunks(step, row); },
               [&](const Row& row, int64_t pair, int64_t head, int64_t chunk) {
                 score_chunk(step, row, head, chunk, lse(pair),
                             scores(pair) + chunk * CHUNK_BLOCKS, edges(pair) + chunk);
               });
    each_pair([&](const Row& row, int64_t pair) {
      rooms.chosen_count[pair] = choose(step, row, scores(pair), edges(pair),
                                        rooms.chosen + pair * sizes.choices);
    });
  }
};

void choose_wave(Team& team, const Step& step, const Sizes& sizes, const Rooms& rooms,
                 const Wave& wave) {
  int64_t chunks = 0, scored = 0;
  for (int64_t i = wave.first; i < wave.first + wave.count; ++i) {
    if (!chooses(step, step.row[i])) continue;
    chunks = std::max(chunks, normaliser_chunks(step, step.row[i]));
    scored = std::max(scored, score_chunks(step, step.row[i]));
  }
  if (scored == 0) return;
  WaveChoice choice = {team, step, sizes, rooms, wave};
  choice.normalise(chunks);
  choice.choose_blocks(scored);
}

}  // namespace endside
