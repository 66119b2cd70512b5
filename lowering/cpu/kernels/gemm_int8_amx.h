// Products of 8-bit numbers in AMX tiles.
#pragma once

#include <immintrin.h>
#include <cstdint>

#include "gemm_amx.h"
#include "vector_int8.h"

namespace {

constexpr bool INT8_ROWS_ARE_UNSIGNED = false;

// Computes products [rows, BLOCK] of `rows` packed rows, a multiple of 32, with BLOCK others, `stride`
// floats per row. The steps are what 1 is worth in each row (null: 1 in all) and in each column.
// Nothing is fetched.
template <int BYTES = 0>
inline void multiply_int8(const uint32_t* a, const float* a_step, const uint32_t* b,
                          const float* b_step, const int32_t*, int rows, float* products,
                          int stride = BLOCK, const char* = nullptr) {
  for (int n = 0; n < BLOCK; n += 32) {
    for (int r = 0; r < rows; r += 32) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int k = 0; k < INT8_DEPTH; k += 16) {
        const uint32_t* a0 = a + r * INT8_DEPTH + k;
        const uint32_t* b0 = b + k * BLOCK + n;
        _tile_loadd(6, b0, BLOCK * 4);
        _tile_loadd(4, a0, INT8_DEPTH * 4);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, b0 + 16, BLOCK * 4);
        _tile_dpbssd(1, 4, 7);
        _tile_loadd(5, a0 + 16 * INT8_DEPTH, INT8_DEPTH * 4);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      }
      float* c = products + r * stride + n;
      _tile_stored(0, c, stride * 4);
      _tile_stored(1, c + 16, stride * 4);
      _tile_stored(2, c + 16 * stride, stride * 4);
      _tile_stored(3, c + 16 * stride + 16, stride * 4);
    }
  }
  for (int r = 0; r < rows; ++r) {
    const vec step = set1(a_step ? a_step[r] : 1.0f);
    for (int n = 0; n < BLOCK; n += LANES) {
      float* c = products + r * stride + n;
      const vec sum = to_floats(load_ints(c));
      store(c, mul(mul(sum, step), load(b_step + n)));
    }
  }
}

}  // namespace
