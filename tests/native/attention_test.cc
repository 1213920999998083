// Attention over the cache, in every instruction set: against double precision where every key is
// seen, against the portable set where blocks are chosen; and exactly against itself, whatever
// shares the work, whoever the neighbours are, tree or no tree. Memory lies inside fences.
#include "attention.h"

#include <memory>

#include "check.h"

using check::Fenced;
using endside::AttentionShape;
using endside::CacheType;
using endside::Isa;

namespace {

// A number that f16 and bf16 hold exactly.
float short_number(check::Noise& noise) { return static_cast<float>(noise.below(255) - 127) / 64; }

// One sequence of `tokens` in a cache of its own: chunks in another order than tokens.
struct Sequence {
  endside::CacheShape shape;
  AttentionShape attention;
  int64_t tokens;
  std::vector<float> keys, values, queries;  // (S, G, D), (S, G, D), (S, H, D)
  std::vector<int32_t> chunks;
  std::unique_ptr<Fenced<uint8_t>> memory;
  endside::Cache cache;

  Sequence(CacheType type, int64_t kv_heads, int64_t heads, int64_t head_dim, int64_t count)
      : tokens(count) {
    check::Noise noise(static_cast<uint64_t>(count));
    shape = {2, kv_heads, head_dim, type, false};
    attention.heads = heads;
    attention.scale = 1 / std::sqrt(static_cast<float>(head_dim));
    for (int64_t i = 0; i < tokens * kv_heads * head_dim; ++i) {
      keys.push_back(short_number(noise));
      values.push_back(short_number(noise));
    }
    for (int64_t i = 0; i < tokens * heads * head_dim; ++i) queries.push_back(2 * noise());
    for (int64_t c = (tokens + 100) / endside::CHUNK; c >= 0; --c) {
      chunks.push_back(static_cast<int32_t>(c));
    }
  }

  void sparse() {
    shape.summaries = true;
    attention.sparse.on = true;
    attention.sparse.window_blocks = 2;
    attention.sparse.topk = 5;
    attention.sparse.dense_len = 300;
  }

  void store(Isa isa, int64_t count) {
    const int64_t pool = static_cast<int64_t>(chunks.size());
    memory = std::make_unique<Fenced<uint8_t>>(endside::cache_bytes(shape, pool));
    std::memset(memory->data(), 0, memory->size());
    cache = {shape, pool, memory->data()};
    for (int64_t t = 0; t < count; ++t) append(isa, t, t);
  }

  // Token `source` at `position`.
  void append(Isa isa, int64_t source, int64_t position) {
    const int64_t at = source * shape.kv_heads * shape.head_dim;
    endside::append(cache, 1, {chunks.data()}, position, &keys[at], &values[at], 0,
                    shape.kv_heads, isa);
  }

  struct Result {
    std::vector<float> out;        // (rows, H, D)
    std::vector<int32_t> visible;  // (rows, G)
  };

  // Rows first .. first + count of the stored sequence, or the tree with those rows' tokens.
  Result attend(Isa isa, int threads, int64_t first, int64_t count,
                const int32_t* parents = nullptr, int64_t tree_start = 0) {
    const int64_t row = attention.heads * shape.head_dim;
    const int64_t cell = shape.kv_heads * shape.head_dim;
    Fenced<float> q(count * row), out(count * row);
    Fenced<int32_t> visible(count * shape.kv_heads);
    std::memcpy(q.data(), &queries[first * row], count * row * sizeof(float));
    endside::Span span;
    span.table = {chunks.data()};
    span.start = parents ? tree_start : first;
    span.rows = count;
    span.parents = parents;
    span.tree_keys = parents ? &keys[first * cell] : nullptr;
    span.tree_values = parents ? &values[first * cell] : nullptr;
    Fenced<uint8_t> scratch(
        endside::attention_scratch_bytes(shape, attention, count, tokens, threads));
    endside::Pool pool(threads);
    pool.run([&](endside::Team& team) {
      endside::attend(team, cache, 1, attention, &span, 1, q.data(), out.data(), visible.data(),
                      scratch.data(), isa);
    });
    CHECK(q.intact() && out.intact() && visible.intact() && scratch.intact() && memory->intact());
    return {{out.begin(), out.end()}, {visible.begin(), visible.end()}};
  }

  // How far tiles may be off (attention_tiles.h): 2^-17 of each product in a score and of each
  // weight, which the quotient of two sums counts twice. Without second terms it were 2^-9.
  double tile_bound(int64_t position) const {
    const int64_t D = shape.head_dim, G = shape.kv_heads, H = attention.heads;
    double most = 0, value = 0;
    for (int64_t h = 0; h < H; ++h) {
      for (int64_t t = 0; t <= position; ++t) {
        double score = 0;
        for (int64_t d = 0; d < D; ++d) {
          const int64_t at = (t * G + h / (H / G)) * D + d;
          const double q = queries[(position * H + h) * D + d];
          score += std::fabs(q * keys[at]) * attention.scale;
          value = std::max(value, static_cast<double>(std::fabs(values[at])));
        }
        most = std::max(most, score);
      }
    }
    return 2 * (most + 1) * value * std::ldexp(1.0, -17);
  }

  // out[h, d] of the row at `position`, in double precision over all keys up to it.
  std::vector<double> truth(int64_t position) const {
    const int64_t D = shape.head_dim, G = shape.kv_heads, H = attention.heads;
    std::vector<double> out;
    for (int64_t h = 0; h < H; ++h) {
      const int64_t g = h / (H / G);
      std::vector<double> weight, sum(D, 0.0);
      double total = 0;
      for (int64_t t = 0; t <= position; ++t) {
        double score = 0;
        for (int64_t d = 0; d < D; ++d) {
          score += static_cast<double>(queries[(position * H + h) * D + d]) *
                   keys[(t * G + g) * D + d];
        }
        weight.push_back(std::exp(score * attention.scale));
        total += weight.back();
        for (int64_t d = 0; d < D; ++d) sum[d] += weight.back() * values[(t * G + g) * D + d];
      }
      for (double value : sum) out.push_back(value / total);
    }
    return out;
  }
};

}  // namespace

TEST_EACH_ISA(attention_dense) {
  for (CacheType type : {CacheType::f16, CacheType::bf16, CacheType::int8}) {
    for (const auto& [heads, head_dim] : {std::pair<int64_t, int64_t>{2, 8}, {10, 24}, {6, 64}}) {
      Sequence s(type, 2, heads, head_dim, 1090);
      s.store(isa, s.tokens);
      for (int64_t position : {0, 1, 62, 63, 64, 65, 128, 1023, 1024, 1089}) {
        const Sequence::Result got = s.attend(isa, 1, position, 1);
        const std::vector<double> want = s.truth(position);
        const double bound =
            type == CacheType::int8 ? 0.05 : isa == Isa::amx ? s.tile_bound(position) : 1e-5;
        for (std::size_t i = 0; i < want.size(); ++i) {
          CHECK_NEAR(got.out[i], want[i], bound, "type", static_cast<int>(type), "D", head_dim,
                     "position", position, "entry", i);
        }
        for (int32_t keys : got.visible) CHECK(keys == position + 1);
      }
    }
  }
}

// Rows together, alone, with other neighbours, by more threads: the same bits.
static void check_sharing(Sequence& s, Isa isa) {
  s.store(isa, s.tokens);
  const int64_t first = s.tokens - 70, row = s.attention.heads * s.shape.head_dim;
  const Sequence::Result all = s.attend(isa, 1, first, 70);
  for (int threads : {2, 3}) {
    const Sequence::Result more = s.attend(isa, threads, first, 70);
    CHECK(more.out == all.out && more.visible == all.visible, "threads", threads);
  }
  for (const auto& [begin, count] : {std::pair<int64_t, int64_t>{0, 1}, {3, 2}, {9, 17}, {69, 1}}) {
    const Sequence::Result part = s.attend(isa, 2, first + begin, count);
    const float* const want = &all.out[begin * row];
    CHECK(std::equal(part.out.begin(), part.out.end(), want), "rows", count, "from", begin);
  }
}

TEST_EACH_ISA(attention_sharing_dense) {
  Sequence s(CacheType::f16, 2, 6, 40, 1090);
  check_sharing(s, isa);
}

// Widths of whole tiles too: there bf16 cells lie in another order where tiles multiply.
TEST_EACH_ISA(attention_sharing_sparse) {
  for (int64_t head_dim : {40, 64}) {
    Sequence s(CacheType::bf16, 2, 6, head_dim, 2100);
    s.sparse();
    check_sharing(s, isa);
  }
}

// Blocks are chosen: another set chooses the same ones, and most keys stay unseen.
TEST_EACH_ISA(attention_sparse) {
  for (CacheType type : {CacheType::f16, CacheType::bf16, CacheType::int8}) {
    for (bool selection_41 : {true, false}) {
      Sequence s(type, 2, 6, type == CacheType::bf16 ? 64 : 40, 2100);
      s.sparse();
      s.attention.sparse.selection_41 = selection_41;
      s.attention.sparse.coarse_lse = selection_41;
      const int64_t first = 2040, count = 60;
      s.store(isa, s.tokens);
      const Sequence::Result got = s.attend(isa, 1, first, count);
      s.store(Isa::portable, s.tokens);
      const Sequence::Result want = s.attend(Isa::portable, 1, first, count);
      CHECK(got.visible == want.visible);
      double seen = 0;
      for (int32_t keys : got.visible) seen += keys;
      const double share = seen / static_cast<double>(got.visible.size()) / first;
      CHECK(share < 0.5 && share > 0.05, share);
      for (std::size_t i = 0; i < got.out.size(); ++i) CHECK_NEAR(got.out[i], want.out[i], 2e-5, i);
    }
  }
}

// A draft tree, then plain decoding along each of its root paths: the same bits.
static void check_tree(Sequence& s, Isa isa) {
  constexpr int64_t COUNT = 7;
  const int32_t parents[COUNT] = {-1, 0, 0, 1, 3, 2, -1};
  const int64_t start = s.tokens - COUNT, row = s.attention.heads * s.shape.head_dim;
  s.store(isa, start);
  const Sequence::Result tree = s.attend(isa, 2, start, COUNT, parents, start);
  for (int32_t leaf = 0; leaf < COUNT; ++leaf) {
    std::vector<int32_t> path;
    for (int32_t node = leaf; node >= 0; node = parents[node]) path.insert(path.begin(), node);
    Sequence plain = Sequence(s.shape.type, s.shape.kv_heads, s.attention.heads,
                              s.shape.head_dim, s.tokens);
    plain.attention = s.attention;
    plain.shape = s.shape;
    plain.store(isa, start);
    const int64_t end = start + static_cast<int64_t>(path.size()) - 1;
    for (std::size_t i = 0; i < path.size(); ++i) plain.append(isa, start + path[i], start + i);
    std::copy_n(&s.queries[(start + leaf) * row], row, &plain.queries[end * row]);
    const Sequence::Result alone = plain.attend(isa, 1, end, 1);
    CHECK(std::equal(alone.out.begin(), alone.out.end(), &tree.out[leaf * row]), "leaf", leaf);
    CHECK(alone.visible[0] == tree.visible[leaf * s.shape.kv_heads], "leaf", leaf);
  }
}

TEST_EACH_ISA(attention_tree) {
  for (const auto& [type, head_dim] : {std::pair<CacheType, int64_t>{CacheType::f16, 40},
                                       {CacheType::int8, 40}, {CacheType::bf16, 32}}) {
    Sequence dense(type, 2, 6, head_dim, 1030);
    check_tree(dense, isa);
    Sequence sparse(type, 2, 6, head_dim, 1155);  // windows end inside the tree
    sparse.sparse();
    check_tree(sparse, isa);
  }
}

// A tree of more rows than the context has positions left, and no more room than the context needs.
TEST_EACH_ISA(attention_wide_tree_at_the_end) {
  constexpr int64_t COUNT = 7;
  const int32_t parents[COUNT] = {-1, -1, 0, -1, 2, -1, -1};
  Sequence s(CacheType::f16, 2, 6, 40, 1024);
  s.sparse();
  s.store(isa, 1020);
  const Sequence::Result one = s.attend(isa, 1, 1010, COUNT, parents, 1020);
  const Sequence::Result more = s.attend(isa, 3, 1010, COUNT, parents, 1020);
  CHECK(one.out == more.out && one.visible == more.visible);
}

// A path of more rows than a tree may have is refused before anything is read.
TEST(attention_refuses_deep_trees) {
  constexpr int64_t COUNT = 65;
  int32_t parents[COUNT];
  for (int32_t row = 0; row < COUNT; ++row) parents[row] = row - 1;
  Sequence s(CacheType::f16, 2, 6, 40, 200);
  s.store(Isa::portable, 100);
  s.attend(Isa::portable, 2, 100, COUNT - 1, parents, 100);
  CHECK_THROWS(std::invalid_argument, s.attend(Isa::portable, 2, 100, COUNT, parents, 100));
}

// Sets that fuse multiplication and addition agree in every bit, whatever their width.
TEST(attention_widths_agree) {
  std::vector<Isa> fused;
  for (Isa isa : check::tested_isas()) {
    // portable rounds twice, tiles sum in another order
    if (isa != Isa::portable && isa != Isa::amx) fused.push_back(isa);
  }
  for (bool sparse : {false, true}) {
    Sequence s(CacheType::f16, 2, 6, 40, 1500);
    if (sparse) s.sparse();
    Sequence::Result first;
    for (Isa isa : fused) {
      s.store(isa, s.tokens);
      const Sequence::Result got = s.attend(isa, 1, 1440, 60);
      if (isa == fused.front()) first = got;
      CHECK(got.out == first.out && got.visible == first.visible, endside::isa_name(isa));
    }
  }
}
