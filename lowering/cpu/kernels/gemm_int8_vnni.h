// Products of 8-bit numbers in vector registers.
#pragma once

#include "vector.h"

namespace {

constexpr bool INT8_ROWS_ARE_UNSIGNED = true;

// Multiplies R rows with all columns, in R x 4 accumulators, 4 registers of columns and 1 of a row.
template <int R>
__attribute__((noinline)) void multiply_int8_rows(const uint32_t* a, const float* a_step,
                                                  const uint32_t* b, const float* b_step,
                                                  const int32_t* start, float* products) {
  constexpr int VECTORS_PER_ROW = BLOCK / LANES;
  int_vec acc[R][VECTORS_PER_ROW];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS_PER_ROW; ++v) acc[r][v] = load_aligned_ints(start + v * LANES);
  for (int k = 0; k < INT8_DEPTH; ++k, b += BLOCK) {
    int_vec factor[VECTORS_PER_ROW];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS_PER_ROW; ++v) factor[v] = load_ints(b + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const int_vec broadcast = set1_int(static_cast<int>(a[r * INT8_DEPTH + k]));
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS_PER_ROW; ++v) add_int8_products(acc[r][v], broadcast, factor[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const vec step = set1(a_step[r]);
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS_PER_ROW; ++v)
      store(products + r * BLOCK + v * LANES,
            mul(mul(to_floats(acc[r][v]), step), load(b_step + v * LANES)));
  }
}

// Computes products [rows, BLOCK] of `rows` packed rows, a multiple of 2, with BLOCK others. The
// steps are what 1 is worth in each row and in each column; sums begin with `start`.
inline void multiply_int8(const uint32_t* a, const float* a_step, const uint32_t* b,
                          const float* b_step, const int32_t* start, int rows, float* products) {
  int r = 0;
  for (; r + 6 <= rows; r += 6)
    multiply_int8_rows<6>(a + r * INT8_DEPTH, a_step + r, b, b_step, start, products + r * BLOCK);
  for (; r + 4 <= rows; r += 4)
    multiply_int8_rows<4>(a + r * INT8_DEPTH, a_step + r, b, b_step, start, products + r * BLOCK);
  for (; r < rows; r += 2)
    multiply_int8_rows<2>(a + r * INT8_DEPTH, a_step + r, b, b_step, start, products + r * BLOCK);
}

}  // namespace
