#include "gemm.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "fused.h"
#include "region.h"

namespace endside {

constexpr int64_t SHARED_STEPS = 4;   // laid out at a time where depth is outside
constexpr int64_t OWN_BYTES = 1 << 20;  // of a unit's own panels: half of a second-level cache

bool gemm_able([[maybe_unused]] Isa isa) {
#if defined(ENDSIDE_AMX)
  return isa == Isa::amx;
#else
  return false;
#endif
}

static const GemmKernels& kernels_of(Isa isa) {
#if defined(ENDSIDE_AMX)
  if (gemm_able(isa)) return gemm_amx();
#endif
  throw std::invalid_argument(std::string("gemm needs matrix tiles, which ") + isa_name(isa) +
                              " has not");
}

namespace {

// Memory of a thread that is kept for its next product.
class Room {
 public:
  uint16_t* of(int64_t numbers) {
    const size_t bytes = static_cast<size_t>(numbers) * sizeof(uint16_t);
    if (!region_ || region_->bytes() < bytes) {
      region_.reset();
      region_ = std::make_unique<Region>(bytes);
    }
    return reinterpret_cast<uint16_t*>(region_->data());
  }

 private:
  std::unique_ptr<Region> region_;
};
thread_local Room shared_room, own_room;

// One block of depths of a product.
struct Block {
  const Gemm& gemm;
  const GemmKernels& kernels;
  int64_t depth_begin, depth, steps;
  bool rows_shared;
  int64_t shared_panels, own_panels, units;
  uint16_t* shared;  // (shared_panels, steps, GEMM_STEP_NUMBERS)

  int64_t panel_numbers() const { return steps * GEMM_STEP_NUMBERS; }

  const GemmFactor& factor(bool rows) const { return rows ? gemm.a : gemm.b; }

  // Steps begin .. end of panels first .. last of a factor, those of a panel side by side from `to`
  // on. Memory is read as it lies: line after line, or depth after depth through all panels.
  void lay(bool rows, int64_t first, int64_t last, int64_t begin, int64_t end, uint16_t* to) const {
    if (factor(rows).depth_inside) {
      for (int64_t panel = first; panel < last; ++panel) {
        for (int64_t s = begin; s < end; ++s) lay_step(rows, panel, s, to + place(panel - first, s));
      }
    } else {
      for (int64_t s = begin; s < end; ++s) {
        for (int64_t panel = first; panel < last; ++panel) {
          lay_step(rows, panel, s, to + place(panel - first, s));
        }
      }
    }
  }
  int64_t place(int64_t panel, int64_t s) const {
    return panel * panel_numbers() + s * GEMM_STEP_NUMBERS;
  }
  void lay_step(bool rows, int64_t panel, int64_t s, uint16_t* to) const {
    const GemmFactor& whole = factor(rows);
    const int64_t line = panel * GEMM_LINES, at = depth_begin + s * GEMM_STEP;
    const int64_t lines = std::min(GEMM_LINES, (rows ? gemm.rows : gemm.columns) - line);
    const int64_t offset = whole.depth_inside ? line * whole.step + at : at * whole.step + line;
    const GemmFactor part = {whole.data + offset, whole.step, whole.depth_inside};
    kernels.lay[part.depth_inside][rows](part, lines, std::min(GEMM_STEP, depth - s * GEMM_STEP),
                                         to);
  }

  GemmPiece piece(int64_t row_panel, int64_t column_panel) const {
    const int64_t row = row_panel * GEMM_LINES, column = column_panel * GEMM_LINES;
    return {gemm.c + row * gemm.step + column, gemm.step,
            std::min(GEMM_LINES, gemm.rows - row), std::min(GEMM_LINES, gemm.columns - column)};
  }

  // A part of the shared factor: a panel, or a few steps of all.
  int64_t shares() const {
    return factor(rows_shared).depth_inside ? shared_panels : units_of(steps, SHARED_STEPS);
  }
  void share(int64_t index) const {
    if (factor(rows_shared).depth_inside) {
      return lay(rows_shared, index, index + 1, 0, steps, shared + place(index, 0));
    }
    const int64_t begin = index * SHARED_STEPS;
    lay(rows_shared, 0, shared_panels, begin, std::min(begin + SHARED_STEPS, steps), shared);
  }

  void unit(int64_t index) const {
    const int64_t begin = index * own_panels / units, end = (index + 1) * own_panels / units;
    uint16_t* own = own_room.of((end - begin) * panel_numbers());
    lay(!rows_shared, begin, end, 0, steps, own);
    kernels.enter();
    for (int64_t s = 0; s < shared_panels; ++s) {
      const uint16_t* theirs = shared + s * panel_numbers();
      for (int64_t i = begin; i < end; ++i) {
        const uint16_t* mine = own + (i - begin) * panel_numbers();
        const bool add = depth_begin > 0;
        if (rows_shared) {
          kernels.multiply(theirs, mine, steps, piece(s, i), add);
        } else {
          kernels.multiply(mine, theirs, steps, piece(i, s), add);
        }
      }
    }
    kernels.leave();
  }
};

// As few units as fit the cache, but two a thread so that a late one holds up less.
int64_t units_of_panels(int64_t panels, int64_t panel_bytes, int threads) {
  const int64_t most = std::max<int64_t>(1, OWN_BYTES / panel_bytes);
  const int64_t wanted = std::max(units_of(panels, most), int64_t{2} * threads);
  return std::min(panels, units_of(wanted, threads) * threads);
}

}  // namespace

void gemm(const Gemm& product, int threads, Isa isa) {
  const GemmKernels& kernels = kernels_of(isa);
  const int64_t row_panels = units_of(product.rows, GEMM_LINES);
  const int64_t column_panels = units_of(product.columns, GEMM_LINES);
  const bool rows_shared = row_panels <= column_panels;
  const int64_t shared_panels = rows_shared ? row_panels : column_panels;
  const int64_t own_panels = rows_shared ? column_panels : row_panels;
  const int64_t most = std::min(GEMM_DEPTH, units_of(product.depth, GEMM_STEP) * GEMM_STEP);
  uint16_t* room = shared_room.of(shared_panels * (most / GEMM_STEP) * GEMM_STEP_NUMBERS);
  for (int64_t begin = 0; begin < product.depth; begin += GEMM_DEPTH) {
    const int64_t depth = std::min(GEMM_DEPTH, product.depth - begin);
    const int64_t steps = units_of(depth, GEMM_STEP);
    const int64_t panel_bytes = steps * GEMM_STEP_NUMBERS * int64_t{sizeof(uint16_t)};
    const int64_t units = units_of_panels(own_panels, panel_bytes, threads);
    const Block block = {product, kernels, begin, depth, steps, rows_shared, shared_panels,
                         own_panels, units, room};
    run_fused(block.shares(), threads,
              [](const void* data, int64_t i) { static_cast<const Block*>(data)->share(i); },
              &block);
    run_fused(units, threads,
              [](const void* data, int64_t i) { static_cast<const Block*>(data)->unit(i); },
              &block);
  }
}

}  // namespace endside
