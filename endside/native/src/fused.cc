#include "fused.h"

#include <atomic>
#include <exception>
#include <stdexcept>

#if defined(__linux__)
#include <dlfcn.h>
#endif
#if defined(ENDSIDE_X86)
#include <xmmintrin.h>
#endif

namespace endside {

const FusedKernels& fused_kernels(Isa isa) {
  switch (isa) {
    case Isa::portable: return fused_portable();
#if defined(ENDSIDE_X86)
    case Isa::avx2: return fused_avx2();
    case Isa::avx512:
    case Isa::amx: return fused_avx512();
#elif defined(ENDSIDE_NEON)
    case Isa::neon:
    case Isa::neon_i8mm: return fused_neon();
#endif
    default: throw std::invalid_argument("fused was not built for this instruction set");
  }
}

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

static Parallel parallel() {
#if defined(__linux__)
  // not linked to: the library must be the one that others in this process use already
  static const auto found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#else
  return nullptr;
#endif
}

bool fused_team() { return parallel() != nullptr; }

namespace {
struct Work {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // of the first unit that failed
  int64_t units;
  void (*fn)(const void*, int64_t);
  const void* data;
};

// An exception must not leave a thread of a team that knows nothing of them.
void take(void* argument) {
  Work& work = *static_cast<Work*>(argument);
  try {
    for (int64_t unit = work.next++; unit < work.units; unit = work.next++) work.fn(work.data, unit);
  } catch (...) {
    if (!work.failed.exchange(true)) work.error = std::current_exception();
    work.next = work.units;
  }
}
}  // namespace

static void flush_own(void* wanted) {
  const bool on = *static_cast<const bool*>(wanted);
#if defined(ENDSIDE_X86)
  constexpr unsigned BITS = 0x8040;  // results and operands
  _mm_setcsr(on ? _mm_getcsr() | BITS : _mm_getcsr() & ~BITS);
#elif defined(ENDSIDE_NEON)
  constexpr uint64_t BITS = uint64_t{1} << 24;
  uint64_t control;
  __asm__ volatile("mrs %0, fpcr" : "=r"(control));
  __asm__ volatile("msr fpcr, %0" ::"r"(on ? control | BITS : control & ~BITS));
#else
  (void)on;
#endif
}

void flush_denormals(int threads, bool wanted) {
  if (threads > 1 && fused_team()) parallel()(flush_own, &wanted, static_cast<unsigned>(threads), 0);
  flush_own(&wanted);
}

void run_fused(int64_t units, int threads, void (*fn)(const void*, int64_t), const void* data) {
  Work work;
  work.units = units;
  work.fn = fn;
  work.data = data;
  if (threads > 1 && units > 1 && fused_team()) {
    parallel()(take, &work, static_cast<unsigned>(threads), 0);
  } else {
    take(&work);
  }
  if (work.failed) std::rethrow_exception(work.error);
}

}  // namespace endside
