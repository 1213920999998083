#include "linear.h"

#include <algorithm>
#include <stdexcept>

#include "linear_amx.h"
#include "linear_body.h"
#include "linear_kernels.h"

namespace endside {

static size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

PackedSizes packed_sizes(const Linear& shape) {
  const size_t blocks = static_cast<size_t>(shape.padded_n() / ROWS);
  const size_t k = static_cast<size_t>(shape.padded_k());
  const size_t codes =
      blocks * static_cast<size_t>(block_bytes(shape.kind, shape.padded_k(), shape.group));
  if (!shape.quantized()) return {codes, 0, 0};
  const size_t groups = blocks * ROWS * (k / static_cast<size_t>(shape.group));
  return {codes, groups * sizeof(uint16_t), shape.asymmetric ? groups : 0};
}

// Rows a multiple of 1,024 bytes apart would meet in few sets of the nearest cache: a line more.
static int64_t row_stride(const Linear& linear) {
  const int64_t k = linear.padded_k();
  return k % 1024 == 0 ? k + 64 : k;
}

size_t input_bytes(const Linear& linear, int64_t rows) {
  const size_t cells = static_cast<size_t>(rows * row_stride(linear));
  if (!linear.quantized()) return padded(cells * sizeof(float));
  const size_t groups = static_cast<size_t>(rows * (linear.padded_k() / linear.group));
  return padded(cells) + padded(groups * sizeof(float)) + padded(groups * sizeof(int32_t));
}

Input make_input(const Linear& linear, int64_t rows, void* scratch) {
  Input input;
  input.rows = rows;
  input.k = linear.padded_k();
  input.stride = row_stride(linear);
  uint8_t* const at = static_cast<uint8_t*>(scratch);
  if (!linear.quantized()) {
    input.x = reinterpret_cast<float*>(at);
    return input;
  }
  input.group = linear.group;
  const size_t cells = static_cast<size_t>(rows * input.stride);
  const size_t groups = static_cast<size_t>(rows * (input.k / linear.group));
  input.q = reinterpret_cast<int8_t*>(at);
  input.scale = reinterpret_cast<float*>(at + padded(cells));
  input.sum = reinterpret_cast<int32_t*>(at + padded(cells) + padded(groups * sizeof(float)));
  return input;
}

Piece piece_of(const Linear& linear, int64_t n_begin, int64_t n_end) {
  const int64_t block = block_bytes(linear.kind, linear.padded_k(), linear.group);
  return {linear.codes + n_begin / ROWS * block, (n_end - n_begin + ROW_TILE - 1) / ROW_TILE,
          block};
}

Ahead way_of(const Piece* pieces, int64_t count) {
  if (pieces->tiles == 0) return {pieces, pieces + count, pieces->codes, 0, 0, 0};
  return {pieces, pieces + count, pieces->codes, pieces->block, pieces->tiles - 1, 0};
}

size_t apply_scratch_bytes(const Linear&) {
  return std::max(WIDE_BYTES + CHUNK_ROWS * ROW_TILE * sizeof(float), sizeof(AmxScratch));
}

void prepare(const Input& input, const float* x, int64_t width, const float* norm_weight, float eps,
             int64_t row_begin, int64_t row_end, Isa isa) {
  switch (isa) {
    case Isa::portable:
      return prepare_portable(input, x, width, norm_weight, eps, row_begin, row_end);
#if defined(ENDSIDE_X86)
    case Isa::avx2: return prepare_avx2(input, x, width, norm_weight, eps, row_begin, row_end);
    case Isa::amx:  // gains nothing
    case Isa::avx512: return prepare_avx512(input, x, width, norm_weight, eps, row_begin, row_end);
#elif defined(ENDSIDE_NEON)
    case Isa::neon: return prepare_neon(input, x, width, norm_weight, eps, row_begin, row_end);
    case Isa::neon_i8mm:
      return prepare_neon_i8mm(input, x, width, norm_weight, eps, row_begin, row_end);
#endif
    default: throw std::invalid_argument("prepare was not built for this instruction set");
  }
}

void apply(const Linear& linear, const Input& input, int64_t n_begin, int64_t n_end,
           const Epilogue& epilogue, void* scratch, Isa isa) {
  switch (isa) {
    case Isa::portable: return apply_portable(linear, input, n_begin, n_end, epilogue, scratch);
#if defined(ENDSIDE_X86)
    case Isa::avx2: return apply_avx2(linear, input, n_begin, n_end, epilogue, scratch);
#if defined(ENDSIDE_AMX)
    case Isa::amx: return apply_amx(linear, input, n_begin, n_end, epilogue, scratch);
#endif
    case Isa::avx512: return apply_avx512(linear, input, n_begin, n_end, epilogue, scratch);
#elif defined(ENDSIDE_NEON)
    case Isa::neon: return apply_neon(linear, input, n_begin, n_end, epilogue, scratch);
    case Isa::neon_i8mm:
      return apply_neon_i8mm(linear, input, n_begin, n_end, epilogue, scratch);
#endif
    default: throw std::invalid_argument("apply was not built for this instruction set");
  }
}

}  // namespace endside
