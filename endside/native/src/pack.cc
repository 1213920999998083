// Packing: rows of weights, or codes somebody chose, into blocks of 8 rows; and one row back.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "linear.h"
#include "linear_half.h"
#include "linear_layout.h"
#include "quantize.h"

namespace endside {

// Codes of one group of a block, a row after the other.
struct GroupRows {
  uint8_t row[ROWS][MAX_GROUP];
  uint8_t& at(int64_t step, int64_t i) { return row[i / STEP][step * STEP + i % STEP]; }
  uint8_t at(int64_t step, int64_t i) const { return row[i / STEP][step * STEP + i % STEP]; }
};

// Steps first .. first + 4 of lane i as the base-3 fraction of linear.h.
static uint8_t base3(const GroupRows& group, int64_t first, int64_t i) {
  int value = 0;
  for (int64_t t = 0; t < TRITS; ++t) value = value * 3 + group.at(first + t, i);
  return static_cast<uint8_t>((value * 256 + 242) / 243);
}

static void put_ternary3(const GroupRows& group, int64_t steps, uint8_t* out) {
  const int64_t whole = steps / TRITS * TRITS;
  for (int64_t first = 0; first < whole; first += TRITS, out += STEP_CODES) {
    for (int64_t i = 0; i < STEP_CODES; ++i) out[i] = base3(group, first, i);
  }
  for (int64_t s = whole; s < steps; ++s, out += TAIL_BYTES) {
    for (int64_t i = 0; i < TAIL_BYTES; ++i) {
      out[i] = static_cast<uint8_t>(group.at(s, i) | group.at(s, i + 8) << 2 |
                                    group.at(s, i + 16) << 4 | group.at(s, i + 24) << 6);
    }
  }
}

static void put_group(Kind kind, const GroupRows& group, int64_t size, uint8_t* out) {
  const int64_t steps = size / STEP;
  if (kind == Kind::ternary3) return put_ternary3(group, steps, out);
  const int64_t share = kind == Kind::int8 ? 1 : kind == Kind::int4 ? 2 : 4;
  const int64_t bits = 8 / share;
  for (int64_t s = 0; s < steps; s += share, out += STEP_CODES) {
    for (int64_t i = 0; i < STEP_CODES; ++i) {
      int code = 0;
      for (int64_t j = 0; j < share; ++j) code |= group.at(s + j, i) << (j * bits);
      out[i] = static_cast<uint8_t>(code);
    }
  }
}

// One code back: row r (0 .. 7) of the block, place c of the group that starts at `codes`.
static int32_t code_at(Kind kind, const uint8_t* codes, int64_t size, int64_t r, int64_t c) {
  const int64_t s = c / STEP, i = r * STEP + c % STEP;
  if (kind == Kind::int8) return codes[s * STEP_CODES + i];
  if (kind == Kind::int4) return codes[s / 2 * STEP_CODES + i] >> (s % 2 * 4) & 15;
  if (kind == Kind::ternary2) return codes[s / 4 * STEP_CODES + i] >> (s % 4 * 2) & 3;
  const int64_t whole = size / STEP / TRITS * TRITS;
  if (s >= whole) {
    const uint8_t* const tail = codes + whole / TRITS * STEP_CODES + (s - whole) * TAIL_BYTES;
    return tail[i % 8] >> (i / 8 * 2) & 3;
  }
  int fraction = codes[s / TRITS * STEP_CODES + i];
  for (int64_t t = 0; t < s % TRITS; ++t) fraction = fraction * 3 & 255;
  return fraction * 3 >> 8;
}

static float source_value(const void* weight, SourceType type, int64_t at) {
  if (type == SourceType::f32) return static_cast<const float*>(weight)[at];
  const uint16_t half = static_cast<const uint16_t*>(weight)[at];
  return type == SourceType::bf16 ? from_bf16(half) : from_f16(half);
}

static void pack_plain(const Linear& shape, const void* weight, SourceType type, int64_t block,
                       uint8_t* codes) {
  const int64_t k = shape.padded_k();
  uint8_t* const out = codes + block * block_bytes(shape.kind, k, shape.group);
  for (int64_t r = 0; r < ROWS; ++r) {
    const int64_t n = block * ROWS + r;
    for (int64_t c = 0; c < k; ++c) {
      const bool inside = n < shape.n && c < shape.k;
      const float value = inside ? source_value(weight, type, n * shape.k + c) : 0.0f;
      if (shape.kind == Kind::f32) reinterpret_cast<float*>(out)[c * ROWS + r] = value;
      else reinterpret_cast<uint16_t*>(out)[c * ROWS + r] = to_bf16(value);
    }
  }
}

// The blocks that rows begin .. end stand for; the last rows bring the padding with them.
struct Blocks { int64_t begin, end; };
static Blocks blocks_of(const Linear& shape, int64_t row_begin, int64_t row_end) {
  if (row_begin % ROWS != 0 || (row_end % ROWS != 0 && row_end != shape.n) || row_begin < 0 ||
      row_end > shape.padded_n()) {
    throw std::invalid_argument("pack: rows are packed in blocks of 8");
  }
  const int64_t end = row_end >= shape.n ? shape.padded_n() : row_end;
  return {row_begin / ROWS, end / ROWS};
}

static void check(const Linear& shape) {
  const bool known = shape.group == 32 || shape.group == 64 || shape.group == 128;
  if (shape.quantized() && !known) throw std::invalid_argument("pack: group is 32, 64 or 128");
  if (shape.asymmetric && shape.kind != Kind::int4 && shape.kind != Kind::int8) {
    throw std::invalid_argument("pack: only int4 and int8 may be asymmetric");
  }
}

// fill(n, g, codes of the row) -> GroupCode, for every row and group of the blocks.
template <class Fill>
static void pack_blocks(const Linear& shape, Blocks blocks, uint8_t* codes, uint16_t* scales,
                        uint8_t* zeros, Fill fill) {
  const int64_t groups = shape.padded_k() / shape.group;
  const int64_t bytes = group_bytes(shape.kind, shape.group);
  GroupRows rows;
  for (int64_t at = blocks.begin * groups; at < blocks.end * groups; ++at) {
    for (int64_t r = 0; r < ROWS; ++r) {
      const GroupCode code = fill(at / groups * ROWS + r, at % groups, rows.row[r]);
      scales[at * ROWS + r] = code.scale;
      if (shape.asymmetric) zeros[at * ROWS + r] = code.zero;
    }
    put_group(shape.kind, rows, shape.group, codes + at * bytes);
  }
}

void pack_float(const Linear& shape, const void* weight, SourceType type, int64_t row_begin,
                int64_t row_end, uint8_t* codes, uint16_t* scales, uint8_t* zeros) {
  check(shape);
  const Blocks blocks = blocks_of(shape, row_begin, row_end);
  if (!shape.quantized()) {
    for (int64_t b = blocks.begin; b < blocks.end; ++b) pack_plain(shape, weight, type, b, codes);
    return;
  }
  float values[MAX_GROUP];
  pack_blocks(shape, blocks, codes, scales, zeros, [&](int64_t n, int64_t g, uint8_t* row) {
    const int64_t at = g * shape.group;
    const int64_t count = n < shape.n ? std::min(shape.group, shape.k - at) : 0;
    for (int64_t c = 0; c < count; ++c) {
      values[c] = source_value(weight, type, n * shape.k + at + c);
    }
    return round_group(shape, values, count, row);
  });
}

void pack_codes(const Linear& shape, const uint8_t* code_values, const uint16_t* scale_values,
                const uint8_t* zero_values, int64_t row_begin, int64_t row_end, uint8_t* codes,
                uint16_t* scales, uint8_t* zeros) {
  check(shape);
  if (!shape.quantized()) throw std::invalid_argument("pack: float kinds have no codes");
  const int32_t largest = largest_code(shape.kind);
  const int64_t groups = shape.padded_k() / shape.group;
  const Blocks blocks = blocks_of(shape, row_begin, row_end);
  pack_blocks(shape, blocks, codes, scales, zeros, [&](int64_t n, int64_t g, uint8_t* row) {
    GroupCode code = {0, static_cast<uint8_t>(symmetric_zero(shape.kind))};
    const bool inside = n < shape.n;
    if (inside) code.scale = scale_values[n * groups + g];
    if (inside && shape.asymmetric) code.zero = zero_values[n * groups + g];
    for (int64_t c = 0; c < shape.group; ++c) {
      const int64_t k = g * shape.group + c;
      row[c] = inside && k < shape.k ? code_values[n * shape.k + k] : code.zero;
      if (row[c] > largest || code.zero > largest) {
        throw std::invalid_argument("pack: a code or zero above " + std::to_string(largest));
      }
    }
    return code;
  });
}

void unpack_row(const Linear& linear, int64_t row, float* out) {
  const int64_t k = linear.padded_k(), block = row / ROWS, r = row % ROWS;
  const uint8_t* const codes = linear.codes + block * block_bytes(linear.kind, k, linear.group);
  if (!linear.quantized()) {
    for (int64_t c = 0; c < linear.k; ++c) {
      out[c] = linear.kind == Kind::f32
                   ? reinterpret_cast<const float*>(codes)[c * ROWS + r]
                   : from_bf16(reinterpret_cast<const uint16_t*>(codes)[c * ROWS + r]);
    }
    return;
  }
  const int64_t groups = k / linear.group, bytes = group_bytes(linear.kind, linear.group);
  for (int64_t c = 0; c < linear.k; ++c) {
    const int64_t g = c / linear.group, at = (block * groups + g) * ROWS + r;
    const int32_t zero = linear.asymmetric ? linear.zeros[at] : symmetric_zero(linear.kind);
    const uint16_t bits = linear.scales[at];
    const float scale = linear.scale_type == ScaleType::f16 ? from_f16(bits) : from_bf16(bits);
    const int32_t code = code_at(linear.kind, codes + g * bytes, linear.group, r, c % linear.group);
    out[c] = scale * static_cast<float>(code - zero);
  }
}

}  // namespace endside
