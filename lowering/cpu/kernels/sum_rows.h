// Sums of rows of the inputs, which means are made of.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "indexing.h"
#include "vector.h"

namespace {

constexpr int POOLED = (HEAD_DIM + LANES - 1) / LANES * LANES;  // floats of one sum or mean

// Sums the rows first <= n < stop for which `real(n)` into `sum` [POOLED], and returns how many
// there are.
template <typename Real>
int64_t sum_rows(float* sum, const TensorView& rows, int64_t b, int64_t head, int64_t first,
                 int64_t stop, const Real& real) {
  std::fill_n(sum, POOLED, 0.0f);
  int64_t count = 0;
  for (int64_t n = first; n < stop; ++n) {
    if (!real(n)) continue;
    ++count;
    const input* row = rows.at(b, head, n);
    int d = 0;
    for (; d + LANES <= HEAD_DIM; d += LANES)
      store(sum + d, add(load(sum + d), load(row + d, input_tag{})));
    if (d < HEAD_DIM) {
      input tail[LANES] = {};
      std::memcpy(tail, row + d, (HEAD_DIM - d) * sizeof(input));
      store(sum + d, add(load(sum + d), load(tail, input_tag{})));
    }
  }
  return count;
}

}  // namespace
