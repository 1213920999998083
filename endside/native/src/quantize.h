// Rounding one group of weights to codes; the rules are in linear.h.
#pragma once

#include "linear.h"

namespace endside {

struct GroupCode {
  uint16_t scale;
  uint8_t zero;
};

// w (count), count <= shape.group -> codes (shape.group); codes from `count` on stand for zero.
GroupCode round_group(const Linear& shape, const float* w, int64_t count, uint8_t* codes);

}  // namespace endside
