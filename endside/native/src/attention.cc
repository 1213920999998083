#include "attention.h"

#include <algorithm>
#include <stdexcept>

#include "attention_rooms.h"

namespace endside {

size_t attention_scratch_bytes(const CacheShape& cache, const AttentionShape& shape, int64_t rows,
                               int64_t context, int threads) {
  Rooms rooms;
  OwnRoom own;
  return cut_rooms(nullptr, Sizes(cache, shape, rows, context, threads), 0, &rooms, &own);
}

// One call, seen by one thread.
struct Attend {
  Team& team;
  const Step& step;
  const Sizes& sizes;
  const Rooms& rooms;
  OwnRoom own;
  float* out;
  int32_t* visible;

  void prepare(const Span* spans, int64_t span_count, const float* q);
  void many();
  void few();

 private:
  void place_rows(const Span* spans, int64_t span_count);
  void cut_tiles();
  void few_segments(const Wave& wave);
  void finish(const Row& row, int64_t head, const Blocks& blocks, const Softmax& state);

  Softmax part_at(int64_t pair, int64_t segment) const {
    return softmax_at(rooms.parts, step.heads, pair * sizes.segments + segment);
  }
  Blocks blocks_of(const Row& row, int64_t pair) const {
    if (!chooses(step, row)) return {nullptr, row.position / BLOCK + 1};
    return {rooms.chosen + pair * sizes.choices, rooms.chosen_count[pair]};
  }
};

void Attend::place_rows(const Span* spans, int64_t span_count) {
  int64_t index = 0;
  for (int64_t s = 0; s < span_count; ++s) {
    const Span& span = spans[s];
    for (int64_t place = 0; place < span.rows; ++place, ++index) {
      int64_t position = span.start + place;
      if (span.parents) {
        const int64_t parent = span.parents[place];
        position = parent < 0 ? span.start : rooms.row[index - place + parent].position + 1;
      }
      rooms.row[index] = {&span, place, index, position};
    }
  }
}

// Rows of each span in tiles: large ones share most, but there must be enough for the threads.
void Attend::cut_tiles() {
  int64_t size = sizes.tile, count = 0;
  while (size > 4 && sizes.rows / size * sizes.kv_heads < 4 * team.size()) size /= 2;
  for (int64_t at = 0; at < sizes.rows;) {
    const Span& span = *rooms.row[at].span;
    const int64_t rows = std::min(size, span.rows - rooms.row[at].place);
    rooms.tiles[count++] = {static_cast<int32_t>(at), static_cast<int32_t>(rows)};
    at += rows;
  }
  *rooms.tile_count = count;
}

void Attend::prepare(const Span* spans, int64_t span_count, const float* q) {
  if (team.rank() == 0) {
    place_rows(spans, span_count);
    cut_tiles();
  }
  const float factor = step.shape.scale * 1.44269504088896341f;  // log2(e)
  const int64_t in = step.heads.heads * sizes.width, out_floats = step.heads.query_floats();
  team.split(sizes.rows * sizes.kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      step.kernels->prepare_query(step.heads, q + pair * in, factor, rooms.q + pair * out_floats);
    }
  });
  team.barrier();
  const auto is_tree = [](const Span& span) { return span.parents != nullptr; };
  if (std::none_of(spans, spans + span_count, is_tree)) return;
  const auto each_tree_row = [&](auto work) {
    team.each(sizes.rows * sizes.kv_heads, [&](int64_t pair) {
      const Row& row = step.row[pair / sizes.kv_heads];
      if (is_tree(*row.span)) work(step, row, pair % sizes.kv_heads);
    });
  };
  each_tree_row(store_tree_row);
  if (sizes.sparse) each_tree_row(pool_tree_row);
}

void Attend::finish(const Row& row, int64_t head, const Blocks& blocks, const Softmax& state) {
  const int64_t first = row.index * step.shape.heads + head * step.heads.heads;
  step.kernels->finish(step.heads, state, out + first * sizes.width);
  if (!visible) return;
  // every block but the last, the row's own, is full
  visible[row.index * sizes.kv_heads + head] =
      static_cast<int32_t>((blocks.count - 1) * BLOCK + row.position % BLOCK + 1);
}

// A thread takes a tile and a key head through everything.
void Attend::many() {
  const int64_t tiles = *rooms.tile_count;
  team.each(tiles * sizes.kv_heads, [&](int64_t item) {
    // later tiles of a prompt see more: they come first
    const Tile tile = rooms.tiles[tiles - 1 - item / sizes.kv_heads];
    const int64_t head = item % sizes.kv_heads;
    const Row* rows = step.row + tile.first;
    Blocks blocks[MAX_TILE];
    choose_tile(step, sizes, own, rows, tile.count, head, blocks);
    Softmax segments[MAX_TILE], whole[MAX_TILE];
    int64_t longest = 0;
    for (int64_t i = 0; i < tile.count; ++i) {
      segments[i] = softmax_at(own.segment, step.heads, i);
      whole[i] = softmax_at(own.whole, step.heads, i);
      clear(step.heads, whole[i]);
      longest = std::max(longest, blocks[i].count);
    }
    walk(step, {rows, blocks, tile.count, head, 0, longest, segments, whole}, own);
    for (int64_t i = 0; i < tile.count; ++i) finish(rows[i], head, blocks[i], whole[i]);
  });
}

// Segments of the rows of a wave are shared out, then merged in order.
void Attend::few_segments(const Wave& wave) {
  const int64_t heads = sizes.kv_heads;
  int64_t segments = 0;
  for (int64_t pair = 0; pair < wave.count * heads; ++pair) {
    const Blocks blocks = blocks_of(step.row[wave.first + pair / heads], pair);
    segments = std::max(segments, ceil_div(blocks.count, SEGMENT));
  }
  team.each(wave.tile_count * heads * segments, [&](int64_t item) {
    const Tile tile = wave.tiles[item / (heads * segments)];
    const int64_t head = item / segments % heads, segment = item % segments;
    const Row* rows = step.row + tile.first;
    Blocks blocks[WAVE];
    Softmax parts[WAVE];
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t pair = (tile.first + i - wave.first) * heads + head;
      blocks[i] = blocks_of(rows[i], pair);
      parts[i] = part_at(pair, segment);
    }
    walk(step, {rows, blocks, tile.count, head, segment * SEGMENT, (segment + 1) * SEGMENT, parts,
                nullptr}, own);
  });
  team.each(wave.count * heads, [&](int64_t pair) {
    const Row& row = step.row[wave.first + pair / heads];
    const Blocks blocks = blocks_of(row, pair);
    const Softmax whole = softmax_at(own.whole, step.heads, 0);
    clear(step.heads, whole);
    for (int64_t segment = 0; segment * SEGMENT < blocks.count; ++segment) {
      step.kernels->merge(step.heads, whole, part_at(pair, segment));
    }
    finish(row, pair % heads, blocks, whole);
  });
}

void Attend::few() {
  for (int64_t first = 0; first < sizes.rows; first += sizes.wave) {
    Wave wave = {first, std::min(sizes.wave, sizes.rows - first), {}, 0};
    for (int64_t i = first; i < first + wave.count; ++i) {
      if (i == first || step.row[i].span != step.row[i - 1].span) {
        wave.tiles[wave.tile_count++] = {static_cast<int32_t>(i), 0};
      }
      ++wave.tiles[wave.tile_count - 1].count;
    }
    if (sizes.sparse) choose_wave(team, step, sizes, rooms, wave);
    few_segments(wave);
  }
}

// Tokens of the sequence that the rows of a span stand in, their own included.
static int64_t tokens_seen(const Span& span) {
  if (span.parents == nullptr) return span.start + span.rows;
  int64_t deepest = 0;
  for (int64_t row = 0; row < span.rows; ++row) {
    int64_t depth = 0;
    for (int64_t at = row; at >= 0; at = span.parents[at]) ++depth;
    deepest = std::max(deepest, depth);
  }
  if (deepest > MAX_DEPTH) throw std::invalid_argument("attend: a draft tree of depth above 64");
  return span.start + deepest;
}

void attend(Team& team, const Cache& cache, int64_t layer, const AttentionShape& shape,
            const Span* spans, int64_t span_count, const float* q, float* out, int32_t* visible,
            void* scratch, Isa isa) {
  int64_t rows = 0, context = 1;
  for (int64_t s = 0; s < span_count; ++s) {
    rows += spans[s].rows;
    context = std::max(context, tokens_seen(spans[s]));
  }
  if (rows == 0) return;
  const Sizes sizes(cache.shape, shape, rows, context, team.size());
  Rooms rooms;
  OwnRoom own;
  cut_rooms(static_cast<uint8_t*>(scratch), sizes, team.rank(), &rooms, &own);
  const Step step = {cache,      CacheLayout(cache.shape, isa),
                     layer,      shape,
                     sizes.heads, &attention_kernels(isa),
                     rooms.row,  rooms.q,
                     rooms.tree};
  Attend work = {team, step, sizes, rooms, own, out, visible};
  work.prepare(spans, span_count, q);
  // Enough tiles and key heads for every thread, or their parts are shared out; one tile whose heads
  // fall evenly on the threads is as well balanced, and meets at fewer barriers.
  const bool enough = *rooms.tile_count * sizes.kv_heads >= 2 * team.size() ||
                      (*rooms.tile_count == 1 && sizes.kv_heads % team.size() == 0);
  step.kernels->enter(sizes.heads);
  if (team.size() == 1 || enough) {
    work.many();
  } else {
    work.few();
  }
  step.kernels->leave();
}

}  // namespace endside
