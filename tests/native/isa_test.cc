// Which instruction sets there are and how one is chosen.
#include "isa.h"

#include <algorithm>

#include "check.h"

using endside::Isa;

TEST(isa_names) {
  const std::vector<Isa> isas = endside::available_isas();
  CHECK(isas.front() == Isa::portable);
  for (Isa isa : isas) CHECK(endside::choose_isa(endside::isa_name(isa)) == isa);
  CHECK(endside::choose_isa("auto") == isas.back());
  CHECK_THROWS(std::invalid_argument, endside::choose_isa("mmx"));
  CHECK_THROWS(std::invalid_argument, endside::choose_isa(""));
}

// Whoever has the wide one has the narrow one: comparisons between the two always have both.
TEST(isa_order) {
  const std::vector<Isa> isas = endside::available_isas();
  const auto has = [&](Isa isa) { return std::count(isas.begin(), isas.end(), isa) != 0; };
  CHECK(std::is_sorted(isas.begin(), isas.end()));
  CHECK(has(Isa::avx2) || !has(Isa::avx512));
  CHECK(has(Isa::avx512) || !has(Isa::amx));
  CHECK(has(Isa::neon) || !has(Isa::neon_i8mm));
}
