// Around the product: activations to int8 with RMSNorm before, epilogues after, packing and back.
#include <memory>

#include "linear_case.h"

using check::Fenced;
using check::Matrix;
using check::Noise;
using endside::Epilogue;
using endside::Isa;
using endside::Kind;
using endside::Linear;
using endside::Then;

static Linear shape_of(Kind kind, int64_t n, int64_t k, int64_t group) {
  Linear shape;
  shape.kind = kind;
  shape.n = n;
  shape.k = k;
  shape.group = group;
  return shape;
}

TEST_EACH_ISA(prepare_int8) {
  Noise noise(11);
  for (int64_t group : {32, 64, 128}) {
    for (int64_t width : {int64_t{1}, group - 1, group, 3 * group + 7, int64_t{1024}}) {
      const Linear linear = shape_of(Kind::int4, 16, width, group);
      constexpr int64_t ROWS = 9;
      Fenced<float> x(ROWS * width, 1);
      check::fill_rows(noise, x.data(), ROWS, width, group);
      const check::Quantized want = check::quantize(x.data(), ROWS, width, group);
      Fenced<uint8_t> memory(endside::input_bytes(linear, ROWS));
      const endside::Input input = endside::make_input(linear, ROWS, memory.data());
      endside::prepare(input, x.data(), width, nullptr, 0, 0, 4, isa);
      endside::prepare(input, x.data(), width, nullptr, 0, 4, ROWS, isa);
      CHECK(memory.intact() && x.intact());
      for (std::size_t i = 0; i < want.q.size(); ++i) {
        const int64_t p = i / input.k, c = i % input.k;
        CHECK(input.q[p * input.stride + c] == want.q[i], width, i);
      }
      for (std::size_t i = 0; i < want.sum.size(); ++i) {
        CHECK(input.sum[i] == want.sum[i], width, i);
        CHECK(input.scale[i] == want.scale[i], width, i);
      }
    }
  }
}

// The norm before rounding against double precision: no value is off by more than half a step.
TEST_EACH_ISA(prepare_norm) {
  Noise noise(12);
  for (int64_t width : {1, 15, 16, 33, 127, 129, 515}) {
    const Linear linear = shape_of(Kind::int8, 16, width, 64);
    const int64_t groups = linear.padded_k() / 64;
    const float eps = 0.01f;
    Fenced<float> x(3 * width, 1), weight(width, 3);
    check::fill_rows(noise, x.data(), 3, width, 64);
    for (float& value : weight) value = 1.5f + noise();
    Fenced<uint8_t> memory(endside::input_bytes(linear, 3));
    const endside::Input input = endside::make_input(linear, 3, memory.data());
    endside::prepare(input, x.data(), width, weight.data(), eps, 0, 3, isa);
    CHECK(memory.intact() && x.intact() && weight.intact());
    for (int64_t i = 0; i < 3 * width; ++i) {
      const int64_t p = i / width, c = i % width;
      double squares = 0;
      for (int64_t j = 0; j < width; ++j) squares += std::pow(x[p * width + j], 2.0);
      const double want = x[i] / std::sqrt(squares / width + eps) * weight[c];
      const double scale = input.scale[p * groups + c / 64];
      CHECK_NEAR(scale * input.q[p * input.stride + c], want, 0.5001 * scale, width, c);
    }
  }
}

// The same bits in every instruction set, norm included; a NaN stays in its row.
TEST_EACH_ISA(prepare_same_bits) {
  Noise noise(13);
  const int64_t width = 197;
  const Linear linear = shape_of(Kind::int4, 16, width, 128);
  std::vector<float> x(4 * width), weight(width);
  check::fill_rows(noise, x.data(), 4, width, 32);
  for (float& value : weight) value = 1.5f + noise();
  const auto prepared = [&](Isa which) {
    Fenced<uint8_t> memory(endside::input_bytes(linear, 4));
    const endside::Input input = endside::make_input(linear, 4, memory.data());
    endside::prepare(input, x.data(), width, weight.data(), 1e-5f, 0, 4, which);
    std::vector<float> values;
    for (int64_t i = 0; i < 4 * input.stride; ++i) values.push_back(input.q[i]);
    for (int64_t i = 0; i < 4 * input.k / 128; ++i) values.push_back(input.scale[i]);
    return values;
  };
  CHECK(prepared(isa) == prepared(Isa::portable));
  const std::vector<float> clean = prepared(isa);
  x[width + 150] = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> spoilt = prepared(isa);
  const std::size_t scales = 4 * 256;
  for (std::size_t i = 0; i < 8; ++i) {
    const bool nan = std::isnan(spoilt[scales + i]);
    CHECK(i / 2 == 1 ? nan : spoilt[scales + i] == clean[scales + i], "scale", i);
  }
}

// y through `store` is exact elsewhere; here what the others make of it.
TEST_EACH_ISA(epilogues) {
  Noise noise(14);
  const int64_t n = 48, k = 64, rows = 5;
  Matrix m = check::make_codes(shape_of(Kind::int4, n, k, 32), noise);
  std::vector<float> x(rows * k);
  check::fill_rows(noise, x.data(), rows, k, 32);
  const std::vector<float> y = check::products(m, x.data(), rows);
  Fenced<uint8_t> memory(endside::input_bytes(m.shape, rows));
  Fenced<uint8_t> scratch(endside::apply_scratch_bytes(m.shape));
  const endside::Input input = endside::make_input(m.shape, rows, memory.data());
  endside::prepare(input, x.data(), k, nullptr, 0, 0, rows, isa);
  for (Then then : {Then::store, Then::add, Then::silu_mul}) {
    const int64_t columns = then == Then::silu_mul ? n / 2 : n;
    Fenced<float> out(rows * columns);
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = 0.25f * static_cast<float>(i % 9);
    Epilogue epilogue;
    epilogue.then = then;
    epilogue.alpha = then == Then::silu_mul ? 1.0f : 1.7f;
    epilogue.out = out.data();
    epilogue.stride = columns;
    endside::apply(m.shape, input, 0, n, epilogue, scratch.data(), isa);
    CHECK(out.intact());
    for (int64_t i = 0; i < rows * columns; ++i) {
      const int64_t p = i / columns, c = i % columns;
      if (then == Then::silu_mul) {
        const float gate = y[p * n + c / 8 * 16 + c % 8], up = y[p * n + c / 8 * 16 + 8 + c % 8];
        const double want = gate / (1.0 + std::exp(-static_cast<double>(gate))) * up;
        CHECK_NEAR(out[i], want, 1e-6 * std::fabs(want) + 1e-12, "silu", i);
      } else {
        const float before = then == Then::add ? 0.25f * static_cast<float>(i % 9) : 0.0f;
        const float want = then == Then::add ? before + 1.7f * y[p * n + c] : 1.7f * y[p * n + c];
        CHECK(out[i] == want, "then", static_cast<int>(then), i, "got", out[i], "want", want);
      }
    }
  }
}

// Rows come back as the codes say, whatever the layout.
TEST(unpack_gives_the_codes_back) {
  Noise noise(15);
  for (Kind kind : {Kind::int8, Kind::int4, Kind::ternary2, Kind::ternary3}) {
    for (int64_t group : {32, 64, 128}) {
      Linear shape = shape_of(kind, 19, group + 33, group);
      shape.asymmetric = group == 64 && check::top_code(kind) > 2;
      Matrix m = check::make_codes(shape, noise);
      Fenced<float> row(shape.k);
      for (int64_t n = 0; n < shape.n; ++n) {
        endside::unpack_row(m.shape, n, row.data());
        for (int64_t c = 0; c < shape.k; ++c) {
          const int64_t g = n * m.groups + c / group;
          const float want = m.scale[g] * static_cast<float>(m.code[n * shape.k + c] - m.zero[g]);
          CHECK(row[c] == want, "kind", static_cast<int>(kind), "row", n, "column", c);
        }
      }
      CHECK(row.intact() && m.intact());
    }
  }
}

TEST(pack_refuses_codes_that_do_not_fit) {
  for (Kind kind : {Kind::int4, Kind::ternary2, Kind::ternary3}) {
    const Linear shape = shape_of(kind, 1, 32, 32);
    const endside::PackedSizes sizes = endside::packed_sizes(shape);
    Fenced<uint8_t> codes(sizes.codes);
    Fenced<uint16_t> scales(sizes.scales / 2);
    std::vector<uint8_t> values(32, 1);
    const uint16_t scale = 0x3c00;
    values[31] = static_cast<uint8_t>(check::top_code(kind) + 1);
    CHECK_THROWS(std::invalid_argument,
                 endside::pack_codes(shape, values.data(), &scale, nullptr, 0, 1, codes.data(),
                                     scales.data(), nullptr));
  }
}
