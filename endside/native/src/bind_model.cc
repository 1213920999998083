// The model as Python sees it: plain tuples in, numpy arrays filled.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>

#include "bind.h"
#include "cache_layout.h"
#include "model.h"

using namespace endside;

static const float* norm_from(nb::handle object, int64_t width, Keep& keep, bool buffers) {
  if (!buffers) return nullptr;
  const auto found = array_of<Array<const float, 1>>(object, "norm");
  if (static_cast<int64_t>(found.size()) != width) {
    throw std::invalid_argument("norm: must have as many entries as the model is wide");
  }
  keep.push_back(nb::borrow(object));
  return found.data();
}

// (layers, width, heads, kv_heads, head_dim, ff, vocab, eps, embed, residual and logit scale)
static Shape shape_from(const nb::tuple& parts) {
  const auto whole = [&](size_t i) { return nb::cast<int64_t>(parts[i]); };
  const auto real = [&](size_t i) { return static_cast<float>(nb::cast<double>(parts[i])); };
  return {whole(0), whole(1), whole(2), whole(3), whole(4), whole(5),
          whole(6), real(7),  real(8),  real(9),  real(10)};
}

// () or (init_blocks, window_blocks, topk, dense_len, selection_41, coarse_lse)
static SparseShape sparse_from(const nb::tuple& parts) {
  SparseShape sparse;
  if (parts.size() == 0) return sparse;
  sparse.on = true;
  sparse.init_blocks = nb::cast<int64_t>(parts[0]);
  sparse.window_blocks = nb::cast<int64_t>(parts[1]);
  sparse.topk = nb::cast<int64_t>(parts[2]);
  sparse.dense_len = nb::cast<int64_t>(parts[3]);
  sparse.selection_41 = nb::cast<bool>(parts[4]);
  sparse.coarse_lse = nb::cast<bool>(parts[5]);
  return sparse;
}

// (rows, trees, context, chunks, threads)
static Limits limits_from(const nb::tuple& parts) {
  Limits limits;
  limits.rows = nb::cast<int64_t>(parts[0]);
  limits.trees = nb::cast<int64_t>(parts[1]);
  limits.context = nb::cast<int64_t>(parts[2]);
  limits.chunks = nb::cast<int64_t>(parts[3]);
  limits.threads = nb::cast<int>(parts[4]);
  return limits;
}

static void embed_from(nb::handle object, const Shape& shape, Weights& weights, Keep& keep,
                       bool buffers) {
  if (nb::isinstance<nb::tuple>(object)) {
    weights.embed_packed = linear_from(object, keep, buffers);
    if (weights.embed_packed.n != shape.vocab || weights.embed_packed.k != shape.width) {
      throw std::invalid_argument("embed: must be (vocab, width)");
    }
    return;
  }
  if (!buffers) return;
  const auto found = array_of<nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>>(
      object, "embed");
  if (static_cast<int64_t>(found.shape(0)) != shape.vocab ||
      static_cast<int64_t>(found.shape(1)) != shape.width) {
    throw std::invalid_argument("embed: must be (vocab, width)");
  }
  if (found.dtype() == nb::dtype<float>()) {
    weights.embed_type = SourceType::f32;
  } else if (found.dtype() == nb::dtype<uint16_t>()) {
    weights.embed_type = SourceType::bf16;
  } else if (found.dtype().bits == 16 &&
             found.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float)) {
    weights.embed_type = SourceType::f16;
  } else {
    throw std::invalid_argument("embed: must be float32, float16 or uint16 holding bfloat16");
  }
  weights.embed = found.data();
  keep.push_back(nb::borrow(object));
}

// (embed, [(attention_norm, qkv, output, mlp_norm, gate_up, down)], final_norm, head,
//  inverse_frequencies, rope_amplitude)
static Weights weights_from(const nb::tuple& parts, const Shape& shape, Keep& keep, bool buffers) {
  Weights weights;
  embed_from(parts[0], shape, weights, keep, buffers);
  for (nb::handle each : nb::cast<nb::list>(parts[1])) {
    const nb::tuple layer = nb::cast<nb::tuple>(each);
    weights.layers.push_back({norm_from(layer[0], shape.width, keep, buffers),
                              linear_from(layer[1], keep, buffers),
                              linear_from(layer[2], keep, buffers),
                              norm_from(layer[3], shape.width, keep, buffers),
                              linear_from(layer[4], keep, buffers),
                              linear_from(layer[5], keep, buffers)});
  }
  weights.final_norm = norm_from(parts[2], shape.width, keep, buffers);
  weights.head = linear_from(parts[3], keep, buffers);
  weights.inverse_frequencies = norm_from(parts[4], shape.head_dim / 2, keep, buffers);
  weights.rope_amplitude = static_cast<float>(nb::cast<double>(parts[5]));
  return weights;
}

namespace {

// Requests in the core's form, and what keeps their arrays alive meanwhile.
struct Requests {
  std::vector<Request> list;
  std::vector<Array<const int32_t, 1>> arrays;
  int64_t rows = 0, wanted = 0;

  const int32_t* take(nb::handle object, const char* what) {
    arrays.push_back(array_of<Array<const int32_t, 1>>(object, what));
    return arrays.back().data();
  }

  // (tokens, chunks, start, parents or None, want)
  explicit Requests(const nb::list& given) {
    for (nb::handle each : given) {
      const nb::tuple parts = nb::cast<nb::tuple>(each);
      Request request;
      request.tokens = take(parts[0], "tokens");
      request.span.rows = static_cast<int64_t>(arrays.back().size());
      request.span.table.chunks = take(parts[1], "chunks");
      const int64_t held = static_cast<int64_t>(arrays.back().size()) * CHUNK;
      request.span.start = nb::cast<int64_t>(parts[2]);
      if (!parts[3].is_none()) {
        request.span.parents = take(parts[3], "parents");
        if (static_cast<int64_t>(arrays.back().size()) != request.span.rows) {
          throw std::invalid_argument("forward: a tree needs one parent per token");
        }
      }
      if (reach(request.span) > held) {
        throw std::invalid_argument("forward: the chunks do not hold the new tokens");
      }
      request.want = static_cast<Want>(nb::cast<int>(parts[4]));
      rows += request.span.rows;
      wanted += request.want == Want::all ? request.span.rows : request.want == Want::last;
      list.push_back(request);
    }
  }
};

class BoundModel {
 public:
  BoundModel(const nb::tuple& shape, const nb::tuple& weights, const nb::tuple& sparse, int type,
             const nb::tuple& limits, const std::string& isa)
      : shape_(shape_from(shape)),
        model_(shape_, weights_from(weights, shape_, keep_, true), sparse_from(sparse),
               static_cast<CacheType>(type), limits_from(limits), choose_isa(isa)) {}

  void forward(const nb::list& given, Array<float, 2> out, nb::handle trace, nb::handle visible) {
    const Requests requests(given);
    if (static_cast<int64_t>(out.shape(0)) != requests.wanted ||
        static_cast<int64_t>(out.shape(1)) != shape_.vocab) {
      throw std::invalid_argument("forward: out must be (rows wanted, vocab)");
    }
    float* residual = nullptr;
    if (!trace.is_none()) {
      residual = filled<float>(trace, "trace", shape_.layers + 1, requests.rows, shape_.width);
    }
    int32_t* seen = nullptr;
    if (!visible.is_none()) {
      seen = filled<int32_t>(visible, "visible", shape_.layers, requests.rows, shape_.kv_heads);
    }
    nb::gil_scoped_release unlocked;
    model_.forward(requests.list.data(), static_cast<int64_t>(requests.list.size()), out.data(),
                   residual, seen);
  }

  void accept(int64_t index, Array<const int32_t, 1> rows) {
    nb::gil_scoped_release unlocked;
    model_.accept(index, rows.data(), static_cast<int64_t>(rows.size()));
  }

  void copy_chunk(int32_t source, int32_t target) {
    nb::gil_scoped_release unlocked;
    model_.copy_chunk(source, target);
  }

  // rows (I, width): what tokens behind the vocabulary are
  void set_inputs(Array<const float, 2> rows) {
    if (static_cast<int64_t>(rows.shape(1)) != shape_.width) {
      throw std::invalid_argument("inputs: must be as wide as the model");
    }
    model_.set_inputs(rows.data(), static_cast<int64_t>(rows.shape(0)));
    inputs_ = rows;
  }

  // The bytes of a chunk where they lie, by kind (pieces, bytes); they keep this model alive.
  nb::list chunk(int32_t index) {
    nb::list found;
    for (const Pieces& each : model_.chunk(index)) {
      const int64_t strides[] = {static_cast<int64_t>(each.stride), 1};
      const size_t sizes[] = {each.count, each.bytes};
      found.append(nb::ndarray<nb::numpy, uint8_t, nb::ndim<2>>(each.data, 2, sizes, nb::find(this),
                                                                strides));
    }
    return found;
  }

  Model& model() { return model_; }
  void set_timing(bool on) { model_.set_timing(on); }
  std::vector<std::pair<std::string, double>> timing() const { return model_.timing(); }

 private:
  template <class T>
  static T* filled(nb::handle object, const char* what, int64_t a, int64_t b, int64_t c) {
    const auto found = array_of<Array<T, 3>>(object, what);
    if (static_cast<int64_t>(found.shape(0)) != a || static_cast<int64_t>(found.shape(1)) != b ||
        static_cast<int64_t>(found.shape(2)) != c) {
      throw std::invalid_argument(std::string("forward: ") + what + " has another shape");
    }
    return found.data();
  }

  Keep keep_;
  Array<const float, 2> inputs_;  // what set_inputs was given, kept alive
  Shape shape_;
  Model model_;
};

}  // namespace

endside::Model& model_of(nb::handle object) { return nb::cast<BoundModel&>(object).model(); }

static std::vector<std::pair<std::string, size_t>> memory(const nb::tuple& shape,
                                                          const nb::tuple& weights,
                                                          const nb::tuple& sparse, int type,
                                                          const nb::tuple& limits) {
  Keep keep;
  const Shape sizes = shape_from(shape);
  return Model::memory(sizes, weights_from(weights, sizes, keep, false), sparse_from(sparse),
                       static_cast<CacheType>(type), limits_from(limits));
}

static std::vector<std::string> plan(const nb::tuple& shape, const nb::tuple& weights,
                                     const nb::tuple& sparse, int, const nb::tuple& limits) {
  Keep keep;
  const Shape sizes = shape_from(shape);
  return Model::plan(sizes, weights_from(weights, sizes, keep, false), sparse_from(sparse),
                     limits_from(limits));
}

// How the cells of a cache lie for an instruction set's kernels: "rows" or "tiles".
static const char* cell_order(int type, int64_t head_dim, const std::string& isa) {
  CacheShape shape;
  shape.layers = shape.kv_heads = 1;
  shape.head_dim = head_dim;
  shape.type = static_cast<CacheType>(type);
  return CacheLayout(shape, choose_isa(isa)).order == Order::tiles ? "tiles" : "rows";
}

void bind_model(nb::module_& module) {
  module.def("cell_order", &cell_order);
  nb::class_<BoundModel>(module, "Model")
      .def(nb::init<const nb::tuple&, const nb::tuple&, const nb::tuple&, int, const nb::tuple&,
                    const std::string&>(),
           nb::arg("shape"), nb::arg("weights"), nb::arg("sparse"), nb::arg("cache"),
           nb::arg("limits"), nb::arg("isa"))
      .def("forward", &BoundModel::forward, nb::arg("requests"), nb::arg("out").noconvert(),
           nb::arg("trace").none(), nb::arg("visible").none())
      .def("accept", &BoundModel::accept, nb::arg("index"), nb::arg("rows").noconvert())
      .def("copy_chunk", &BoundModel::copy_chunk, nb::arg("source"), nb::arg("target"))
      .def("chunk", &BoundModel::chunk, nb::arg("index"))
      .def("set_inputs", &BoundModel::set_inputs, nb::arg("rows").noconvert())
      .def("set_timing", &BoundModel::set_timing, nb::arg("on"))
      .def("timing", &BoundModel::timing);
  module.def("memory", &memory, nb::arg("shape"), nb::arg("weights"), nb::arg("sparse"),
             nb::arg("cache"), nb::arg("limits"));
  module.def("plan", &plan, nb::arg("shape"), nb::arg("weights"), nb::arg("sparse"),
             nb::arg("cache"), nb::arg("limits"));
}
