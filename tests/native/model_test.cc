// The decoder step without Python, for the sanitizers above all: a team over every stage, rows cut
// into calls anyhow, a tree and its acceptance, and the same bits each time. That the numbers are
// right is shown beside float64 in test_model.py.
#include "model.h"

#include <memory>
#include <stdexcept>

#include "check.h"
#include "region.h"

using namespace endside;

namespace {

const int64_t LENGTH = 70, VOCAB = 45;

// One matrix and the memory it lies in.
struct Matrix {
  Linear linear;
  std::unique_ptr<Region> codes, scales, zeros;
};

Matrix matrix(Kind kind, int64_t n, int64_t k, bool asymmetric, check::Noise& noise) {
  Matrix made;
  made.linear.kind = kind;
  made.linear.n = n;
  made.linear.k = k;
  made.linear.group = kind == Kind::f32 || kind == Kind::bf16 ? 0 : 32;
  made.linear.asymmetric = asymmetric;
  const PackedSizes sizes = packed_sizes(made.linear);
  made.codes = std::make_unique<Region>(sizes.codes);
  made.scales = std::make_unique<Region>(sizes.scales);
  made.zeros = std::make_unique<Region>(sizes.zeros);
  std::vector<float> weight(static_cast<size_t>(n * k));
  for (float& each : weight) each = noise() * 0.2f;
  uint16_t* scales = reinterpret_cast<uint16_t*>(made.scales->data());
  pack_float(made.linear, weight.data(), SourceType::f32, 0, n, made.codes->data(), scales,
             made.zeros->data());
  made.linear.codes = made.codes->data();
  if (sizes.scales) made.linear.scales = scales;
  if (sizes.zeros) made.linear.zeros = made.zeros->data();
  return made;
}

// A model in which no size divides another.
class Decoder {
 public:
  Decoder() {
    shape_ = {2, 40, 6, 2, 16, 24, VOCAB, 1e-5f, 2.0f, 0.5f, 0.25f};
    const int64_t queries = shape_.heads * shape_.head_dim;
    const int64_t all = queries + 2 * shape_.kv_heads * shape_.head_dim;
    norm_.assign(static_cast<size_t>(shape_.width), 1.25f);
    for (int i = 0; i < shape_.head_dim / 2; ++i) frequencies_.push_back(1.0f / (1.0f + i));
    embed_.resize(static_cast<size_t>(VOCAB * shape_.width));
    for (float& each : embed_) each = noise_();
    for (int64_t i = 0; i < shape_.layers; ++i) {
      Layer layer;
      layer.attention_norm = layer.mlp_norm = norm_.data();
      layer.qkv = add(i ? Kind::f32 : Kind::int8, all, shape_.width, false);
      layer.output = add(Kind::int4, shape_.width, queries, true);
      layer.gate_up = add(Kind::int4, 2 * shape_.ff, shape_.width, false);
      layer.down = add(i ? Kind::ternary3 : Kind::ternary2, shape_.width, shape_.ff, false);
      weights_.layers.push_back(layer);
    }
    weights_.embed_type = SourceType::f32;
    weights_.embed = embed_.data();
    weights_.final_norm = norm_.data();
    weights_.head = add(Kind::int8, VOCAB, shape_.width, false);
    weights_.inverse_frequencies = frequencies_.data();
    for (int64_t i = 0; i < LENGTH; ++i) {
      tokens_.push_back(static_cast<int32_t>(noise_.below(VOCAB)));
    }
  }

  std::unique_ptr<Model> model(int threads, CacheType type, Isa isa) const {
    SparseShape sparse;
    sparse.on = true;
    sparse.dense_len = 1 << 20;
    const Limits limits{80, 16, 2 * CHUNK, 3, threads};
    return std::make_unique<Model>(shape_, weights_, sparse, type, limits, isa);
  }

  Request request(const int32_t* tokens, int64_t rows, int64_t start, const int32_t* chunks,
                  const int32_t* parents = nullptr) const {
    Request made;
    made.span.table.chunks = chunks;
    made.span.start = start;
    made.span.rows = rows;
    made.span.parents = parents;
    made.tokens = tokens;
    made.want = Want::all;
    return made;
  }

  // Logits of all tokens, `size` rows a call.
  std::vector<float> logits(Model& model, int64_t size, const int32_t* chunks) const {
    std::vector<float> out(static_cast<size_t>(LENGTH * VOCAB));
    for (int64_t at = 0; at < LENGTH; at += size) {
      const int64_t rows = at + size < LENGTH ? size : LENGTH - at;
      const Request one = request(tokens_.data() + at, rows, at, chunks);
      model.forward(&one, 1, out.data() + at * VOCAB, nullptr, nullptr);
    }
    return out;
  }

  const std::vector<int32_t>& tokens() const { return tokens_; }

 private:
  Linear add(Kind kind, int64_t n, int64_t k, bool asymmetric) {
    matrices_.push_back(matrix(kind, n, k, asymmetric, noise_));
    return matrices_.back().linear;
  }

  check::Noise noise_{7};
  Shape shape_;
  Weights weights_;
  std::vector<Matrix> matrices_;
  std::vector<float> norm_, frequencies_, embed_;
  std::vector<int32_t> tokens_;
};

const int32_t FIRST[] = {0, 1}, SECOND[] = {2, 1};

}  // namespace

TEST_EACH_ISA(model_calls_and_threads) {
  const Decoder decoder;
  for (CacheType type : {CacheType::f16, CacheType::bf16, CacheType::int8}) {
    const std::vector<float> want = decoder.logits(*decoder.model(1, type, isa), 1, FIRST);
    for (float each : want) CHECK(std::isfinite(each));
    for (int threads : {1, 2, 5}) {
      const auto model = decoder.model(threads, type, isa);
      for (int64_t size : {LENGTH, int64_t{9}, int64_t{1}}) {
        CHECK(decoder.logits(*model, size, SECOND) == want, "threads", threads, "rows", size);
      }
    }
  }
}

TEST_EACH_ISA(model_tree) {
  const Decoder decoder;
  const int32_t* tokens = decoder.tokens().data();
  // The path 0, 2, 3 holds tokens 61, 62, 63; rows 1 and 4 are other continuations.
  const int32_t draft[] = {tokens[61], 1, tokens[62], tokens[63], 2};
  const int32_t parents[] = {-1, -1, 0, 2, 2}, kept[] = {0, 2, 3};
  const auto plain = decoder.model(1, CacheType::f16, isa);
  const std::vector<float> want = decoder.logits(*plain, LENGTH, FIRST);
  const auto same = [&](const float* got, int64_t position) {
    return std::memcmp(got, want.data() + position * VOCAB, VOCAB * sizeof(float)) == 0;
  };
  for (int threads : {1, 3}) {
    const auto model = decoder.model(threads, CacheType::f16, isa);
    std::vector<float> out(static_cast<size_t>(LENGTH * VOCAB));
    const Request before = decoder.request(tokens, 61, 0, FIRST);
    model->forward(&before, 1, out.data(), nullptr, nullptr);
    const Request both[] = {decoder.request(tokens, 4, 0, SECOND),
                            decoder.request(draft, 5, 61, FIRST, parents)};
    model->forward(both, 2, out.data(), nullptr, nullptr);
    CHECK(same(out.data() + 4 * VOCAB, 61) && same(out.data() + 6 * VOCAB, 62) &&
          same(out.data() + 7 * VOCAB, 63), "threads", threads);
    model->accept(1, kept, 3);
    model->copy_chunk(0, 2);
    const Request after = decoder.request(tokens + 64, LENGTH - 64, 64, SECOND);
    model->forward(&after, 1, out.data(), nullptr, nullptr);
    for (int64_t i = 64; i < LENGTH; ++i) CHECK(same(out.data() + (i - 64) * VOCAB, i), "row", i);
    CHECK_THROWS(std::invalid_argument, model->accept(1, kept, 3));
  }
}
