// Products of float32 matrices in tiles against double precision, in every layout, inside fences.
#include "gemm.h"

#include <cstring>
#include <stdexcept>

#include "check.h"

namespace {

using endside::Gemm;
using endside::GemmFactor;

struct Shape {
  int64_t rows, columns, depth;
};

// A factor of random numbers whose lines, or depths, lie `gap` further apart than they must.
struct Factor {
  Factor(int64_t lines, int64_t depth, bool inside, int64_t gap, uint64_t seed)
      : step((inside ? depth : lines) + gap),
        inside(inside),
        numbers(static_cast<std::size_t>((inside ? lines : depth) * step), seed) {
    check::Noise noise(seed);
    for (float& x : numbers) x = noise();
  }
  float at(int64_t line, int64_t depth) {
    return numbers[static_cast<std::size_t>(inside ? line * step + depth : depth * step + line)];
  }
  GemmFactor operand() { return {numbers.data(), step, inside}; }
  int64_t step;
  bool inside;
  check::Fenced<float> numbers;
};

constexpr double BOUND = 1.0 / (1 << 22);  // of the sum of magnitudes

void agrees(const Shape& shape, bool a_inside, bool b_inside) {
  const int64_t gap = shape.rows % 3;
  Factor a(shape.rows, shape.depth, a_inside, gap, 1);
  Factor b(shape.columns, shape.depth, b_inside, gap, 2);
  const int64_t step = shape.columns + gap;
  check::Fenced<float> c(static_cast<std::size_t>(shape.rows * step), 3);
  for (float& x : c) x = -7;
  endside::gemm({a.operand(), b.operand(), c.data(), step, shape.rows, shape.columns, shape.depth},
                1, endside::Isa::amx);
  for (int64_t i = 0; i < shape.rows; ++i) {
    for (int64_t j = 0; j < step; ++j) {
      const float found = c[static_cast<std::size_t>(i * step + j)];
      if (j >= shape.columns) {
        CHECK(found == -7, "gap of row", i);
        continue;
      }
      double want = 0, magnitude = 0;
      for (int64_t k = 0; k < shape.depth; ++k) {
        const double term = static_cast<double>(a.at(i, k)) * b.at(j, k);
        want += term;
        magnitude += std::fabs(term);
      }
      CHECK_NEAR(found, want, BOUND * magnitude, "depth", shape.depth);
    }
  }
  CHECK(a.numbers.intact() && b.numbers.intact() && c.intact(), "depth", shape.depth);
}

// Sets without tiles refuse, by name.
bool refuses(endside::Isa isa) {
  if (endside::gemm_able(isa)) return false;
  const float x = 1;
  float c = 0;
  CHECK_THROWS(std::invalid_argument,
               endside::gemm({{&x, 1, true}, {&x, 1, true}, &c, 1, 1, 1, 1}, 1, isa));
  return true;
}

}  // namespace

TEST_EACH_ISA(gemm_layouts) {
  if (refuses(isa)) return;
  const Shape shapes[] = {{1, 1, 1},    {5, 3, 7},     {16, 17, 31},   {31, 32, 33},
                          {32, 64, 64}, {33, 70, 100}, {100, 40, 1100}, {65, 129, 2050}};
  for (const Shape& shape : shapes) {
    for (const bool a : {false, true}) {
      for (const bool b : {false, true}) agrees(shape, a, b);
    }
  }
}

// A number of the product has the same bits whatever is computed beside it.
TEST_EACH_ISA(gemm_company) {
  if (refuses(isa)) return;
  const Shape shape = {70, 150, 1200};
  Factor a(shape.rows, shape.depth, true, 0, 4), b(shape.columns, shape.depth, true, 0, 5);
  std::vector<float> all(static_cast<std::size_t>(shape.rows * shape.columns));
  endside::gemm({a.operand(), b.operand(), all.data(), shape.columns, shape.rows, shape.columns,
                 shape.depth},
                1, isa);
  for (int64_t row : {int64_t{0}, int64_t{31}, int64_t{69}}) {
    for (int64_t column : {int64_t{0}, int64_t{77}, int64_t{149}}) {
      const GemmFactor one = {a.operand().data + row * a.step, a.step, true};
      const GemmFactor other = {b.operand().data + column * b.step, b.step, true};
      float alone = 0;
      endside::gemm({one, other, &alone, 1, 1, 1, shape.depth}, 1, isa);
      CHECK(alone == all[static_cast<std::size_t>(row * shape.columns + column)], "row", row);
    }
  }
}

// 24 bits of both factors count: products that float32 holds exactly come out exactly.
TEST_EACH_ISA(gemm_exact) {
  if (refuses(isa)) return;
  const float odd = 16777215.0f, other = 5592405.0f;  // 2^24 - 1 and a third of it
  for (const float factor : {1.0f, -0.5f, 256.0f}) {
    for (const float x : {odd, other}) {
      float found = 0;
      endside::gemm({{&x, 1, true}, {&factor, 1, true}, &found, 1, 1, 1, 1}, 1, isa);
      CHECK(found == x * factor, "factor", factor);
    }
  }
}

// What is no number stays none: a training step looks for it. Bits of a NaN are all ones too.
TEST_EACH_ISA(gemm_no_number) {
  if (refuses(isa)) return;
  float bad[] = {INFINITY, -INFINITY, NAN, 0};
  std::memset(bad + 3, 0xff, sizeof(float));
  for (const float x : bad) {
    for (const float y : {1.0f, 0.0f, 3.1f}) {
      float found = 0;
      endside::gemm({{&x, 1, true}, {&y, 1, true}, &found, 1, 1, 1, 1}, 1, isa);
      CHECK(!std::isfinite(found), "times", y);
      endside::gemm({{&y, 1, true}, {&x, 1, true}, &found, 1, 1, 1, 1}, 1, isa);
      CHECK(!std::isfinite(found), "times", y);
    }
  }
}
