// A draft head's step, single program, multiple data, like the model's own (model_forward.cc):
// products are shared by output columns, attention by rows and key heads.
#include "draft_head.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <stdexcept>

#include "attention_kernels.h"
#include "likeliest.h"
#include "model.h"
#include "pool.h"
#include "region.h"
#include "rmsnorm.h"
#include "rope.h"

namespace endside {

static constexpr int64_t BITS = 64;  // of `above`
static constexpr double LOG2E = 1.4426950408889634;

namespace {

enum Stage { layer_stage, out_stage, choose_stage, stages };

// Scratch of one thread.
struct Own {
  uint8_t *tile, *input;
  float *query, *softmax, *keys, *values;  // keys, values: what a row sees behind `seen`
};

// R = DraftLimits::rows.
struct Rooms {
  float *pair, *stream, *qkv, *attended, *gated, *angles, *logits;
  uint8_t* input;
  std::vector<Own> own;
};

}  // namespace

static int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

static HeadShape head_shape(const DraftShape& shape) {
  return {shape.heads / shape.kv_heads, shape.head_dim, round_up(shape.head_dim, 16)};
}

static std::array<const Linear*, 6> matrices(const DraftWeights& weights) {
  return {&weights.fc, &weights.qkv, &weights.output, &weights.gate_up, &weights.down,
          &weights.out};
}

static Rooms carve(Carver& carver, const DraftShape& shape, const DraftWeights& weights,
                   const DraftLimits& limits, int threads) {
  const auto floats = [&](int64_t count) { return carver.take<float>(static_cast<size_t>(count)); };
  const int64_t rows = limits.rows, width = shape.width, queries = shape.heads * shape.head_dim;
  Rooms rooms;
  rooms.pair = floats(rows * 2 * width);
  rooms.stream = floats(rows * width);
  rooms.qkv = floats(rows * weights.qkv.n);
  rooms.attended = floats(rows * queries);
  rooms.gated = floats(rows * shape.ff);
  rooms.angles = floats(rows * shape.head_dim);
  rooms.logits = floats(limits.guesses * weights.out.n);
  size_t input = 0, lone = 0, tile = 0;
  for (const Linear* linear : matrices(weights)) {
    input = std::max(input, input_bytes(*linear, rows));
    lone = std::max(lone, input_bytes(*linear, 1));
    tile = std::max(tile, apply_scratch_bytes(*linear));
  }
  rooms.input = carver.take<uint8_t>(input);
  const HeadShape heads = head_shape(shape);
  for (int i = 0; i < threads; ++i) {
    Own own;
    own.tile = carver.take<uint8_t>(tile);
    own.input = carver.take<uint8_t>(lone);
    own.query = floats(heads.query_floats());
    own.softmax = floats(2 * MAX_HEADS + heads.heads * heads.stride);
    own.keys = floats(shape.head_dim * BLOCK);
    own.values = floats(shape.head_dim * BLOCK + 16);
    rooms.own.push_back(own);
  }
  return rooms;
}

static void fit(bool good, const std::string& what) {
  if (!good) throw std::invalid_argument("draft head: " + what);
}

static void check(const DraftShape& shape, const DraftWeights& weights, const DraftLimits& limits) {
  const int64_t width = shape.width, dim = shape.head_dim;
  fit(width > 0 && shape.ff > 0 && shape.ff % ROWS == 0, "ff must be a multiple of 8");
  fit(dim > 0 && dim % 8 == 0 && dim <= 256, "head_dim must be a multiple of 8, at most 256");
  fit(shape.kv_heads > 0 && shape.heads > 0 && shape.heads % shape.kv_heads == 0 &&
          shape.heads <= MAX_HEADS * shape.kv_heads,
      "heads must be a multiple of kv_heads, at most 16 of one");
  fit(limits.rows > 0 && limits.guesses > 0 && limits.blocks > 0 && limits.threads > 0,
      "limits must be positive");
  const int64_t queries = shape.heads * dim, taken = weights.joined ? width : 2 * width;
  const auto is = [](const Linear& linear, int64_t n, int64_t k) {
    return linear.n == n && linear.k == k;
  };
  fit(weights.fc.n == width && (!weights.joined || weights.fc.k == 2 * width), "fc");
  fit(is(weights.qkv, queries + 2 * shape.kv_heads * dim, taken), "qkv");
  fit(is(weights.output, width, queries), "output");
  fit(is(weights.gate_up, 2 * shape.ff, width), "gate_up");
  fit(is(weights.down, width, shape.ff), "down");
  fit(weights.out.k == width, "out");
}

static size_t bytes_of(const DraftShape& shape, const DraftWeights& weights,
                       const DraftLimits& limits, int threads) {
  check(shape, weights, limits);
  Carver counting(nullptr);
  carve(counting, shape, weights, limits, threads);
  return counting.used();
}

struct DraftHead::State {
  State(const DraftShape& shape, const DraftWeights& weights, const DraftLimits& limits,
        Model* shared, Isa isa)
      : shape(shape),
        weights(weights),
        limits(limits),
        heads(head_shape(shape)),
        isa(isa),
        // a lone query does not pay for tiles
        kernels(attention_kernels(isa == Isa::amx ? Isa::avx512 : isa)),
        threads(shared ? shared->threads() : limits.threads),
        memory(bytes_of(shape, weights, limits, threads)),
        shared(shared),
        pool(shared ? nullptr : std::make_unique<Pool>(threads)) {
    Carver carver(memory.data());
    rooms = carve(carver, shape, weights, limits, threads);
  }

  void together(const std::function<void(Team&)>& fn) {
    std::lock_guard<std::mutex> one_at_a_time(busy);
    if (shared) return shared->together(fn);
    pool->run(fn);
  }

  const DraftShape shape;
  const DraftWeights weights;
  const DraftLimits limits;
  const HeadShape heads;
  const Isa isa;
  const AttentionKernels& kernels;
  const int threads;
  Region memory;
  Rooms rooms;
  bool timed = false;
  std::array<double, stages> seconds{};
  std::mutex busy;
  Model* shared;
  std::unique_ptr<Pool> pool;  // last: its threads end before what they use
};

namespace {

using Clock = std::chrono::steady_clock;

// The step as one thread of the team sees it.
template <class State>
class Step {
 public:
  Step(State& state, const DraftCall& call, Team& team)
      : state_(state),
        shape_(state.shape),
        weights_(state.weights),
        rooms_(state.rooms),
        own_(state.rooms.own[static_cast<size_t>(team.rank())]),
        call_(call),
        team_(team),
        last_(Clock::now()) {}

  void run() {
    pair_up();
    read_pair();
    rotate_and_store();
    attend();
    mlp();
    leave();
    lap(layer_stage);
    if (call_.guesses) guess();
  }

 private:
  void lap(Stage stage) {
    if (!state_.timed || team_.rank() != 0) return;
    const Clock::time_point now = Clock::now();
    state_.seconds[stage] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

  void norm_row(const float* x, const float* weight, float* out) const {
    const size_t width = static_cast<size_t>(shape_.width);
    if (weight) return rmsnorm(x, weight, shape_.norm_eps, out, 1, width, state_.isa);
    std::memcpy(out, x, width * sizeof(float));
  }

  void pair_up() {
    const int64_t width = shape_.width, half = shape_.head_dim / 2;
    team_.split(call_.rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        float* pair = rooms_.pair + row * 2 * width;
        norm_row(call_.embeds + row * width, weights_.embed_norm, pair);
        norm_row(call_.hidden + row * width, weights_.hidden_norm, pair + width);
        if (!weights_.joined) norm_row(call_.hidden + row * width, nullptr, stream(row));
        float* angles = rooms_.angles + row * shape_.head_dim;
        rope_table(call_.positions[row], weights_.inverse_frequencies, half,
                   weights_.rope_amplitude, angles, angles + half);
      }
    });
    team_.barrier();
  }

  void read_pair() {
    const int64_t width = shape_.width;
    const Epilogue store{Then::store, 1.0f, rooms_.qkv, weights_.qkv.n};
    if (!weights_.joined) {
      return multiply(weights_.qkv, rooms_.pair, call_.rows, nullptr, store);
    }
    multiply(weights_.fc, rooms_.pair, call_.rows, nullptr,
             {Then::store, 1.0f, rooms_.stream, width});
    if (weights_.fc_bias) {
      team_.split(call_.rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          for (int64_t c = 0; c < width; ++c) stream(row)[c] += weights_.fc_bias[c];
        }
      });
      team_.barrier();
    }
    multiply(weights_.qkv, rooms_.stream, call_.rows, weights_.attention_norm, store);
  }

  // A key head belongs to one thread: rows of a block share cache lines.
  void rotate_and_store() {
    team_.split(shape_.kv_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) {
        for (int64_t row = 0; row < call_.rows; ++row) rotate_row(row, head);
      }
    });
    team_.barrier();
  }

  void rotate_row(int64_t row, int64_t head) {
    const int64_t dim = shape_.head_dim, shared = state_.heads.heads;
    const float* angles = rooms_.angles + row * dim;
    float* start = rooms_.qkv + row * weights_.qkv.n;
    rope_rotate(start + head * shared * dim, shared, dim, angles, angles + dim / 2);
    float* key = start + (shape_.heads + head) * dim;
    rope_rotate(key, 1, dim, angles, angles + dim / 2);
    const int64_t room = call_.at + row, block = room / BLOCK, lane = room % BLOCK;
    float* keys = block_of(call_.keys, head, block);
    for (int64_t d = 0; d < dim; ++d) keys[d * BLOCK + lane] = key[d];
    std::memcpy(block_of(call_.values, head, block) + lane * dim, key + shape_.kv_heads * dim,
                static_cast<size_t>(dim) * sizeof(float));
  }

  void attend() {
    team_.each(call_.rows * shape_.kv_heads, [&](int64_t item) {
      attend_row(item / shape_.kv_heads, item % shape_.kv_heads);
    });
  }

  void attend_row(int64_t row, int64_t head) {
    const int64_t dim = shape_.head_dim, queries = state_.heads.heads * dim;
    const Softmax softmax = empty_softmax();
    const float* q = rooms_.qkv + row * weights_.qkv.n + head * queries;
    const double factor = LOG2E / std::sqrt(static_cast<double>(dim));
    state_.kernels.prepare_query(state_.heads, q, static_cast<float>(factor), own_.query);
    const int64_t seen = call_.seen[row];
    for (int64_t block = 0; block * BLOCK < seen; ++block) {
      meet(block_of(call_.keys, head, block), block_of(call_.values, head, block),
           std::min(seen - block * BLOCK, BLOCK), softmax);
    }
    const int64_t path = gather_path(row, head);
    if (path) meet(own_.keys, own_.values, path, softmax);
    state_.kernels.finish(state_.heads, softmax,
                          rooms_.attended + (row * shape_.kv_heads + head) * queries);
  }

  Softmax empty_softmax() const {
    float* room = own_.softmax;
    std::fill(room, room + MAX_HEADS, -std::numeric_limits<float>::infinity());
    std::fill(room + MAX_HEADS, room + 2 * MAX_HEADS + state_.heads.heads * state_.heads.stride,
              0.0f);
    return {room, room + MAX_HEADS, room + 2 * MAX_HEADS};
  }

  void meet(const float* keys, const float* values, int64_t count, const Softmax& softmax) const {
    Block block{};
    block.cell = block.stored = Cell::f32;
    block.keys = keys;
    block.values = values;
    const Query query{own_.query, count, softmax};
    state_.kernels.attend_block(state_.heads, block, &query, 1);
  }

  // The rooms behind `seen` whose bits are set, as a block -> how many.
  int64_t gather_path(int64_t row, int64_t head) const {
    const int64_t dim = shape_.head_dim;
    int64_t count = 0;
    for (uint64_t bits = call_.above[row]; bits; bits &= bits - 1, ++count) {
      const int64_t room = call_.seen[row] + __builtin_ctzll(bits);
      const float* keys = block_of(call_.keys, head, room / BLOCK) + room % BLOCK;
      for (int64_t d = 0; d < dim; ++d) own_.keys[d * BLOCK + count] = keys[d * BLOCK];
      const float* value = block_of(call_.values, head, room / BLOCK) + room % BLOCK * dim;
      std::memcpy(own_.values + count * dim, value, static_cast<size_t>(dim) * sizeof(float));
    }
    return count;
  }

  void mlp() {
    const int64_t width = shape_.width, rows = call_.rows;
    const Epilogue residual{Then::add, shape_.residual_scale, rooms_.stream, width};
    multiply(weights_.output, rooms_.attended, rows, nullptr, residual);
    multiply(weights_.gate_up, rooms_.stream, rows, weights_.mlp_norm,
             {Then::silu_mul, 1.0f, rooms_.gated, shape_.ff});
    multiply(weights_.down, rooms_.gated, rows, nullptr, residual);
  }

  void leave() {
    team_.split(call_.rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        norm_row(stream(row), weights_.state_norm, call_.states + row * shape_.width);
      }
    });
    team_.barrier();
  }

  void guess() {
    const int64_t size = weights_.out.n, first = call_.rows - call_.guesses;
    multiply(weights_.out, call_.states + first * shape_.width, call_.guesses,
             weights_.final_norm, {Then::store, shape_.logit_scale, rooms_.logits, size});
    lap(out_stage);
    team_.each(call_.guesses, [&](int64_t row) {
      likeliest(rooms_.logits + row * size, size, call_.width, call_.tokens + row * call_.width,
                call_.chances + row * call_.width, state_.isa);
    });
    lap(choose_stage);
  }

  // x (P, K), normed first if there is a norm, times the matrix: the team's whole product. A lone
  // row is prepared by each thread for itself, which costs less than a barrier.
  void multiply(const Linear& linear, const float* x, int64_t rows, const float* norm,
                const Epilogue& epilogue) {
    const float eps = shape_.norm_eps;
    const Input input = make_input(linear, rows, rows == 1 ? own_.input : rooms_.input);
    if (rows == 1) {
      prepare(input, x, linear.k, norm, eps, 0, 1, state_.isa);
    } else {
      team_.split(rows, 1, [&](int64_t begin, int64_t end) {
        prepare(input, x, linear.k, norm, eps, begin, end, state_.isa);
      });
      team_.barrier();
    }
    team_.split(linear.padded_n(), ROW_TILE, [&](int64_t begin, int64_t end) {
      apply(linear, input, begin, end, epilogue, own_.tile, state_.isa);
    });
    team_.barrier();
  }

  float* stream(int64_t row) const { return rooms_.stream + row * shape_.width; }
  float* block_of(float* window, int64_t head, int64_t block) const {
    return window + (head * state_.limits.blocks + block) * BLOCK * shape_.head_dim;
  }

  State& state_;
  const DraftShape& shape_;
  const DraftWeights& weights_;
  const Rooms& rooms_;
  const Own& own_;
  const DraftCall& call_;
  Team& team_;
  Clock::time_point last_;
};

}  // namespace

DraftHead::DraftHead(const DraftShape& shape, const DraftWeights& weights,
                     const DraftLimits& limits, Model* shared, Isa isa)
    : state_(std::make_unique<State>(shape, weights, limits, shared, isa)) {}

DraftHead::~DraftHead() = default;

void DraftHead::run(const DraftCall& call) {
  const State& state = *state_;
  const int64_t rooms = state.limits.blocks * BLOCK;
  fit(call.rows > 0 && call.rows <= state.limits.rows, "too many rows for one call, or none");
  fit(call.guesses >= 0 && call.guesses <= std::min(call.rows, state.limits.guesses),
      "more rows guess than there are");
  fit(call.at >= 0 && call.at + call.rows <= rooms, "the window has no room for these rows");
  const int64_t most = std::min(state.weights.out.n, MAX_LIKELIEST);
  fit(!call.guesses || (call.width > 0 && call.width <= most), "tokens of a guess");
  for (int64_t row = 0; row < call.rows; ++row) {
    const int64_t filled = call.at + call.rows, seen = call.seen[row];
    const uint64_t above = call.above[row];
    const int64_t last = above ? seen + BITS - __builtin_clzll(above) : seen;
    fit(seen >= 0 && last <= filled && last > 0, "a row sees rooms that nothing is in");
    fit(call.positions[row] >= 0, "a position is negative");
  }
  state_->together([&](Team& team) { Step<State>(*state_, call, team).run(); });
}

void DraftHead::project(const float* x, int64_t rows, float* out) {
  State& state = *state_;
  const Linear& fc = state.weights.fc;
  fit(rows > 0 && rows <= state.limits.rows, "too many rows for one call, or none");
  state.together([&](Team& team) {
    const Input input = make_input(fc, rows, state.rooms.input);
    team.split(rows, 1, [&](int64_t begin, int64_t end) {
      prepare(input, x, fc.k, nullptr, 0, begin, end, state.isa);
    });
    team.barrier();
    team.split(fc.padded_n(), ROW_TILE, [&](int64_t begin, int64_t end) {
      uint8_t* tile = state.rooms.own[static_cast<size_t>(team.rank())].tile;
      apply(fc, input, begin, end, {Then::store, 1.0f, out, fc.n}, tile, state.isa);
    });
  });
}

void DraftHead::set_timing(bool on) {
  state_->timed = on;
  state_->seconds.fill(0);
}

std::vector<std::pair<std::string, double>> DraftHead::timing() const {
  const auto& seconds = state_->seconds;
  return {{"layer", seconds[layer_stage]},
          {"out", seconds[out_stage]},
          {"choose", seconds[choose_stage]}};
}

}  // namespace endside
