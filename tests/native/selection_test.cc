// Which blocks sparse attention reads, against a second implementation in double precision that takes
// the formulas of infllmv2 §2 to §5 literally: pool every window, score every summary, sort all blocks.
// Outputs tell which blocks were read, so a wrong choice shows as a large error.
#include <algorithm>
#include <memory>

#include "attention.h"
#include "check.h"

using check::Fenced;
using endside::Isa;
using endside::SparseShape;

namespace {

constexpr int64_t H = 6, G = 2, D = 24, I = H / G;

// Numbers that f16 holds; keys drift slowly, so that some blocks fit a query better than others.
struct Text {
  int64_t tokens;
  std::vector<float> keys, values, queries;

  explicit Text(int64_t count) : tokens(count) {
    check::Noise noise(41);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < G * D; ++i) {
        const double drift = 1.5 * std::sin(0.0003 * static_cast<double>(t * (i + 1)));
        keys.push_back(static_cast<float>(std::lround((noise() + drift) * 64)) / 64);
        values.push_back(static_cast<float>(noise.below(255) - 127) / 64);
      }
      for (int64_t i = 0; i < H * D; ++i) queries.push_back(3 * noise());
    }
  }
  const float* key(int64_t t, int64_t g) const { return &keys[(t * G + g) * D]; }
  const float* query(int64_t t, int64_t h) const { return &queries[(t * H + h) * D]; }
};

double dot(const float* q, const std::vector<double>& k) {
  double sum = 0;
  for (int64_t d = 0; d < D; ++d) sum += q[d] * k[d];
  return sum / std::sqrt(static_cast<double>(D));
}

// Means of `size` keys every `stride` among the first `length`.
std::vector<std::vector<double>> pool(const Text& text, int64_t g, int64_t length, int64_t size,
                                      int64_t stride) {
  std::vector<std::vector<double>> means;
  for (int64_t begin = 0; begin + size <= length; begin += stride) {
    std::vector<double> mean(D, 0.0);
    for (int64_t t = begin; t < begin + size; ++t) {
      for (int64_t d = 0; d < D; ++d) mean[d] += text.key(t, g)[d] / static_cast<double>(size);
    }
    means.push_back(mean);
  }
  return means;
}

// Scores of all blocks up to the row's own.
std::vector<double> block_scores(const Text& text, const SparseShape& sparse, int64_t position,
                                 int64_t g) {
  const auto fine = pool(text, g, position + 1, 32, 16);
  const auto coarse = pool(text, g, position + 1, 128, 64);
  std::vector<double> scores(fine.size(), 0.0);
  for (int64_t h = g * I; h < (g + 1) * I; ++h) {
    double total = 0;
    for (const auto& k : sparse.coarse_lse ? coarse : fine) {
      total += std::exp(dot(text.query(position, h), k));
    }
    for (std::size_t j = 0; j < fine.size(); ++j) {
      if (total > 0) scores[j] += std::exp(dot(text.query(position, h), fine[j])) / total;
    }
  }
  std::vector<double> blocks(position / 64 + 1, 0.0);
  for (int64_t b = 0; b <= position / 64; ++b) {
    for (int64_t j = std::max<int64_t>(4 * b - 1, 0); j < 4 * b + 4; ++j) {
      if (j < static_cast<int64_t>(scores.size())) blocks[b] = std::max(blocks[b], scores[j]);
    }
  }
  return blocks;
}

struct Choice {
  std::vector<bool> taken;
  double margin;  // between the last block taken and the first left out, relative
};

Choice choose(const Text& text, const SparseShape& sparse, int64_t position, int64_t g) {
  const int64_t own = position / 64;
  Choice choice = {std::vector<bool>(own + 1, true), 1};
  if (position + 1 < sparse.dense_len) return choice;
  const std::vector<double> scores = block_scores(text, sparse, position, g);
  std::vector<std::pair<double, int64_t>> ranked;
  const int64_t first_local = own - sparse.window_blocks + (sparse.selection_41 ? 0 : 1);
  for (int64_t b = sparse.init_blocks; b < first_local; ++b) ranked.push_back({-scores[b], b});
  std::sort(ranked.begin(), ranked.end());
  const int64_t free = sparse.topk - sparse.init_blocks - (sparse.selection_41 ? 1 : 0);
  for (int64_t i = free; i < static_cast<int64_t>(ranked.size()); ++i) {
    choice.taken[ranked[i].second] = false;
  }
  if (free < static_cast<int64_t>(ranked.size())) {
    choice.margin = 1 - ranked[free].first / ranked[free - 1].first;
  }
  return choice;
}

std::vector<double> attend(const Text& text, const std::vector<bool>& taken, int64_t position,
                           int64_t h) {
  std::vector<double> sum(D, 0.0);
  double total = 0;
  for (int64_t t = 0; t <= position; ++t) {
    if (!taken[t / 64]) continue;
    const float* k = text.key(t, h / I);
    const double weight = std::exp(dot(text.query(position, h), std::vector<double>(k, k + D)));
    total += weight;
    for (int64_t d = 0; d < D; ++d) sum[d] += weight * text.values[(t * G + h / I) * D + d];
  }
  for (double& x : sum) x /= total;
  return sum;
}

struct Stored {
  endside::CacheShape shape = {2, G, D, endside::CacheType::f16, true};
  std::vector<int32_t> chunks;
  std::unique_ptr<Fenced<uint8_t>> memory;
  endside::Cache cache;

  Stored(const Text& text, Isa isa) {
    for (int64_t c = text.tokens / endside::CHUNK; c >= 0; --c) {
      chunks.push_back(static_cast<int32_t>(c));
    }
    const int64_t pool = static_cast<int64_t>(chunks.size());
    memory = std::make_unique<Fenced<uint8_t>>(endside::cache_bytes(shape, pool));
    // what is not written, the empty first slots too, is about 1: a key like any other
    std::memset(memory->data(), 0x3c, memory->size());
    cache = {shape, pool, memory->data()};
    for (int64_t t = 0; t < text.tokens; ++t) {
      endside::append(cache, 1, {chunks.data()}, t, text.key(t, 0), &text.values[t * G * D], 0, G,
                      isa);
    }
  }
};

// Rows first .. end of the text: checks outputs and visible keys, returns the mean visible share.
double check_rows(const Text& text, const SparseShape& sparse, int64_t first, Isa isa) {
  Stored stored(text, isa);
  const int64_t rows = text.tokens - first;
  endside::AttentionShape shape;
  shape.heads = H;
  shape.scale = 1 / std::sqrt(static_cast<float>(D));
  shape.sparse = sparse;
  Fenced<float> q(rows * H * D), out(rows * H * D);
  Fenced<int32_t> visible(rows * G);
  std::copy(text.query(first, 0), text.query(first, 0) + rows * H * D, q.begin());
  endside::Span span;
  span.table = {stored.chunks.data()};
  span.start = first;
  span.rows = rows;
  Fenced<uint8_t> scratch(
      endside::attention_scratch_bytes(stored.shape, shape, rows, text.tokens, 1));
  endside::Pool pool(1);
  pool.run([&](endside::Team& team) {
    endside::attend(team, stored.cache, 1, shape, &span, 1, q.data(), out.data(), visible.data(),
                    scratch.data(), isa);
  });
  double share = 0;
  for (int64_t row = 0; row < rows; row += 7) {
    const int64_t p = first + row;
    for (int64_t h = 0; h < H; h += I) {
      const Choice choice = choose(text, sparse, p, h / I);
      const int64_t blocks = std::count(choice.taken.begin(), choice.taken.end(), true);
      const int64_t keys = (blocks - 1) * 64 + p % 64 + 1;
      CHECK(visible[row * G + h / I] == keys, "visible at", p, visible[row * G + h / I], keys);
      share += static_cast<double>(keys) / static_cast<double>(p + 1);
      // summaries are rounded to f16, so nearly equal blocks may change places
      if (choice.margin < 2e-3) continue;
      const std::vector<double> want = attend(text, choice.taken, p, h);
      for (int64_t d = 0; d < D; ++d) {
        CHECK_NEAR(out[(row * H + h) * D + d], want[d], 1e-5, "position", p, "head", h);
      }
    }
  }
  return share / (static_cast<double>((rows + 6) / 7) * G);
}

}  // namespace

TEST_EACH_ISA(selection_conventions) {
  const Text text(2123);
  for (const bool selection_41 : {true, false}) {
    for (const bool coarse_lse : {true, false}) {
      SparseShape sparse;
      sparse.on = true;
      sparse.selection_41 = selection_41;
      sparse.coarse_lse = coarse_lse;
      sparse.window_blocks = 2;
      sparse.topk = 6;
      sparse.dense_len = 700;
      const double share = check_rows(text, sparse, 1950, isa);
      CHECK(share < 0.3, "sparsity does not act", share);
    }
  }
}

// The smallest window, two initial blocks, no dense beginning: rows that see no summary at all, rows
// whose candidates are just as many as may be chosen, and one more.
TEST_EACH_ISA(selection_edges) {
  const Text text(1111);
  for (const bool selection_41 : {true, false}) {
    SparseShape sparse;
    sparse.on = true;
    sparse.selection_41 = selection_41;
    sparse.init_blocks = 2;
    sparse.window_blocks = 1;
    sparse.topk = 5;
    sparse.dense_len = -1;
    const double share = check_rows(text, sparse, 0, isa);
    CHECK(share < 0.8 && share > 0.5, "from dense to sparse", share);
  }
}

// One position before dense_len is dense, dense_len - 1 is the first sparse one.
TEST_EACH_ISA(selection_starts_at_dense_len) {
  const Text text(1400);
  SparseShape sparse;
  sparse.on = true;
  sparse.window_blocks = 2;
  sparse.topk = 6;
  sparse.dense_len = 1401 - 7;
  check_rows(text, sparse, 1400 - 7 - 7, isa);
  check_rows(text, sparse, 1400 - 8, isa);
}
