// RMSNorm over rows of float32:  out[p, c] = x[p, c] / sqrt(mean_c(x[p, c]^2) + eps) * weight[c]
//
// Rows never meet: a row's result depends on that row and the weight alone, whatever else is in the
// batch. Each instruction set sums in an order of its own, so two of them may differ in last bits.
#pragma once

#include <cstddef>

#include "isa.h"

namespace endside {

// x (P, C), weight (C) -> out (P, C), all dense and row-major. out may be x.
void rmsnorm(const float* x, const float* weight, float eps, float* out, std::size_t rows,
             std::size_t width, Isa isa);

void rmsnorm_portable(const float* x, const float* weight, float eps, float* out,
                      std::size_t rows, std::size_t width);
void rmsnorm_neon(const float* x, const float* weight, float eps, float* out, std::size_t rows,
                  std::size_t width);
void rmsnorm_avx2(const float* x, const float* weight, float eps, float* out, std::size_t rows,
                  std::size_t width);
void rmsnorm_avx512(const float* x, const float* weight, float eps, float* out, std::size_t rows,
                    std::size_t width);

}  // namespace endside
