// The core without Python: every instruction set of this machine against double precision, at odd
// widths, with NaN before and after every row's memory. Exit code 0 when all agree.
#include <cmath>
#include <cstdio>
#include <limits>
#include <stdexcept>
#include <vector>

#include "isa.h"
#include "rmsnorm.h"

static const float nan_value = std::numeric_limits<float>::quiet_NaN();

// Reproducible numbers in [-1, 1).
static float noise(unsigned& state) {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / static_cast<float>(1u << 23) - 1.0f;
}

static bool agrees(endside::Isa isa, std::size_t rows, std::size_t width) {
  constexpr std::size_t fence = 16;
  const float eps = 1e-5f;
  unsigned state = static_cast<unsigned>(width) + 1;
  std::vector<float> x(rows * width + 2 * fence, nan_value);
  std::vector<float> weight(width + 2 * fence, nan_value);
  std::vector<float> out(rows * width + 2 * fence, nan_value);
  for (std::size_t i = 0; i < rows * width; ++i) x[fence + i] = 3.0f * noise(state);
  for (std::size_t i = 0; i < width; ++i) weight[fence + i] = 1.5f + noise(state);
  endside::rmsnorm(&x[fence], &weight[fence], eps, &out[fence], rows, width, isa);
  for (std::size_t row = 0; row < rows; ++row) {
    double sum = 0;
    for (std::size_t c = 0; c < width; ++c) sum += std::pow(x[fence + row * width + c], 2.0);
    const double scale = 1.0 / std::sqrt(sum / static_cast<double>(width) + eps);
    for (std::size_t c = 0; c < width; ++c) {
      const double truth = x[fence + row * width + c] * scale * weight[fence + c];
      const double error = std::fabs(out[fence + row * width + c] - truth);
      if (!(error <= 1e-6 * (1.0 + std::fabs(truth)))) return false;
    }
  }
  for (std::size_t i = 0; i < fence; ++i) {
    if (!std::isnan(out[i]) || !std::isnan(out[fence + rows * width + i])) return false;
  }
  return true;
}

static bool refuses_unknown() {
  try {
    endside::choose_isa("mmx");
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

int main() {
  bool all = refuses_unknown();
  for (endside::Isa isa : endside::available_isas()) {
    bool good = true;
    for (std::size_t width : {1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 129, 1024}) {
      good = agrees(isa, 3, width) && good;
    }
    std::printf("rmsnorm %s: %s\n", endside::isa_name(isa), good ? "ok" : "WRONG");
    all = all && good;
  }
  return all ? 0 : 1;
}
