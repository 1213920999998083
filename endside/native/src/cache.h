// Keys, values and their InfLLM v2 summaries, in one static pool of chunks.
//
// A chunk holds CHUNK tokens of one sequence for every layer. Per layer and key head:
//     16 blocks, each of keys [D][64], transposed so that 64 keys are scored with vector lanes =
//              keys, and values [64][D]
//     fine     [D][64]   means of 32 keys, one every 16 tokens
//     coarse   [D][16]   means of 128 keys, one every 64 tokens
// How the numbers of these matrices lie is up to the instruction set (cache_layout.h, Order).
// A summary belongs to the chunk that its *last* token lies in: fine summary j to slot j + 1 of the
// sequence's slots, coarse summary m to slot m + 1 (slot 0 stays empty). So a chunk depends on no
// token after its end, and sequences with a common beginning may share its full chunks.
//
// Blocks of all chunks come first, [chunk][layer][head][block], and behind them all summaries. A
// token reads every summary but few blocks, so summaries must be one stream: those of RUN chunks
// with neighbouring numbers lie side by side, [run][layer][head], and there first all coarse ones,
// then all fine ones. A sequence whose chunks have ascending numbers reads them in order. Runs are
// not longer because memory comes in huge pages: a short sequence should touch few.
//
// Means are taken in float32 over the *stored* keys (infllmv2 §2), in the order of additions of
// ops/infllm/reference.py, and rounded to the cache type; only complete windows exist. int8 keys
// and values have one float32 scale per token and head, w = scale * code; their summaries are f16.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "isa.h"

namespace endside {

constexpr int64_t BLOCK = 64;     // tokens per attention block
constexpr int64_t CHUNK = 1024;   // tokens per chunk of the pool
constexpr int64_t CHUNK_BLOCKS = CHUNK / BLOCK;
constexpr int64_t FINE_STRIDE = 16, FINE_SIZE = 32, COARSE_STRIDE = 64, COARSE_SIZE = 128;
constexpr int64_t FINE_SLOTS = CHUNK / FINE_STRIDE;      // per chunk
constexpr int64_t COARSE_SLOTS = CHUNK / COARSE_STRIDE;  // per chunk
constexpr int64_t RUN = 16;                              // chunks with their summaries side by side
constexpr int64_t MAX_HEAD_DIM = 256;                    // a multiple of 8 up to this

enum class CacheType : int32_t { f16 = 0, bf16 = 1, int8 = 2 };

struct CacheShape {
  int64_t layers = 0, kv_heads = 0, head_dim = 0;  // L, G, D
  CacheType type = CacheType::f16;
  bool summaries = false;  // sparse models only
};
size_t cache_bytes(const CacheShape& shape, int64_t chunks);  // of a pool of so many chunks

// The pool: `base` is 64-byte aligned and zeroed. A view.
struct Cache {
  CacheShape shape;
  int64_t chunks = 0;
  uint8_t* base = nullptr;
};

// Where a sequence's tokens lie: token t in chunk chunks[t / CHUNK].
struct Table { const int32_t* chunks = nullptr; };

// Stores one token's rotated key and value (G, D) f32 at `position`, and pools every window that
// ends with it. Threads may call it at once for different layers or heads (head_begin .. head_end),
// in ascending positions within one head.
void append(const Cache& cache, int64_t layer, Table table, int64_t position, const float* key,
            const float* value, int64_t head_begin, int64_t head_end, Isa isa);

// Memory of a chunk: `count` pieces of `bytes` each, `stride` bytes from one to the next.
struct Pieces {
  uint8_t* data;
  size_t count, bytes, stride;
};
// All that a chunk consists of: blocks, then coarse and fine summaries where there are some.
std::vector<Pieces> pieces_of(const Cache& cache, int32_t chunk);

// Copies a chunk, whole or partly filled: keys, values, summaries of every layer.
void copy_chunk(const Cache& cache, int32_t source, int32_t target);

}  // namespace endside
