#include "quantize.h"

#include <cmath>

#include "linear_half.h"
#include "linear_layout.h"

namespace endside {

constexpr float LARGEST_F16 = 65504.0f;

static uint16_t round_scale(float scale, ScaleType type) {
  if (type == ScaleType::bf16) return to_bf16(scale);
  return to_f16(scale < LARGEST_F16 ? scale : LARGEST_F16);
}

static float scale_value(uint16_t scale, ScaleType type) {
  return type == ScaleType::bf16 ? from_bf16(scale) : from_f16(scale);
}

static float largest_magnitude(const float* w, int64_t count) {
  float most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::fabs(w[i]) > most ? std::fabs(w[i]) : most;
  return most;
}

// The magnitude that every weight other than 0 has, or the mean of all.
static float ternary_scale(const float* w, int64_t count) {
  const float most = largest_magnitude(w, count);
  bool exact = true;
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    exact = exact && (w[i] == 0 || std::fabs(w[i]) == most);
    sum += std::fabs(w[i]);
  }
  return exact ? most : static_cast<float>(sum / static_cast<double>(count));
}

// scale and, when asymmetric, the smallest weight (0 at most), which the zero comes from.
static float choose_scale(const Linear& shape, const float* w, int64_t count, float* smallest) {
  const bool ternary = shape.kind == Kind::ternary2 || shape.kind == Kind::ternary3;
  if (ternary) return ternary_scale(w, count);
  if (!shape.asymmetric) {
    const int32_t reach = largest_code(shape.kind) / 2;  // 7 or 127
    return largest_magnitude(w, count) / static_cast<float>(reach);
  }
  float low = 0, high = 0;
  for (int64_t i = 0; i < count; ++i) {
    low = w[i] < low ? w[i] : low;
    high = w[i] > high ? w[i] : high;
  }
  *smallest = low;
  return (high - low) / static_cast<float>(largest_code(shape.kind));
}

GroupCode round_group(const Linear& shape, const float* w, int64_t count, uint8_t* codes) {
  float smallest = 0;
  GroupCode result = {0, static_cast<uint8_t>(symmetric_zero(shape.kind))};
  if (count > 0) result.scale = round_scale(choose_scale(shape, w, count, &smallest),
                                            shape.scale_type);
  const float scale = scale_value(result.scale, shape.scale_type);
  const float top = static_cast<float>(largest_code(shape.kind));
  const auto bounded = [top](float code) { return code < 0 ? 0.0f : code > top ? top : code; };
  const bool divide = scale > 0;
  if (shape.asymmetric && smallest < 0 && divide) {
    result.zero = static_cast<uint8_t>(bounded(std::nearbyint(-smallest / scale)));
  } else if (shape.asymmetric) {
    result.zero = 0;
  }
  const float zero = result.zero;
  for (int64_t i = 0; i < shape.group; ++i) {
    const float steps = i < count && divide ? std::nearbyint(w[i] / scale) : 0.0f;
    codes[i] = static_cast<uint8_t>(bounded(steps + zero));
  }
  return result;
}

}  // namespace endside
