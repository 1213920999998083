// Included before every source of the peer (bench/peer_llamacpp.py). GCC 12's intrinsics for tile
// registers do not tell the compiler what memory they read, so it drops the stores before them and
// the peer dies in ldtilecfg. These say it; the peer's own source stays as it is.
#pragma once
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#define ENDSIDE_TILE_LOAD(op, dst, base, stride)                                        \
  __asm__ volatile(op " (%0,%1,1), %%tmm" #dst ::"r"((const void*)(base)),              \
                   "r"((long)(stride))                                                  \
                   : "memory")
#define _tile_loadd(dst, base, stride) ENDSIDE_TILE_LOAD("tileloadd", dst, base, stride)
#define _tile_stream_loadd(dst, base, stride) ENDSIDE_TILE_LOAD("tileloaddt1", dst, base, stride)
#define ENDSIDE_TILE_STORE(src, base, stride)                                           \
  __asm__ volatile("tilestored %%tmm" #src ", (%0,%1,1)" ::"r"((void*)(base)),          \
                   "r"((long)(stride))                                                  \
                   : "memory")
#define _tile_stored(src, base, stride) ENDSIDE_TILE_STORE(src, base, stride)
#define _tile_loadconfig(config) \
  __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])(const void*)(config)))
#endif
