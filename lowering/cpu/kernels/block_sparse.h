// Finds the key blocks of the largest mean-pooled score per query block. block_top_k_index in
// lowering/reference/ says what it means.
#pragma once

#include <omp.h>
#include <algorithm>
#include <cstdint>
#include <vector>

#include "inputs.h"
#include "mark_largest.h"
#include "memory.h"
#include "sum_rows.h"
#include "vector.h"

namespace {

// Takes means over groups of `repeat` blocks, of sums [blocks, POOLED] with their counts. Block 0
// of `sums` is the `lead`-th block of its group.
void pool_blocks(std::vector<float>& means, const float* sums, const float* counts, int64_t blocks,
                 int64_t lead, int64_t repeat) {
  const int64_t groups = (lead + blocks + repeat - 1) / repeat;
  means.assign(groups * POOLED, 0.0f);
  for (int64_t group = 0; group < groups; ++group) {
    float count = 0.0f;
    float* mean = means.data() + group * POOLED;
    const int64_t stop = std::min(blocks, (group + 1) * repeat - lead);
    for (int64_t n = std::max<int64_t>(0, group * repeat - lead); n < stop; ++n) {
      for (int d = 0; d < POOLED; d += LANES)
        store(mean + d, add(load(mean + d), load(sums + n * POOLED + d)));
      count += counts[n];
    }
    const vec total = set1(std::max(count, 1.0f));
    for (int d = 0; d < POOLED; d += LANES) store(mean + d, divide(load(mean + d), total));
  }
}

// Writes the lists of the key blocks of the largest pooled score, for all query blocks of one head.
void select_blocks(const EstimateArguments& a, MarkScratch& s, const float* query_sums,
                   const float* query_counts, const float* key_sums, const float* key_counts,
                   int64_t key_blocks, int64_t b, int64_t h) {
  const int64_t repeat = a.second_sizes[h] / BLOCK, first = a.query_offset / BLOCK;
  const int64_t lead = first % repeat;
  std::vector<float> queries, keys;
  pool_blocks(queries, query_sums, query_counts, a.num_blocks, lead, repeat);
  pool_blocks(keys, key_sums, key_counts, key_blocks, 0, repeat);
  const int64_t groups = static_cast<int64_t>(queries.size()) / POOLED;
  const int64_t columns = static_cast<int64_t>(keys.size()) / POOLED;
  s.values.resize(columns);
  s.marks.resize(columns);
  s.blocks.resize(key_blocks);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t row = group + first / repeat;  // on the absolute grid of pooled blocks
    const float* query = queries.data() + group * POOLED;
    const auto allowed = [&](int64_t column) {
      const int64_t distance = row - column;
      return (!a.causal || distance >= 0) &&
          (a.window <= 0 || (distance - 1) * repeat * BLOCK < a.window - 1);
    };
    for (int64_t column = 0; column < columns; ++column) {
      if (!allowed(column)) {
        s.values[column] = NEGATIVE_INFINITY;
        continue;
      }
      const float* key = keys.data() + column * POOLED;
      vec sum = set1(0.0f);
      for (int d = 0; d < POOLED; d += LANES) sum = fma(load(query + d), load(key + d), sum);
      float value = reduce_add(sum);
      if constexpr (BIASED)
        value = value * a.scale + a.run_bias[h * a.run_head + a.run_head / 2 + column - row];
      s.values[column] = a.causal && column == row ? INFINITE : value;
    }
    mark_largest(s.marks.data(), s.values.data(), columns, a.first_sizes[h], s.order, s.sorted);
    for (int64_t n = 0; n < repeat; ++n) {
      const int64_t i = group * repeat + n - lead;  // query block
      if (i < 0 || i >= a.num_blocks) continue;
      for (int64_t kb = 0; kb < key_blocks; ++kb) {
        const bool chosen = s.marks[kb / repeat] && allowed(kb / repeat);
        s.blocks[kb] = a.causal ? (chosen && kb <= first + i) || kb == first + i : chosen;
      }
      const int64_t list = (b * a.num_heads + h) * a.num_blocks + i;
      write_list(a.first_count + list, a.first_index + list * a.first_width, s.blocks.data(),
                 key_blocks, a.first_width);
    }
  }
}

int estimate_block_top_k(const EstimateArguments& a) {
  const int64_t key_blocks = (a.num_keys + BLOCK - 1) / BLOCK;
  const int64_t first = a.query_offset / BLOCK;
  const int64_t heads = a.batch * a.num_heads;
  const TensorView query{static_cast<const input*>(a.query), a.query_batch, a.query_head,
                         a.query_row};
  const TensorView key{static_cast<const input*>(a.key), a.key_batch, a.key_head, a.key_row};
  const Buffer<float> query_sums(heads * a.num_blocks * POOLED), query_counts(heads * a.num_blocks);
  const Buffer<float> key_sums(a.batch * a.kv_heads * key_blocks * POOLED);
  const Buffer<float> key_counts(a.batch * a.kv_heads * key_blocks);
#pragma omp parallel num_threads(a.threads)
  {
    MarkScratch s;
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < a.batch * a.kv_heads * key_blocks; ++t) {
      const int64_t b = t / key_blocks / a.kv_heads, kb = t % key_blocks;
      key_counts.get()[t] = sum_rows(
          key_sums.get() + t * POOLED, key, b, t / key_blocks % a.kv_heads, kb * BLOCK,
          std::min(a.num_keys, (kb + 1) * BLOCK), [&](int64_t j) { return key_is_real(a, b, j); });
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < heads * a.num_blocks; ++t) {
      const int64_t b = t / a.num_blocks / a.num_heads, h = t / a.num_blocks % a.num_heads;
      const int64_t low = (first + t % a.num_blocks) * BLOCK - a.query_offset;
      query_counts.get()[t] = sum_rows(
          query_sums.get() + t * POOLED, query, b, a.heads[h], std::max<int64_t>(0, low),
          std::min(a.num_queries, low + BLOCK), [&](int64_t n) { return query_is_real(a, b, n); });
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < heads; ++t) {
      const int64_t b = t / a.num_heads, h = t % a.num_heads;
      const int64_t g = b * a.kv_heads + a.heads[h] / a.group;
      select_blocks(a, s, query_sums.get() + t * a.num_blocks * POOLED,
                    query_counts.get() + t * a.num_blocks, key_sums.get() + g * key_blocks * POOLED,
                    key_counts.get() + g * key_blocks, key_blocks, b, h);
    }
  }
  return 0;
}

}  // namespace
