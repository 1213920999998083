// Asked of the system page by page: an anonymous mapping is zero and unbacked until it is written.
#include "region.h"

#include <sys/mman.h>

#include <stdexcept>
#include <string>

namespace endside {

Region::Region(size_t bytes) {
  if (bytes == 0) return;
  void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) {
    throw std::runtime_error("the system has no " + std::to_string(bytes >> 20) +
                             " MiB of memory left: ask for a shorter context or fewer rows");
  }
  data_ = static_cast<uint8_t*>(found);
  bytes_ = bytes;
#if defined(MADV_HUGEPAGE)
  madvise(found, bytes, MADV_HUGEPAGE);  // a wish: a refusal costs speed only
#endif
}

Region::~Region() {
  if (!data_) return;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(data_, bytes_);
#endif
  munmap(data_, bytes_);
}

}  // namespace endside
