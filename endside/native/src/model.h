// A whole decoder behind one call: token ids in, logits out, every buffer made at construction.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "attention.h"
#include "linear.h"
#include "pool.h"

namespace endside {

struct Shape {
  int64_t layers = 0, width = 0, heads = 0, kv_heads = 0, head_dim = 0, ff = 0, vocab = 0;
  float norm_eps = 1e-6f;
  float embed_scale = 1, residual_scale = 1, logit_scale = 1;  // muP: x E, x increments, x logits
};

struct Layer {
  const float* attention_norm = nullptr;  // (C)
  Linear qkv, output;                     // rows q | k | v;  (C, H * D)
  const float* mlp_norm = nullptr;        // (C)
  Linear gate_up, down;                   // blocks of 8 gate rows, 8 up rows, ...;  (C, F)
};

struct Weights {  // views; the caller keeps the memory alive
  SourceType embed_type = SourceType::bf16;
  const void* embed = nullptr;   // (V, C) plain rows, or null: rows of embed_packed are unpacked
  Linear embed_packed;
  const float* inputs = nullptr;  // (I, C) what enters the first layer for tokens V .. V + I - 1,
  int64_t input_count = 0;        // which can be read and never be written
  std::vector<Layer> layers;
  const float* final_norm = nullptr;
  Linear head;                   // (V, C)
  const float* inverse_frequencies = nullptr;  // (D / 2)
  float rope_amplitude = 1;
};

struct Limits {
  int64_t rows = 512;      // rows of one call at most (prefill chunk)
  int64_t trees = 64;      // rows of draft trees among them at most
  int64_t context = 4096;  // longest sequence
  int64_t chunks = 4;      // chunks in the pool
  int threads = 1;
};

enum class Want : int32_t { none = 0, last = 1, all = 2 };

struct Request {           // one sequence's rows in this step
  Span span;               // tree_keys/tree_values are filled by the model; the table names the
                           // chunks of the new tokens too
  const int32_t* tokens = nullptr;
  Want want = Want::last;
};

// Tokens its sequence may hold once these rows are part of it: a tree counts by its depth.
int64_t reach(const Span& span);

class Model {
 public:
  struct State;
  Model(const Shape&, const Weights&, const SparseShape&, CacheType, const Limits&, Isa);
  ~Model();
  // Bytes it will allocate, by name, without allocating: {"cache", ...}, {"activations", ...}, ...
  static std::vector<std::pair<std::string, size_t>> memory(const Shape&, const Weights&,
                                                            const SparseShape&, CacheType,
                                                            const Limits&);
  // The steps of one decode call in order, as `inspect` prints them; needs no buffers either.
  static std::vector<std::string> plan(const Shape&, const Weights&, const SparseShape&,
                                       const Limits&);
  // Runs all rows; logits (rows wanted, V) in order. trace: null or (L + 1, P, C), the residual
  // stream entering each layer and leaving the last. visible: null or (L, P, G).
  void forward(const Request* requests, int64_t count, float* logits, float* trace,
               int32_t* visible);
  // Seconds that rank 0 spent in each stage since timing was switched on, by name.
  void set_timing(bool on);
  std::vector<std::pair<std::string, double>> timing() const;
  // After a tree: keep these rows (root to leaf) of request `index` of the last forward.
  void accept(int64_t index, const int32_t* rows, int64_t count);
  void copy_chunk(int32_t source, int32_t target);
  // Tokens behind the vocabulary: rows (count, C), which the caller keeps alive.
  void set_inputs(const float* rows, int64_t count);
  // The bytes of one chunk where they lie: to be read or filled between calls.
  std::vector<Pieces> chunk(int32_t index);
  // Its threads, lent between its own calls to what runs beside it.
  int threads() const;
  void together(const std::function<void(Team&)>& fn);

 private:
  std::unique_ptr<State> state_;
};

}  // namespace endside
