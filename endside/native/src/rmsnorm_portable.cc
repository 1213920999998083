#include <cmath>

#include "rmsnorm.h"

namespace endside {

// Sixteen partial sums: the error grows with width / 16, and a compiler may use what vectors it has.
static float sum_of_squares(const float* x, std::size_t width) {
  constexpr std::size_t lanes = 16;
  float part[lanes] = {};
  std::size_t c = 0;
  for (; c + lanes <= width; c += lanes) {
    for (std::size_t lane = 0; lane < lanes; ++lane) part[lane] += x[c + lane] * x[c + lane];
  }
  for (std::size_t lane = 0; c < width; ++c, ++lane) part[lane] += x[c] * x[c];
  for (std::size_t half = lanes / 2; half > 0; half /= 2) {
    for (std::size_t lane = 0; lane < half; ++lane) part[lane] += part[lane + half];
  }
  return part[0];
}

void rmsnorm_portable(const float* x, const float* weight, float eps, float* out,
                      std::size_t rows, std::size_t width) {
  for (std::size_t row = 0; row < rows; ++row, x += width, out += width) {
    const float mean = sum_of_squares(x, width) / static_cast<float>(width);
    const float scale = 1.0f / std::sqrt(mean + eps);
    for (std::size_t c = 0; c < width; ++c) out[c] = x[c] * scale * weight[c];
  }
}

}  // namespace endside
