// One softmax update of a query block: scores of a strip of tiles, their exponentials, and P x V.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "gemm.h"
#include "memory.h"
#include "query_block.h"
#include SCORES_HEADER
#include WEIGHTS_HEADER

namespace {

// What one thread works on.
struct AttentionScratch {
  ScoreScratch scores;
  ValueScratch of_values;
  Buffer<packed> staging;
  Buffer<weight> weights;
  Buffer<float> out;
  alignas(64) uint64_t row_bits[STRIP][BLOCK];
  alignas(64) float maximum[BLOCK], sum[BLOCK], scale[BLOCK];

  AttentionScratch()
      : staging(BLOCK * std::max(DEPTH * PAIR, VALUE_WIDTH)),
        weights(BLOCK * STRIP * BLOCK),
        out(BLOCK * VALUE_WIDTH) {
    std::memset(weights.get(), 0, BLOCK * STRIP * BLOCK * sizeof(weight));
  }
};

// What turns scores into exponents of 2.
struct Exponents {
  float scale, cap_exponent = 0.0f, cap = 0.0f;

  explicit Exponents(const AttentionArguments& a)
      : scale(SOFTCAP || a.scale == 0 ? 1.0f : LOG2E * std::abs(a.scale)) {
    if constexpr (SOFTCAP) {
      cap_exponent = 2.0f * LOG2E * std::abs(a.scale) / a.softcap;
      cap = a.softcap * LOG2E;
    }
  }
};

// Takes softcap * tanh(score * scale / softcap), in units of log2, of `count` scores. A score is
// number * to_exponent + shift.
inline void cap_scores(float* scores, int count, float to_exponent, float cap, float shift = 0.0f) {
  for (int n = 0; n < count; n += LANES) {
    // tanh(x) is 1 - 2 / (e^2x + 1). At |x| = 20 it is 1 to the last bit.
    vec x = fma(load(scores + n), set1(to_exponent), set1(shift));
    x = sub(set1(0.0f), maximum(set1(-57.0f), sub(set1(0.0f), maximum(set1(-57.0f), x))));
    const vec e = add(exp2_vec(x), set1(1.0f));
    store(scores + n, mul(set1(cap), sub(set1(1.0f), divide(set1(2.0f), e))));
  }
}

// Exponents of 2 from which on they are rounded before the greatest is taken from them.
//
// fma(score, factor, -greatest) leaves what was rounded off the greatest exponent, at most its
// size / 2^24. All weights of the row have that in common, so that it cancels, and the others are
// exact. It must stay small, though, or the weights overflow, or are all zero. Rounded exponents
// give 0 at the greatest whatever its size.
constexpr float LARGE_EXPONENT = 16777216.0f;

// Takes 2^exponent(score) of one row of the strip, as P x V reads it, and returns the sum.
template <typename Exponent>
inline float exponentiate(weight* out, const float* scores, int width, const Exponent& exponent) {
  vec sum = set1(0.0f);
  if constexpr (sizeof(weight) == 2) {
    for (int n = 0; n < width; n += 2 * LANES) {
      const vec low = exp2_vec(exponent(load(scores + n)));
      const vec high = exp2_vec(exponent(load(scores + n + LANES)));
      sum = add(sum, add(low, high));
      store(out + n, low, high, weight_tag{});
    }
  } else {
    for (int n = 0; n < width; n += LANES) {
      const vec x = exp2_vec(exponent(load(scores + n)));
      sum = add(sum, x);
      store(out + n, x, weight_tag{});
    }
  }
  return reduce_add(sum);
}

// Takes e^(score - maximum) of one row of the strip and returns the sum.
inline float exponentiate(weight* out, const float* scores, int width, float scale, float shift) {
  const vec factor = set1(scale), offset = set1(shift);
  if (std::abs(shift) < LARGE_EXPONENT)
    return exponentiate(out, scores, width, [&](vec x) { return fma(x, factor, offset); });
  return exponentiate(out, scores, width, [&](vec x) { return add(mul(x, factor), offset); });
}

// What is read or written soon: it is fetched into the second cache while other work is done.
struct Prefetch {
  const word* keys[STRIP];       // a panel per tile of the strip, fetched by its P x V
  const input* query = nullptr;  // rows that are fetched by the softmax of as many rows
  input* out = nullptr;
  int query_rows = 0, out_rows = 0;

  // It is always inlined: GCC 12 takes a function that only fetches for one without effect.
  __attribute__((always_inline)) void fetch_rows(const AttentionArguments& a, int r) const {
    constexpr int LINE = 64 / sizeof(input);
    for (int d = 0; d < HEAD_DIM && r < query_rows; d += LINE)
      __builtin_prefetch(query + r * a.query_row + d, 0, 2);
    for (int d = 0; d < VALUE_DIM && r < out_rows; d += LINE)
      __builtin_prefetch(out + r * a.out_row + d, 1, 2);
  }
};

// Adds scores, exponentials and P x V of `count` tiles on top of `out`.
void add_strip(const AttentionArguments& a, AttentionScratch& s, const QueryBlock& block,
               const Tile* tiles, int count, const Exponents& exponents, const Prefetch& prefetch) {
  const int computed = (block.rows + ROW_STEP - 1) / ROW_STEP * ROW_STEP;
  float* scores = s.scores.scores.get();
  weight* weights = s.weights.get();
  for (int t = 0; t < count; ++t)
    if (tiles[t].masked) fill_mask(a, block, tiles[t], s.row_bits[t]);
  s.scores.compute(a, block, tiles, count, computed);
  for (int r = 0; r < block.rows; ++r) {
    float* row = scores + r * STRIP * BLOCK;
    prefetch.fetch_rows(a, r);
    float factor = s.scores.factor(r) * exponents.scale;
    float shift = s.scores.shift(r) * exponents.scale;
    if constexpr (SOFTCAP) {
      const float to_exponent = exponents.cap_exponent;
      cap_scores(row, count * BLOCK, s.scores.factor(r) * to_exponent, exponents.cap,
                 s.scores.shift(r) * to_exponent);
      factor = exponents.scale, shift = 0.0f;
    }
    vec highest = set1(NEGATIVE_INFINITY);
    for (int t = 0; t < count; ++t) {
      float* tile = row + t * BLOCK;
      if (tiles[t].masked) {
        for (int n = 0; n < BLOCK; n += LANES)
          store(tile + n, keep(s.row_bits[t][r] >> n, load(tile + n)));
      }
      for (int n = 0; n < BLOCK; n += LANES) highest = maximum(highest, load(tile + n));
    }
    const float before = s.maximum[r];
    const float after = std::max(before, reduce_max(highest) * factor + shift);
    // At -inf nothing is visible yet. Zero keeps the exponents at -inf instead of NaN.
    const float least = after == NEGATIVE_INFINITY ? 0.0f : after;
    s.scale[r] = before == least ? 1.0f : std::exp2(before - least);
    s.maximum[r] = after;
    s.sum[r] = s.sum[r] * s.scale[r] +
        exponentiate(weights + r * STRIP * BLOCK, row, count * BLOCK, factor, shift - least);
  }
  add_values(a, s.of_values, block, weights, tiles, count, computed, s.out.get(), s.scale,
             prefetch.keys);
}

}  // namespace
