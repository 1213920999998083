#include <arm_neon.h>

#include <cmath>

#include "rmsnorm.h"

namespace endside {

static float sum_of_squares(const float* x, std::size_t width) {
  float32x4_t part[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
  std::size_t c = 0;
  for (; c + 16 <= width; c += 16) {
    for (std::size_t i = 0; i < 4; ++i) {
      const float32x4_t a = vld1q_f32(x + c + 4 * i);
      part[i] = vfmaq_f32(part[i], a, a);
    }
  }
  float rest = 0;
  for (; c < width; ++c) rest += x[c] * x[c];
  return vaddvq_f32(vaddq_f32(vaddq_f32(part[0], part[1]), vaddq_f32(part[2], part[3]))) + rest;
}

void rmsnorm_neon(const float* x, const float* weight, float eps, float* out, std::size_t rows,
                  std::size_t width) {
  for (std::size_t row = 0; row < rows; ++row, x += width, out += width) {
    const float mean = sum_of_squares(x, width) / static_cast<float>(width);
    const float scale = 1.0f / std::sqrt(mean + eps);
    std::size_t c = 0;
    for (; c + 4 <= width; c += 4) {
      const float32x4_t scaled = vmulq_n_f32(vld1q_f32(x + c), scale);
      vst1q_f32(out + c, vmulq_f32(scaled, vld1q_f32(weight + c)));
    }
    for (; c < width; ++c) out[c] = x[c] * scale * weight[c];
  }
}

}  // namespace endside
