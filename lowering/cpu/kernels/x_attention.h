// Estimates lists of key blocks from sums along antidiagonals, in one pass.
// lowering/reference/x_attention.py says what it means.
//
// i  group of `stride` queries     s  group of `stride` keys: a run that keeps its rows
//
// One row is a group of queries in reversed order, so its product with a run is the sum of the
// antidiagonal of their stride x stride tile, without a copy of the keys in that shape.
#pragma once

#include <omp.h>
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "block_lists.h"
#include "run_products.h"

namespace {

// Packs the keys of the 64 groups of one panel, one row of each group at a time.
void pack_key_groups(const EstimateArguments& a, const KeyRuns& runs, RunScratch& s,
                     const TensorView& key, int64_t b, int64_t kv_head, int64_t panel) {
  const int64_t length = runs.parts, first = panel * BLOCK * length;
  for (int64_t t = 0; t < length; ++t)
    pack_keys(runs.panels + (panel * length + t) * DEPTH * BLOCK, s.rows.get(),
              [&](int r) -> const input* {
                const int64_t j = first + r * length + t;
                return j < a.num_keys && key_is_real(a, b, j) ? key.at(b, kv_head, j) : nullptr;
              });
  for (int r = 0; r < BLOCK; ++r) {
    bool exists = false;
    for (int64_t j = first + r * length; j < std::min(a.num_keys, first + (r + 1) * length); ++j)
      exists = exists || key_is_real(a, b, j);
    runs.weight[panel * BLOCK + r] = exists ? 0.0f : NEGATIVE_INFINITY;
  }
}

// Writes the lists of the tiles of queries from `first` on that make one product.
void choose_tiles(const EstimateArguments& a, RunScratch& s, const KeyRuns& runs,
                  const Extent& extent, const TensorView& query, int64_t b, int64_t h,
                  int64_t first, int64_t tiles) {
  const int64_t size = a.block_size[h], length = a.stride[h], per_tile = size / length;
  int64_t at_once = 0;  // the first of the groups that are multiplied at once
  const int64_t key_blocks = (a.num_keys + size - 1) / size;
  const auto pack = [&](int64_t index, packed* out) -> RunRange {
    const int64_t group = first * per_tile + index;
    at_once = index / ROWS_AT_ONCE * ROWS_AT_ONCE;
    bool exists = false;
    for (int64_t t = 0; t < length; ++t) {
      const int64_t n = (group + 1) * length - 1 - t - a.query_offset;
      packed* row = out + t * DEPTH * PAIR;
      if (n >= 0 && n < a.num_queries && query_is_real(a, b, n)) {
        pack_query(a, row, query.at(b, a.heads[h], n));
        exists = true;
      } else {
        std::memset(row, 0, DEPTH * sizeof(word));
      }
    }
    if (!exists) return {0, 0};
    const int64_t low = a.window > 0 ? std::max<int64_t>(0, group - (a.window - 1) / length) : 0;
    return {low, a.causal ? std::min(runs.count, group + 1) : runs.count};
  };
  const auto add_row = [&](float* row, RunRange seen) {
    const float scale = a.scale / static_cast<float>(length);
    if constexpr (BIASED) {
      const int64_t group = first * per_tile + at_once + place_in_strip(s, row);
      add_run_bias(row, seen, bias_of_group(a, h, group), 1, scale);
    }
    const float total = exponentiate_row(row, runs.weight, seen, scale);
    if (total == 0.0f) return;
    const vec share = set1(1.0f / total);
    float* sums = s.sums.get();
    for (int64_t n = seen.low / LANES * LANES; n < seen.high; n += LANES)
      store(sums + n, fma(load(row + n), share, load(sums + n)));
  };
  visit_rows(s, runs, tiles * per_tile, per_tile, pack, add_row, [&](int64_t tile) {
    take_sums(s, runs.count, per_tile, key_blocks);
    s.selection.start(a, extent, b, h, first + tile, size);
    s.selection.take_mass(s.selection.rest.begin(), a.threshold[h]);
    s.selection.write(a, b, h, size);
  });
}

int estimate_x_attention(const EstimateArguments& a) {
  const TensorView query{static_cast<const input*>(a.query), a.query_batch, a.query_head,
                         a.query_row};
  const TensorView key{static_cast<const input*>(a.key), a.key_batch, a.key_head, a.key_row};
  const AllKeyRuns all(a, a.stride, /*whole=*/true);
  const Extent extent(a);
  const int64_t last = a.query_offset + a.num_queries - 1;
  std::vector<int64_t> at_once(a.num_heads), first(a.num_heads), stop(a.num_heads);
  int64_t most = 0;  // products of the head with the most of them
  for (int64_t h = 0; h < a.num_heads; ++h) {
    at_once[h] = std::max<int64_t>(1, ROWS_AT_ONCE / (a.block_size[h] / a.stride[h]));
    first[h] = a.query_offset / a.block_size[h];
    stop[h] = last / a.block_size[h] + 1;
    most = std::max(most, (stop[h] - first[h] + at_once[h] - 1) / at_once[h]);
  }
#pragma omp parallel num_threads(a.threads)
  {
    RunScratch s(all);
    for (int64_t t = 0; t < a.batch * a.num_heads; ++t) {
      const int64_t b = t / a.num_heads, h = t % a.num_heads;
      if (!all.owns(h)) continue;
      const KeyRuns runs = all.of(b, h);
#pragma omp for schedule(static) nowait
      for (int64_t panel = 0; panel < runs.padded / BLOCK; ++panel)
        pack_key_groups(a, runs, s, key, b, a.heads[h] / a.group, panel);
    }
#pragma omp barrier
    const TileScope tiles;
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < a.batch * a.num_heads * most; ++t) {
      const int64_t b = t / most / a.num_heads, h = t / most % a.num_heads;
      const int64_t tile = first[h] + (most - 1 - t % most) * at_once[h];  // the longest first
      if (tile < stop[h])
        choose_tiles(a, s, all.of(b, h), extent, query, b, h, tile,
                     std::min(at_once[h], stop[h] - tile));
    }
  }
  return 0;
}

}  // namespace

extern "C" int x_attention_index(const EstimateArguments* arguments) {
  try {
    return estimate_x_attention(*arguments);
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
