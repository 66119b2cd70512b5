// Rows of the inputs, and arithmetic on positions and bits.
#pragma once

#include <cstdint>

#include "spec.h"

namespace {

// One tensor [B, H, N, D]. Its strides are in elements, and the last one is 1.
struct TensorView {
  const input* data;
  int64_t batch, head, row;
  const input* at(int64_t b, int64_t h, int64_t n) const {
    return data + b * batch + h * head + n * row;
  }
};

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

inline uint64_t low_bits(int64_t count) {
  return count <= 0 ? 0 : count >= 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
}

}  // namespace
