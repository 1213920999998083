// What this machine can do at most: read memory, multiply int8, multiply float32.
//
//     limits bandwidth THREADS BYTES small|huge REPEATS
//     limits peak THREADS REPEATS
//
// One line of JSON. A decoding step must read every weight once, so bytes per token over bandwidth
// is the least time it can take; a prompt must multiply every weight with every token, so the int8
// peak bounds prefill. Method: threads pinned, each owns one contiguous share of the buffer and
// touches it first; all meet at a barrier before and after each repeat. The page kind is the
// caller's choice: 4 KiB pages cost address translation, and model files are usually mapped with
// them. The peak loops keep everything in registers; "int8" is what this instruction set has for
// unsigned times signed bytes: VNNI, the dot product of Arm, or AVX2's three instructions.
//
// Build: g++ -O3 -march=native -std=c++17 -pthread limits.cc -o limits
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define OPAQUE(value) asm volatile("" : "+x"(value))
#elif defined(__aarch64__)
#include <arm_neon.h>
#define OPAQUE(value) asm volatile("" : "+w"(value))
#else
#define OPAQUE(value) asm volatile("" : "+m"(value))
#endif

namespace {

using Wide = uint64_t __attribute__((vector_size(32)));
using Clock = std::chrono::steady_clock;

void pin(int index) {
  cpu_set_t allowed, one;
  CPU_ZERO(&one);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  const int count = CPU_COUNT(&allowed);
  int wanted = index % count;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &allowed) && wanted-- == 0) CPU_SET(cpu, &one);
  pthread_setaffinity_np(pthread_self(), sizeof one, &one);
}

// Seconds of each repeat of `work(thread)`, run by all threads at once after `prepare(thread)`.
std::vector<double> together(int threads, int repeats, const std::function<void(int)>& prepare,
                             const std::function<void(int)>& work) {
  pthread_barrier_t barrier;
  pthread_barrier_init(&barrier, nullptr, static_cast<unsigned>(threads));
  std::vector<double> seconds;
  const auto body = [&](int id) {
    pin(id);
    prepare(id);
    for (int repeat = 0; repeat < repeats; ++repeat) {
      pthread_barrier_wait(&barrier);
      const auto begun = Clock::now();
      work(id);
      pthread_barrier_wait(&barrier);
      if (id == 0) seconds.push_back(std::chrono::duration<double>(Clock::now() - begun).count());
    }
  };
  std::vector<std::thread> team;
  for (int id = 0; id < threads; ++id) team.emplace_back(body, id);
  for (auto& one : team) one.join();
  pthread_barrier_destroy(&barrier);
  return seconds;
}

std::string summary(const char* name, double amount, std::vector<double> seconds) {
  std::sort(seconds.begin(), seconds.end());
  char text[160];
  std::snprintf(text, sizeof text, ",\"%s\":{\"median\":%.3f,\"min\":%.3f,\"max\":%.3f}", name,
                amount / seconds[seconds.size() / 2], amount / seconds.back(),
                amount / seconds.front());
  return text;
}

int bandwidth(int threads, size_t bytes, bool huge, int repeats) {
  constexpr size_t PAGE = size_t{2} << 20;
  const size_t unit = sizeof(Wide) * 8, share = bytes / static_cast<size_t>(threads) / unit * unit;
  const size_t size = share * static_cast<size_t>(threads);
  void* map = mmap(nullptr, size + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                   -1, 0);
  if (map == MAP_FAILED || share == 0) {
    std::fputs("limits: no memory of that size\n", stderr);
    return 1;
  }
  const uintptr_t first = (reinterpret_cast<uintptr_t>(map) + PAGE - 1) & ~(PAGE - 1);
  auto* base = reinterpret_cast<uint8_t*>(first);
  madvise(base, size, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  std::vector<uint64_t> found(static_cast<size_t>(threads));
  const auto fill = [&](int id) {
    std::memset(base + share * static_cast<size_t>(id), 1 + id, share);
  };
  const auto read = [&](int id) {
    const auto* row = reinterpret_cast<const Wide*>(base + share * static_cast<size_t>(id));
    Wide sums[8] = {};
    for (size_t i = 0; i < share / sizeof(Wide); i += 8)
      for (size_t j = 0; j < 8; ++j) sums[j] ^= row[i + j];
    Wide all = sums[0];
    for (size_t j = 1; j < 8; ++j) all ^= sums[j];
    found[static_cast<size_t>(id)] += all[0] ^ all[1] ^ all[2] ^ all[3];
  };
  const std::vector<double> seconds = together(threads, repeats, fill, read);
  const std::string speed = summary("gb_s", 1e-9 * static_cast<double>(size), seconds);
  std::printf("{\"threads\":%d,\"bytes\":%zu,\"pages\":\"%s\"%s,\"sum\":%llu}\n", threads, size,
              huge ? "huge" : "small", speed.c_str(), static_cast<unsigned long long>(found[0]));
  return 0;
}

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int CHAINS = 8;  // hides four cycles of latency on two pipes, and fits sixteen registers
#else
constexpr int CHAINS = 12;
#endif
constexpr int64_t TURNS = 8000000;

#if defined(__AVX512VNNI__)
const char* const INT8 = "vpdpbusd, 512 bits";
constexpr double INT8_OPS = 128;
using Bytes = __m512i;
Bytes dot(Bytes sum, Bytes x, Bytes y) { return _mm512_dpbusd_epi32(sum, x, y); }
Bytes zero_bytes() { return _mm512_setzero_si512(); }
#elif defined(__AVX2__)
const char* const INT8 = "vpmaddubsw + vpmaddwd + vpaddd, 256 bits";
constexpr double INT8_OPS = 64;
using Bytes = __m256i;
Bytes dot(Bytes sum, Bytes x, Bytes y) {
  const Bytes pairs = _mm256_maddubs_epi16(x, y);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
Bytes zero_bytes() { return _mm256_setzero_si256(); }
#elif defined(__ARM_FEATURE_DOTPROD)
const char* const INT8 = "sdot, 128 bits";
constexpr double INT8_OPS = 32;
using Bytes = int32x4_t;
Bytes dot(Bytes sum, Bytes x, Bytes y) {
  return vdotq_s32(sum, vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(y));
}
Bytes zero_bytes() { return vdupq_n_s32(0); }
#else
const char* const INT8 = "compiler's vectors, 128 bits";
constexpr double INT8_OPS = 8;
using Bytes = int32_t __attribute__((vector_size(16)));
Bytes dot(Bytes sum, Bytes x, Bytes y) { return sum + x * y; }
Bytes zero_bytes() { return Bytes{}; }
#endif

#if defined(__AVX512F__)
using Floats = __m512;
Floats fma(Floats sum, Floats x, Floats y) { return _mm512_fmadd_ps(x, y, sum); }
#elif defined(__FMA__)
using Floats = __m256;
Floats fma(Floats sum, Floats x, Floats y) { return _mm256_fmadd_ps(x, y, sum); }
#else
using Floats = float __attribute__((vector_size(16)));
Floats fma(Floats sum, Floats x, Floats y) { return sum + x * y; }
#endif
constexpr double FLOAT_OPS = 2.0 * sizeof(Floats) / sizeof(float);

// CHAINS independent sums, TURNS times. All is opaque, so nothing is folded, hoisted or spilled.
template <class T, T (*Op)(T, T, T)>
void chains(T x, T y) {
  OPAQUE(y);
  T sums[CHAINS];
#pragma GCC unroll 16
  for (int i = 0; i < CHAINS; ++i) sums[i] = x;
  for (int64_t turn = 0; turn < TURNS; ++turn) {
#pragma GCC unroll 16
    for (int i = 0; i < CHAINS; ++i) {
      OPAQUE(x);
      sums[i] = Op(sums[i], x, y);
      OPAQUE(sums[i]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < CHAINS; ++i) OPAQUE(sums[i]);
}

int peak(int threads, int repeats) {
  const auto nothing = [](int) {};
  const auto bytes = [](int) { chains<Bytes, dot>(zero_bytes(), zero_bytes()); };
  const auto floats = [](int) { chains<Floats, fma>(Floats{}, Floats{}); };
  const double turns = 1e-9 * CHAINS * static_cast<double>(TURNS) * threads;
  const std::vector<double> int8 = together(threads, repeats, nothing, bytes);
  const std::vector<double> fp32 = together(threads, repeats, nothing, floats);
  std::printf("{\"threads\":%d,\"int8_with\":\"%s\",\"float_bits\":%zu%s%s}\n", threads, INT8,
              8 * sizeof(Floats), summary("int8_gops", INT8_OPS * turns, int8).c_str(),
              summary("fp32_gflops", FLOAT_OPS * turns, fp32).c_str());
  return 0;
}

}  // namespace

int main(int count, char** words) {
  const std::string verb = count > 1 ? words[1] : "";
  if (verb == "bandwidth" && count == 6)
    return bandwidth(std::atoi(words[2]), std::strtoull(words[3], nullptr, 10),
                     std::string(words[4]) == "huge", std::atoi(words[5]));
  if (verb == "peak" && count == 4) return peak(std::atoi(words[2]), std::atoi(words[3]));
  std::fputs("usage: limits bandwidth THREADS BYTES small|huge REPEATS\n"
             "       limits peak THREADS REPEATS\n",
             stderr);
  return 2;
}
