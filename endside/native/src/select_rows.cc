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
  Chooser choosers[MAX_TILE];
  int64_t choosing = 0, chunks = 0, scored = 0;
  for (int64_t i = 0; i < count; ++i) {
    blocks[i] = {nullptr, rows[i].position / BLOCK + 1};
    if (!chooses(step, rows[i])) continue;
    chunks = std::max(chunks, normaliser_chunks(step, rows[i]));
    scored = std::max(scored, score_chunks(step, rows[i]));
    float* room = own.normaliser + i * 3 * MAX_HEADS;
    clear_totals(room);
    choosers[choosing++] = {rows + i, room, room + 2 * MAX_HEADS,
                            own.block_scores + i * sizes.blocks, own.edges + i * sizes.chunks};
  }
  if (choosing == 1) begin_choice(step, *choosers[0].row, head);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    normalise_chunk(step, choosers, choosing, head, chunk);
  }
  for (int64_t c = 0; c < choosing; ++c) finish_normaliser(step, choosers[c]);
  for (int64_t chunk = 0; chunk < scored; ++chunk) {
    score_chunk(step, choosers, choosing, head, chunk);
  }
  for (int64_t c = 0; c < choosing; ++c) {
    const Chooser& chooser = choosers[c];
    const int64_t i = chooser.row - rows;
    int32_t* list = own.chosen + i * sizes.choices;
    blocks[i] = {list, choose(step, *chooser.row, chooser.block_scores, chooser.edges, list)};
  }
}

// A wave's work, shared out. A pair is (row of the wave, key head).
struct WaveChoice {
  Team& team;
  const Step& step;
  const Sizes& sizes;
  const Rooms& rooms;
  const Wave& wave;

  // fn(choosers, how many, head, chunk) for the rows of each tile of the wave that choose.
  template <class Fn>
  void each_chunk(int64_t most, Fn fn) {
    const int64_t heads = sizes.kv_heads;
    const int64_t shares = ceil_div(wave.tile_count * heads * most, 4 * team.size());
    const int64_t at_once = std::min(CHUNKS_AT_ONCE, shares), groups = ceil_div(most, at_once);
    team.each(wave.tile_count * heads * groups, [&](int64_t item) {
      const Tile tile = wave.tiles[item / (heads * groups)];
      const int64_t head = item / groups % heads, begin = item % groups * at_once;
      for (int64_t chunk = begin; chunk < std::min(begin + at_once, most); ++chunk) {
        Chooser choosers[WAVE];
        int64_t count = 0;
        for (int64_t i = tile.first; i < tile.first + tile.count; ++i) {
          if (!chooses(step, step.row[i])) continue;
          choosers[count++] = chooser(step.row[i], (i - wave.first) * heads + head, chunk);
        }
        fn(choosers, count, head, chunk);
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
  // Every chunk has totals of its own, which are merged in order.
  float* totals(int64_t pair, int64_t chunk) const {
    return rooms.totals + (pair * sizes.chunks + chunk) * 2 * MAX_HEADS;
  }
  Chooser chooser(const Row& row, int64_t pair, int64_t chunk) const {
    return {&row, totals(pair, chunk), rooms.lse + pair * MAX_HEADS,
            rooms.block_scores + pair * sizes.blocks, rooms.edges + pair * sizes.chunks};
  }

  void normalise(int64_t chunks) {
    each_chunk(chunks, [&](Chooser* choosers, int64_t count, int64_t head, int64_t chunk) {
      for (int64_t i = 0; i < count; ++i) clear_totals(choosers[i].totals);
      normalise_chunk(step, choosers, count, head, chunk);
    });
    each_pair([&](const Row& row, int64_t pair) {
      float sum[2 * MAX_HEADS];
      clear_totals(sum);
      for (int64_t chunk = 0; chunk < normaliser_chunks(step, row); ++chunk) {
        const float* part = totals(pair, chunk);
        step.kernels->merge_totals(step.heads.heads, sum, sum + MAX_HEADS, part, part + MAX_HEADS);
      }
      Chooser whole = chooser(row, pair, 0);
      whole.totals = sum;
      finish_normaliser(step, whole);
    });
  }
  void choose_blocks(int64_t chunks) {
    each_chunk(chunks, [&](const Chooser* choosers, int64_t count, int64_t head, int64_t chunk) {
      score_chunk(step, choosers, count, head, chunk);
    });
    each_pair([&](const Row& row, int64_t pair) {
      const Chooser own = chooser(row, pair, 0);
      rooms.chosen_count[pair] = choose(step, row, own.block_scores, own.edges,
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
