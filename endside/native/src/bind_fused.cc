// The passes of a training step. Memory comes as addresses, because numpy knows no bfloat16:
// `native/fused.py` has checked what lies there.
#include <nanobind/stl/string.h>

#include <string>

#include "bind.h"
#include "fused.h"
#include "gemm.h"

using namespace endside;

namespace {

using Address = uintptr_t;
template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// One call on the borrowed team, the interpreter unlocked.
template <class A, void (*FusedKernels::*KERNEL)(const A&, int64_t)>
void run(const A& arguments, int64_t units, int threads, const std::string& isa) {
  struct Call {
    const A& arguments;
    void (*kernel)(const A&, int64_t);
  };
  const Call call{arguments, fused_kernels(choose_isa(isa)).*KERNEL};
  nb::gil_scoped_release unlocked;
  run_fused(
      units, threads,
      [](const void* data, int64_t unit) {
        const Call& one = *static_cast<const Call*>(data);
        one.kernel(one.arguments, unit);
      },
      &call);
}

void norm_forward(Address x, Address branch, Address weight, Address out, Address y, Address r,
                  float scale, float eps, int64_t rows, int64_t width, bool narrow_branch,
                  bool narrow_y, int threads, const std::string& isa) {
  const NormForward a{at<float>(x), at<float>(weight), at<void>(branch), at<float>(out),
                      at<float>(r), at<void>(y),       scale,            eps,
                      rows,         width,             narrow_branch,    narrow_y};
  run<NormForward, &FusedKernels::norm_forward>(a, units_of(rows, FUSED_ROWS), threads, isa);
}

void norm_backward(Address x, Address weight, Address r, Address beside, Address dy, Address to_x,
                   Address to_branch, Address to_weight, float scale, int64_t rows, int64_t width,
                   bool narrow_branch, bool narrow_y, int threads, const std::string& isa) {
  const NormBackward a{at<float>(x),      at<float>(weight),    at<float>(r), at<float>(beside),
                       at<void>(dy),      at<float>(to_x),      at<void>(to_branch),
                       at<float>(to_weight), scale, rows, width, narrow_branch, narrow_y};
  run<NormBackward, &FusedKernels::norm_backward>(a, units_of(rows, FUSED_ROWS), threads, isa);
}

void gate_forward(Address gate, Address up, Address out, int64_t count, bool narrow, int threads,
                  const std::string& isa) {
  const Gate a{at<void>(gate), at<void>(up), nullptr, at<void>(out), nullptr, nullptr, count,
               narrow};
  run<Gate, &FusedKernels::gate_forward>(a, units_of(count, FUSED_NUMBERS), threads, isa);
}

void gate_backward(Address gate, Address up, Address dout, Address to_gate, Address to_up,
                   int64_t count, bool narrow, int threads, const std::string& isa) {
  const Gate a{at<void>(gate),    at<void>(up),    at<void>(dout), nullptr,
               at<void>(to_gate), at<void>(to_up), count,          narrow};
  run<Gate, &FusedKernels::gate_backward>(a, units_of(count, FUSED_NUMBERS), threads, isa);
}

void head_rows(Address logits, Address targets, Address losses, int64_t rows, int64_t width,
               bool wanted, bool narrow, int threads, const std::string& isa) {
  const HeadRows a{at<void>(logits), at<int64_t>(targets), at<float>(losses), rows,
                   width,            wanted,               narrow};
  run<HeadRows, &FusedKernels::head_rows>(a, rows, threads, isa);
}

void turn(Address x, Address cos, Address sin, Address out, int64_t rows, int64_t heads,
          int64_t width, int64_t step, float direction, bool narrow, int threads,
          const std::string& isa) {
  const Turn a{at<void>(x), at<float>(cos), at<float>(sin), at<void>(out), rows,
               heads,       width,          step,           direction,     narrow};
  run<Turn, &FusedKernels::turn>(a, units_of(rows, FUSED_ROWS), threads, isa);
}

void softmax_forward(Address scores, Address from, Address to, Address weights, Address lse,
                     int64_t heads, int64_t rows, int64_t keys, float scale, bool narrow,
                     int threads, const std::string& isa) {
  const SoftmaxForward a{at<float>(scores), at<int64_t>(from), at<int64_t>(to), at<void>(weights),
                         at<float>(lse),    heads,             rows,            keys,
                         scale,             narrow};
  const int64_t units = units_of(heads * rows, FUSED_ROWS);
  run<SoftmaxForward, &FusedKernels::softmax_forward>(a, units, threads, isa);
}

void softmax_backward(Address scores, Address to_weights, Address lse, Address mean, Address from,
                      Address to, Address weights, Address to_scores, int64_t heads, int64_t rows,
                      int64_t keys, float scale, bool narrow, int threads,
                      const std::string& isa) {
  const SoftmaxBackward a{at<float>(scores), at<float>(to_weights), at<float>(lse),
                          at<float>(mean),   at<int64_t>(from),     at<int64_t>(to),
                          at<void>(weights), at<void>(to_scores),   heads,
                          rows,              keys,                  scale,
                          narrow};
  const int64_t units = units_of(heads * rows, FUSED_ROWS);
  run<SoftmaxBackward, &FusedKernels::softmax_backward>(a, units, threads, isa);
}

// c (rows, columns) = a b; `inside`: a line of the factor lies side by side along the depth.
void product(Address a, int64_t a_step, bool a_inside, Address b, int64_t b_step, bool b_inside,
             Address c, int64_t step, int64_t rows, int64_t columns, int64_t depth, int threads,
             const std::string& isa) {
  const Gemm call{{at<float>(a), a_step, a_inside},
                  {at<float>(b), b_step, b_inside},
                  at<float>(c),
                  step,
                  rows,
                  columns,
                  depth};
  const Isa set = choose_isa(isa);
  nb::gil_scoped_release unlocked;
  gemm(call, threads, set);
}

bool product_able(const std::string& isa) { return gemm_able(choose_isa(isa)); }

}  // namespace

void bind_fused(nb::module_& module) {
  module.attr("fused_rows") = FUSED_ROWS;
  module.def("fused_team", &fused_team);
  module.def("flush_denormals", &flush_denormals);
  module.def("fused_norm_forward", &norm_forward);
  module.def("fused_norm_backward", &norm_backward);
  module.def("fused_gate_forward", &gate_forward);
  module.def("fused_gate_backward", &gate_backward);
  module.def("fused_head_rows", &head_rows);
  module.def("fused_turn", &turn);
  module.def("fused_softmax_forward", &softmax_forward);
  module.def("fused_softmax_backward", &softmax_backward);
  module.def("fused_product", &product);
  module.def("product_able", &product_able);
}
