// Memory that is asked for once and cut into named parts.
//
// It comes zeroed from the system, in huge pages where the system has them, and costs nothing until
// it is touched: a cache made for a long context takes what the conversation so far takes.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace endside {

class Region {
 public:
  explicit Region(size_t bytes);  // throws std::runtime_error with the size when there is none
  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  uint8_t* data_ = nullptr;  // 64-byte aligned; null when there are no bytes
  size_t bytes_ = 0;
};

// Cuts arrays from memory one after the other, each on its own cache line. Without memory it only
// counts, so that the same code says how much is needed and hands it out. Under the address
// sanitizer a line that nobody may touch lies after each array.
class Carver {
 public:
  explicit Carver(uint8_t* memory) : memory_(memory) {}
  template <class T>
  T* take(size_t count) {
    T* found = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += (count * sizeof(T) + LINE - 1) / LINE * LINE;
    fence();
    return found;
  }
  size_t used() const { return used_; }

 private:
  static constexpr size_t LINE = 64;  // bytes
#if defined(__SANITIZE_ADDRESS__)
  void fence() {
    if (memory_) ASAN_POISON_MEMORY_REGION(memory_ + used_, LINE);
    used_ += LINE;
  }
#else
  void fence() {}
#endif
  uint8_t* memory_;
  size_t used_ = 0;
};

}  // namespace endside
