// The micro-GEMM in AMX tiles of bf16 pairs. gemm.h says what its arguments are.
#pragma once

#include <immintrin.h>
#include <cstdint>

#include "tile_bounds.h"
#include "vector.h"

namespace {

constexpr int ROW_STEP = 64, COLUMN_STEP = 32;   // rows come in whole query blocks
constexpr int COLUMNS_AT_ONCE = COLUMN_STEP;     // so many cost no more than one
constexpr int FEW_ROWS = 32, FEW_ROW_STEP = 32;  // of a product of few rows

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tile registers belong to whoever runs on the thread, so the configuration of others is put back.
class TileScope {
 public:
  TileScope() {
    _tile_storeconfig(&saved_);
    const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~TileScope() {
    if (saved_.palette != 0) _tile_loadconfig(&saved_);
    else _tile_release();
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  alignas(64) TileConfig saved_;
};

// Says how many bytes to fetch per step: none here.
constexpr int fetch_step(int, int, int) { return 0; }

template <bool ACCUMULATE, int FETCH = 0>
void multiply(const word* a, int lda, const word* const* panels, int num_panels, int steps, int ldb,
              float* c, int ldc, int rows, int columns, const float* row_scale,
              const TileBounds* bounds = nullptr, const word* const* = nullptr) {
  if (ACCUMULATE) {
    for (int r = 0; r < rows; ++r) {
      if (row_scale[r] == 1.0f) continue;
      for (int n = 0; n < columns; n += LANES)
        store(c + r * ldc + n, mul(load(c + r * ldc + n), set1(row_scale[r])));
    }
  }
  for (int n = 0; n < columns; n += 32) {
    for (int r = 0; r < rows; r += 32) {
      if (!ACCUMULATE && bounds && bounds->of_row(r + 31) <= n) continue;
      float* c0 = c + r * ldc + n;
      float* c1 = c0 + 16 * ldc;
      if (ACCUMULATE) {
        _tile_loadd(0, c0, ldc * 4);
        _tile_loadd(1, c0 + 16, ldc * 4);
        _tile_loadd(2, c1, ldc * 4);
        _tile_loadd(3, c1 + 16, ldc * 4);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      const word* a0 = a + r * lda;
      for (int p = 0; p < num_panels; ++p) {
        const word* b = panels[p] + n;
        const int seen = ACCUMULATE && bounds ? (bounds[p].of_row(r + 31) + 1) / 2 : steps;
        for (int k = 0; k < steps; k += 16, a0 += 16, b += 16 * ldb) {
          if (k >= seen) continue;
          _tile_loadd(6, b, ldb * 4);
          _tile_loadd(4, a0, lda * 4);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, b + 16, ldb * 4);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, a0 + 16 * lda, lda * 4);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, c0, ldc * 4);
      _tile_stored(1, c0 + 16, ldc * 4);
      _tile_stored(2, c1, ldc * 4);
      _tile_stored(3, c1 + 16, ldc * 4);
    }
  }
}

}  // namespace
