// Estimates lists of key blocks from tiles of queries and pooled keys, in one pass.
// lowering/reference/block_scores.py says what it means; the scores are tile_scores of
// lowering/reference/pooled_keys.py.
#pragma once

#include <omp.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <new>
#include <vector>

#include "block_lists.h"
#include "run_products.h"

namespace {

// Adds e^(product - greatest) of one query row to the sums of its tile, and keeps `greatest` up to
// date.
void add_exponentials(float* sums, float* row, const float* weight, RunRange seen, int64_t runs,
                      float scale, float* greatest) {
  hide_edges(row, seen, scale);
  const vec exponent = exponent_factor(scale);
  const float top = greatest_of(row, weight, seen, exponent);
  if (top == NEGATIVE_INFINITY) return;
  if (top > *greatest) {
    const vec factor = set1(std::exp2(*greatest - top));
    for (int64_t s = 0; s < runs; s += LANES) store(sums + s, mul(load(sums + s), factor));
    *greatest = top;
  }
  const vec peak = set1(*greatest);
  for (int64_t s = seen.low / LANES * LANES; s < seen.high; s += LANES)
    store(sums + s,
          add(load(sums + s), exp2_vec(sub(fma(load(row + s), exponent, load(weight + s)), peak))));
}

// Writes the lists of one tile of queries.
void choose_tile(const EstimateArguments& a, RunScratch& s, const KeyRuns& runs,
                 const Extent& extent, const TensorView& query, int64_t b, int64_t h,
                 int64_t tile) {
  const int64_t size = a.block_size[h];
  float greatest = NEGATIVE_INFINITY;
  int64_t at_once = 0;  // the first of the rows that are multiplied at once
  const auto pack = [&](int64_t index, packed* out) -> RunRange {
    const int64_t p = tile * size + index, n = p - a.query_offset;
    at_once = index / ROWS_AT_ONCE * ROWS_AT_ONCE;
    if (n < 0 || n >= a.num_queries || !query_is_real(a, b, n)) return {0, 0};
    pack_query(a, out, query.at(b, a.heads[h], n));
    // Only the blocks that the row sees whole count.
    const int64_t low = a.window > 0 && p >= a.window ? (p - a.window) / size + 1 : 0;
    return {low, a.causal ? std::min(runs.count, (p + 1) / size) : runs.count};
  };
  const auto add_row = [&](float* row, RunRange seen) {
    if constexpr (BIASED) {
      const int64_t n = tile * size + at_once + place_in_strip(s, row) - a.query_offset;
      add_run_bias(row, seen, a.run_bias + h * a.run_head + (a.num_queries - 1 - n), size, a.scale);
    }
    add_exponentials(s.sums.get(), row, runs.weight, seen, runs.padded, a.scale, &greatest);
  };
  visit_rows(s, runs, size, size, pack, add_row, [&](int64_t) {
    take_sums(s, runs.count, 1, runs.count);
    s.selection.start(a, extent, b, h, tile, size);
    if (a.mass[h] > 0.0f) s.selection.take_mass(s.selection.rest.begin(), a.mass[h]);
    else s.selection.take_above(a.share[h]);
    s.selection.write(a, b, h, size);
  });
}

int estimate_block_scores(const EstimateArguments& a) {
  const TensorView query{static_cast<const input*>(a.query), a.query_batch, a.query_head,
                         a.query_row};
  const TensorView key{static_cast<const input*>(a.key), a.key_batch, a.key_head, a.key_row};
  const AllKeyRuns all(a, a.block_size, /*whole=*/false);
  const Extent extent(a);
  const int64_t end = a.query_offset + a.num_queries;
  int64_t most = 0;  // tiles of the head with the most of them
  for (int64_t h = 0; h < a.num_heads; ++h)
    most = std::max(most, (end - 1) / a.block_size[h] - a.query_offset / a.block_size[h] + 1);
#pragma omp parallel num_threads(a.threads)
  {
    RunScratch s(all);
    for (int64_t t = 0; t < a.batch * a.num_heads; ++t) {
      const int64_t b = t / a.num_heads, h = t % a.num_heads;
      if (!all.owns(h)) continue;
      const KeyRuns runs = all.of(b, h);
#pragma omp for schedule(static) nowait
      for (int64_t panel = 0; panel < runs.padded / BLOCK; ++panel)
        pool_panel(a, runs, s, key, b, a.heads[h] / a.group, a.block_size[h], panel, false);
    }
#pragma omp barrier
    const TileScope tiles;
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < a.batch * a.num_heads * most; ++t) {
      const int64_t b = t / most / a.num_heads, h = t / most % a.num_heads;
      const int64_t tile = (end - 1) / a.block_size[h] - t % most;  // the longest first
      if (tile >= a.query_offset / a.block_size[h])
        choose_tile(a, s, all.of(b, h), extent, query, b, h, tile);
    }
  }
  return 0;
}

}  // namespace

extern "C" int block_scores_index(const EstimateArguments* arguments) {
  try {
    return estimate_block_scores(*arguments);
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
