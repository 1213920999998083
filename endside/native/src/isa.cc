#include "isa.h"

#include <stdexcept>

namespace endside {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::portable: return "portable";
    case Isa::neon: return "neon";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
  }
  throw std::logic_error("isa_name: not an instruction set");
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas = {Isa::portable};
#if defined(ENDSIDE_X86)
  // The compiler's run-time library asks cpuid, and whether the system saves the wide registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) isas.push_back(Isa::avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    isas.push_back(Isa::avx512);
  }
#elif defined(ENDSIDE_NEON)
  // Part of every 64-bit ARM processor.
  isas.push_back(Isa::neon);
#endif
  return isas;
}

Isa choose_isa(const std::string& name) {
  const std::vector<Isa> isas = available_isas();
  if (name == "auto") return isas.back();
  std::string choices = "auto";
  for (Isa isa : isas) {
    if (name == isa_name(isa)) return isa;
    choices += std::string(", ") + isa_name(isa);
  }
  throw std::invalid_argument("instruction set '" + name + "' is not available here: use one of " +
                              choices);
}

}  // namespace endside
