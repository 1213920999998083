// The instruction sets a kernel may be written for, and which of them this machine has.
//
//   avx2       AVX2, FMA, F16C
//   avx512     AVX-512 F, BW, VL, DQ and VNNI; a processor with some of them only runs avx2
//   amx        avx512 with matrix tiles (int8 and bf16), VBMI and bf16 products, where the compiler
//              knows them and the system lends the tiles; kernels that gain nothing from them run
//              as avx512
//   neon       64-bit ARM with int8 dot products (ARMv8.2 and later); older ones run portable
//   neon_i8mm  neon with int8 matrix products; kernels that gain nothing from them run as neon
#pragma once

#include <string>
#include <vector>

namespace endside {

enum class Isa { portable, neon, neon_i8mm, avx2, avx512, amx };

// Names as Python and error messages spell them.
const char* isa_name(Isa isa);

// Slowest first: what was compiled in and the processor can run. Never empty.
std::vector<Isa> available_isas();

// "auto" gives the fastest; a name gives that one. Throws std::invalid_argument, which lists the
// choices, when the name is unknown or the machine lacks it.
Isa choose_isa(const std::string& name);

}  // namespace endside
