// Finds the vertical columns: the single keys that get most attention of the last queries, or of
// evenly spaced ones where attention is not causal. last_query_sums in
// lowering/reference/vertical_slash.py and spread_sums in union.py say what it means. The weights of
// one head stay in a strip of N rows, so memory is O(N) per thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <iterator>
#include <vector>

#include "evenly_spaced_rows.h"
#include "last_queries.h"
#include "memory.h"

namespace {

struct VerticalColumnScratch {
  Buffer<packed> staging;
  Buffer<word> queries;           // [DEPTH, LAST_QUERIES] words: a B operand
  Buffer<float> scores;           // of one block of keys
  Buffer<uint16_t> weights;       // [padded keys, LAST_QUERIES]
  Buffer<float> factors, totals;  // [key blocks, LAST_QUERIES]
  std::vector<float> sums, ranked;

  explicit VerticalColumnScratch(int64_t padded)
      : staging(BLOCK * DEPTH * PAIR),
        queries(DEPTH * LAST_QUERIES),
        scores(BLOCK * LAST_QUERIES),
        weights(padded * LAST_QUERIES),
        factors(padded / BLOCK * LAST_QUERIES),
        totals(padded / BLOCK * LAST_QUERIES),
        sums(padded) {}
};

// Packs QUERIES evenly spaced queries of one head as a B operand, and says which are real.
template <int QUERIES>
uint64_t pack_spread_queries(const EstimateArguments& a, VerticalColumnScratch& s,
                             const TensorView& query, const Extent& extent, int64_t b, int64_t h) {
  const EvenlySpacedRows spaced(a, extent, b, QUERIES);
  uint64_t real = 0;
  pack_queries(a, s.queries.get(), s.staging.get(), [&](int q) -> const input* {
    const int64_t n = q < QUERIES ? spaced.at(q) : -1;
    if (n < 0 || !query_is_real(a, b, n)) return nullptr;
    real |= uint64_t(1) << q;
    return query.at(b, a.heads[h], n);
  });
  return real;
}

// Sums the attention of QUERIES queries per key into `sums`: of the last ones, or of evenly spaced
// ones where attention is not causal.
template <int QUERIES>
void sum_vertical_columns(const EstimateArguments& a, VerticalColumnScratch& s,
                          const TensorView& query, const TensorView& key, const Extent& extent,
                          int64_t b, int64_t h) {
  constexpr int VECTORS_PER_ROW = QUERIES / LANES;
  const int64_t last = extent.last_query[b];
  const int64_t first_row = a.causal ? last - (QUERIES - 1) : 0;
  const int64_t reach = std::min(a.num_keys, a.causal ? a.query_offset + last + 1 : a.num_keys);
  const int64_t blocks = (reach + BLOCK - 1) / BLOCK;
  std::fill(s.sums.begin(), s.sums.end(), 0.0f);
  uint64_t looking = ~uint64_t(0);
  if (a.causal)
    pack_last_queries<QUERIES>(a, s.queries.get(), s.staging.get(), query, b, a.heads[h],
                               first_row);
  else looking = pack_spread_queries<QUERIES>(a, s, query, extent, b, h);
  const vec exponent = exponent_of_product(a);
  for (int64_t n = 0; n < blocks; ++n) {
    score_block<QUERIES>(a, s.queries.get(), s.staging.get(), key, b, a.heads[h] / a.group,
                         n * BLOCK, first_row, s.scores.get());
    exponentiate_block<QUERIES>(s.scores.get(), exponent, s.weights.get() + n * BLOCK * QUERIES,
                                s.factors.get() + n * QUERIES, s.totals.get() + n * QUERIES);
  }
  find_factors<QUERIES>(s.factors.get(), s.totals.get(), blocks);
  for (int64_t n = 0; n < blocks; ++n) {
    vec factor[VECTORS_PER_ROW];
    for (int v = 0; v < VECTORS_PER_ROW; ++v) {
      float* of_block = s.factors.get() + n * QUERIES + v * LANES;
      for (int lane = 0; lane < LANES && looking != ~uint64_t(0); ++lane)
        if (!(looking >> (v * LANES + lane) & 1)) of_block[lane] = 0.0f;
      factor[v] = load(of_block);
    }
    const uint16_t* weights = s.weights.get() + n * BLOCK * QUERIES;
    for (int r = 0; r < BLOCK; ++r) {
      vec sum = set1(0.0f);
      for (int v = 0; v < VECTORS_PER_ROW; ++v)
        sum = fma(load(weights + r * QUERIES + v * LANES, float16_tag{}), factor[v], sum);
      const float total = reduce_add(sum);
      s.sums[n * BLOCK + r] = total > 0.0f ? total : 0.0f;  // NaN cannot be ranked
    }
  }
}

// Does the same with as many queries as the head's rule says.
void sum_vertical_columns(const EstimateArguments& a, VerticalColumnScratch& s,
                          const TensorView& query, const TensorView& key, const Extent& extent,
                          int64_t b, int64_t h) {
  switch (a.last_queries[h]) {
    case 16: return sum_vertical_columns<16>(a, s, query, key, extent, b, h);
    case 32: return sum_vertical_columns<32>(a, s, query, key, extent, b, h);
    default: return sum_vertical_columns<LAST_QUERIES>(a, s, query, key, extent, b, h);
  }
}

// Returns the value of rank `count` among n values, 1 for the largest. One of every 16 tells which
// are too small, so that few have to be put in order.
float find_ranked(std::vector<float>& few, const float* values, int64_t n, int64_t count) {
  constexpr int64_t STEP = 16;
  few.clear();
  for (int64_t j = 0; j < n; j += STEP) few.push_back(values[j]);
  const int64_t rank = 2 * count / STEP + 8;  // among these: likely below the one in question
  float bound = NEGATIVE_INFINITY;
  if (rank < static_cast<int64_t>(few.size())) {
    std::nth_element(few.begin(), few.begin() + rank, few.end(), std::greater<float>());
    bound = few[rank];
  }
  few.clear();
  std::copy_if(values, values + n, std::back_inserter(few), [&](float x) { return x >= bound; });
  if (static_cast<int64_t>(few.size()) < count) few.assign(values, values + n);
  std::nth_element(few.begin(), few.begin() + (count - 1), few.end(), std::greater<float>());
  return few[count - 1];
}

// Writes the `columns` keys of the head with the largest sums. Those without any are not kept.
void write_vertical_columns(const EstimateArguments& a, VerticalColumnScratch& s, int64_t b,
                            int64_t h) {
  int64_t left = std::min<int64_t>(a.columns[h], a.num_keys);
  const float least =
      left > 0 ? find_ranked(s.ranked, s.sums.data(), a.num_keys, left) : NEGATIVE_INFINITY;
  for (int64_t j = 0; j < a.num_keys; ++j) left -= s.sums[j] > least;  // what is left: equal ones
  const int64_t head = b * a.num_heads + h;
  int32_t* entries = a.column_index + head * a.column_width;
  int32_t written = 0;
  for (int64_t j = 0; j < a.num_keys && a.columns[h] > 0; ++j) {
    if (s.sums[j] < least || s.sums[j] <= 0.0f) continue;
    if (s.sums[j] == least && left-- <= 0) continue;
    entries[written++] = static_cast<int32_t>(j);
  }
  a.column_count[head] = written;
}

}  // namespace
