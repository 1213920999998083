// The model's door: requests are read and checked here, before the team starts, so that nothing can
// go wrong on a thread that others wait for.
#include "model.h"

#include <algorithm>
#include <stdexcept>

#include "model_state.h"

namespace endside {

Model::State::State(const Shape& shape, const Weights& weights, const SparseShape& sparse,
                    CacheType type, const Limits& limits, Isa isa)
    : shape(shape),
      weights(weights),
      attention(attention_shape(shape, sparse)),
      limits((check_parts(shape, weights, limits), limits)),
      isa(isa),
      cache_memory(cache_bytes(cache_shape(shape, sparse, type), limits.chunks)),
      activations(buffers_bytes(shape, weights, limits)),
      tree_memory(trees_bytes(shape, limits)),
      attention_memory(attention_bytes(shape, sparse, type, limits)),
      cache{cache_shape(shape, sparse, type), limits.chunks, cache_memory.data()},
      pool(limits.threads) {
  Carver rows(activations.data());
  buffers = carve_buffers(rows, shape, weights, limits);
  Carver drafts(tree_memory.data());
  trees = carve_trees(drafts, shape, limits);
  const size_t most = static_cast<size_t>(limits.rows);
  work.tokens.reserve(most);
  work.positions.reserve(most);
  work.wanted.reserve(most);
  ways.resize(static_cast<size_t>(limits.threads));
  pool.run([this](Team& team) {
    ways[static_cast<size_t>(team.rank())] = make_way(this->weights, team);
  });
}

static void refuse(const std::string& what) { throw std::invalid_argument("forward: " + what); }

static std::string of(int64_t value, int64_t limit) {
  return std::to_string(value) + " of " + std::to_string(limit);
}

// Rows between a row of a tree and the last stored token.
static int64_t depth(const int32_t* parents, int64_t row) {
  int64_t steps = 0;
  for (row = parents[row]; row >= 0; row = parents[row]) ++steps;
  return steps;
}

int64_t reach(const Span& span) {
  if (!span.parents) return span.start + span.rows;
  int64_t deepest = 0;
  for (int64_t row = 0; row < span.rows; ++row) {
    if (span.parents[row] < -1 || span.parents[row] >= row) {
      refuse("a tree's parent does not come before its row");
    }
    deepest = std::max(deepest, depth(span.parents, row) + 1);
  }
  return span.start + deepest;
}

void Model::State::check(const Request& request) const {
  const Span& span = request.span;
  if (span.rows < 1 || span.rows > limits.rows) refuse("rows " + of(span.rows, limits.rows));
  if (span.start < 0) refuse("start is negative");
  const int64_t tokens = reach(span);
  if (span.parents && tokens - span.start > BLOCK) {
    refuse("rows on a tree's path " + of(tokens - span.start, BLOCK));
  }
  if (tokens > limits.context) refuse("tokens " + of(tokens, limits.context));
  for (int64_t row = 0; row < span.rows; ++row) {
    const int32_t token = request.tokens[row];
    const int64_t known = shape.vocab + weights.input_count;
    if (token < 0 || token >= known) refuse("token " + of(token, known));
  }
  for (int64_t i = 0; i * CHUNK < tokens; ++i) {
    const int32_t chunk = span.table.chunks[i];
    if (chunk < 0 || chunk >= limits.chunks) refuse("chunk " + of(chunk, limits.chunks));
  }
}

void Model::State::add(const Request& request) {
  const Span& span = request.span;
  const int64_t first = work.rows();
  work.first.push_back(first);
  for (int64_t row = 0; row < span.rows; ++row) {
    const int64_t steps = span.parents ? depth(span.parents, row) : row;
    work.tokens.push_back(request.tokens[row]);
    work.positions.push_back(static_cast<int32_t>(span.start + steps));
    const bool last = row + 1 == span.rows;
    if (request.want == Want::all || (request.want == Want::last && last)) {
      work.wanted.push_back(static_cast<int32_t>(first + row));
    }
  }
}

void Model::State::add_spans(const Request* requests, int64_t count) {
  const int64_t keys = shape.kv_heads * shape.head_dim;
  for (int64_t layer = 0; layer < shape.layers; ++layer) {
    size_t draft = 0;
    for (int64_t i = 0; i < count; ++i) {
      Span span = requests[i].span;
      if (span.parents) {
        const int64_t slot = layer * tree_stride() + work.drafts[draft++].offset * keys;
        span.tree_keys = trees.keys + slot;
        span.tree_values = trees.values + slot;
      }
      work.spans.push_back(span);
    }
  }
}

void Model::State::lay_out(const Request* requests, int64_t count) {
  work.first.clear();
  work.spans.clear();
  work.tokens.clear();
  work.positions.clear();
  work.wanted.clear();
  work.drafts.clear();
  work.tables.clear();
  int64_t rows = 0, drafted = 0;
  for (int64_t i = 0; i < count; ++i) {
    check(requests[i]);
    const Span& span = requests[i].span;
    rows += span.rows;
    if (!span.parents) continue;
    work.drafts.push_back({i, span.start, span.rows, drafted, work.tables.size()});
    drafted += span.rows;
    const int64_t chunks = (reach(span) + CHUNK - 1) / CHUNK;
    work.tables.insert(work.tables.end(), span.table.chunks, span.table.chunks + chunks);
  }
  if (rows > limits.rows) refuse("rows " + of(rows, limits.rows));
  if (drafted > limits.trees) refuse("rows of trees " + of(drafted, limits.trees));
  for (int64_t i = 0; i < count; ++i) add(requests[i]);
  add_spans(requests, count);
}

Model::Model(const Shape& shape, const Weights& weights, const SparseShape& sparse, CacheType type,
             const Limits& limits, Isa isa)
    : state_(std::make_unique<State>(shape, weights, sparse, type, limits, isa)) {}

Model::~Model() = default;

void Model::forward(const Request* requests, int64_t count, float* logits, float* trace,
                    int32_t* visible) {
  State& state = *state_;
  std::lock_guard<std::mutex> one_at_a_time(state.busy);
  state.lay_out(requests, count);
  if (count == 0) return;
  state.work.logits = logits;
  state.work.trace = trace;
  state.work.visible = visible;
  state.pool.run([&state](Team& team) { Forward(state, team).run(); });
}

void Model::accept(int64_t index, const int32_t* rows, int64_t count) {
  State& state = *state_;
  std::lock_guard<std::mutex> one_at_a_time(state.busy);
  const auto& drafts = state.work.drafts;
  const auto draft = std::find_if(drafts.begin(), drafts.end(),
                                  [&](const Draft& each) { return each.request == index; });
  if (draft == drafts.end()) throw std::invalid_argument("accept: that request was not a tree");
  for (int64_t i = 0; i < count; ++i) {
    if (rows[i] < 0 || rows[i] >= draft->rows) throw std::invalid_argument("accept: no such row");
  }
  const int64_t keys = state.shape.kv_heads * state.shape.head_dim;
  const Table table{state.work.tables.data() + draft->table};
  state.pool.run([&](Team& team) {
    team.split(state.shape.layers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t layer = begin; layer < end; ++layer) {
        const int64_t slot = layer * state.tree_stride() + draft->offset * keys;
        endside::accept(state.cache, layer, table, draft->start, rows, count,
                        state.trees.keys + slot, state.trees.values + slot, state.isa);
      }
    });
  });
  state.work.drafts.erase(draft);
}

void Model::copy_chunk(int32_t source, int32_t target) {
  State& state = *state_;
  std::lock_guard<std::mutex> one_at_a_time(state.busy);
  const int64_t chunks = state.limits.chunks;
  if (std::min(source, target) < 0 || std::max(source, target) >= chunks) {
    throw std::invalid_argument("copy_chunk: no such chunk");
  }
  endside::copy_chunk(state.cache, source, target);
}

std::vector<Pieces> Model::chunk(int32_t index) {
  if (index < 0 || index >= state_->limits.chunks) {
    throw std::invalid_argument("chunk: no such chunk");
  }
  return pieces_of(state_->cache, index);
}

void Model::set_inputs(const float* rows, int64_t count) {
  State& state = *state_;
  std::lock_guard<std::mutex> one_at_a_time(state.busy);
  state.weights.inputs = rows;
  state.weights.input_count = count;
}

int Model::threads() const { return state_->pool.size(); }

void Model::together(const std::function<void(Team&)>& fn) {
  std::lock_guard<std::mutex> one_at_a_time(state_->busy);
  state_->pool.run(fn);
}

void Model::set_timing(bool on) {
  state_->timed = on;
  state_->seconds.fill(0);
}

std::vector<std::pair<std::string, double>> Model::timing() const {
  std::vector<std::pair<std::string, double>> found;
  for (int stage = 0; stage < STAGES; ++stage) {
    found.emplace_back(stage_name(static_cast<Stage>(stage)),
                       state_->seconds[static_cast<size_t>(stage)]);
  }
  return found;
}

}  // namespace endside
