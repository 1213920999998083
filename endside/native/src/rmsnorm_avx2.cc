#include <immintrin.h>

#include <cmath>

#include "rmsnorm.h"

namespace endside {

// All ones in the first `count` of eight lanes: masked loads never touch what lies beyond the row.
static __m256i first_lanes(std::size_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
}

static float sum_lanes(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

static float sum_of_squares(const float* x, std::size_t width) {
  __m256 even = _mm256_setzero_ps();
  __m256 odd = _mm256_setzero_ps();
  std::size_t c = 0;
  for (; c + 16 <= width; c += 16) {
    const __m256 a = _mm256_loadu_ps(x + c);
    const __m256 b = _mm256_loadu_ps(x + c + 8);
    even = _mm256_fmadd_ps(a, a, even);
    odd = _mm256_fmadd_ps(b, b, odd);
  }
  for (; c < width; c += 8) {
    const __m256 a = _mm256_maskload_ps(x + c, first_lanes(width - c));
    even = _mm256_fmadd_ps(a, a, even);
  }
  return sum_lanes(_mm256_add_ps(even, odd));
}

void rmsnorm_avx2(const float* x, const float* weight, float eps, float* out, std::size_t rows,
                  std::size_t width) {
  for (std::size_t row = 0; row < rows; ++row, x += width, out += width) {
    const float mean = sum_of_squares(x, width) / static_cast<float>(width);
    const __m256 scale = _mm256_set1_ps(1.0f / std::sqrt(mean + eps));
    for (std::size_t c = 0; c < width; c += 8) {
      const __m256i mask = first_lanes(width - c < 8 ? width - c : 8);
      const __m256 scaled = _mm256_mul_ps(_mm256_maskload_ps(x + c, mask), scale);
      _mm256_maskstore_ps(out + c, mask,
                          _mm256_mul_ps(scaled, _mm256_maskload_ps(weight + c, mask)));
    }
  }
}

}  // namespace endside
