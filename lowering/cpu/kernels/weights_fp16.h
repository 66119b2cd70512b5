// P x V of a strip in fp16, at twice the rate of fp32, as SageAttention has it (arXiv 2410.02367,
// section 4.4). Sums are fp16 over the keys of one tile, and fp32 over tiles.
//
// values     [BLOCK / 2][VALUE_WIDTH] pairs of neighbouring keys, times 2^k so that the greatest
//            is from 256 to 512: no sum of 64 of them overflows; then 2^-k
//
// Tiles whose values are too far apart for that are multiplied in fp32, as are infinity and NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "int8_rows.h"
#include "memory.h"
#include "query_block.h"
#include "vector_fp16.h"

namespace {

constexpr int VALUE_PAIRS = BLOCK / 2;
constexpr int HALF_ROWS = 6, HALF_VECTORS = 4;  // of a register tile
constexpr int GREATEST_POWER = 9;               // of 2, above every value in fp16

// The greatest value of a key may be this many times that of another one in its tile.
constexpr float MOST_RATIO = 262144.0f;
constexpr float LEAST_VALUE = 1e-30f, MOST_VALUE = 1e30f;

inline void widen_value(float* out, const input* in) {
  int d = 0;
  for (; d + LANES <= VALUE_DIM; d += LANES) store(out + d, load(in + d, input_tag{}));
  if (d == VALUE_DIM) return;
  input tail[LANES] = {};
  std::memcpy(tail, in + d, (VALUE_DIM - d) * sizeof(input));
  store(out + d, load(tail, input_tag{}));
}

// Packs 64 values. row(r) is row r of the input, or null where there is none. The last number is 0
// where they are to be multiplied in fp32.
template <typename Row>
void pack_weighted_values(word* out, packed* staging, const Row& row) {
  float* wide = reinterpret_cast<float*>(staging);
  float greatest = 0.0f, least = MOST_VALUE;
  bool finite = true;
  for (int r = 0; r < BLOCK; ++r) {
    float* values = wide + r * VALUE_WIDTH;
    const input* in = row(r);
    std::fill_n(values, VALUE_WIDTH, 0.0f);
    if (!in) continue;
    widen_value(values, in);
    vec most = set1(0.0f), wrong = set1(0.0f);
    for (int d = 0; d < VALUE_WIDTH; d += LANES) {
      const vec x = load(values + d);
      wrong = add(wrong, mul(x, set1(0.0f)));
      most = maximum(maximum(x, sub(set1(0.0f), x)), most);
    }
    const float of_row = reduce_max(most);
    finite = finite && reduce_add(wrong) == 0.0f;
    greatest = std::max(greatest, of_row);
    if (of_row > 0.0f) least = std::min(least, of_row);
  }
  uint32_t* pairs = reinterpret_cast<uint32_t*>(out);
  float& unit = *reinterpret_cast<float*>(pairs + VALUE_PAIRS * VALUE_WIDTH);
  const bool fits = finite && greatest <= MOST_VALUE &&
      (greatest == 0.0f || (least > LEAST_VALUE && greatest <= least * MOST_RATIO));
  unit = 0.0f;
  if (!fits) return;
  int power = 0;
  if (greatest > 0.0f) std::frexp(greatest, &power);
  unit = std::ldexp(1.0f, power - GREATEST_POWER);
  const vec factor = set1(std::ldexp(1.0f, GREATEST_POWER - power));
  for (int r = 0; r < BLOCK; r += 2)
    for (int n = 0; n < VALUE_WIDTH; n += LANES) {
      uint16_t even[LANES], odd[LANES];
      store(even, mul(load(wide + r * VALUE_WIDTH + n), factor), float16_tag{});
      store(odd, mul(load(wide + (r + 1) * VALUE_WIDTH + n), factor), float16_tag{});
      store_pairs(pairs + r / 2 * VALUE_WIDTH + n, even, odd);
    }
}

struct ValueScratch {
  Buffer<float> values;  // of a tile, as they are
  ValueScratch() : values(BLOCK * VALUE_WIDTH) {}
};

// Adds to R rows of V vectors what `steps` pairs of keys give. Each step fetches LINES lines.
template <int R, int V, int LINES>
__attribute__((noinline)) void add_half_tile(const uint32_t* weights, const uint32_t* values,
                                             int steps, float unit, float* out,
                                             const char* fetched) {
  half_vec acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = zero_halves();
  for (int k = 0; k < steps; ++k, values += VALUE_WIDTH) {
#pragma GCC unroll 8
    for (int n = 0; n < LINES; ++n) __builtin_prefetch(fetched + (k * LINES + n) * 64, 0, 2);
    half_vec factor[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) factor[v] = load_halves(values + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const half_vec pair = set1_pair(weights[r * (STRIP * BLOCK / 2) + k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) add_half_products(acc[r][v], pair, factor[v]);
    }
  }
  const vec factor = set1(unit);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      float* sum = out + r * VALUE_WIDTH + v * LANES;
      store(sum, fma(sum_pairs(acc[r][v]), factor, load(sum)));
    }
}

template <int V, int LINES>
inline void add_half_columns(const uint32_t* weights, const uint32_t* values, float unit,
                             const TileBounds& bounds, int computed, float* out,
                             const char* fetched) {
  constexpr int LDA = STRIP * BLOCK / 2;
  const auto steps = [&](int last) { return (bounds.of_row(last) + 1) / 2; };
  int r = 0;
  for (; r + HALF_ROWS <= computed; r += HALF_ROWS, fetched += LINES * VALUE_PAIRS * 64)
    add_half_tile<HALF_ROWS, V, LINES>(weights + r * LDA, values, steps(r + HALF_ROWS - 1), unit,
                                       out + r * VALUE_WIDTH, fetched);
  for (; r + 4 <= computed; r += 4)
    add_half_tile<4, V, 0>(weights + r * LDA, values, steps(r + 3), unit, out + r * VALUE_WIDTH,
                           nullptr);
  for (; r < computed; r += 2)
    add_half_tile<2, V, 0>(weights + r * LDA, values, steps(r + 1), unit, out + r * VALUE_WIDTH,
                           nullptr);
}

// Adds what a tile gives with its values in fp32.
inline void add_wide_tile(const AttentionArguments& a, ValueScratch& s, const QueryBlock& block,
                          const weight* weights, const Tile& tile, float* out) {
  const TensorView value{static_cast<const input*>(a.value), a.value_batch, a.value_head,
                         a.value_row};
  const int64_t g = block.h / (a.heads / a.kv_heads);
  float* values = s.values.get();
  std::fill_n(values, BLOCK * VALUE_WIDTH, 0.0f);
  for (int k = 0; k < tile.bounds.keys; ++k)
    if (tile.visible >> k & 1)
      widen_value(values + k * VALUE_WIDTH,
                  value.at(block.b, g, tile.columns ? tile.columns[k] : tile.first + k));
  for (int r = 0; r < block.rows; ++r) {
    float factors[BLOCK];
    for (int k = 0; k < BLOCK; k += LANES)
      store(factors + k, load(weights + r * STRIP * BLOCK + k, float16_tag{}));
    for (int n = 0; n < VALUE_WIDTH; n += LANES) {
      vec sum = load(out + r * VALUE_WIDTH + n);
      for (int k = 0; k < tile.bounds.of_row(r); ++k)
        sum = fma(set1(factors[k]), load(values + k * VALUE_WIDTH + n), sum);
      store(out + r * VALUE_WIDTH + n, sum);
    }
  }
}

// Multiplies each row of `out` by its scale and adds what the tiles of a strip give. A panel of
// `fetched` per tile is fetched meanwhile.
inline void add_values(const AttentionArguments& a, ValueScratch& s, const QueryBlock& block,
                       const weight* weights, const Tile* tiles, int count, int computed,
                       float* out, const float* scale, const word* const* fetched) {
  constexpr int GROUPS = (BLOCK + HALF_ROWS - 1) / HALF_ROWS * VALUE_PAIRS;
  constexpr int LINES = (KEY_WORDS * int(sizeof(word)) / 64 + GROUPS - 1) / GROUPS;
  for (int r = 0; r < block.rows; ++r) {
    if (scale[r] == 1.0f) continue;
    for (int n = 0; n < VALUE_WIDTH; n += LANES)
      store(out + r * VALUE_WIDTH + n, mul(load(out + r * VALUE_WIDTH + n), set1(scale[r])));
  }
  for (int t = 0; t < count; ++t, weights += BLOCK) {
    const uint32_t* values = reinterpret_cast<const uint32_t*>(tiles[t].values);
    const float unit = *reinterpret_cast<const float*>(values + VALUE_PAIRS * VALUE_WIDTH);
    if (unit == 0.0f) {
      add_wide_tile(a, s, block, weights, tiles[t], out);
      continue;
    }
    const uint32_t* pairs = reinterpret_cast<const uint32_t*>(weights);
    const char* panel = reinterpret_cast<const char*>(fetched[t]);
    int n = 0;
    for (; n + HALF_VECTORS * LANES <= VALUE_WIDTH; n += HALF_VECTORS * LANES) {
      if (n == 0)
        add_half_columns<HALF_VECTORS, LINES>(pairs, values, unit, tiles[t].bounds, computed, out,
                                              panel);
      else
        add_half_columns<HALF_VECTORS, 0>(pairs, values + n, unit, tiles[t].bounds, computed,
                                          out + n, nullptr);
    }
    for (; n < VALUE_WIDTH; n += LANES)
      add_half_columns<1, 0>(pairs, values + n, unit, tiles[t].bounds, computed, out + n, nullptr);
  }
}

}  // namespace
