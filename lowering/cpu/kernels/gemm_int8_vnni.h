// Products of 8-bit numbers in vector registers.
#pragma once

#include "vector_int8.h"

namespace {

constexpr bool INT8_ROWS_ARE_UNSIGNED = true;
constexpr int INT8_ROWS = 6;  // of a register tile, R x 4 accumulators, 4 of columns and 1 of a row

// Multiplies R rows with all columns. Each step fetches LINES lines from `fetched` on.
template <int R, int LINES>
__attribute__((noinline)) void multiply_int8_rows(const uint32_t* a, const float* a_step,
                                                  const uint32_t* b, const float* b_step,
                                                  const int32_t* start, float* products, int stride,
                                                  const char* fetched) {
  constexpr int VECTORS_PER_ROW = BLOCK / LANES;
  int_vec acc[R][VECTORS_PER_ROW];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS_PER_ROW; ++v) acc[r][v] = load_aligned_ints(start + v * LANES);
  for (int k = 0; k < INT8_DEPTH; ++k, b += BLOCK) {
#pragma GCC unroll 8
    for (int n = 0; n < LINES; ++n) __builtin_prefetch(fetched + (k * LINES + n) * 64, 0, 2);
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
    const vec step = set1(a_step ? a_step[r] : 1.0f);
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS_PER_ROW; ++v) {
      vec sum = to_floats(acc[r][v]);
      if (a_step) sum = mul(sum, step);
      store(products + r * stride + v * LANES, mul(sum, load(b_step + v * LANES)));
    }
  }
}

// Computes products [rows, BLOCK] of `rows` packed rows, a multiple of 2, with BLOCK others, `stride`
// floats per row. The steps are what 1 is worth in each row (null: 1 in all) and in each column; sums
// begin with `start`. Memory of BYTES bytes that is read soon is fetched meanwhile.
template <int BYTES = 0>
inline void multiply_int8(const uint32_t* a, const float* a_step, const uint32_t* b,
                          const float* b_step, const int32_t* start, int rows, float* products,
                          int stride = BLOCK, const char* fetched = nullptr) {
  constexpr int GROUPS = (BLOCK + INT8_ROWS - 1) / INT8_ROWS;
  constexpr int LINES = (BYTES / 64 + GROUPS * INT8_DEPTH - 1) / (GROUPS * INT8_DEPTH);
  const auto step_at = [&](int r) { return a_step ? a_step + r : nullptr; };
  int r = 0;
  for (; r + INT8_ROWS <= rows; r += INT8_ROWS)
    multiply_int8_rows<INT8_ROWS, LINES>(a + r * INT8_DEPTH, step_at(r), b, b_step, start,
                                         products + r * stride, stride,
                                         fetched + r / INT8_ROWS * INT8_DEPTH * LINES * 64);
  for (; r + 4 <= rows; r += 4)
    multiply_int8_rows<4, 0>(a + r * INT8_DEPTH, step_at(r), b, b_step, start,
                             products + r * stride, stride, nullptr);
  for (; r < rows; r += 2)
    multiply_int8_rows<2, 0>(a + r * INT8_DEPTH, step_at(r), b, b_step, start,
                             products + r * stride, stride, nullptr);
}

}  // namespace
