// RMSNorm of every instruction set against double precision, at odd widths, inside fences.
#include "rmsnorm.h"

#include "check.h"

static void agrees(endside::Isa isa, std::size_t rows, std::size_t width) {
  const float eps = 1e-5f;
  check::Noise noise(width);
  check::Fenced<float> x(rows * width, 1), weight(width, 2), out(rows * width, 3);
  for (float& value : x) value = 3.0f * noise();
  for (float& value : weight) value = 1.5f + noise();
  endside::rmsnorm(x.data(), weight.data(), eps, out.data(), rows, width, isa);
  for (std::size_t row = 0; row < rows; ++row) {
    const float* in = &x[row * width];
    double sum = 0;
    for (std::size_t c = 0; c < width; ++c) sum += static_cast<double>(in[c]) * in[c];
    const double scale = 1.0 / std::sqrt(sum / static_cast<double>(width) + eps);
    for (std::size_t c = 0; c < width; ++c) {
      const double want = in[c] * scale * weight[c];
      CHECK_NEAR(out[row * width + c], want, 1e-6 * (1.0 + std::fabs(want)), "width", width);
    }
  }
  CHECK(x.intact() && weight.intact() && out.intact(), "width", width);
}

TEST_EACH_ISA(rmsnorm) {
  for (std::size_t width : {1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 129, 1024}) {
    agrees(isa, 3, width);
  }
}
