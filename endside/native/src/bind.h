// What the binding files share: arrays as they come from numpy, and packed matrices made of them.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <vector>

#include "linear.h"

namespace nb = nanobind;

// Dense arrays of the processor's memory; nothing is converted on the way in.
template <class T, int Axes>
using Array = nb::ndarray<T, nb::ndim<Axes>, nb::c_contig, nb::device::cpu>;

template <class A>
A array_of(nb::handle object, const char* what) {
  try {
    return nb::cast<A>(object, false);
  } catch (const nb::cast_error&) {
    throw std::invalid_argument(std::string(what) + ": the array has another type or layout");
  }
}

// Python objects whose memory a C++ view points into.
using Keep = std::vector<nb::object>;

// (kind, n, k, group, asymmetric, scale_type, codes, scales, zeros); arrays may be None when
// `buffers` is false: then only the sizes matter.
endside::Linear linear_from(nb::handle parts, Keep& keep, bool buffers = true);

namespace endside {
class Model;
}
// The model inside a bound one.
endside::Model& model_of(nb::handle object);

void bind_linear(nb::module_& module);
void bind_model(nb::module_& module);
void bind_draft(nb::module_& module);
void bind_fused(nb::module_& module);
