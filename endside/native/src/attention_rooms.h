// Where a call of `attend` keeps what it works on: pieces of the scratch that the caller gives.
//
// Room is made for the longest sequence and all rows at once; a smaller call uses less of it, cut
// in the same order.
#pragma once

#include "attention_step.h"

namespace endside {

constexpr int64_t WAVE = 8;  // rows whose parts are shared out together, at most

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// How much room a call needs; all sizes grow with rows and context.
struct Sizes {
  int64_t rows, kv_heads, query_heads, width, threads;
  HeadShape heads;
  int64_t blocks, chunks, segments, wave, choices, tile;
  bool sparse;

  Sizes(const CacheShape& cache, const AttentionShape& shape, int64_t row_count, int64_t context,
        int team);
};

// Rows side by side of one sequence.
struct Tile { int32_t first, count; };

// What the team shares.
struct Rooms {
  Row* row;
  Tile* tiles;
  int64_t* tile_count;
  float* q;
  TreeRoom tree;
  // for each row of a wave, and key head:
  float* parts;         // (segments) running softmaxes
  float* totals;        // (chunks, 2, MAX_HEADS): peak, total of each chunk
  float* lse;           // (MAX_HEADS)
  float* block_scores;  // (blocks)
  float* edges;         // (chunks)
  int32_t* chosen;      // (choices)
  int64_t* chosen_count;
};

// The rooms of a call and of one of its threads; without a base their bytes are only counted.
size_t cut_rooms(uint8_t* base, const Sizes& sizes, int64_t rank, Rooms* rooms, OwnRoom* own);

// Whole-row selection (infllmv2 §3 to §5) over select.cc's chunks.
// Blocks of each row of a tile, by one thread.
void choose_tile(const Step& step, const Sizes& sizes, const OwnRoom& own, const Row* rows,
                 int64_t count, int64_t head, Blocks* blocks);
// Blocks of the rows of a wave, by all threads, in rooms.chosen. Ends in a barrier.
struct Wave {
  int64_t first, count;  // rows of the call
  Tile tiles[WAVE];
  int64_t tile_count;
};
void choose_wave(Team& team, const Step& step, const Sizes& sizes, const Rooms& rooms,
                 const Wave& wave);

}  // namespace endside
