// The borrowed team: every unit once, and what one of them throws reaches the caller.
#include "fused.h"

#include <dlfcn.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"

namespace {

constexpr int64_t UNITS = 100;

struct Counts {
  std::vector<std::atomic<int>> of = std::vector<std::atomic<int>>(UNITS);
  int64_t bad = -1;
};

void count(const void* data, int64_t unit) {
  Counts& counts = *static_cast<Counts*>(const_cast<void*>(data));
  ++counts.of[static_cast<std::size_t>(unit)];
  std::this_thread::sleep_for(std::chrono::microseconds(100));  // or the first thread does it all
  if (unit == counts.bad) throw std::runtime_error("as asked");
}

}  // namespace

TEST(fused_team) {
#if !defined(__SANITIZE_THREAD__)  // which does not see how that team waits for its threads
  dlopen("libgomp.so.1", RTLD_NOW | RTLD_GLOBAL);  // else one thread does it all
#endif
  for (const int threads : {1, 4}) {
    Counts counts;
    endside::run_fused(UNITS, threads, count, &counts);
    for (const std::atomic<int>& times : counts.of) CHECK(times == 1, "threads", threads);
    for (const int64_t bad : {int64_t{0}, int64_t{57}, UNITS - 1}) {
      Counts failing;
      failing.bad = bad;
      CHECK_THROWS(std::runtime_error, endside::run_fused(UNITS, threads, count, &failing));
      for (const std::atomic<int>& times : failing.of) CHECK(times <= 1, "threads", threads);
    }
  }
}
