#include <immintrin.h>

#include <cmath>

#include "rmsnorm.h"

namespace endside {

// One bit for each of the sixteen lanes that lie inside the row.
static __mmask16 first_lanes(std::size_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffffu : (1u << count) - 1u);
}

static float sum_of_squares(const float* x, std::size_t width) {
  __m512 even = _mm512_setzero_ps();
  __m512 odd = _mm512_setzero_ps();
  std::size_t c = 0;
  for (; c + 32 <= width; c += 32) {
    const __m512 a = _mm512_loadu_ps(x + c);
    const __m512 b = _mm512_loadu_ps(x + c + 16);
    even = _mm512_fmadd_ps(a, a, even);
    odd = _mm512_fmadd_ps(b, b, odd);
  }
  for (; c < width; c += 16) {
    const __m512 a = _mm512_maskz_loadu_ps(first_lanes(width - c), x + c);
    even = _mm512_fmadd_ps(a, a, even);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
}

void rmsnorm_avx512(const float* x, const float* weight, float eps, float* out, std::size_t rows,
                    std::size_t width) {
  for (std::size_t row = 0; row < rows; ++row, x += width, out += width) {
    const float mean = sum_of_squares(x, width) / static_cast<float>(width);
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(mean + eps));
    for (std::size_t c = 0; c < width; c += 16) {
      const __mmask16 mask = first_lanes(width - c);
      const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + c), scale);
      _mm512_mask_storeu_ps(out + c, mask,
                            _mm512_mul_ps(scaled, _mm512_maskz_loadu_ps(mask, weight + c)));
    }
  }
}

}  // namespace endside
