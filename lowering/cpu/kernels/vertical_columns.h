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

// Query heads of a kv head that look at its keys together.
template <int QUERIES>
constexpr int HEADS_AT_ONCE = COLUMNS_AT_ONCE < 2 * QUERIES ? 1 : COLUMNS_AT_ONCE / QUERIES;

constexpr int MOST_HEADS_AT_ONCE = HEADS_AT_ONCE<16>;

struct VerticalColumnScratch {
  Buffer<packed> staging;
  Buffer<word> queries;           // [DEPTH, LAST_QUERIES] words: a B operand
  Buffer<float> scores;           // of one block of keys
  Buffer<uint16_t> weights;       // [padded keys, LAST_QUERIES]
  Buffer<float> factors, totals;  // [key blocks, LAST_QUERIES]
  std::vector<float> sums;        // [heads, padded keys]
  std::vector<float> ranked;

  explicit VerticalColumnScratch(int64_t padded)
      : staging(BLOCK * DEPTH * PAIR),
        queries(DEPTH * LAST_QUERIES),
        scores(BLOCK * LAST_QUERIES),
        weights(padded * LAST_QUERIES),
        factors(padded / BLOCK * LAST_QUERIES),
        totals(padded / BLOCK * LAST_QUERIES),
        sums(MOST_HEADS_AT_ONCE * padded) {}
};

// Entries of `heads` that look together, `count` from `first` on.
struct HeadsTogether {
  int64_t first;
  int count;
};

// Puts together neighbouring query heads of a kv head that have as many queries.
inline std::vector<HeadsTogether> put_together(const EstimateArguments& a) {
  std::vector<HeadsTogether> found;
  for (int64_t h = 0; h < a.num_heads; ++h) {
    const int most = a.last_queries[h] == 16 ? HEADS_AT_ONCE<16>
        : a.last_queries[h] == 32            ? HEADS_AT_ONCE<32>
                                             : 1;
    const bool joins = !found.empty() && found.back().count < most &&
        a.heads[found.back().first] / a.group == a.heads[h] / a.group &&
        a.last_queries[found.back().first] == a.last_queries[h];
    if (joins) ++found.back().count;
    else found.push_back({h, 1});
  }
  return found;
}

// Packs QUERIES queries of each of HEADS heads as a B operand, and says which are real. row(q) is the
// row of a head's q-th query.
template <int QUERIES, int HEADS, typename Row>
uint64_t pack_queries_of_heads(const EstimateArguments& a, VerticalColumnScratch& s,
                               const TensorView& query, int64_t b, int64_t h, const Row& row) {
  uint64_t real = 0;
  pack_queries(a, s.queries.get(), s.staging.get(), [&](int q) -> const input* {
    const int64_t n = q < QUERIES * HEADS ? row(q % QUERIES) : -1;
    if (n < 0) return nullptr;
    real |= uint64_t(1) << q;
    return query.at(b, a.heads[h + q / QUERIES], n);
  });
  return real;
}

// Sums the attention of QUERIES queries of each of HEADS heads, from entry h on, per key into `sums`:
// of the last queries, or of evenly spaced ones where attention is not causal.
template <int QUERIES, int HEADS>
void sum_vertical_columns(const EstimateArguments& a, VerticalColumnScratch& s,
                          const TensorView& query, const TensorView& key, const Extent& extent,
                          int64_t b, int64_t h) {
  constexpr int WIDTH = QUERIES * HEADS, VECTORS_PER_HEAD = QUERIES / LANES;
  const int64_t padded = round_up(a.num_keys, BLOCK);
  const int64_t last = extent.last_query[b];
  const int64_t first_row = a.causal ? last - (QUERIES - 1) : 0;
  const int64_t reach = std::min(a.num_keys, a.causal ? a.query_offset + last + 1 : a.num_keys);
  const int64_t blocks = (reach + BLOCK - 1) / BLOCK;
  std::fill(s.sums.begin(), s.sums.begin() + HEADS * padded, 0.0f);
  uint64_t looking = ~uint64_t(0);
  if (a.causal) {
    pack_queries_of_heads<QUERIES, HEADS>(a, s, query, b, h, [&](int q) { return first_row + q; });
  } else {
    const EvenlySpacedRows spaced(a, extent, b, QUERIES);
    looking = pack_queries_of_heads<QUERIES, HEADS>(a, s, query, b, h, [&](int q) {
      const int64_t n = spaced.at(q);
      return n >= 0 && query_is_real(a, b, n) ? n : -1;
    });
  }
  const vec exponent = exponent_of_product(a);
  for (int64_t n = 0; n < blocks; ++n) {
    score_block<QUERIES, HEADS>(a, s.queries.get(), s.staging.get(), key, b, a.heads[h] / a.group,
                                n * BLOCK, first_row, s.scores.get());
    if constexpr (BIASED)
      add_bias_to_block<QUERIES, HEADS>(a, h, n * BLOCK, s.scores.get(), [&](int q) {
        return a.causal ? first_row + q : EvenlySpacedRows(a, extent, b, QUERIES).at(q);
      });
    exponentiate_block<WIDTH>(s.scores.get(), exponent, s.weights.get() + n * BLOCK * WIDTH,
                              s.factors.get() + n * WIDTH, s.totals.get() + n * WIDTH);
  }
  find_factors<WIDTH>(s.factors.get(), s.totals.get(), blocks);
  for (int64_t n = 0; n < blocks; ++n) {
    vec factor[WIDTH / LANES];
    for (int v = 0; v < WIDTH / LANES; ++v) {
      float* of_block = s.factors.get() + n * WIDTH + v * LANES;
      for (int lane = 0; lane < LANES && looking != ~uint64_t(0); ++lane)
        if (!(looking >> (v * LANES + lane) & 1)) of_block[lane] = 0.0f;
      factor[v] = load(of_block);
    }
    const uint16_t* weights = s.weights.get() + n * BLOCK * WIDTH;
    for (int r = 0; r < BLOCK; ++r) {
      for (int head = 0; head < HEADS; ++head) {
        vec sum = set1(0.0f);
        for (int i = 0; i < VECTORS_PER_HEAD; ++i) {
          const int v = head * VECTORS_PER_HEAD + i;
          sum = fma(load(weights + r * WIDTH + v * LANES, float16_tag{}), factor[v], sum);
        }
        const float total = reduce_add(sum);
        s.sums[head * padded + n * BLOCK + r] = total > 0.0f ? total : 0.0f;  // NaN has no rank
      }
    }
  }
}

// Does the same with as many heads as look together.
template <int QUERIES, int HEADS>
void sum_vertical_columns(const EstimateArguments& a, VerticalColumnScratch& s,
                          const TensorView& query, const TensorView& key, const Extent& extent,
                          int64_t b, const HeadsTogether& together) {
  if constexpr (HEADS > 1) {
    if (together.count < HEADS)
      return sum_vertical_columns<QUERIES, HEADS - 1>(a, s, query, key, extent, b, together);
  }
  sum_vertical_columns<QUERIES, HEADS>(a, s, query, key, extent, b, together.first);
}

// Does the same with as many queries as the heads' rules say.
void sum_vertical_columns(const EstimateArguments& a, VerticalColumnScratch& s,
                          const TensorView& query, const TensorView& key, const Extent& extent,
                          int64_t b, const HeadsTogether& heads) {
  switch (a.last_queries[heads.first]) {
    case 16: return sum_vertical_columns<16, HEADS_AT_ONCE<16>>(a, s, query, key, extent, b, heads);
    case 32: return sum_vertical_columns<32, HEADS_AT_ONCE<32>>(a, s, query, key, extent, b, heads);
    default: return sum_vertical_columns<LAST_QUERIES, 1>(a, s, query, key, extent, b, heads);
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

// Writes the `columns` keys of the head with the largest sums [padded keys]. Those without any are
// not kept.
void write_vertical_columns(const EstimateArguments& a, VerticalColumnScratch& s, const float* sums,
                            int64_t b, int64_t h) {
  int64_t left = std::min<int64_t>(a.columns[h], a.num_keys);
  const float least = left > 0 ? find_ranked(s.ranked, sums, a.num_keys, left) : NEGATIVE_INFINITY;
  for (int64_t j = 0; j < a.num_keys; ++j) left -= sums[j] > least;  // what is left: equal ones
  const int64_t head = b * a.num_heads + h;
  int32_t* entries = a.column_index + head * a.column_width;
  int32_t written = 0;
  for (int64_t j = 0; j < a.num_keys && a.columns[h] > 0; ++j) {
    if (sums[j] < least || sums[j] <= 0.0f) continue;
    if (sums[j] == least && left-- <= 0) continue;
    entries[written++] = static_cast<int32_t>(j);
  }
  a.column_count[head] = written;
}

}  // namespace
