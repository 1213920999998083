// Rotary positions, rotate-half layout: channel i of a head pairs with channel i + D/2.
//
//     y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin        angle = position * inverse frequency
//
// The angle is rounded to float32 before its cosine is taken, as in the PyTorch reference, so that
// both models turn by the same angle even at position 131,072.
#pragma once

#include <cstdint>

namespace endside {

// One row's angles: inverse_frequencies, cosine and sine (half), times the amplitude.
void rope_table(int64_t position, const float* inverse_frequencies, int64_t half, float amplitude,
                float* cosine, float* sine);

// x (heads, D) of one token, in place; cosine, sine (D / 2).
void rope_rotate(float* x, int64_t heads, int64_t head_dim, const float* cosine, const float* sine);

}  // namespace endside
