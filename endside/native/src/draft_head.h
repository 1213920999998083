// One decoder layer that goes on from what a model has just thought: a draft head's step, natively.
//
// The plain form, with the equations, is endside/engine/drafts/head.py. A call runs some rows, pairs
// of an embedding and a hidden state, and says what the last of them guess:
//
//     pair      [norm embedding ; norm hidden]
//     joined    fc of the pair is the stream, and the layer reads it normed (EAGLE-2, MTP)
//     else      hidden is the stream, and the layer reads the pair (EAGLE-3)
//     rows      see the first `seen` rooms of the window, and of those behind them the ones whose
//               bit is set in `above`: a text's pairs the pairs before them, a tree's nodes their
//               own path
//
// The window belongs to the caller: one for each sequence, rooms in blocks of 64. It is float32 and
// so short that nothing is gained from fewer bytes.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "linear.h"

namespace endside {

class Model;

struct DraftShape {
  int64_t width = 0, heads = 0, kv_heads = 0, head_dim = 0, ff = 0;
  float norm_eps = 1e-6f;
  float residual_scale = 1, logit_scale = 1;
};

struct DraftWeights {  // views; the caller keeps the memory alive. A norm that is null does nothing
  bool joined = true;
  const float* embed_norm = nullptr;   // (C)
  const float* hidden_norm = nullptr;  // (C)
  Linear fc;                           // joined: (C, 2C); else what `project` multiplies by
  const float* fc_bias = nullptr;      // (C), joined only
  const float* attention_norm = nullptr;  // (C), joined only
  Linear qkv, output;                     // rows q | k | v of C or 2C columns;  (C, H * D)
  const float* mlp_norm = nullptr;
  Linear gate_up, down;                   // as in the model
  const float* state_norm = nullptr;      // of what the layer leaves
  const float* final_norm = nullptr;      // of that, before `out`
  Linear out;                             // (Vd, C)
  const float* inverse_frequencies = nullptr;  // (D / 2)
  float rope_amplitude = 1;
};

struct DraftLimits {
  int64_t rows = 256;     // of a call at most
  int64_t guesses = 64;   // rows of them that guess
  int64_t blocks = 21;    // of 64 rooms, in a window
  int threads = 1;        // without a model to share a team with
};

struct DraftCall {
  int64_t rows = 0;
  const float* embeds = nullptr;       // (P, C)
  const float* hidden = nullptr;       // (P, C)
  const int32_t* positions = nullptr;  // (P) in the text, for the rotation
  int64_t at = 0;                      // room of the first row in the window
  const int32_t* seen = nullptr;       // (P)
  const uint64_t* above = nullptr;     // (P)
  float* keys = nullptr;               // (G, blocks, D, 64)
  float* values = nullptr;             // (G, blocks, 64, D), and 16 numbers more
  float* states = nullptr;             // (P, C) what the layer leaves
  int64_t guesses = 0, width = 0;      // the last rows, and tokens of each
  int32_t* tokens = nullptr;           // (guesses, width), likeliest first
  float* chances = nullptr;            // (guesses, width) log-probabilities
};

class DraftHead {
 public:
  // shared: a model whose threads it works with, between the model's own calls; may be null.
  DraftHead(const DraftShape&, const DraftWeights&, const DraftLimits&, Model* shared, Isa);
  ~DraftHead();
  // Throws std::invalid_argument before anything is computed.
  void run(const DraftCall& call);
  // x (P, K) -> out (P, C): fc alone, where the pair does not go through it.
  void project(const float* x, int64_t rows, float* out);
  // Seconds of the layer, of the output product, and of finding the likeliest, since switched on.
  void set_timing(bool on);
  std::vector<std::pair<std::string, double>> timing() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace endside
