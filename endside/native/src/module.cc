// The Python module: checks shapes, releases the interpreter lock, calls the core. C++ exceptions
// become Python ones here and nowhere else.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "isa.h"
#include "rmsnorm.h"

static std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (endside::Isa isa : endside::available_isas()) names.push_back(endside::isa_name(isa));
  return names;
}

static void rmsnorm(Array<const float, 2> x, Array<const float, 1> weight, float eps,
                    Array<float, 2> out, const std::string& isa) {
  const endside::Isa chosen = endside::choose_isa(isa);
  if (weight.shape(0) != x.shape(1)) {
    throw std::invalid_argument("rmsnorm: weight must have as many entries as x has columns");
  }
  if (out.shape(0) != x.shape(0) || out.shape(1) != x.shape(1)) {
    throw std::invalid_argument("rmsnorm: out must have the shape of x");
  }
  nb::gil_scoped_release unlocked;
  endside::rmsnorm(x.data(), weight.data(), eps, out.data(), x.shape(0), x.shape(1), chosen);
}

NB_MODULE(_core, module) {
  module.def("available_isas", &isa_names);
  module.def("rmsnorm", &rmsnorm, nb::arg("x").noconvert(), nb::arg("weight").noconvert(),
             nb::arg("eps"), nb::arg("out").noconvert(), nb::arg("isa"));
  bind_linear(module);
  bind_model(module);
  bind_draft(module);
  bind_fused(module);
}
