// A test frame for the core without Python: named tests, checks that say where, fenced memory.
//
//     TEST(rmsnorm_in_place) { CHECK(...); }                     runs once
//     TEST_EACH_ISA(rmsnorm) { CHECK_NEAR(got, want, bound); }   runs for each `isa` there is
//
// One line per test and instruction set ("rmsnorm avx2: ok"); the program ends with 0 when all are
// ok. Words on the command line choose the tests whose line contains one of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace check {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Registers a test when the program starts; each_isa: once for every instruction set.
struct Test {
  Test(const char* name, bool each_isa, std::function<void(endside::Isa)> run);
};

// What this machine runs, and what this build emulates (see emulate/immintrin.h).
std::vector<endside::Isa> tested_isas();

template <class... Words>
std::string join(const Words&... words) {
  std::ostringstream text;
  text.precision(9);
  (void)std::initializer_list<int>{((text << words << ' '), 0)...};
  return text.str();
}

#define CHECK_TEST(name, each_isa)                                       \
  static void name([[maybe_unused]] endside::Isa isa);                   \
  static const check::Test name##_test(#name, each_isa, name);           \
  static void name([[maybe_unused]] endside::Isa isa)
#define TEST(name) CHECK_TEST(name, false)
#define TEST_EACH_ISA(name) CHECK_TEST(name, true)

// CHECK(condition, words ...): the words say which case it was.
#define CHECK(condition, ...)                                                         \
  do {                                                                                \
    if (!(condition)) {                                                               \
      throw check::Failure(check::join(__FILE__ ":", __LINE__, #condition, ##__VA_ARGS__)); \
    }                                                                                 \
  } while (false)
// Written so that NaN fails.
#define CHECK_NEAR(got, want, bound, ...)                                                    \
  CHECK(std::fabs(static_cast<double>(got) - static_cast<double>(want)) <= (bound), "| got", \
        got, "want", want, ##__VA_ARGS__)
#define CHECK_THROWS(type, expression)                             \
  do {                                                             \
    bool thrown = false;                                           \
    try {                                                          \
      expression;                                                  \
    } catch (const type&) {                                        \
      thrown = true;                                               \
    }                                                              \
    CHECK(thrown, "| " #expression " should throw " #type);        \
  } while (false)

// Reproducible numbers.
class Noise {
 public:
  explicit Noise(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 32);
  }
  int64_t below(int64_t count) { return bits() % count; }
  float operator()() { return static_cast<float>(bits() >> 8) / (1 << 23) - 1.0f; }  // [-1, 1)

 private:
  uint64_t state_;
};

// `count` values on a 64-byte boundary (plus `shift` values) with FENCE bytes of 0xff (NaN as a
// float, -1 as an integer) on both sides and inside. Under the address sanitizer the sides may not
// be touched at all; without it `intact` tells whether they were written.
template <class T>
class Fenced {
 public:
  static constexpr std::size_t FENCE = 256;
  explicit Fenced(std::size_t count, std::size_t shift = 0)
      : bytes_(count * sizeof(T)), memory_(bytes_ + 2 * FENCE + 64 + shift * sizeof(T), 0xff) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    begin_ = (address + FENCE + 63) / 64 * 64 - address + shift * sizeof(T);
    poison(true);
  }
  ~Fenced() { poison(false); }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;

  T* data() { return reinterpret_cast<T*>(memory_.data() + begin_); }
  T& operator[](std::size_t index) { return data()[index]; }
  std::size_t size() const { return bytes_ / sizeof(T); }
  T* begin() { return data(); }
  T* end() { return data() + size(); }
  bool intact() {
    poison(false);
    bool whole = true;
    for (std::size_t i = 0; i < memory_.size(); ++i) {
      const bool inside = i >= begin_ && i < begin_ + bytes_;
      whole = whole && (inside || memory_[i] == 0xff);
    }
    poison(true);
    return whole;
  }

 private:
  void poison([[maybe_unused]] bool on) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(memory_.data(), memory_.size());
    if (!on) return;
    ASAN_POISON_MEMORY_REGION(memory_.data(), begin_);
    const std::size_t end = begin_ + bytes_;
    ASAN_POISON_MEMORY_REGION(memory_.data() + end, memory_.size() - end);
#endif
  }
  std::size_t bytes_, begin_ = 0;
  std::vector<uint8_t> memory_;
};

}  // namespace check
