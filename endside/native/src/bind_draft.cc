// A draft head as Python sees it: plain tuples in, numpy arrays filled.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>

#include "bind.h"
#include "cache.h"
#include "draft_head.h"

using namespace endside;

static const float* vector_from(nb::handle object, int64_t size, Keep& keep) {
  if (object.is_none()) return nullptr;
  const auto found = array_of<Array<const float, 1>>(object, "vector");
  if (static_cast<int64_t>(found.size()) != size) {
    throw std::invalid_argument("draft head: a vector must have " + std::to_string(size) +
                                " entries, not " + std::to_string(found.size()));
  }
  keep.push_back(nb::borrow(object));
  return found.data();
}

// (width, heads, kv_heads, head_dim, ff, eps, residual and logit scale)
static DraftShape shape_from(const nb::tuple& parts) {
  const auto whole = [&](size_t i) { return nb::cast<int64_t>(parts[i]); };
  const auto real = [&](size_t i) { return static_cast<float>(nb::cast<double>(parts[i])); };
  return {whole(0), whole(1), whole(2), whole(3), whole(4), real(5), real(6), real(7)};
}

// (rows, guesses, blocks, threads)
static DraftLimits limits_from(const nb::tuple& parts) {
  return {nb::cast<int64_t>(parts[0]), nb::cast<int64_t>(parts[1]), nb::cast<int64_t>(parts[2]),
          nb::cast<int>(parts[3])};
}

// (joined, embed_norm, hidden_norm, fc, fc_bias, attention_norm, qkv, output, mlp_norm, gate_up,
//  down, state_norm, final_norm, out, inverse_frequencies, rope_amplitude)
static DraftWeights weights_from(const nb::tuple& parts, const DraftShape& shape, Keep& keep) {
  const auto vector = [&](size_t i) { return vector_from(parts[i], shape.width, keep); };
  const auto matrix = [&](size_t i) { return linear_from(parts[i], keep); };
  DraftWeights weights;
  weights.joined = nb::cast<bool>(parts[0]);
  weights.embed_norm = vector(1);
  weights.hidden_norm = vector(2);
  weights.fc = matrix(3);
  weights.fc_bias = vector(4);
  weights.attention_norm = vector(5);
  weights.qkv = matrix(6);
  weights.output = matrix(7);
  weights.mlp_norm = vector(8);
  weights.gate_up = matrix(9);
  weights.down = matrix(10);
  weights.state_norm = vector(11);
  weights.final_norm = vector(12);
  weights.out = matrix(13);
  weights.inverse_frequencies = vector_from(parts[14], shape.head_dim / 2, keep);
  weights.rope_amplitude = static_cast<float>(nb::cast<double>(parts[15]));
  return weights;
}

namespace {

class BoundDraft {
 public:
  BoundDraft(const nb::tuple& shape, const nb::tuple& weights, const nb::tuple& limits,
             nb::handle model, const std::string& isa)
      : shape_(shape_from(shape)),
        limits_(limits_from(limits)),
        weights_(weights_from(weights, shape_, keep_)),
        head_(shape_, weights_, limits_, shared(model, keep_), choose_isa(isa)) {}

  // embeds, hidden, states (P, C), positions, seen (P), above (P), window: keys and values
  void run(Array<const float, 2> embeds, Array<const float, 2> hidden,
           Array<const int32_t, 1> positions, int64_t at, Array<const int32_t, 1> seen,
           Array<const uint64_t, 1> above, const nb::tuple& window, Array<float, 2> states,
           Array<int32_t, 2> tokens, Array<float, 2> chances) {
    DraftCall call;
    call.rows = static_cast<int64_t>(positions.size());
    const auto wide = [&](const auto& array) {
      return static_cast<int64_t>(array.shape(0)) == call.rows &&
             static_cast<int64_t>(array.shape(1)) == shape_.width;
    };
    need(wide(embeds) && wide(hidden) && wide(states), "embeds, hidden or states");
    need(seen.size() == positions.size() && above.size() == positions.size(), "seen or above");
    need(tokens.shape(0) == chances.shape(0) && tokens.shape(1) == chances.shape(1), "chances");
    call.embeds = embeds.data();
    call.hidden = hidden.data();
    call.positions = positions.data();
    call.at = at;
    call.seen = seen.data();
    call.above = above.data();
    call.keys = room(window[0], 0);
    call.values = room(window[1], 16);
    call.states = states.data();
    call.guesses = static_cast<int64_t>(tokens.shape(0));
    call.width = static_cast<int64_t>(tokens.shape(1));
    call.tokens = tokens.data();
    call.chances = chances.data();
    nb::gil_scoped_release unlocked;
    head_.run(call);
  }

  void project(Array<const float, 2> x, Array<float, 2> out) {
    const int64_t rows = static_cast<int64_t>(x.shape(0));
    need(static_cast<int64_t>(x.shape(1)) == weights_.fc.k && x.shape(0) == out.shape(0) &&
             static_cast<int64_t>(out.shape(1)) == shape_.width,
         "what is projected");
    nb::gil_scoped_release unlocked;
    head_.project(x.data(), rows, out.data());
  }

  void set_timing(bool on) { head_.set_timing(on); }
  std::vector<std::pair<std::string, double>> timing() const { return head_.timing(); }

 private:
  static Model* shared(nb::handle model, Keep& keep) {
    if (model.is_none()) return nullptr;
    keep.push_back(nb::borrow(model));
    return &model_of(model);
  }
  static void need(bool good, const char* what) {
    if (!good) throw std::invalid_argument(std::string("draft head: ") + what + ": another shape");
  }
  float* room(nb::handle object, int64_t more) const {
    const auto found = array_of<Array<float, 1>>(object, "window");
    const int64_t cells = shape_.kv_heads * limits_.blocks * BLOCK * shape_.head_dim;
    need(static_cast<int64_t>(found.size()) >= cells + more, "the window");
    return found.data();
  }

  Keep keep_;
  DraftShape shape_;
  DraftLimits limits_;
  DraftWeights weights_;
  DraftHead head_;
};

}  // namespace

void bind_draft(nb::module_& module) {
  nb::class_<BoundDraft>(module, "DraftHead")
      .def(nb::init<const nb::tuple&, const nb::tuple&, const nb::tuple&, nb::handle,
                    const std::string&>(),
           nb::arg("shape"), nb::arg("weights"), nb::arg("limits"), nb::arg("model").none(),
           nb::arg("isa"))
      .def("run", &BoundDraft::run, nb::arg("embeds").noconvert(), nb::arg("hidden").noconvert(),
           nb::arg("positions").noconvert(), nb::arg("at"), nb::arg("seen").noconvert(),
           nb::arg("above").noconvert(), nb::arg("window"), nb::arg("states").noconvert(),
           nb::arg("tokens").noconvert(), nb::arg("chances").noconvert())
      .def("project", &BoundDraft::project, nb::arg("x").noconvert(), nb::arg("out").noconvert())
      .def("set_timing", &BoundDraft::set_timing, nb::arg("on"))
      .def("timing", &BoundDraft::timing);
}
