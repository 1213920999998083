#include "rope.h"

#include <cmath>

namespace endside {

void rope_table(int64_t position, const float* inverse_frequencies, int64_t half, float amplitude,
                float* cosine, float* sine) {
  for (int64_t i = 0; i < half; ++i) {
    const float angle = static_cast<float>(position) * inverse_frequencies[i];
    cosine[i] = static_cast<float>(std::cos(static_cast<double>(angle))) * amplitude;
    sine[i] = static_cast<float>(std::sin(static_cast<double>(angle))) * amplitude;
  }
}

void rope_rotate(float* x, int64_t heads, int64_t head_dim, const float* cosine,
                 const float* sine) {
  const int64_t half = head_dim / 2;
  for (int64_t head = 0; head < heads; ++head, x += head_dim) {
    for (int64_t i = 0; i < half; ++i) {
      const float low = x[i], high = x[i + half];
      x[i] = low * cosine[i] - high * sine[i];
      x[i + half] = high * cosine[i] + low * sine[i];
    }
  }
}

}  // namespace endside
