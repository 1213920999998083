// One step through the decoder, single program, multiple data.
//
// Every product is shared by output columns, so a thread streams its own part of each weight matrix
// and no sums cross threads. A lone row is prepared by each thread for itself: that costs less than
// the barrier it saves, and the quantized row is then in the thread's own cache. With many rows the
// tiles are handed out in parts, since processors seldom run at one speed for a whole matrix.
#include <algorithm>
#include <cstring>

#include "model_state.h"
#include "rope.h"

namespace endside {

static constexpr int64_t FEW_ROWS = 8;  // up to here a product is limited by the weights' bytes
static constexpr int64_t PARTS = 4;     // per thread, of a product of many rows

Forward::Forward(Model::State& state, Team& team)
    : state_(state),
      team_(team),
      shape_(state.shape),
      buffers_(state.buffers),
      work_(state.work),
      scratch_(state.buffers.scratch[static_cast<size_t>(team.rank())]),
      way_(state.ways[static_cast<size_t>(team.rank())]),
      rows_(state.work.rows()),
      timed_(state.timed && team.rank() == 0) {
  ahead_ = way_of(way_.data(), static_cast<int64_t>(way_.size()));
  if (timed_) last_ = std::chrono::steady_clock::now();
}

void Forward::lap(Stage stage) {
  if (!timed_) return;
  const auto now = std::chrono::steady_clock::now();
  state_.seconds[static_cast<size_t>(stage)] += std::chrono::duration<double>(now - last_).count();
  last_ = now;
}

void Forward::run() {
  embed();
  for (int64_t index = 0; index < shape_.layers; ++index) layer(index);
  copy_trace(shape_.layers);
  if (!work_.wanted.empty()) head();
}

void Forward::embed() {
  team_.split(rows_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const size_t at = static_cast<size_t>(row);
      embed_row(state_.weights, shape_, work_.tokens[at], buffers_.x + row * shape_.width);
      float* angles = buffers_.angles + row * shape_.head_dim;
      rope_table(work_.positions[at], state_.weights.inverse_frequencies, shape_.head_dim / 2,
                 state_.weights.rope_amplitude, angles, angles + shape_.head_dim / 2);
    }
  });
  team_.barrier();
  lap(Stage::embed);
}

void Forward::layer(int64_t index) {
  const Layer& part = state_.weights.layers[static_cast<size_t>(index)];
  const int64_t width = shape_.width, queries = shape_.heads * shape_.head_dim;
  copy_trace(index);
  Input input = prepared(part.qkv, buffers_.x, rows_, width, part.attention_norm);
  multiply(Stage::qkv, part.qkv, input, {Then::store, 1.0f, buffers_.qkv, part.qkv.n});

  rotate_queries();
  store_keys(index);
  team_.barrier();
  lap(Stage::rope);

  int32_t* visible = work_.visible;
  if (visible) visible += index * rows_ * shape_.kv_heads;
  attend(team_, state_.cache, index, state_.attention, work_.layer_spans(index), work_.requests(),
         buffers_.q, buffers_.attended, visible, state_.attention_memory.data(), state_.isa);
  lap(Stage::attention);

  const Epilogue residual{Then::add, shape_.residual_scale, buffers_.x, width};
  input = prepared(part.output, buffers_.attended, rows_, queries, nullptr);
  multiply(Stage::output, part.output, input, residual);
  input = prepared(part.gate_up, buffers_.x, rows_, width, part.mlp_norm);
  multiply(Stage::gate_up, part.gate_up, input, {Then::silu_mul, 1.0f, buffers_.gated, shape_.ff});
  input = prepared(part.down, buffers_.gated, rows_, shape_.ff, nullptr);
  multiply(Stage::down, part.down, input, residual);
}

void Forward::rotate_queries() {
  const int64_t heads = shape_.heads, dim = shape_.head_dim;
  const int64_t stride = (heads + 2 * shape_.kv_heads) * dim;
  team_.split(rows_ * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end;) {
      const int64_t row = item / heads, head = item % heads;
      const int64_t count = std::min(heads - head, end - item);
      float* query = buffers_.q + item * dim;
      const float* angles = buffers_.angles + row * dim;
      std::memcpy(query, buffers_.qkv + row * stride + head * dim,
                  static_cast<size_t>(count * dim) * sizeof(float));
      rope_rotate(query, count, dim, angles, angles + dim / 2);
      item += count;
    }
  });
}

// A head of a sequence belongs to one thread, which stores its tokens in order: a summary is made
// from the keys before it.
void Forward::store_keys(int64_t index) {
  const int64_t heads = shape_.kv_heads;
  team_.split(work_.requests() * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) store_span(index, item / heads, item % heads);
  });
}

void Forward::store_span(int64_t layer, int64_t request, int64_t head) {
  const Span& span = work_.layer_spans(layer)[request];
  const int64_t dim = shape_.head_dim, keys = shape_.kv_heads * dim;
  const int64_t stride = shape_.heads * dim + 2 * keys;
  for (int64_t i = 0; i < span.rows; ++i) {
    const int64_t row = work_.first[static_cast<size_t>(request)] + i;
    float* key = buffers_.qkv + row * stride + shape_.heads * dim;
    float* value = key + keys;
    const int64_t lane = head * dim;
    const float* angles = buffers_.angles + row * dim;
    rope_rotate(key + lane, 1, dim, angles, angles + dim / 2);
    if (!span.parents) {
      append(state_.cache, layer, span.table, span.start + i, key, value, head, head + 1,
             state_.isa);
      continue;
    }
    const int64_t slot = span.tree_keys - state_.trees.keys + i * keys + lane;
    std::memcpy(state_.trees.keys + slot, key + lane, static_cast<size_t>(dim) * sizeof(float));
    std::memcpy(state_.trees.values + slot, value + lane, static_cast<size_t>(dim) * sizeof(float));
  }
}

Input Forward::prepared(const Linear& linear, const float* x, int64_t rows, int64_t width,
                     const float* norm) {
  if (rows == 1) {
    const Input input = make_input(linear, 1, scratch_.input);
    prepare(input, x, width, norm, shape_.norm_eps, 0, 1, state_.isa);
    lap(Stage::prepare);
    return input;
  }
  const Input input = make_input(linear, rows, buffers_.input);
  team_.split(rows, 1, [&](int64_t begin, int64_t end) {
    prepare(input, x, width, norm, shape_.norm_eps, begin, end, state_.isa);
  });
  team_.barrier();
  lap(Stage::prepare);
  return input;
}

void Forward::multiply(Stage stage, const Linear& linear, Input input, const Epilogue& epilogue) {
  const bool few = team_.size() == 1 || input.rows <= FEW_ROWS;
  const Piece* const mine = few ? way_.data() + product_ : nullptr;
  if (mine) {
    if (ahead_.piece < mine) ahead_ = way_of(mine, way_.data() + way_.size() - mine);
    input.ahead = &ahead_;
  }
  ++product_;
  const auto columns = [&](int64_t begin, int64_t end) {
    if (begin < end) apply(linear, input, begin, end, epilogue, scratch_.tile, state_.isa);
  };
  const int64_t size = team_.size(), tiles = linear.padded_n() / ROW_TILE;
  if (few) {
    team_.split(linear.padded_n(), ROW_TILE, columns);
    team_.barrier();
  } else {
    const int64_t parts = size * PARTS;
    team_.each(parts, [&](int64_t part) {
      columns(tiles * part / parts * ROW_TILE, tiles * (part + 1) / parts * ROW_TILE);
    });
  }
  lap(stage);
}

void Forward::gather_wanted() {
  if (team_.rank() == 0) {
    const int64_t width = shape_.width;
    for (size_t i = 0; i < work_.wanted.size(); ++i) {
      const int64_t row = work_.wanted[i], target = static_cast<int64_t>(i);
      if (row == target) continue;
      std::memcpy(buffers_.x + target * width, buffers_.x + row * width,
                  static_cast<size_t>(width) * sizeof(float));
    }
  }
  team_.barrier();
}

void Forward::head() {
  const int64_t wanted = static_cast<int64_t>(work_.wanted.size());
  if (wanted != rows_) {
    if (work_.trace) team_.barrier();  // the trace is read from the rows that move now
    gather_wanted();
  }
  const Linear& matrix = state_.weights.head;
  const Input input =
      prepared(matrix, buffers_.x, wanted, shape_.width, state_.weights.final_norm);
  multiply(Stage::head, matrix, input,
           {Then::store, shape_.logit_scale, work_.logits, shape_.vocab});
}

void Forward::copy_trace(int64_t index) {
  if (!work_.trace) return;
  const int64_t width = shape_.width;
  float* target = work_.trace + index * rows_ * width;
  team_.split(rows_ * width, 1, [&](int64_t begin, int64_t end) {
    std::memcpy(target + begin, buffers_.x + begin,
                static_cast<size_t>(end - begin) * sizeof(float));
  });
}

}  // namespace endside
