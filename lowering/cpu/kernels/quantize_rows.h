// Rows of a linear layer's input, rotated and rounded to 8 bits. The meaning is `quantize_rows` of
// lowering/reference/linear.py.
#pragma once

#include <omp.h>
#include <algorithm>
#include <cstdint>
#include <deque>
#include <new>

#include "memory.h"
#include "rotate.h"
#include "vector.h"

namespace {

constexpr float MOST_LEVEL = 127.0f, ZERO_LEVEL = 128.0f;

// Rotates a row of `groups` groups into `rotated`, and returns its greatest absolute number.
// `poison` becomes NaN if a number of the row is not finite, and is zero otherwise.
inline float rotate_row(float* rotated, const input* row, int64_t groups, float* poison) {
  vec most = set1(0.0f), wrong = set1(0.0f);
  for (int64_t g = 0; g < groups; ++g) {
    vec group[VECTORS_PER_GROUP];
    for (int v = 0; v < VECTORS_PER_GROUP; ++v) {
      group[v] = load(row + g * GROUP + v * LANES, input_tag{});
      wrong = add(wrong, mul(group[v], set1(0.0f)));
    }
    rotate(group);
    for (int v = 0; v < VECTORS_PER_GROUP; ++v) {
      most = maximum(maximum(group[v], sub(set1(0.0f), group[v])), most);
      store(rotated + g * GROUP + v * LANES, group[v]);
    }
  }
  *poison = reduce_add(wrong);
  return reduce_max(most);
}

// Rounds a rotated row to levels. Plain C++, which compilers turn into vectors.
inline void round_row(uint8_t* levels, const float* rotated, int64_t width, float inverse) {
  for (int64_t k = 0; k < width; ++k)
    levels[k] =
        static_cast<uint8_t>(static_cast<int32_t>(rotated[k] * inverse + (ZERO_LEVEL + 0.5f)));
}

}  // namespace

extern "C" int quantize_rows(const QuantizeArguments* arguments) {
  const QuantizeArguments& a = *arguments;
  const int64_t width = a.groups * GROUP;
  try {
    std::deque<Buffer<float>> rotated;
    for (int64_t t = 0; t < a.threads; ++t) rotated.emplace_back(width);
#pragma omp parallel for num_threads(a.threads) schedule(static)
    for (int64_t n = 0; n < a.num_rows; ++n) {
      float* row = rotated[omp_get_thread_num()].get();
      float poison;
      const float most =
          rotate_row(row, static_cast<const input*>(a.rows) + n * a.stride, a.groups, &poison);
      const bool finite = poison == 0.0f && most > 0.0f;
      round_row(a.levels + n * width, row, finite ? width : 0, MOST_LEVEL / most);
      if (!finite) std::fill_n(a.levels + n * width, width, static_cast<uint8_t>(ZERO_LEVEL));
      a.steps[n] = most / (MOST_LEVEL * ROOT) + poison;
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
