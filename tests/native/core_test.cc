// The core without Python: runs every test linked into this program, for every instruction set.
#include <chrono>
#include <cstdio>

#include "check.h"

namespace check {

namespace {

struct Entry {
  std::string name;
  bool each_isa;
  std::function<void(endside::Isa)> run;
};

std::vector<Entry>& entries() {
  static std::vector<Entry> all;
  return all;
}

bool chosen(const std::string& line, int count, char** words) {
  bool any = count < 2;
  for (int i = 1; i < count; ++i) any = any || line.find(words[i]) != std::string::npos;
  return any;
}

// Whether the test held; prints its line.
bool passes(const Entry& entry, endside::Isa isa, const std::string& line) {
  const auto started = std::chrono::steady_clock::now();
  std::string verdict = "ok";
  try {
    entry.run(isa);
  } catch (const std::exception& error) {
    verdict = std::string("WRONG ") + error.what();
  }
  const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - started;
  std::printf("%s: %s (%.2f s)\n", line.c_str(), verdict.c_str(), spent.count());
  std::fflush(stdout);
  return verdict == "ok";
}

}  // namespace

Test::Test(const char* name, bool each_isa, std::function<void(endside::Isa)> run) {
  entries().push_back({name, each_isa, std::move(run)});
}

std::vector<endside::Isa> tested_isas() {
  std::vector<endside::Isa> isas = endside::available_isas();
#if defined(ENDSIDE_EMULATE_AVX512)
  if (isas.back() != endside::Isa::avx512) isas.push_back(endside::Isa::avx512);
#endif
  return isas;
}

}  // namespace check

int main(int count, char** words) {
  int run = 0, wrong = 0;
  for (const check::Entry& entry : check::entries()) {
    for (endside::Isa isa : check::tested_isas()) {
      const std::string line =
          entry.each_isa ? entry.name + " " + endside::isa_name(isa) : entry.name;
      if (!check::chosen(line, count, words)) continue;
      ++run;
      wrong += !check::passes(entry, isa, line);
      if (!entry.each_isa) break;
    }
  }
  std::printf("%d tests, %d wrong\n", run, wrong);
  return run == 0 || wrong != 0;
}
