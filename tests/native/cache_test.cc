// Where the parts of chunks lie: beside each other, nowhere twice, and those of one chunk together
// are all that it consists of.
#include <algorithm>

#include "cache_layout.h"
#include "check.h"

using check::Fenced;
using endside::Cache;
using endside::CacheLayout;
using endside::CacheShape;
using endside::CacheType;
using endside::Order;
using endside::Pieces;
using endside::RUN;

namespace {

constexpr int64_t CHUNKS = 2 * RUN + 3;  // the last run is a short one

template <class F>
void each_piece(const Cache& cache, int32_t chunk, F visit) {
  for (const Pieces& kind : endside::pieces_of(cache, chunk)) {
    for (size_t i = 0; i < kind.count; ++i) visit(kind.data + i * kind.stride, kind.bytes);
  }
}

struct Case {
  CacheShape shape;
  Fenced<uint8_t> memory;
  Cache cache;

  Case(CacheType type, bool summaries)
      : shape{3, 2, 24, type, summaries},
        memory(endside::cache_bytes(shape, CHUNKS)),
        cache{shape, CHUNKS, memory.data()} {
    std::fill(memory.begin(), memory.end(), uint8_t{255});
  }
};

void check_case(CacheType type, bool summaries) {
  Case c(type, summaries);
  for (int32_t chunk = 0; chunk < CHUNKS; ++chunk) {
    each_piece(c.cache, chunk, [&](uint8_t* piece, size_t bytes) {
      CHECK(piece >= c.memory.begin() && piece + bytes <= c.memory.end(), "outside", chunk);
      CHECK(std::all_of(piece, piece + bytes, [](uint8_t x) { return x == 255; }), "twice", chunk);
      std::fill(piece, piece + bytes, static_cast<uint8_t>(chunk));
    });
  }
  // nothing is left but what vectors may read past the end
  const int64_t left = std::count(c.memory.begin(), c.memory.end(), uint8_t{255});
  CHECK(left == 64, "bytes of no chunk", left);
  const CacheLayout layout(c.shape, Order::rows);
  for (int32_t chunk = 0; chunk < CHUNKS; ++chunk) {
    for (int64_t layer = 0; layer < c.shape.layers; ++layer) {
      for (int64_t head = 0; head < c.shape.kv_heads; ++head) {
        const auto owned = [&](const uint8_t* part, size_t bytes) {
          return std::all_of(part, part + bytes, [&](uint8_t x) { return x == chunk; });
        };
        CHECK(owned(endside::head_part(c.cache, layout, layer, head, chunk), layout.head_bytes));
        for (const bool fine : {false, true}) {
          CHECK(owned(endside::summaries_of(c.cache, layout, layer, head, chunk, fine),
                      fine ? layout.fine_bytes : layout.coarse_bytes), "chunk", chunk, fine);
        }
      }
    }
  }
  // into a run of another length
  endside::copy_chunk(c.cache, 5, CHUNKS - 1);
  const int64_t fives = std::count(c.memory.begin(), c.memory.end(), uint8_t{5});
  const int64_t others = std::count(c.memory.begin(), c.memory.end(), uint8_t{6});
  CHECK(fives == 2 * others, "copied", fives, "of", others);
  CHECK(std::count(c.memory.begin(), c.memory.end(), uint8_t{CHUNKS - 1}) == 0, "not copied whole");
  CHECK(c.memory.intact());
}

}  // namespace

TEST(cache_pieces) {
  for (CacheType type : {CacheType::f16, CacheType::bf16, CacheType::int8}) {
    for (bool summaries : {false, true}) check_case(type, summaries);
  }
}

// A decode step reads all summaries of a layer and head: of chunks with ascending numbers in order.
TEST(cache_summaries_are_streams) {
  const Case c(CacheType::bf16, true);
  const CacheLayout layout(c.shape, Order::rows);
  for (int32_t chunk = 0; chunk + 1 < CHUNKS; ++chunk) {
    if ((chunk + 1) % RUN == 0) continue;
    for (const bool fine : {false, true}) {
      const uint8_t* own = endside::summaries_of(c.cache, layout, 1, 1, chunk, fine);
      const uint8_t* next = endside::summaries_of(c.cache, layout, 1, 1, chunk + 1, fine);
      const size_t bytes = fine ? layout.fine_bytes : layout.coarse_bytes;
      CHECK(own + bytes == next, "chunk", chunk, fine);
    }
  }
}
