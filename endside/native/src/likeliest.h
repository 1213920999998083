// The largest of many logits, and their log-probabilities: what a draft is asked for.
//
//     chances[i] = x[tokens[i]] - max - log(sum of exp(x - max))
//
// Largest first; of equal ones the lower index first, in every instruction set. The sum has an
// order of its own in each, so chances may differ in last bits.
#pragma once

#include <cstdint>

#include "isa.h"

namespace endside {

constexpr int64_t MAX_LIKELIEST = 64;

// x (size) -> tokens, chances (count); 1 <= count <= size, MAX_LIKELIEST.
void likeliest(const float* x, int64_t size, int64_t count, int32_t* tokens, float* chances,
               Isa isa);

void likeliest_portable(const float* x, int64_t size, int64_t count, int32_t* tokens,
                        float* chances);
void likeliest_neon(const float* x, int64_t size, int64_t count, int32_t* tokens, float* chances);
void likeliest_avx2(const float* x, int64_t size, int64_t count, int32_t* tokens, float* chances);
void likeliest_avx512(const float* x, int64_t size, int64_t count, int32_t* tokens,
                      float* chances);

}  // namespace endside
