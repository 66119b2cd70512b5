// A linear layer whose products are of half-precision numbers.
//
// Every row of the input and of the weight is multiplied by a power of two first, so that its
// greatest number lies in [16, 32): no sum overflows, and what is lost below is 2^-29 of that
// number. gemm_half.h says how sums are rounded.
#pragma once

#include <omp.h>
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <deque>
#include <new>

#include "gemm_half.h"
#include "memory.h"
#include "vector.h"

namespace {

constexpr int64_t MOST_ROWS = 192;         // of a block, whose rows stay in the second cache
constexpr int64_t BLOCK_WORDS = 1 << 18;   // of such a block
constexpr int64_t PANEL_DEPTH = 256;       // of columns that stay in the first cache
constexpr int64_t SLAB_NUMBERS = 1 << 21;  // of a weight that are packed at a time

inline int64_t round_up(int64_t number, int64_t multiple) {
  return (number + multiple - 1) / multiple * multiple;
}

inline float number(const uint16_t* p) {
  alignas(64) uint16_t padded[LANES] = {*p};
  alignas(64) float wide[LANES];
  store(wide, load(padded, input_tag{}));
  return wide[0];
}

// The power of two that brings the greatest number of a row into [16, 32), its inverse in
// `undone`. NaN if the row has a number that is not finite.
inline float row_scale(const input* row, int64_t width, float* undone) {
  vec most = set1(0.0f), wrong = set1(0.0f);
  int64_t k = 0;
  for (; k + LANES <= width; k += LANES) {
    const vec x = load(row + k, input_tag{});
    wrong = fma(x, set1(0.0f), wrong);
    most = maximum(maximum(x, sub(set1(0.0f), x)), most);
  }
  float greatest = reduce_max(most), poison = reduce_add(wrong);
  for (; k < width; ++k) {
    const float x = number(row + k);
    poison += x * 0.0f;
    greatest = std::max(greatest, std::fabs(x));
  }
  int exponent = 5;
  if (greatest > 0.0f) std::frexp(greatest, &exponent);
  exponent = std::max(exponent, -120);
  *undone = std::ldexp(1.0f, exponent - 5);
  return std::ldexp(1.0f, 5 - exponent) + poison;
}

// Calls take(k, x) for LANES numbers x of a row at a time, times `scale`, with zeros up to `depth`.
template <typename Take>
inline void for_each_vector(const input* row, int64_t width, int64_t depth, float scale,
                            const Take& take) {
  int64_t k = 0;
  for (; k + LANES <= width; k += LANES) take(k, mul(load(row + k, input_tag{}), set1(scale)));
  if (k < width) {
    alignas(64) input rest[LANES] = {};
    std::copy(row + k, row + width, rest);
    take(k, mul(load(rest, input_tag{}), set1(scale)));
    k += LANES;
  }
  for (; k < depth; k += LANES) take(k, set1(0.0f));
}

// Packs TILE_COLUMNS rows of the weight, `count` of which there are, as columns
// [depth, TILE_COLUMNS]. Returns whether all numbers are finite.
inline bool pack_columns(uint16_t* columns, const input* weight, int64_t stride, int64_t width,
                         int64_t depth, int64_t count, uint16_t* narrow, float* undone) {
  bool finite = true;
  for (int64_t first = 0; first < TILE_COLUMNS; first += LANES) {
    for (int64_t n = 0; n < LANES; ++n) {
      uint16_t* out = narrow + n * depth;
      undone[first + n] = 1.0f;
      if (first + n >= count) {
        std::fill_n(out, depth, uint16_t(0));
        continue;
      }
      const input* row = weight + (first + n) * stride;
      const float scale = row_scale(row, width, undone + first + n);
      finite &= scale == scale;
      for_each_vector(row, width, depth, scale, [&](int64_t k, vec x) { store_half(out + k, x); });
    }
    for (int64_t k = 0; k < depth; k += 2 * LANES) {
      alignas(64) float words[LANES * LANES];
      transpose(words, LANES, reinterpret_cast<const float*>(narrow + k),
                static_cast<int>(depth / 2));
      for (int64_t pair = 0; pair < LANES; ++pair) {
        uint16_t* out = columns + (k + 2 * pair) * TILE_COLUMNS + first;
        store_halves(out, out + TILE_COLUMNS, words + pair * LANES);
      }
    }
  }
  return finite;
}

// Packs rows of the input as words [count, depth] that hold each number twice.
inline bool pack_rows(uint32_t* words, const input* rows, int64_t stride, int64_t width,
                      int64_t depth, int64_t count, int64_t padded, float* undone) {
  bool finite = true;
  for (int64_t n = 0; n < padded; ++n) {
    uint32_t* out = words + n * depth;
    undone[n] = 1.0f;
    if (n >= count) {
      std::fill_n(out, depth, 0u);
      continue;
    }
    const input* row = rows + n * stride;
    const float scale = row_scale(row, width, undone + n);
    finite &= scale == scale;
    for_each_vector(row, width, depth, scale,
                    [&](int64_t k, vec x) { store_half_twice(out + k, x); });
  }
  return finite;
}

// Writes sums [count, TILE_COLUMNS] to the output, times what undoes the scales, with the bias.
inline void finish(input* out, int64_t stride, const float* sums, int64_t count, int64_t columns,
                   const float* row_undone, const float* column_undone, const float* bias) {
  for (int64_t n = 0; n < count; ++n) {
    alignas(64) input done[TILE_COLUMNS];
    for (int64_t c = 0; c < TILE_COLUMNS; c += LANES) {
      vec x = mul(load(sums + n * TILE_COLUMNS + c), set1(row_undone[n]));
      x = fma(x, load(column_undone + c), load(bias + c));
      store(done + c, x, input_tag{});
    }
    std::copy_n(done, columns, out + n * stride);
  }
}

}  // namespace

// Returns 1 if there is no memory and 2 if a number of the input or the weight is not finite.
extern "C" int linear_half(const LinearArguments* arguments) {
  const LinearArguments& a = *arguments;
  const auto* rows = static_cast<const input*>(a.rows);
  const auto* weight = static_cast<const input*>(a.weight);
  auto* out = static_cast<input*>(a.out);
  const int64_t depth = round_up(a.inputs, CHAIN);
  const int64_t height =
      std::clamp(BLOCK_WORDS / depth / TILE_ROWS * TILE_ROWS, int64_t(TILE_ROWS), MOST_ROWS);
  const int64_t blocks = (a.num_rows + height - 1) / height;
  const int64_t width =
      std::min(std::max(SLAB_NUMBERS / depth / TILE_COLUMNS, int64_t(1)) * TILE_COLUMNS,
               round_up(a.outputs, TILE_COLUMNS));
  std::atomic<bool> finite{true};
  try {
    Buffer<uint16_t> columns(width * depth);
    Buffer<float> column_undone(width), bias(width);
    std::deque<Buffer<uint16_t>> narrow;
    std::deque<Buffer<uint32_t>> words;
    std::deque<Buffer<float>> sums;
    for (int64_t t = 0; t < a.threads; ++t) {
      narrow.emplace_back(LANES * depth);
      words.emplace_back(height * depth);
      sums.emplace_back(height * (TILE_COLUMNS + 1));
    }
    for (int64_t slab = 0; slab < a.outputs && finite; slab += width) {
      const int64_t wanted = std::min(width, a.outputs - slab);
      const int64_t panels = round_up(wanted, TILE_COLUMNS) / TILE_COLUMNS;
      for (int64_t c = 0; c < panels * TILE_COLUMNS; ++c)
        bias.get()[c] = a.bias && c < wanted ? a.bias[slab + c] : 0.0f;
#pragma omp parallel num_threads(a.threads)
      {
        const int t = omp_get_thread_num();
#pragma omp for schedule(dynamic)
        for (int64_t p = 0; p < panels; ++p) {
          const int64_t first = p * TILE_COLUMNS;
          if (!pack_columns(columns.get() + first * depth,
                            weight + (slab + first) * a.weight_stride, a.weight_stride, a.inputs,
                            depth, std::min<int64_t>(wanted - first, TILE_COLUMNS), narrow[t].get(),
                            column_undone.get() + first))
            finite = false;
        }
#pragma omp for schedule(dynamic)
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t first = block * height, count = std::min(height, a.num_rows - first);
          const int64_t padded = round_up(count, TILE_ROWS);
          float *found = sums[t].get(), *row_undone = found + height * TILE_COLUMNS;
          if (!pack_rows(words[t].get(), rows + first * a.rows_stride, a.rows_stride, a.inputs,
                         depth, count, padded, row_undone))
            finite = false;
          for (int64_t p = 0; p < panels && finite; ++p) {
            const uint16_t* panel = columns.get() + p * TILE_COLUMNS * depth;
            for (int64_t k = 0; k < depth; k += PANEL_DEPTH)
              for (int64_t n = 0; n < padded; n += TILE_ROWS)
                multiply_half(words[t].get() + n * depth + k, depth, panel + k * TILE_COLUMNS,
                              std::min(PANEL_DEPTH, depth - k), found + n * TILE_COLUMNS, k == 0);
            const int64_t column = p * TILE_COLUMNS;
            finish(out + first * a.outputs + slab + column, a.outputs, found, count,
                   std::min<int64_t>(wanted - column, TILE_COLUMNS), row_undone,
                   column_undone.get() + column, bias.get() + column);
          }
        }
      }
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return finite ? 0 : 2;
}
