// Rows of numbers, each rounded to 255 levels of its greatest one.
#pragma once

#include <cstdint>
#include <cstring>

#include "sum_rows.h"
#include "vector_int8.h"

namespace {

// Says what a level is worth if 127 of them are the greatest number of a row [POOLED]. A row of
// zeros gets 1.
inline float step_of(const float* row) {
  vec most = set1(0.0f);
  for (int d = 0; d < POOLED; d += LANES) {
    const vec x = load(row + d);
    most = maximum(maximum(x, sub(set1(0.0f), x)), most);
  }
  const float greatest = reduce_max(most);
  return greatest > 0.0f ? greatest / 127 : 1.0f;
}

// Writes a row [POOLED] in steps, as [INT8_DEPTH] words, and returns the sum of all its numbers.
inline int32_t pack_int8(uint32_t* out, const float* row, float step) {
  const vec inverse = set1(1.0f / step);
  alignas(16) int8_t bytes[POOLED];
  int_vec sum = zero_ints();
  for (int d = 0; d < POOLED; d += LANES)
    sum = store_int8(bytes + d, mul(load(row + d), inverse), sum);
  constexpr int BYTES = INT8_DEPTH * 4, SHARED = POOLED < BYTES ? POOLED : BYTES;
  std::memset(out, 0, BYTES);
  std::memcpy(out, bytes, SHARED);
  return reduce_add(sum);
}

// Widens a row of HEAD_DIM inputs to POOLED floats, with zeros at the end.
inline void widen_row(float* out, const input* in) {
  int d = 0;
  for (; d + LANES <= HEAD_DIM; d += LANES) store(out + d, load(in + d, input_tag{}));
  if (d == HEAD_DIM) return;
  input tail[LANES] = {};
  std::memcpy(tail, in + d, (HEAD_DIM - d) * sizeof(input));
  store(out + d, load(tail, input_tag{}));
}

}  // namespace
