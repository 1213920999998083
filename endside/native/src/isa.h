// The instruction sets a kernel may be written for, and which of them this machine has.
#pragma once

#include <string>
#include <vector>

namespace endside {

enum class Isa { portable, neon, avx2, avx512 };

// Names as Python and error messages spell them.
const char* isa_name(Isa isa);

// Slowest first: what was compiled in and the processor can run. Never empty.
std::vector<Isa> available_isas();

// "auto" gives the fastest; a name gives that one. Throws std::invalid_argument, which lists the
// choices, when the name is unknown or the machine lacks it.
Isa choose_isa(const std::string& name);

}  // namespace endside
