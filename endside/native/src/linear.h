// Projections y = x W^T with W packed in few bits, the activations in int8 made on the fly.
//
// Numbers. A row of W is cut into groups of `group` weights along K; w = scale * (code - zero),
// with zero 8 (int4), 128 (int8) or 1 (ternary) when symmetric. A row of x is cut the same way;
// with m = max|x| of a group, s = m / 127 and q = round-to-nearest-even(x * (127 / m)) in -127 ..
// 127 (m < 2^-100: s and q are 0). Then, from y = +0,
//
//     y += float(dot - zero * sum(q)) * (scale * s)        for every group, in order
//
// dot and sum are exact integers; the float part is one multiplication for scale * s, one for the
// product and one addition, never fused. So every instruction set, every number of threads and
// every number of rows gives the same bits: batching and speculation change no token. The same
// holds for `prepare` and the epilogues, whose sums and polynomials have one order written down
// here and there. float kinds (f32, bf16) multiply in float32, k ascending, one fused multiply-add
// per weight.
//
// Layout, the same for every instruction set: rows in blocks of 8; inside a block, k in steps of 4;
// a step is 32 bytes, row-major (8 rows x 4 consecutive k). int8 stores code as it is (unsigned,
// zero 128); int4 stores step 2i in the low and step 2i+1 in the high nibbles of 32 bytes; ternary2
// stores steps 4i .. 4i+3 in bit pairs 0-1 .. 6-7. ternary3 stores, per group, five steps per 32
// bytes: the base-3 number v = t0 t1 t2 t3 t4 (t0 first) as the fraction ceil(256 v / 243), so that
// times 3 carries the next digit out on top; the 1 to 3 steps left over in a group take 8 bytes
// each, quarter i of the step in bit pair i. f32 and bf16: 8 rows of k = 0, 8 rows of k = 1, ...
// scales and zeros: [N / 8][K / group][8].
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace endside {

enum class Kind : int32_t { f32 = 0, bf16 = 1, int8 = 2, int4 = 3, ternary2 = 4, ternary3 = 5 };
enum class ScaleType : int32_t { f16 = 0, bf16 = 1 };

constexpr int64_t ROWS = 8;        // rows per packed block
constexpr int64_t ROW_TILE = 16;   // rows are shared out, and padded, in units of this
constexpr int64_t MAX_GROUP = 128;

// One packed matrix W (N, K): a view, it owns nothing. Padding rows and columns hold zeros.
struct Linear {
  Kind kind = Kind::f32;
  int64_t n = 0, k = 0;    // logical sizes
  int64_t group = 128;     // 32, 64 or 128; 0 for float kinds
  bool asymmetric = false;
  ScaleType scale_type = ScaleType::f16;
  const uint8_t* codes = nullptr;     // 64-byte aligned
  const uint16_t* scales = nullptr;   // null for float kinds
  const uint8_t* zeros = nullptr;     // null when symmetric

  bool quantized() const { return kind != Kind::f32 && kind != Kind::bf16; }
  int64_t padded_n() const { return (n + ROW_TILE - 1) / ROW_TILE * ROW_TILE; }
  int64_t padded_k() const {
    const int64_t unit = quantized() ? group : 4;
    return (k + unit - 1) / unit * unit;
  }
};

// Bytes of the three packed buffers.
struct PackedSizes { size_t codes, scales, zeros; };
PackedSizes packed_sizes(const Linear& shape);

// What is being packed: rows (n, k) of f32, bf16 or f16 to be rounded to nearest (kind says to
// what), or codes that a quantizer chose (n, k) with its scales (n, k/group) and zeros (n,
// k/group).
enum class SourceType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };
// Symmetric int4: scale = max|w| / 7, ties as above; int8: max|w| / 127; ternary: scale = mean|w|
// of the group unless every weight is already -s, 0 or +s, which is kept exactly. Asymmetric int4
// (8): scale = (max - min) / 15 (255) with 0 counted among the weights, so that the zero is a code.
// Scales are rounded to 16 bits BEFORE the codes are chosen; a scale that rounds to 0 makes zeros.
// `weight`, `code_values` ... point at row 0 of W. Packs rows row_begin .. row_end (multiples of 8,
// or n at the end: then the padding rows too) so that threads and streaming can share the work. A
// code that the kind cannot hold throws std::invalid_argument.
void pack_float(const Linear& shape, const void* weight, SourceType type, int64_t row_begin,
                int64_t row_end, uint8_t* codes, uint16_t* scales, uint8_t* zeros);
void pack_codes(const Linear& shape, const uint8_t* code_values, const uint16_t* scale_values,
                const uint8_t* zero_values, int64_t row_begin, int64_t row_end, uint8_t* codes,
                uint16_t* scales, uint8_t* zeros);
// One row back as float32 (k): the embedding of a tied model, and tests.
void unpack_row(const Linear& linear, int64_t row, float* out);

// What a thread will read of codes: tiles of ROW_TILE rows, two blocks each, piece after piece; and
// how far it has asked memory for them (linear_ahead.h).
struct Piece {
  const uint8_t* codes = nullptr;
  int64_t tiles = 0, block = 0;  // bytes of a block
};
struct Ahead {
  const Piece *piece = nullptr, *end = nullptr;
  const uint8_t* at = nullptr;  // in the first block of a tile
  int64_t left = 0, tiles = 0;  // bytes of that block, then tiles of the piece
  int64_t lead = 0;             // bytes asked for and not yet read
};
// The codes of rows n_begin .. n_end, and a way of pieces from its start.
Piece piece_of(const Linear& linear, int64_t n_begin, int64_t n_end);
Ahead way_of(const Piece* pieces, int64_t count);

// The rows a matrix multiplies, P of them, in the form its kind wants (scratch owned by the
// caller).
struct Input {
  int64_t rows = 0, k = 0;        // k: padded_k of the matrix
  int64_t stride = 0;             // numbers between rows of x or q, at least k
  int64_t group = 0;              // 0: float rows
  float* x = nullptr;             // (P, stride) float kinds
  int8_t* q = nullptr;            // (P, stride)
  float* scale = nullptr;         // (P, k / group)
  int32_t* sum = nullptr;         // (P, k / group)
  Ahead* ahead = nullptr;         // of the thread; null: a product asks for its own codes only
};
size_t input_bytes(const Linear& linear, int64_t rows);  // scratch of one Input of that many rows
Input make_input(const Linear& linear, int64_t rows, void* scratch);  // 64-byte aligned scratch

// Rows begin .. end of x (P, width) -> input; weight: RMSNorm (eps) first when not null.
void prepare(const Input& input, const float* x, int64_t width, const float* norm_weight, float eps,
             int64_t row_begin, int64_t row_end, Isa isa);

enum class Then : int32_t { store = 0, add = 1, silu_mul = 2 };
// What happens to y (P, N). store: out = alpha * y. add: out += alpha * y (the residual).
// silu_mul: the matrix holds gate and up in alternating blocks of 8 rows (gate block first);
// out (P, N/2) = silu(gate) * up.
struct Epilogue {
  Then then = Then::store;
  float alpha = 1.0f;
  float* out = nullptr;
  int64_t stride = 0;  // floats between rows of out
};

// Scratch per thread for `apply` (weights of a tile expanded for many rows).
size_t apply_scratch_bytes(const Linear& linear);

// Rows n_begin .. n_end of W (multiples of ROW_TILE) times all rows of the input. Deterministic:
// the bits of y[p][n] depend on x[p] and W[n] alone.
void apply(const Linear& linear, const Input& input, int64_t n_begin, int64_t n_end,
           const Epilogue& epilogue, void* scratch, Isa isa);

}  // namespace endside
