// The micro-GEMM in vector registers. gemm.h says what its arguments are.
#pragma once

#include <algorithm>

#include "tile_bounds.h"
#include "vector.h"

namespace {

constexpr int ROW_STEP = 2, COLUMN_STEP = LANES;
// The register tile has 8 x 3 or 6 x 4 accumulators of 32 registers, or 6 x 2 of AVX2's 16. The
// others hold a row of B and a number of A. 8 divides the rows of a block, which is worth 2%;
// products of bf16 pairs gain nothing by it.
constexpr int VECTORS = LANES == 8 ? 2 : USES_BF16 ? 4 : 3;
constexpr int ROWS = VECTORS == 3 ? 8 : 6;
// So many columns of B cost little more than a vector of them.
constexpr int COLUMNS_AT_ONCE = VECTORS * LANES;
constexpr int FEW_ROWS = 12, FEW_ROW_STEP = 2;  // of a product of few rows

struct TileScope {};

// Says how many bytes to fetch per step, so that a product of BLOCK rows and `steps` x `columns` of
// B fetches `words`. It is no more at a time, or the fetches hold up the loads of the product
// itself.
constexpr int fetch_step(int words, int steps, int columns) {
  const int passes = std::max(1, columns / (VECTORS * LANES)) * ((BLOCK + ROWS - 1) / ROWS);
  return (words * int(sizeof(word)) + passes * steps - 1) / (passes * steps);
}

// Multiplies R rows from `row` on with V vectors from `column` on. It is not inlined: within its
// callers, GCC 12 runs out of registers for the accumulators.
template <int R, int V, bool ACCUMULATE, int FETCH>
__attribute__((noinline)) void multiply_tile(const word* a, int lda, const word* const* panels,
                                             int num_panels, int steps, int row, int column,
                                             int ldb, float* c, int ldc, const float* row_scale,
                                             const TileBounds* bounds,
                                             const word* const* prefetch) {
  if constexpr (!ACCUMULATE && V > 1) {
    if (bounds && bounds->of_row(row + R - 1) <= column + (V - 1) * LANES)
      return multiply_tile<R, V - 1, ACCUMULATE, FETCH>(
          a, lda, panels, num_panels, steps, row, column, ldb, c, ldc, row_scale, bounds, prefetch);
  }
  a += row * lda;
  c += row * ldc + column;
  const int done = (column / (VECTORS * LANES) * ((BLOCK + ROWS - 1) / ROWS) + row / ROWS) * steps;
  vec acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      acc[r][v] =
          ACCUMULATE ? mul(load(c + r * ldc + v * LANES), set1(row_scale[row + r])) : set1(0.0f);
  }
  for (int p = 0; p < num_panels; ++p) {
    const word* b = panels[p] + column;
    const char* line = FETCH ? reinterpret_cast<const char*>(prefetch[p]) + done * FETCH : nullptr;
    const int seen =
        ACCUMULATE && bounds ? (bounds[p].of_row(row + R - 1) + PAIR - 1) / PAIR : steps;
    for (int k = 0; k < seen; ++k, b += ldb) {
      if constexpr (FETCH > 0) __builtin_prefetch(line + k * FETCH, 0, 2);
      decltype(load_words(b)) factor[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) factor[v] = load_words(b + v * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const word broadcast = a[r * lda + k];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[r][v] = dot(acc[r][v], broadcast, factor[v]);
      }
    }
    a += steps;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(c + r * ldc + v * LANES, acc[r][v]);
  }
}

template <int V, bool ACCUMULATE, int FETCH>
inline void multiply_columns(const word* a, int lda, const word* const* panels, int num_panels,
                             int steps, int column, int ldb, float* c, int ldc, int rows,
                             const float* row_scale, const TileBounds* bounds,
                             const word* const* prefetch) {
  int r = 0;
  if constexpr (!ACCUMULATE) {
    while (bounds && r + ROWS <= rows && bounds->of_row(r + ROWS - 1) <= column) r += ROWS;
  }
  for (; r + ROWS <= rows; r += ROWS)
    multiply_tile<ROWS, V, ACCUMULATE, FETCH>(a, lda, panels, num_panels, steps, r, column, ldb, c,
                                              ldc, row_scale, bounds, prefetch);
  for (; r + 4 <= rows; r += 4)
    multiply_tile<4, V, ACCUMULATE, FETCH>(a, lda, panels, num_panels, steps, r, column, ldb, c,
                                           ldc, row_scale, bounds, prefetch);
  for (; r < rows; r += 2)
    multiply_tile<2, V, ACCUMULATE, FETCH>(a, lda, panels, num_panels, steps, r, column, ldb, c,
                                           ldc, row_scale, bounds, prefetch);
}

template <bool ACCUMULATE, int FETCH = 0>
void multiply(const word* a, int lda, const word* const* panels, int num_panels, int steps, int ldb,
              float* c, int ldc, int rows, int columns, const float* row_scale,
              const TileBounds* bounds = nullptr, const word* const* prefetch = nullptr) {
  int n = 0;
  for (; n + VECTORS * LANES <= columns; n += VECTORS * LANES)
    multiply_columns<VECTORS, ACCUMULATE, FETCH>(a, lda, panels, num_panels, steps, n, ldb, c, ldc,
                                                 rows, row_scale, bounds, prefetch);
  for (; n < columns; n += LANES)
    multiply_columns<1, ACCUMULATE, 0>(a, lda, panels, num_panels, steps, n, ldb, c, ldc, rows,
                                       row_scale, bounds, prefetch);
}

}  // namespace
