// Projections in every kind, group size, zero and number of rows against integers and the promised
// float operations: exactly, so the instruction sets agree with each other in every bit too.
#include "linear.h"

#include <memory>

#include "linear_ahead.h"
#include "linear_case.h"

using check::Fenced;
using check::Matrix;
using check::Noise;
using endside::Epilogue;
using endside::Isa;
using endside::Kind;
using endside::Level;
using endside::Linear;
using endside::Piece;
using endside::ScaleType;
using endside::Then;

static const int64_t ROWS_OF_X[] = {1, 2, 3, 5, 8, 16, 17, 64, 65};
static const Kind LOW[] = {Kind::int8, Kind::int4, Kind::ternary2, Kind::ternary3};

// asymmetric: where the kind can be.
static Linear shape_of(Kind kind, int64_t n, int64_t k, int64_t group = 0,
                       bool asymmetric = false) {
  Linear shape;
  shape.kind = kind;
  shape.n = n;
  shape.k = k;
  shape.group = group;
  shape.asymmetric = asymmetric && (kind == Kind::int4 || kind == Kind::int8);
  return shape;
}

// What was multiplied with what, for messages.
static std::string words(const Linear& s, int64_t rows) {
  return check::join("kind", static_cast<int>(s.kind), "group", s.group, "asymmetric", s.asymmetric,
                     "n", s.n, "k", s.k, "rows", rows);
}

// Rows of x through `prepare` in an Input of their own, inside fences.
struct Prepared {
  Fenced<float> x;
  Fenced<uint8_t> memory;
  endside::Input input;
  Prepared(const Linear& linear, const float* rows, int64_t count, Isa isa)
      : x(count * linear.k, 1), memory(endside::input_bytes(linear, count)) {
    std::memcpy(x.data(), rows, count * linear.k * sizeof(float));
    input = endside::make_input(linear, count, memory.data());
    endside::prepare(input, x.data(), linear.k, nullptr, 0, 0, count, isa);
    CHECK(x.intact() && memory.intact(), words(linear, count));
  }
};

// Rows begin .. end of W times the input; out is fenced, and so are the gaps between its rows.
static std::vector<float> run(Matrix& m, const endside::Input& input, int64_t begin, int64_t end,
                              Isa isa) {
  constexpr int64_t GAP = 5;
  const int64_t n = m.shape.n, stride = n + GAP;
  Fenced<float> out(input.rows * stride);
  Fenced<uint8_t> scratch(endside::apply_scratch_bytes(m.shape));
  Epilogue epilogue;
  epilogue.out = out.data();
  epilogue.stride = stride;
  endside::apply(m.shape, input, begin, end, epilogue, scratch.data(), isa);
  std::vector<float> y;
  for (int64_t i = 0; i < input.rows * stride; ++i) {
    const int64_t column = i % stride;
    if (column < n) y.push_back(out[i]);
    const bool inside = column >= begin && column < end && column < n;
    uint32_t bits;
    std::memcpy(&bits, &out[i], sizeof bits);
    CHECK(inside || bits == 0xffffffffu, "wrote beside its columns", words(m.shape, input.rows));
  }
  CHECK(out.intact() && scratch.intact() && m.intact(), words(m.shape, input.rows));
  return y;
}

static void same(const std::vector<float>& got, const float* want, const std::string& where) {
  for (std::size_t i = 0; i < got.size(); ++i) {
    CHECK(std::memcmp(&got[i], &want[i], sizeof(float)) == 0, where, "entry", i, "got", got[i],
          "want", want[i]);
  }
}

// Every number of rows, all of W at once.
static void check_rows(Matrix m, Noise& noise, Isa isa) {
  const int64_t most = 65, k = m.shape.k;
  std::vector<float> x(most * k);
  check::fill_rows(noise, x.data(), most, k, m.shape.quantized() ? m.shape.group : 32);
  const std::vector<float> want = check::products(m, x.data(), most);
  for (int64_t rows : ROWS_OF_X) {
    Prepared prepared(m.shape, x.data(), rows, isa);
    same(run(m, prepared.input, 0, m.shape.n, isa), want.data(), words(m.shape, rows));
    // The last rows alone: rows that stood elsewhere before.
    Prepared last(m.shape, x.data() + (most - rows) * k, rows, isa);
    same(run(m, last.input, 0, m.shape.n, isa), want.data() + (most - rows) * m.shape.n,
         words(m.shape, rows) + "at the end");
  }
}

TEST_EACH_ISA(linear_low_bits) {
  Noise noise(1);
  for (Kind kind : LOW) {
    for (int64_t group : {32, 64, 128}) {
      for (bool asymmetric : {false, true}) {
        Linear shape = shape_of(kind, 37, 2 * group + 5, group, asymmetric);
        shape.scale_type = asymmetric != (group == 64) ? ScaleType::bf16 : ScaleType::f16;
        check_rows(check::make_codes(shape, noise), noise, isa);
      }
    }
  }
}

TEST_EACH_ISA(linear_odd_sizes) {
  Noise noise(2);
  for (Kind kind : LOW) {
    for (int64_t n : {1, 7, 8, 9, 16, 17}) {
      for (int64_t k : {1, 31, 32, 33, 129}) {
        const Linear shape = shape_of(kind, n, k, 32, n % 2 == 0);
        check_rows(check::make_codes(shape, noise), noise, isa);
      }
    }
  }
}

TEST_EACH_ISA(linear_floats) {
  Noise noise(3);
  for (Kind kind : {Kind::f32, Kind::bf16}) {
    for (int64_t n : {1, 16, 37}) {
      for (int64_t k : {1, 3, 65, 129}) {
        check_rows(check::make_floats(shape_of(kind, n, k), noise), noise, isa);
      }
    }
  }
}

// All codes at the top and activations of +-127 only: the largest sums there can be.
TEST_EACH_ISA(linear_extremes) {
  Noise noise(4);
  for (Kind kind : LOW) {
    for (float sign : {1.0f, -1.0f}) {
      Matrix m = check::make_codes(shape_of(kind, 19, 256, 128, true), noise, true);
      const std::vector<float> x(9 * 256, 3.0f * sign);
      const std::vector<float> want = check::products(m, x.data(), 9);
      for (int64_t rows : {1, 9}) {
        Prepared prepared(m.shape, x.data(), rows, isa);
        same(run(m, prepared.input, 0, 19, isa), want.data(), words(m.shape, rows));
      }
    }
  }
}

// More rows than one pass over the weights takes, and a K that makes passes short.
TEST_EACH_ISA(linear_many_rows) {
  Noise noise(5);
  for (const auto& [k, rows] :
       {std::pair<int64_t, int64_t>{64, 269}, {2048, 40}, {9000, 31}}) {
    Matrix m = check::make_codes(shape_of(Kind::int4, 18, k, 64), noise);
    std::vector<float> x(rows * k);
    check::fill_rows(noise, x.data(), rows, k, 64);
    const std::vector<float> want = check::products(m, x.data(), rows);
    Prepared prepared(m.shape, x.data(), rows, isa);
    same(run(m, prepared.input, 0, 18, isa), want.data(), words(m.shape, rows));
  }
}

// Threads share the rows of W in tiles: a share gives what the whole gave and touches no more.
TEST_EACH_ISA(linear_shares) {
  Noise noise(6);
  for (Kind kind : LOW) {
    Matrix m = check::make_codes(shape_of(kind, 69, 96, 32, true), noise);
    std::vector<float> x(9 * 96);
    check::fill_rows(noise, x.data(), 9, 96, 32);
    for (int64_t rows : {1, 9}) {
      Prepared prepared(m.shape, x.data(), rows, isa);
      const std::vector<float> whole = run(m, prepared.input, 0, 69, isa);
      for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 16}, {16, 48}, {48, 69}}) {
        const std::vector<float> part = run(m, prepared.input, begin, end, isa);
        for (int64_t i = 0; i < rows * 69; ++i) {
          const bool inside = i % 69 >= begin && i % 69 < end;
          CHECK(!inside || part[i] == whole[i], words(m.shape, rows), "column", i % 69);
        }
      }
    }
  }
}

// A way in stretches of several lengths: tile after tile, in each from the front of both blocks on,
// which is the order of reading. The asking itself is not seen, what is handed out is.
TEST(linear_way) {
  const std::vector<uint8_t> codes(16384);
  const std::vector<Piece> pieces = {{codes.data(), 2, 1024}, {codes.data() + 8192, 1, 640}};
  for (int64_t bytes : {64, 128, 208}) {
    endside::Ahead way = endside::way_of(pieces.data(), 2);
    const uint8_t known = 0;
    for (const Piece& piece : pieces) {
      for (int64_t tile = 0; tile < piece.tiles; ++tile) {
        for (int64_t i = 0; i + bytes <= piece.block; i += bytes) {
          const auto found = endside::next_stretch<Level::second>(way, bytes, &known);
          CHECK(found.at == piece.codes + 2 * tile * piece.block + i, "tile", tile, "byte", i);
          CHECK(found.gap == piece.block, "tile", tile, "byte", i);
        }
      }
    }
    for (int turn = 0; turn < 2; ++turn) {
      const auto found = endside::next_stretch<Level::second>(way, bytes, &known);
      CHECK(found.at == &known, "past the end", bytes, "turn", turn);
    }
  }
}

// A thread without a share of the first product, and of one in the middle.
TEST(linear_way_with_gaps) {
  const std::vector<uint8_t> codes(512);
  const std::vector<Piece> pieces = {{}, {codes.data(), 1, 128}, {}, {codes.data() + 256, 1, 128}};
  const uint8_t known = 0;
  endside::Ahead way = endside::way_of(pieces.data(), 4);
  std::vector<const uint8_t*> found;
  for (int i = 0; i < 5; ++i) {
    const uint8_t* const at = endside::next_stretch<Level::second>(way, 128, &known).at;
    if (at != &known) found.push_back(at);
  }
  CHECK(found == std::vector<const uint8_t*>({codes.data(), codes.data() + 256}), found.size());
}

// A thread that asks on into the next product computes the same.
TEST_EACH_ISA(linear_on_the_way) {
  Noise noise(12);
  for (Kind kind : LOW) {
    Matrix m = check::make_codes(shape_of(kind, 64, 256, 128), noise);
    std::vector<float> x(m.shape.k);
    check::fill_rows(noise, x.data(), 1, m.shape.k, 128);
    Prepared prepared(m.shape, x.data(), 1, isa);
    const std::vector<Piece> pieces = {endside::piece_of(m.shape, 16, 48),
                                       endside::piece_of(m.shape, 0, 64)};
    endside::Ahead way = endside::way_of(pieces.data(), 2);
    const std::vector<float> want = run(m, prepared.input, 16, 48, isa);
    prepared.input.ahead = &way;
    same(run(m, prepared.input, 16, 48, isa), want.data(), words(m.shape, 1));
  }
}
