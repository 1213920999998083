// AVX-512 for machines without it: stands before the compiler's header of this name in the include
// path of the *_avx512.cc files, so that the same source runs anywhere (ENDSIDE_EMULATE_AVX512).
//
// Most intrinsics come from SIMDe (Debian: libsimde-dev), which builds them from AVX2; its vector
// types are the compiler's. Those its release 0.7.4 lacks are below, one lane after the other, as
// the processor's manual describes them. This shows that the results are right; it says nothing of
// speed, nor of whether a compiler's own intrinsics agree with SIMDe's.
#ifndef ENDSIDE_EMULATED_IMMINTRIN_H
#define ENDSIDE_EMULATED_IMMINTRIN_H

#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

namespace {

template <class T>
struct Lanes {
  static constexpr int COUNT = 64 / static_cast<int>(sizeof(T));
  alignas(64) T lane[COUNT];
};

inline Lanes<float> lanes(__m512 v) {
  Lanes<float> out;
  __builtin_memcpy(&out, &v, 64);
  return out;
}
inline __m512 vector(const Lanes<float>& v) {
  __m512 out;
  __builtin_memcpy(&out, &v, 64);
  return out;
}

// Lanes whose bit is 0 touch no memory.
template <class T, class M>
inline Lanes<T> masked_load(M mask, const void* from) {
  Lanes<T> out = {};
  for (int i = 0; i < Lanes<T>::COUNT; ++i) {
    if (mask >> i & 1) out.lane[i] = static_cast<const T*>(from)[i];
  }
  return out;
}

inline __m512 emulated_maskz_loadu_ps(__mmask16 mask, const void* from) {
  return vector(masked_load<float>(mask, from));
}
inline void emulated_mask_storeu_ps(void* to, __mmask16 mask, __m512 v) {
  const Lanes<float> in = lanes(v);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) static_cast<float*>(to)[i] = in.lane[i];
  }
}

// Halves are folded onto each other until one lane is left.
template <class F>
inline float fold(__m512 v, F&& join) {
  Lanes<float> in = lanes(v);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) in.lane[i] = join(in.lane[i], in.lane[i + half]);
  }
  return in.lane[0];
}
inline float emulated_reduce_add_ps(__m512 v) {
  return fold(v, [](float a, float b) { return a + b; });
}
inline float emulated_reduce_max_ps(__m512 v) {
  return fold(v, [](float a, float b) { return a > b ? a : b; });
}

// Two halves of eight, through AVX2 or F16C.
inline __m256 low(__m512 v) { return _mm512_castps512_ps256(v); }
inline __m256 high(__m512 v) {
  return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
}
inline __m512 both(__m256 a, __m256 b) {
  return _mm512_castpd_ps(_mm512_insertf64x4(_mm512_castps_pd(_mm512_castps256_ps512(a)),
                                             _mm256_castps_pd(b), 1));
}
inline __m512i both(__m256i a, __m256i b) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

inline __m512 emulated_cvtph_ps(__m256i v) {
  return both(_mm256_cvtph_ps(_mm256_castsi256_si128(v)),
              _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1)));
}
inline __m256i emulated_cvtps_ph(__m512 v) {
  const __m128i first = _mm256_cvtps_ph(low(v), _MM_FROUND_TO_NEAREST_INT);
  const __m128i second = _mm256_cvtps_ph(high(v), _MM_FROUND_TO_NEAREST_INT);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
}
inline __m512 emulated_cvtepi32_ps(__m512i v) {
  return both(_mm256_cvtepi32_ps(_mm512_castsi512_si256(v)),
              _mm256_cvtepi32_ps(_mm512_extracti64x4_epi64(v, 1)));
}
inline __m512i emulated_cvtps_epi32(__m512 v) {
  return both(_mm256_cvtps_epi32(low(v)), _mm256_cvtps_epi32(high(v)));
}
inline __m512i emulated_cvtepu16_epi32(__m256i v) {
  return both(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(v)),
              _mm256_cvtepu16_epi32(_mm256_extracti128_si256(v, 1)));
}
inline __m512i emulated_cvtepu8_epi32(__m128i v) {
  return both(_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8)));
}
inline __m512i emulated_cvtepi8_epi32(__m128i v) {
  return both(_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8)));
}
inline __m256i emulated_cvtepi32_epi16(__m512i v) {
  const __m256i mask = _mm256_set1_epi32(0xffff);  // the lower halves, as they are
  const __m256i packed =
      _mm256_packus_epi32(_mm256_and_si256(_mm512_castsi512_si256(v), mask),
                          _mm256_and_si256(_mm512_extracti64x4_epi64(v, 1), mask));
  return _mm256_permute4x64_epi64(packed, 0xd8);
}

// Even and odd bytes apart, each pair of products into 32 bits. SIMDe has this one, in a form that
// takes a compiler minutes where it is unrolled.
inline __m256i dot_half(__m256i sum, __m256i codes, __m256i x) {
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(x, 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
__attribute__((noinline)) __m512i emulated_dpbusd_epi32(__m512i sum, __m512i codes, __m512i x) {
  return both(dot_half(_mm512_castsi512_si256(sum), _mm512_castsi512_si256(codes),
                       _mm512_castsi512_si256(x)),
              dot_half(_mm512_extracti64x4_epi64(sum, 1), _mm512_extracti64x4_epi64(codes, 1),
                       _mm512_extracti64x4_epi64(x, 1)));
}

}  // namespace

#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32 emulated_dpbusd_epi32
// The alias of release 0.7.4 takes the arguments of the masked form.
#undef _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)

// A later SIMDe that has one of these keeps its own.
#ifndef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps emulated_maskz_loadu_ps
#endif
#ifndef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps emulated_mask_storeu_ps
#endif
#ifndef _mm512_reduce_add_ps
#define _mm512_reduce_add_ps emulated_reduce_add_ps
#endif
#ifndef _mm512_reduce_max_ps
#define _mm512_reduce_max_ps emulated_reduce_max_ps
#endif
#ifndef _mm512_cvtph_ps
#define _mm512_cvtph_ps emulated_cvtph_ps
#endif
#ifndef _mm512_cvtps_ph
#define _mm512_cvtps_ph(v, rounding) emulated_cvtps_ph(v)
#endif
#ifndef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#endif
#ifndef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#endif
#ifndef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#endif
#ifndef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#endif
#ifndef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32 emulated_cvtepi8_epi32
#endif
#ifndef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16 emulated_cvtepi32_epi16
#endif

#endif
