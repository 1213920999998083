// One matrix and the rows it multiplies, with their truth: integers, and the few float operations
// that linear.h promises, done here one weight at a time from unpacked codes.
#pragma once

#include <memory>

#include "check.h"
#include "linear.h"

namespace check {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A 16-bit scale and what it means: +-1.m times 2^e, the same number in both types.
struct Scale {
  uint16_t f16, bf16;
  float value;
};

inline Scale random_scale(Noise& noise) {
  const uint32_t exponent = static_cast<uint32_t>(noise.below(9)), mantissa = noise.bits() & 127;
  const uint32_t sign = noise.below(8) == 0;  // 2^-12 .. 2^-4
  const float value = bits_to_float(sign << 31 | (115 + exponent) << 23 | mantissa << 16);
  return {static_cast<uint16_t>(sign << 15 | (3 + exponent) << 10 | mantissa << 3),
          static_cast<uint16_t>(sign << 15 | (115 + exponent) << 7 | mantissa), value};
}

// Rows of x in groups of very different size; every fifth group is zero, every seventh all +-most.
inline void fill_rows(Noise& noise, float* x, int64_t rows, int64_t width, int64_t group) {
  for (int64_t i = 0; i < rows * width; ++i) {
    const int64_t g = i % width / group + i / width * 3;
    const float size = std::ldexp(1.0f, static_cast<int>(g * 7 % 13) - 6);
    const float value = noise();
    x[i] = g % 5 == 4 ? 0.0f : g % 7 == 6 ? (value < 0 ? -size : size) : value * size;
  }
}

struct Matrix {
  endside::Linear shape;           // the packed view
  int64_t groups = 0;
  std::vector<int32_t> code, zero;  // (n, k), (n, groups)
  std::vector<float> scale;         // (n, groups)
  std::vector<float> weight;        // float kinds (n, k), as stored
  std::unique_ptr<Fenced<uint8_t>> codes, zeros;
  std::unique_ptr<Fenced<uint16_t>> scales;

  bool intact() {
    return codes->intact() && (!scales || scales->intact()) && (!zeros || zeros->intact());
  }
};

inline int32_t top_code(endside::Kind kind) {
  return kind == endside::Kind::int8 ? 255 : kind == endside::Kind::int4 ? 15 : 2;
}
inline int32_t middle_code(endside::Kind kind) {
  return kind == endside::Kind::int8 ? 128 : kind == endside::Kind::int4 ? 8 : 1;
}

inline void allocate(Matrix& m) {
  const endside::PackedSizes sizes = endside::packed_sizes(m.shape);
  m.codes = std::make_unique<Fenced<uint8_t>>(sizes.codes);
  m.shape.codes = m.codes->data();
  if (sizes.scales) m.scales = std::make_unique<Fenced<uint16_t>>(sizes.scales / 2);
  if (sizes.scales) m.shape.scales = m.scales->data();
  if (sizes.zeros) m.zeros = std::make_unique<Fenced<uint8_t>>(sizes.zeros);
  if (sizes.zeros) m.shape.zeros = m.zeros->data();
}

// extreme: every code is the largest, so that sums which could overflow do.
inline Matrix make_codes(const endside::Linear& shape, Noise& noise, bool extreme = false) {
  Matrix m;
  m.shape = shape;
  m.groups = (shape.k + shape.group - 1) / shape.group;
  const int32_t top = top_code(shape.kind);
  std::vector<uint8_t> code_bytes, zero_bytes;
  std::vector<uint16_t> scale_bits;
  for (int64_t i = 0; i < shape.n * shape.k; ++i) {
    m.code.push_back(extreme ? top : static_cast<int32_t>(noise.below(top + 1)));
    code_bytes.push_back(static_cast<uint8_t>(m.code.back()));
  }
  for (int64_t i = 0; i < shape.n * m.groups; ++i) {
    const Scale scale = random_scale(noise);
    const bool half = shape.scale_type == endside::ScaleType::f16;
    scale_bits.push_back(half ? scale.f16 : scale.bf16);
    m.scale.push_back(scale.value);
    const int32_t zero = static_cast<int32_t>(noise.below(top + 1));
    m.zero.push_back(shape.asymmetric ? (extreme ? 0 : zero) : middle_code(shape.kind));
    zero_bytes.push_back(static_cast<uint8_t>(m.zero.back()));
  }
  allocate(m);
  const int64_t middle = shape.n / 2 / endside::ROWS * endside::ROWS;  // two calls share the work
  for (const auto& rows : {std::pair<int64_t, int64_t>{0, middle}, {middle, shape.n}}) {
    if (rows.first == rows.second) continue;
    endside::pack_codes(shape, code_bytes.data(), scale_bits.data(),
                        shape.asymmetric ? zero_bytes.data() : nullptr, rows.first, rows.second,
                        m.codes->data(), m.scales->data(),
                        shape.asymmetric ? m.zeros->data() : nullptr);
  }
  return m;
}

inline Matrix make_floats(const endside::Linear& shape, Noise& noise) {
  Matrix m;
  m.shape = shape;
  for (int64_t i = 0; i < shape.n * shape.k; ++i) {
    float value = noise();
    if (shape.kind == endside::Kind::bf16) {  // of the form it is stored in
      value = static_cast<float>(static_cast<int>(value * 128)) / 128;
    }
    m.weight.push_back(value);
  }
  allocate(m);
  endside::pack_float(shape, m.weight.data(), endside::SourceType::f32, 0, shape.n,
                      m.codes->data(), nullptr, nullptr);
  return m;
}

// Rows of x as int8, one group after the other.
struct Quantized {
  std::vector<int32_t> q, sum;  // (rows, padded k), (rows, groups)
  std::vector<float> scale;     // (rows, groups)
};

inline Quantized quantize(const float* x, int64_t rows, int64_t width, int64_t group) {
  Quantized out;
  const int64_t padded = (width + group - 1) / group * group;
  for (int64_t at = 0; at < rows * padded; at += group) {
    const int64_t row = at / padded, begin = at % padded;
    std::vector<float> part(group, 0.0f);
    for (int64_t i = 0; i < group && begin + i < width; ++i) part[i] = x[row * width + begin + i];
    float most = 0;
    for (float value : part) most = std::fmax(most, std::fabs(value));
    int32_t sum = 0;
    for (float value : part) {
      const float scaled = most > 0 ? value * (127.0f / most) : 0.0f;
      out.q.push_back(static_cast<int32_t>(std::nearbyint(scaled)));
      sum += out.q.back();
    }
    out.scale.push_back(most / 127.0f);
    out.sum.push_back(sum);
  }
  return out;
}

// y[p][n] in the promised order, and its distance from double precision is bounded.
inline float product(const Matrix& m, const Quantized& x, int64_t p, int64_t n) {
  const int64_t k = m.shape.k, group = m.shape.group, padded = m.groups * group;
  float y = 0;
  double wide = 0, size = 0;
  for (int64_t g = 0; g < m.groups; ++g) {
    const int32_t zero = m.zero[n * m.groups + g];
    int64_t dot = 0;
    for (int64_t c = g * group; c < (g + 1) * group && c < k; ++c) {
      dot += static_cast<int64_t>(m.code[n * k + c] - zero) * x.q[p * padded + c];
    }
    const float w = m.scale[n * m.groups + g], s = x.scale[p * m.groups + g];
    const float factor = w * s;
    const float term = static_cast<float>(dot) * factor;
    y = y + term;
    wide += static_cast<double>(dot) * w * s;
    size += std::fabs(static_cast<double>(dot) * w * s);
  }
  CHECK_NEAR(y, wide, 1e-6 * size + 1e-30, "the truth's own rounding");
  return y;
}

inline float product(const Matrix& m, const float* x, int64_t n) {
  float y = 0;
  for (int64_t c = 0; c < m.shape.k; ++c) y = std::fma(m.weight[n * m.shape.k + c], x[c], y);
  return y;
}

// y (rows, n) of every row.
inline std::vector<float> products(const Matrix& m, const float* x, int64_t rows) {
  std::vector<float> y;
  const int64_t k = m.shape.k;
  const bool low_bits = m.shape.quantized();
  const Quantized q = low_bits ? quantize(x, rows, k, m.shape.group) : Quantized{};
  for (int64_t p = 0; p < rows; ++p) {
    for (int64_t n = 0; n < m.shape.n; ++n) {
      y.push_back(low_bits ? product(m, q, p, n) : product(m, x + p * k, n));
    }
  }
  return y;
}

}  // namespace check
