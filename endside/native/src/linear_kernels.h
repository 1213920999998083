// The two entry points that every instruction set has; linear.cc chooses among them at run time.
#pragma once

#include "linear.h"

namespace endside {

#define ENDSIDE_LINEAR_KERNELS(NAME)                                                              \
  void apply_##NAME(const Linear& linear, const Input& input, int64_t n_begin, int64_t n_end,    \
                    const Epilogue& epilogue, void* scratch);                                    \
  void prepare_##NAME(const Input& input, const float* x, int64_t width, const float* norm_weight, \
                      float eps, int64_t row_begin, int64_t row_end)

ENDSIDE_LINEAR_KERNELS(portable);
ENDSIDE_LINEAR_KERNELS(neon);
ENDSIDE_LINEAR_KERNELS(neon_i8mm);
ENDSIDE_LINEAR_KERNELS(avx2);
ENDSIDE_LINEAR_KERNELS(avx512);
ENDSIDE_LINEAR_KERNELS(amx);  // prepare_amx is prepare_avx512

#undef ENDSIDE_LINEAR_KERNELS

}  // namespace endside
