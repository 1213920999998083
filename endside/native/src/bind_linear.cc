// Packing, unpacking, and one matrix at a time: what the weight cache and the tests call.
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "bind.h"
#include "pool.h"
#include "region.h"

using endside::Linear;
using endside::ROW_TILE;

template <class T>
static T* view(nb::handle object, size_t bytes, const char* what, Keep& keep) {
  const auto found = array_of<Array<const T, 1>>(object, what);
  if (found.size() * sizeof(T) != bytes) {
    throw std::invalid_argument(std::string(what) + " hold " +
                                std::to_string(found.size() * sizeof(T)) + " bytes, not " +
                                std::to_string(bytes));
  }
  if (reinterpret_cast<uintptr_t>(found.data()) % 64 != 0) {
    throw std::invalid_argument(std::string(what) + " do not start at a multiple of 64 bytes");
  }
  keep.push_back(nb::borrow(object));
  return const_cast<T*>(found.data());
}

static void check_shape(const Linear& linear) {
  const auto bad = [](const char* what) { throw std::invalid_argument(what); };
  if (linear.n < 1 || linear.k < 1) bad("packed: n and k must be positive");
  if (linear.kind < endside::Kind::f32 || linear.kind > endside::Kind::ternary3) {
    bad("packed: no such kind");
  }
  const bool known = linear.group == 32 || linear.group == 64 || linear.group == 128;
  if (linear.quantized() && !known) bad("packed: group must be 32, 64 or 128");
}

Linear linear_from(nb::handle object, Keep& keep, bool buffers) {
  const nb::tuple parts = nb::cast<nb::tuple>(object);
  Linear linear;
  linear.kind = static_cast<endside::Kind>(nb::cast<int>(parts[0]));
  linear.n = nb::cast<int64_t>(parts[1]);
  linear.k = nb::cast<int64_t>(parts[2]);
  linear.group = nb::cast<int64_t>(parts[3]);
  linear.asymmetric = nb::cast<bool>(parts[4]);
  linear.scale_type = static_cast<endside::ScaleType>(nb::cast<int>(parts[5]));
  check_shape(linear);
  if (!buffers) return linear;
  const endside::PackedSizes sizes = endside::packed_sizes(linear);
  linear.codes = view<uint8_t>(parts[6], sizes.codes, "codes", keep);
  if (sizes.scales) linear.scales = view<uint16_t>(parts[7], sizes.scales, "scales", keep);
  if (sizes.zeros) linear.zeros = view<uint8_t>(parts[8], sizes.zeros, "zeros", keep);
  return linear;
}

static std::tuple<size_t, size_t, size_t> packed_sizes(nb::handle parts) {
  Keep keep;
  const endside::PackedSizes sizes = endside::packed_sizes(linear_from(parts, keep, false));
  return {sizes.codes, sizes.scales, sizes.zeros};
}

// Rows `first` .. `first + rows` of the matrix; the core counts rows from the matrix's own start.
struct Rows {
  int64_t first, end;
  Rows(const Linear& linear, int64_t first, size_t rows, size_t width, int64_t want)
      : first(first), end(first + static_cast<int64_t>(rows)) {
    if (first < 0 || first % endside::ROWS != 0 || end > linear.n ||
        (end % endside::ROWS != 0 && end != linear.n)) {
      throw std::invalid_argument("pack: rows must come in whole blocks of 8");
    }
    if (static_cast<int64_t>(width) != want) {
      throw std::invalid_argument("pack: a row has another length than the matrix");
    }
  }
};

template <class T>
static const T* from_row_zero(const T* rows, int64_t first, int64_t width) {
  return reinterpret_cast<const T*>(reinterpret_cast<uintptr_t>(rows) -
                                    static_cast<uintptr_t>(first * width) * sizeof(T));
}

static uint8_t* writable(const uint8_t* bytes) { return const_cast<uint8_t*>(bytes); }
static uint16_t* writable(const uint16_t* words) { return const_cast<uint16_t*>(words); }

// weight (rows, K): float32, or 16-bit words when source says bf16 (1) or f16 (2).
static void pack_float(nb::handle parts, nb::handle weight, int source, int64_t first) {
  Keep keep;
  const Linear linear = linear_from(parts, keep);
  const auto type = static_cast<endside::SourceType>(source);
  const auto run = [&](const void* data, const Rows& rows) {
    nb::gil_scoped_release unlocked;
    endside::pack_float(linear, data, type, rows.first, rows.end, writable(linear.codes),
                        writable(linear.scales), writable(linear.zeros));
  };
  if (type == endside::SourceType::f32) {
    const auto found = array_of<Array<const float, 2>>(weight, "weight");
    const Rows rows(linear, first, found.shape(0), found.shape(1), linear.k);
    return run(from_row_zero(found.data(), first, linear.k), rows);
  }
  const auto found = array_of<Array<const uint16_t, 2>>(weight, "weight");
  const Rows rows(linear, first, found.shape(0), found.shape(1), linear.k);
  run(from_row_zero(found.data(), first, linear.k), rows);
}

// codes (rows, K), scales (rows, K / group) as 16-bit words, zeros alike or None.
static void pack_codes(nb::handle parts, Array<const uint8_t, 2> codes,
                       Array<const uint16_t, 2> scales, nb::handle zeros, int64_t first) {
  Keep keep;
  const Linear linear = linear_from(parts, keep);
  if (!linear.quantized()) throw std::invalid_argument("pack: this kind has no codes");
  const int64_t groups = (linear.k + linear.group - 1) / linear.group;
  const Rows rows(linear, first, codes.shape(0), codes.shape(1), linear.k);
  const Rows same(linear, first, scales.shape(0), scales.shape(1), groups);
  if (same.end != rows.end) throw std::invalid_argument("pack: codes and scales differ in rows");
  const uint8_t* zero_values = nullptr;
  if (linear.asymmetric) {
    const auto found = array_of<Array<const uint8_t, 2>>(zeros, "zeros");
    const Rows also(linear, first, found.shape(0), found.shape(1), groups);
    if (also.end != rows.end) throw std::invalid_argument("pack: codes and zeros differ in rows");
    zero_values = from_row_zero(found.data(), first, groups);
  }
  nb::gil_scoped_release unlocked;
  endside::pack_codes(linear, from_row_zero(codes.data(), first, linear.k),
                      from_row_zero(scales.data(), first, groups), zero_values, rows.first,
                      rows.end, writable(linear.codes), writable(linear.scales),
                      writable(linear.zeros));
}

static void unpack_rows(nb::handle parts, int64_t first, Array<float, 2> out) {
  Keep keep;
  const Linear linear = linear_from(parts, keep);
  const int64_t rows = static_cast<int64_t>(out.shape(0));
  if (first < 0 || first + rows > linear.n || static_cast<int64_t>(out.shape(1)) != linear.k) {
    throw std::invalid_argument("unpack: no such rows");
  }
  nb::gil_scoped_release unlocked;
  for (int64_t row = 0; row < rows; ++row) {
    endside::unpack_row(linear, first + row, out.data() + row * linear.k);
  }
}

// One product by a team: x (P, K) -> out (P, N), or (P, N / 2) for silu_mul; norm (K) or None.
static void linear_rows(nb::handle parts, Array<const float, 2> x, nb::handle norm, float eps,
                        int then, float alpha, Array<float, 2> out, int threads,
                        const std::string& isa_name) {
  Keep keep;
  const Linear linear = linear_from(parts, keep);
  const endside::Isa isa = endside::choose_isa(isa_name);
  const auto epilogue = static_cast<endside::Then>(then);
  const int64_t rows = static_cast<int64_t>(x.shape(0));
  const int64_t columns = epilogue == endside::Then::silu_mul ? linear.n / 2 : linear.n;
  if (static_cast<int64_t>(x.shape(1)) != linear.k || x.shape(0) != out.shape(0) ||
      static_cast<int64_t>(out.shape(1)) != columns) {
    throw std::invalid_argument("linear: x or out has another shape than the matrix wants");
  }
  const float* weight = nullptr;
  if (!norm.is_none()) {
    const auto found = array_of<Array<const float, 1>>(norm, "norm");
    if (found.size() != x.shape(1)) throw std::invalid_argument("linear: norm is not (K)");
    weight = found.data();
  }
  if (rows == 0) return;
  nb::gil_scoped_release unlocked;
  endside::Pool pool(threads);
  const endside::Region scratch(endside::input_bytes(linear, rows));
  const size_t tile = (endside::apply_scratch_bytes(linear) + 63) / 64 * 64;
  const endside::Region tiles(tile * static_cast<size_t>(threads));
  const endside::Input input = endside::make_input(linear, rows, scratch.data());
  const endside::Epilogue what{epilogue, alpha, out.data(), columns};
  pool.run([&](endside::Team& team) {
    team.split(rows, 1, [&](int64_t begin, int64_t end) {
      endside::prepare(input, x.data(), linear.k, weight, eps, begin, end, isa);
    });
    team.barrier();
    uint8_t* own = tiles.data() + tile * static_cast<size_t>(team.rank());
    team.split(linear.padded_n(), ROW_TILE, [&](int64_t begin, int64_t end) {
      endside::apply(linear, input, begin, end, what, own, isa);
    });
  });
}

void bind_linear(nb::module_& module) {
  module.def("packed_sizes", &packed_sizes, nb::arg("packed"));
  module.def("pack_float", &pack_float, nb::arg("packed"), nb::arg("weight"), nb::arg("source"),
             nb::arg("row"));
  module.def("pack_codes", &pack_codes, nb::arg("packed"), nb::arg("codes").noconvert(),
             nb::arg("scales").noconvert(), nb::arg("zeros").none(), nb::arg("row"));
  module.def("unpack_rows", &unpack_rows, nb::arg("packed"), nb::arg("row"),
             nb::arg("out").noconvert());
  module.def("linear", &linear_rows, nb::arg("packed"), nb::arg("x").noconvert(),
             nb::arg("norm").none(), nb::arg("eps"), nb::arg("then"), nb::arg("alpha"),
             nb::arg("out").noconvert(), nb::arg("threads"), nb::arg("isa"));
}
