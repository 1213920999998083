// What a model needs before it runs: its buffers by name, and the order of its stages.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "linear_half.h"
#include "model_state.h"

namespace endside {

template <class F>
static void each_linear(const Weights& weights, F&& visit) {
  for (const Layer& layer : weights.layers) {
    visit("qkv", layer.qkv);
    visit("output", layer.output);
    visit("gate_up", layer.gate_up);
    visit("down", layer.down);
  }
  visit("head", weights.head);
}

static size_t largest_input(const Weights& weights, int64_t rows) {
  size_t most = 0;
  each_linear(weights, [&](const char*, const Linear& linear) {
    most = std::max(most, input_bytes(linear, rows));
  });
  return most;
}

Buffers carve_buffers(Carver& carver, const Shape& shape, const Weights& weights,
                      const Limits& limits) {
  const size_t rows = static_cast<size_t>(limits.rows);
  const size_t queries = static_cast<size_t>(shape.heads * shape.head_dim);
  const size_t keys = static_cast<size_t>(shape.kv_heads * shape.head_dim);
  size_t tile = 0;
  each_linear(weights, [&](const char*, const Linear& linear) {
    tile = std::max(tile, apply_scratch_bytes(linear));
  });
  Buffers buffers;
  buffers.x = carver.take<float>(rows * static_cast<size_t>(shape.width));
  buffers.qkv = carver.take<float>(rows * (queries + 2 * keys));
  buffers.q = carver.take<float>(rows * queries);
  buffers.attended = carver.take<float>(rows * queries);
  buffers.gated = carver.take<float>(rows * static_cast<size_t>(shape.ff));
  buffers.angles = carver.take<float>(rows * static_cast<size_t>(shape.head_dim));
  buffers.input = carver.take<uint8_t>(largest_input(weights, limits.rows));
  for (int rank = 0; rank < limits.threads; ++rank) {
    Scratch own;
    own.tile = carver.take<uint8_t>(tile);
    own.input = carver.take<uint8_t>(largest_input(weights, 1));
    buffers.scratch.push_back(own);
  }
  return buffers;
}

size_t buffers_bytes(const Shape& shape, const Weights& weights, const Limits& limits) {
  Carver counting(nullptr);
  carve_buffers(counting, shape, weights, limits);
  return counting.used();
}

Trees carve_trees(Carver& carver, const Shape& shape, const Limits& limits) {
  const size_t count = static_cast<size_t>(shape.layers * limits.trees * shape.kv_heads) *
                       static_cast<size_t>(shape.head_dim);
  Trees trees;
  trees.keys = carver.take<float>(count);
  trees.values = carver.take<float>(count);
  return trees;
}

size_t trees_bytes(const Shape& shape, const Limits& limits) {
  Carver counting(nullptr);
  carve_trees(counting, shape, limits);
  return counting.used();
}

std::vector<Piece> make_way(const Weights& weights, const Team& team) {
  std::vector<Piece> way;
  each_linear(weights, [&](const char*, const Linear& linear) {
    Piece piece;
    team.split(linear.padded_n(), ROW_TILE,
               [&](int64_t begin, int64_t end) { piece = piece_of(linear, begin, end); });
    way.push_back(piece);
  });
  way.push_back(way.front());
  return way;
}

CacheShape cache_shape(const Shape& shape, const SparseShape& sparse, CacheType type) {
  return {shape.layers, shape.kv_heads, shape.head_dim, type, sparse.on};
}

AttentionShape attention_shape(const Shape& shape, const SparseShape& sparse) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  return {shape.heads, scale, sparse};
}

size_t attention_bytes(const Shape& shape, const SparseShape& sparse, CacheType type,
                       const Limits& limits) {
  return attention_scratch_bytes(cache_shape(shape, sparse, type), attention_shape(shape, sparse),
                                 limits.rows, limits.context, limits.threads);
}

std::vector<std::pair<std::string, size_t>> Model::memory(const Shape& shape,
                                                          const Weights& weights,
                                                          const SparseShape& sparse, CacheType type,
                                                          const Limits& limits) {
  check_parts(shape, weights, limits);
  return {{"cache", cache_bytes(cache_shape(shape, sparse, type), limits.chunks)},
          {"activations", buffers_bytes(shape, weights, limits)},
          {"attention", attention_bytes(shape, sparse, type, limits)},
          {"trees", trees_bytes(shape, limits)}};
}

static void fit(bool good, const std::string& what) {
  if (!good) throw std::invalid_argument("model: " + what);
}

void check_parts(const Shape& shape, const Weights& weights, const Limits& limits) {
  fit(shape.layers > 0 && shape.width > 0 && shape.vocab > 0, "layers, width and vocab are needed");
  fit(shape.ff > 0 && shape.ff % ROWS == 0, "ff must be a multiple of 8");
  fit(shape.head_dim > 0 && shape.head_dim % 8 == 0 && shape.head_dim <= 256,
      "head_dim must be a multiple of 8, at most 256");
  fit(shape.kv_heads > 0 && shape.heads > 0 && shape.heads % shape.kv_heads == 0,
      "heads must be a multiple of kv_heads");
  fit(shape.heads <= 16 * shape.kv_heads, "at most 16 heads may share a key head");
  fit(limits.rows > 0 && limits.context > 0 && limits.chunks > 0 && limits.threads > 0 &&
          limits.trees >= 0,
      "limits must be positive");
  fit(static_cast<int64_t>(weights.layers.size()) == shape.layers, "a layer is missing");
  const int64_t queries = shape.heads * shape.head_dim;
  const std::vector<std::pair<int64_t, int64_t>> sizes = {
      {queries + 2 * shape.kv_heads * shape.head_dim, shape.width},
      {shape.width, queries},
      {2 * shape.ff, shape.width},
      {shape.width, shape.ff},
  };
  const std::pair<int64_t, int64_t> head = {shape.vocab, shape.width};
  size_t index = 0;
  each_linear(weights, [&](const char* name, const Linear& linear) {
    const size_t at = index++;
    const auto& want = at < 4 * weights.layers.size() ? sizes[at % 4] : head;
    fit(linear.n == want.first && linear.k == want.second,
        std::string(name) + " is " + std::to_string(linear.n) + " x " + std::to_string(linear.k) +
            ", not " + std::to_string(want.first) + " x " + std::to_string(want.second));
  });
}

const char* stage_name(Stage stage) {
  static const char* const names[] = {"embed",  "prepare", "qkv",  "rope", "attention",
                                      "output", "gate_up", "down", "head"};
  return names[static_cast<int>(stage)];
}

static std::string kind_of(const Linear& linear) {
  static const char* const names[] = {"f32", "bf16", "int8", "int4", "ternary2", "ternary3"};
  std::string text = names[static_cast<int>(linear.kind)];
  if (linear.quantized()) text += " group " + std::to_string(linear.group);
  if (linear.asymmetric) text += " with zeros";
  return text + " (" + std::to_string(linear.n) + " x " + std::to_string(linear.k) + ")";
}

static std::string attention_line(const SparseShape& sparse) {
  if (!sparse.on) return "attend: dense";
  return "attend: dense below " + std::to_string(sparse.dense_len) + " tokens, then " +
         std::to_string(sparse.topk) + " blocks of " + std::to_string(BLOCK) +
         ", among them the first " + std::to_string(sparse.init_blocks) + " and the last " +
         std::to_string(sparse.window_blocks);
}

std::vector<std::string> Model::plan(const Shape& shape, const Weights& weights,
                                     const SparseShape& sparse, const Limits& limits) {
  check_parts(shape, weights, limits);
  const Layer& layer = weights.layers.front();
  const auto times = [](const std::string& what, const Linear& linear) {
    return what + ": " + kind_of(linear);
  };
  return {
      "one call, " + std::to_string(limits.threads) + " threads",
      "embed, rope angles",
      "then " + std::to_string(shape.layers) + " layers:",
      "  " + times("norm, quantize, qkv", layer.qkv),
      "  rope, append keys and values",
      "  " + attention_line(sparse),
      "  " + times("quantize, output, add", layer.output),
      "  " + times("norm, quantize, gate up silu", layer.gate_up),
      "  " + times("quantize, down, add", layer.down),
      times("norm, quantize, head", weights.head),
  };
}

void embed_row(const Weights& weights, const Shape& shape, int32_t token, float* out) {
  const int64_t width = shape.width, first = token * width;
  if (token >= shape.vocab) {
    const float* row = weights.inputs + (token - shape.vocab) * width;
    std::copy(row, row + width, out);
    return;
  }
  if (!weights.embed) {
    unpack_row(weights.embed_packed, token, out);
  } else if (weights.embed_type == SourceType::f32) {
    const float* row = static_cast<const float*>(weights.embed) + first;
    std::copy(row, row + width, out);
  } else {
    const uint16_t* row = static_cast<const uint16_t*>(weights.embed) + first;
    const bool half = weights.embed_type == SourceType::f16;
    for (int64_t i = 0; i < width; ++i) out[i] = half ? from_f16(row[i]) : from_bf16(row[i]);
  }
  for (int64_t i = 0; i < width; ++i) out[i] *= shape.embed_scale;
}

}  // namespace endside
