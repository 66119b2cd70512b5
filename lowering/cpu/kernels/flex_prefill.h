// Estimates FlexPrefill's lists: whole vertical columns and diagonals of blocks by coverage, or
// pairs of blocks where mean queries can be trusted. lowering/reference/flex_prefill.py says what
// it means.
//
// size  positions per block of queries and of keys     tile  such a block of queries
#pragma once

#include <omp.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <deque>
#include <functional>
#include <new>
#include <vector>

#include "block_lists.h"
#include "query_rows.h"
#include "run_products.h"
#include "top_share.h"

namespace {

// What the last rows of one head add up to, in PARTS: by key, and by distance from the end on.
struct LastRows {
  int64_t most;  // rows of the head with the most of them
  int64_t key_floats, distance_floats;
  Buffer<float> sums;    // [B, h, PARTS, key_floats + distance_floats]
  Buffer<uint8_t> seen;  // [B, h, most]: whether the row sees any key

  LastRows(const EstimateArguments& a, int64_t panels)
      : most(*std::max_element(a.block_size, a.block_size + a.num_heads)),
        key_floats(panels * BLOCK),
        distance_floats(panels * BLOCK + most + TILE_WIDTH),
        sums(a.batch * a.num_heads * PARTS * (key_floats + distance_floats)),
        seen(a.batch * a.num_heads * most) {}

  float* by_key(int64_t head, int64_t part) const {
    return sums.get() + (head * PARTS + part) * (key_floats + distance_floats);
  }
  float* by_distance(int64_t head, int64_t part) const { return by_key(head, part) + key_floats; }
  uint8_t* query_tiles(int64_t head) const { return seen.get() + head * most; }
};

struct FlexPrefillScratch : RunScratch {
  QueryRowScratch query_rows;
  Buffer<Ranked> ranked;
  std::vector<float> vertical, slash;  // shares of vertical columns and distances
  std::vector<float> vertical_blocks, slash_blocks, proxy;
  std::vector<uint8_t> vertical_kept, slash_kept;
  Buffer<float> pooled;  // [tiles, key blocks] of one head
  Buffer<uint8_t> pooled_kept;

  FlexPrefillScratch(const EstimateArguments& a, const AllKeyRuns& all, int64_t panels,
                     int64_t cells)
      : RunScratch(all),
        query_rows(panels),
        ranked(std::max(a.num_keys, cells)),
        vertical(a.num_keys),
        slash(a.num_keys),
        vertical_blocks(panels),
        slash_blocks(panels),
        proxy(panels),
        vertical_kept(panels),
        slash_kept(panels),
        pooled(cells),
        pooled_kept(cells) {
    selection.scores.reserve(panels);
    selection.kept.reserve(panels);
    selection.rest.reserve(panels);
  }
};

// Sums the attention of every PARTS-th product of the last `size` rows of one head.
void sum_part(const EstimateArguments& a, QueryRowScratch& s, const KeyPanels& keys,
              const LastRows& rows, const TensorView& query, int64_t last, int64_t b, int64_t h,
              int64_t part) {
  const int64_t head = b * a.num_heads + h, size = a.block_size[h];
  float* by_key = rows.by_key(head, part);
  std::fill_n(by_key, rows.key_floats + rows.distance_floats, 0.0f);
  for (int64_t n = part * QUERY_ROWS; n < size; n += PARTS * QUERY_ROWS) {
    const int count = static_cast<int>(std::min<int64_t>(QUERY_ROWS, size - n));
    const int64_t first = last - (size - 1) + n;
    const QueryRows query_rows =
        pack_query_rows(a, s, query, b, h, count, [&](int r) { return first + r; });
    // Entry e is the distance `position of the last row + QUERY_ROWS - 1 - e`, whatever the
    // product.
    add_query_rows(a, s, keys, query_rows, b, h, by_key,
                   rows.by_distance(head, part) + (last - first), rows.query_tiles(head) + n);
  }
}

// Takes the shares of the last rows' attention by key and by distance, over the rows that see any
// key.
void take_shares(const EstimateArguments& a, FlexPrefillScratch& s, const LastRows& rows,
                 int64_t last, int64_t b, int64_t h) {
  const int64_t head = b * a.num_heads + h, n = a.num_keys;
  const uint8_t* seen = rows.query_tiles(head);
  const int64_t live = std::count(seen, seen + a.block_size[h], 1);
  const float share = 1.0f / static_cast<float>(std::max<int64_t>(live, 1));
  std::fill(s.vertical.begin(), s.vertical.end(), 0.0f);
  std::fill(s.slash.begin(), s.slash.end(), 0.0f);
  const int64_t farthest = a.query_offset + last + QUERY_ROWS - 1;  // the distance of entry 0
  for (int64_t part = 0; part < PARTS; ++part) {
    const float* by_key = rows.by_key(head, part);
    const float* by_distance = rows.by_distance(head, part);
    for (int64_t j = 0; j < n; ++j) s.vertical[j] += by_key[j] * share;
    for (int64_t e = 0; e < rows.distance_floats; ++e)
      s.slash[std::clamp<int64_t>(farthest - e, 0, n - 1)] += by_distance[e] * share;
  }
}

// Counts the blocks whose keys hold `gamma` of the shares, as the released code counts them.
int64_t count_covering(const EstimateArguments& a, FlexPrefillScratch& s,
                       const std::vector<float>& shares, int64_t h) {
  for (int64_t j = 0; j < a.num_keys; ++j) s.ranked.get()[j] = rank_score(shares[j], j);
  const float gamma = a.gamma[h];
  const int64_t keys = take_largest(s.ranked.get(), a.num_keys,
                                    [&](float sum) { return gamma >= 1.0f || sum <= gamma; });
  return (keys + 1) / a.block_size[h] + 1;
}

void sum_blocks(const std::vector<float>& shares, std::vector<float>& blocks, int64_t size) {
  std::fill(blocks.begin(), blocks.end(), 0.0f);
  for (size_t j = 0; j < shares.size(); ++j) blocks[j / size] += shares[j];
}

// Marks the first of some blocks and the best of the others, `count` of them together.
void keep_blocks(FlexPrefillScratch& s, const float* scores, int64_t blocks, int64_t count,
                 uint8_t* kept) {
  Ranked* ranked = s.ranked.get();
  for (int64_t kb = 0; kb < blocks; ++kb)
    ranked[kb] = rank_score(kb == 0 ? -NEGATIVE_INFINITY : scores[kb], kb);
  if (count < blocks)
    std::nth_element(ranked, ranked + count, ranked + blocks, std::greater<Ranked>());
  std::fill_n(kept, blocks, 0);
  for (int64_t n = 0; n < std::min(count, blocks); ++n) kept[place_of(ranked[n])] = 1;
}

// Tells whether the mean of the last rows, against mean keys, weighs blocks nearly as the rows do.
// The measure is the Jensen-Shannon distance of both.
bool mean_is_near(const EstimateArguments& a, FlexPrefillScratch& s, const LastRows& rows,
                  const KeyRuns& runs, const TensorView& query, int64_t last, int64_t b,
                  int64_t h) {
  const uint8_t* seen = rows.query_tiles(b * a.num_heads + h);
  const int64_t first = last - (a.block_size[h] - 1);
  std::fill(s.proxy.begin(), s.proxy.end(), 0.0f);
  const auto pack = [&](int64_t, packed* out) -> RunRange {
    const int64_t count =
        sum_rows(s.mean.get(), query, b, a.heads[h], std::max<int64_t>(0, first), last + 1,
                 [&](int64_t n) { return a.scale != 0 && seen[n - first]; });
    pack_mean(out, s.mean.get(), count);
    return {0, runs.count};
  };
  const auto add_row = [&](float* row, RunRange seen) {
    if constexpr (BIASED) {
      const int64_t block = (std::max<int64_t>(0, last) + a.query_offset) / a.block_size[h];
      add_run_bias(row, seen, bias_of_group(a, h, block), 1, a.scale);
    }
    const float total = exponentiate_row(row, runs.weight, seen, a.scale);
    if (!(total > 0.0f)) return;
    for (int64_t kb = 0; kb < runs.count; ++kb) s.proxy[kb] = row[kb] / total;
  };
  visit_rows(s, runs, 1, 1, pack, add_row, [](int64_t) {});
  double divergence = 0.0;
  for (int64_t kb = 0; kb < runs.count; ++kb) {
    const double left = s.proxy[kb], right = s.vertical_blocks[kb], middle = (left + right) / 2;
    if (left > 0) divergence += 0.5 * left * std::log(left / middle);
    if (right > 0) divergence += 0.5 * right * std::log(right / middle);
  }
  return std::sqrt(std::max(0.0, divergence)) < a.tau[h];
}

// Keeps the pairs of blocks that hold `gamma` of the attention of mean queries to mean keys, over
// all tiles together.
void keep_pairs(const EstimateArguments& a, FlexPrefillScratch& s, const KeyRuns& runs,
                const TensorView& query, int64_t b, int64_t h, int64_t first_tile, int64_t tiles) {
  const int64_t size = a.block_size[h];
  int64_t tile = first_tile, count = 0;
  const auto pack = [&](int64_t index, packed* out) -> RunRange {
    const int64_t query_tile = first_tile + index, first = query_tile * size - a.query_offset;
    const int64_t real = sum_rows(s.mean.get(), query, b, a.heads[h], std::max<int64_t>(0, first),
                                  std::min(a.num_queries, first + size), [&](int64_t n) {
                                    return a.scale != 0 && query_is_real(a, b, n);
                                  });
    pack_mean(out, s.mean.get(), real);
    const int64_t low =
        a.window > 0 ? std::max<int64_t>(0, query_tile - (a.window - 2 + size) / size) : 0;
    return {low, a.causal ? std::min(runs.count, query_tile + 1) : runs.count};
  };
  const auto add_row = [&](float* row, RunRange seen) {
    if constexpr (BIASED) add_run_bias(row, seen, bias_of_group(a, h, tile), 1, a.scale);
    const float total = exponentiate_row(row, runs.weight, seen, a.scale);
    if (!(total > 0.0f)) return;
    float* shares = s.pooled.get() + (tile - first_tile) * runs.count;
    for (int64_t kb = seen.low; kb < seen.high; ++kb) {
      shares[kb] = row[kb] / total;
      if (shares[kb] > 0.0f)
        s.ranked.get()[count++] = rank_score(shares[kb], (tile - first_tile) * runs.count + kb);
    }
  };
  std::fill_n(s.pooled.get(), tiles * runs.count, 0.0f);
  std::fill_n(s.pooled_kept.get(), tiles * runs.count, 0);
  visit_rows(s, runs, tiles, 1, pack, add_row, [&](int64_t) { ++tile; });
  const float gamma = a.gamma[h], enough = gamma * static_cast<float>(tiles);
  const int64_t kept = take_largest(s.ranked.get(), count,
                                    [&](float sum) { return gamma >= 1.0f || sum <= enough; });
  for (int64_t n = 0; n < kept; ++n) s.pooled_kept.get()[place_of(s.ranked.get()[n])] = 1;
}

// Decides what one head keeps, and writes its lists.
void choose_head(const EstimateArguments& a, FlexPrefillScratch& s, const LastRows& rows,
                 const KeyRuns& runs, const Extent& extent, const TensorView& query, int64_t b,
                 int64_t h) {
  const int64_t size = a.block_size[h], blocks = runs.count, last = extent.last_query[b];
  const int64_t first_tile = a.query_offset / size;
  const int64_t tiles = (a.query_offset + a.num_queries - 1) / size + 1 - first_tile;
  const int64_t fewest = std::min((a.min_budget[h] + size - 1) / size, blocks);
  const int64_t most = std::min((a.max_budget[h] + size - 1) / size, blocks);
  take_shares(a, s, rows, last, b, h);
  sum_blocks(s.vertical, s.vertical_blocks, size);
  sum_blocks(s.slash, s.slash_blocks, size);
  const bool aware = a.tau[h] > 0.0f && mean_is_near(a, s, rows, runs, query, last, b, h);
  const auto budget = [&](const std::vector<float>& shares) {
    return aware ? fewest : std::clamp(count_covering(a, s, shares, h), fewest, most);
  };
  keep_blocks(s, s.vertical_blocks.data(), blocks, budget(s.vertical), s.vertical_kept.data());
  keep_blocks(s, s.slash_blocks.data(), blocks, budget(s.slash), s.slash_kept.data());
  if (aware) keep_pairs(a, s, runs, query, b, h, first_tile, tiles);

  s.selection.scores.resize(blocks);
  for (int64_t tile = first_tile; tile < first_tile + tiles; ++tile) {
    const int64_t cells = (tile - first_tile) * blocks;
    const auto distance = [&](int64_t kb) { return std::clamp<int64_t>(tile - kb, 0, blocks - 1); };
    for (int64_t kb = 0; kb < blocks; ++kb)
      s.selection.scores[kb] =
          aware ? s.pooled.get()[cells + kb] : s.vertical_blocks[kb] + s.slash_blocks[distance(kb)];
    s.selection.start(a, extent, b, h, tile, size);
    auto& rest = s.selection.rest;
    const auto others = std::partition(rest.begin(), rest.end(), [&](const auto& entry) {
      const int64_t kb = -entry.second;
      return s.vertical_kept[kb] || s.slash_kept[distance(kb)] ||
          (aware && s.pooled_kept.get()[cells + kb]);
    });
    s.selection.take(rest.begin(), others, [] { return true; });
    s.selection.write(a, b, h, size);
  }
}

int estimate_flex_prefill(const EstimateArguments& a) {
  const TensorView query{static_cast<const input*>(a.query), a.query_batch, a.query_head,
                         a.query_row};
  const TensorView key{static_cast<const input*>(a.key), a.key_batch, a.key_head, a.key_row};
  const AllKeyRuns all(a, a.block_size, /*whole=*/false);
  const Extent extent(a);
  KeyPanels keys(a);
  const LastRows rows(a, keys.panels);
  const int64_t heads = a.batch * a.num_heads;
  int64_t cells = 0;  // of tiles and key blocks, of the head that has most and may need them
  for (int64_t h = 0; h < a.num_heads; ++h) {
    const int64_t size = a.block_size[h], end = a.query_offset + a.num_queries - 1;
    const int64_t tiles = end / size + 1 - a.query_offset / size;
    if (a.tau[h] > 0.0f) cells = std::max(cells, tiles * all.of(0, h).count);
  }
  // They are allocated here, because an exception must not leave a thread of the parallel region.
  std::deque<FlexPrefillScratch> scratches;
  for (int64_t t = 0; t < a.threads; ++t) scratches.emplace_back(a, all, keys.panels, cells);
#pragma omp parallel num_threads(a.threads)
  {
    FlexPrefillScratch& s = scratches[omp_get_thread_num()];
    for (int64_t t = 0; t < heads; ++t) {
      const int64_t b = t / a.num_heads, h = t % a.num_heads;
      if (!all.owns(h)) continue;
      const KeyRuns runs = all.of(b, h);
#pragma omp for schedule(static) nowait
      for (int64_t panel = 0; panel < runs.padded / BLOCK; ++panel)
        pool_panel(a, runs, s, key, b, a.heads[h] / a.group, a.block_size[h], panel, false);
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a.batch * keys.slots * keys.panels; ++t)
      keys.pack(a, key, s.query_rows.rows.get(), t);
    const TileScope configured;
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < heads * PARTS; ++t) {
      const int64_t b = t / PARTS / a.num_heads, h = t / PARTS % a.num_heads;
      sum_part(a, s.query_rows, keys, rows, query, extent.last_query[b], b, h, t % PARTS);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < heads; ++t) {
      const int64_t b = t / a.num_heads, h = t % a.num_heads;
      choose_head(a, s, rows, all.of(b, h), extent, query, b, h);
    }
  }
  return 0;
}

}  // namespace

extern "C" int flex_prefill_index(const EstimateArguments* arguments) {
  try {
    return estimate_flex_prefill(*arguments);
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
