// What every file of tile products needs: the shapes of a thread's tile registers, and a word to the
// compiler about memory. Compiled for amx alone, and apart in each file that includes it.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace endside {
namespace {

constexpr uint8_t TILE_ROWS_MOST = 16;
constexpr uint16_t TILE_ROW_BYTES = 64;

// As the processor reads them; a register without rows is not used.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row
  uint8_t rows[16] = {};
};

// Until `_tile_release`. GCC 12's intrinsic says that 8 of the 64 bytes are read, so stores to the
// others might be dropped.
inline void load_shapes(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(shapes)); }

// The compiler is not told what tiles read and write in memory.
inline void memory_is_used() { __asm__ volatile("" ::: "memory"); }

}  // namespace
}  // namespace endside
