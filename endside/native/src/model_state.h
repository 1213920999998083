// What a model owns, and the step that all its threads run: private to model*.cc.
#pragma once

#include <array>
#include <chrono>
#include <mutex>

#include "model.h"
#include "region.h"

namespace endside {

enum class Stage { embed, prepare, qkv, rope, attention, output, gate_up, down, head, count };
constexpr int STAGES = static_cast<int>(Stage::count);
const char* stage_name(Stage stage);

// Scratch of one thread.
struct Scratch {
  uint8_t* tile = nullptr;   // for apply
  uint8_t* input = nullptr;  // one row, prepared
};

// Arrays of the residual stream and what hangs on it. R = Limits::rows.
struct Buffers {
  float* x = nullptr;         // (R, C)
  float* qkv = nullptr;       // (R, (H + 2G) * D)
  float* q = nullptr;         // (R, H, D) rotated
  float* attended = nullptr;  // (R, H, D)
  float* gated = nullptr;     // (R, F)
  float* angles = nullptr;    // (R, D) cosines, then sines
  uint8_t* input = nullptr;   // rows prepared for the matrix at hand
  std::vector<Scratch> scratch;
};
Buffers carve_buffers(Carver& carver, const Shape& shape, const Weights& weights,
                      const Limits& limits);
size_t buffers_bytes(const Shape& shape, const Weights& weights, const Limits& limits);

// Keys and values of draft rows, (L, trees, G, D) each, until `accept` or the next forward.
struct Trees {
  float* keys = nullptr;
  float* values = nullptr;
};
Trees carve_trees(Carver& carver, const Shape& shape, const Limits& limits);
size_t trees_bytes(const Shape& shape, const Limits& limits);

CacheShape cache_shape(const Shape& shape, const SparseShape& sparse, CacheType type);
AttentionShape attention_shape(const Shape& shape, const SparseShape& sparse);
size_t attention_bytes(const Shape& shape, const SparseShape& sparse, CacheType type,
                       const Limits& limits);
// Throws std::invalid_argument with the name of the first part that does not fit the shape.
void check_parts(const Shape& shape, const Weights& weights, const Limits& limits);

// The codes that this thread reads in a step of few rows, product by product, and at last those
// that it starts the next step with.
std::vector<Piece> make_way(const Weights& weights, const Team& team);

// A tree of the last forward: what accept needs of it.
struct Draft {
  int64_t request = 0, start = 0, rows = 0;
  int64_t offset = 0;  // of its first row among the rows of all trees
  size_t table = 0;    // where its table starts in Work::tables
};

// One call of forward, spelled out row by row. Its vectors are reserved once.
struct Work {
  std::vector<int64_t> first;      // first row of each request
  std::vector<Span> spans;         // (L, requests): the rows beside the cache differ by layer
  std::vector<int32_t> tokens, positions;
  std::vector<int32_t> wanted;     // rows whose logits are asked for, ascending
  std::vector<Draft> drafts;
  std::vector<int32_t> tables;     // chunks of the drafts, copied: accept comes later
  float* logits = nullptr;
  float* trace = nullptr;
  int32_t* visible = nullptr;
  int64_t rows() const { return static_cast<int64_t>(tokens.size()); }
  int64_t requests() const { return static_cast<int64_t>(first.size()); }
  const Span* layer_spans(int64_t layer) const { return spans.data() + layer * requests(); }
};

struct Model::State {
  State(const Shape&, const Weights&, const SparseShape&, CacheType, const Limits&, Isa);
  // Reads and checks the requests; throws before anything is computed.
  void lay_out(const Request* requests, int64_t count);
  void check(const Request& request) const;
  void add(const Request& request);
  void add_spans(const Request* requests, int64_t count);
  int64_t tree_stride() const { return limits.trees * shape.kv_heads * shape.head_dim; }

  const Shape shape;
  Weights weights;  // only `inputs` ever changes
  const AttentionShape attention;
  const Limits limits;
  const Isa isa;
  Region cache_memory, activations, tree_memory, attention_memory;
  Cache cache;
  Buffers buffers;
  Trees trees;
  Work work;
  std::vector<std::vector<Piece>> ways;  // by thread: its codes of every product of a step
  bool timed = false;
  std::array<double, STAGES> seconds{};
  std::mutex busy;
  Pool pool;  // last: its threads end before what they use
};

// The decoder step as one thread of the team sees it.
class Forward {
 public:
  Forward(Model::State& state, Team& team);
  void run();

 private:
  void embed();
  void layer(int64_t index);
  void rotate_queries();
  void store_keys(int64_t index);
  void store_span(int64_t layer, int64_t request, int64_t head);
  void head();
  void gather_wanted();
  void copy_trace(int64_t index);
  // Rows of x (P, width), normed first if there is a norm, in the form `linear` wants.
  Input prepared(const Linear& linear, const float* x, int64_t rows, int64_t width,
                 const float* norm);
  // The team's whole product; complete after it. Products run in the order of the ways.
  void multiply(Stage stage, const Linear& linear, Input input, const Epilogue& epilogue);
  void lap(Stage stage);

  Model::State& state_;
  Team& team_;
  const Shape& shape_;
  const Buffers& buffers_;
  const Work& work_;
  const Scratch& scratch_;
  const std::vector<Piece>& way_;
  Ahead ahead_;
  size_t product_ = 0;  // of the way: the next
  const int64_t rows_;
  const bool timed_;
  std::chrono::steady_clock::time_point last_;
};

// Row `token` of the embedding times embed_scale -> out (C).
void embed_row(const Weights& weights, const Shape& shape, int32_t token, float* out);

}  // namespace endside
