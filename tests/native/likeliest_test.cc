// The likeliest tokens of every instruction set against a full sort, at odd sizes and with ties.
#include "likeliest.h"

#include <algorithm>
#include <numeric>

#include "check.h"

static void agrees(endside::Isa isa, int64_t size, int64_t count, float step) {
  check::Noise noise(static_cast<unsigned>(size));
  check::Fenced<float> x(static_cast<std::size_t>(size), 1);
  for (float& value : x) {
    value = 20.0f * noise();
    if (step > 0) value = std::round(value / step) * step;
  }
  std::vector<int32_t> order(static_cast<std::size_t>(size));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return x[static_cast<std::size_t>(a)] > x[static_cast<std::size_t>(b)];
  });
  const double peak = x[static_cast<std::size_t>(order[0])];
  double total = 0;
  for (const float value : x) total += std::exp(static_cast<double>(value) - peak);
  check::Fenced<int32_t> tokens(static_cast<std::size_t>(count), 2);
  check::Fenced<float> chances(static_cast<std::size_t>(count), 3);
  endside::likeliest(x.data(), size, count, tokens.data(), chances.data(), isa);
  for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i) {
    CHECK(tokens[i] == order[i], "size", size, "place", i, "step", step);
    const double want = x[static_cast<std::size_t>(order[i])] - peak - std::log(total);
    CHECK_NEAR(chances[i], want, 1e-5 * (1.0 + std::fabs(want)), "size", size);
  }
  CHECK(x.intact() && tokens.intact() && chances.intact(), "size", size);
}

TEST_EACH_ISA(likeliest) {
  for (int64_t size : {1, 2, 7, 15, 16, 17, 63, 64, 65, 129, 1000, 20000}) {
    for (int64_t count : {int64_t{1}, int64_t{10}, endside::MAX_LIKELIEST}) {
      for (float step : {0.0f, 1.0f, 1000.0f}) agrees(isa, size, std::min(size, count), step);
    }
  }
}
