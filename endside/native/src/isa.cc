#include "isa.h"

#include <stdexcept>

#if defined(ENDSIDE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(ENDSIDE_NEON) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(ENDSIDE_NEON) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace endside {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::portable: return "portable";
    case Isa::neon: return "neon";
    case Isa::neon_i8mm: return "neon_i8mm";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::amx: return "amx";
  }
  throw std::logic_error("isa_name: not an instruction set");
}

#if defined(ENDSIDE_X86)

#if defined(ENDSIDE_AMX)
// Tiles are 8 KiB of state a thread, which Linux saves only for a process that asks (once, for all
// its threads, before the first tile instruction). A kernel that does not know them refuses.
static bool tiles_are_lent() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

static bool has_tiles() {
  constexpr unsigned WANTED = 1u << 22 | 1u << 24 | 1u << 25;  // amx_bf16, amx_tile, amx_int8
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & WANTED) == WANTED &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
}

static bool can_use_tiles() {
  static const bool can = has_tiles() && tiles_are_lent();
  return can;
}
#else
static bool can_use_tiles() { return false; }
#endif

static void add_faster(std::vector<Isa>& isas) {
  // The compiler's run-time library asks cpuid, and whether the system saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx2) isas.push_back(Isa::avx2);
  if (avx2 && avx512) isas.push_back(Isa::avx512);
  if (avx2 && avx512 && can_use_tiles()) isas.push_back(Isa::amx);
}

#elif defined(ENDSIDE_NEON)

#if defined(__APPLE__)
static bool has(const char* feature) {
  int value = 0;
  size_t bytes = sizeof(value);
  return sysctlbyname(feature, &value, &bytes, nullptr, 0) == 0 && value != 0;
}
static bool has_dot_products() { return has("hw.optional.arm.FEAT_DotProd"); }
static bool has_matrix_products() { return has("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__linux__)
static bool has_dot_products() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
static bool has_matrix_products() { return (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0; }
#else
static bool has_dot_products() { return false; }  // no way to ask: portable is always right
static bool has_matrix_products() { return false; }
#endif

static void add_faster(std::vector<Isa>& isas) {
  if (!has_dot_products()) return;
  isas.push_back(Isa::neon);
  if (has_matrix_products()) isas.push_back(Isa::neon_i8mm);
}

#else

static void add_faster(std::vector<Isa>&) {}

#endif

std::vector<Isa> available_isas() {
  std::vector<Isa> isas = {Isa::portable};
  add_faster(isas);
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
