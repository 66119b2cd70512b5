// Estimates lists of key blocks and vertical columns in one pass. lowering/reference/union.py says
// what it means; the scores are row_scores of lowering/reference/pooled_keys.py.
//
// row    a query row that is looked at; BLOCK of them, of BLOCK / rows query blocks, make one product
// panel  64 runs of keys
//
// Products are taken transposed, a row of query rows per run: the softmax of a query row runs down
// the rows, and so do the sums over the runs of a key block. The exponentials of a panel are
// relative to its own greatest, so that no score is looked at twice. What a query row of a panel is
// to be multiplied with follows when all are done.
#pragma once

#include <omp.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

#include "block_lists.h"
#include "gemm.h"
#include "key_runs.h"
#include "memory.h"
#include "vertical_columns.h"
#include POOLED_KEYS_HEADER

namespace {

struct UnionScratch {
  PackedQueryRows query_rows;
  Buffer<float> mean;
  Buffer<float> products;         // [BLOCK, BLOCK] of one panel
  Buffer<float> sums;             // [key blocks, BLOCK] relative to the greatest of their panel
  Buffer<float> factors, totals;  // [panels, BLOCK]
  Buffer<float> scores;           // [query blocks of a product, key blocks]
  std::vector<uint64_t> sharp;    // per key block: for which query blocks of the product it is
  BlockSelection selection;

  UnionScratch(int64_t width, int64_t key_blocks)  // width: runs of the longest, padded
      : mean(POOLED),
        products(BLOCK * BLOCK),
        sums((key_blocks + BLOCK) * BLOCK),
        factors(width),
        totals(width),
        scores(BLOCK * key_blocks),
        sharp(key_blocks) {}
};

// What BLOCK query rows see: run s if low[row] <= s < high[row].
struct VisibleRuns {
  float low[BLOCK], high[BLOCK];                                  // whole numbers
  int64_t first = std::numeric_limits<int64_t>::max(), stop = 0;  // runs that any row sees
  int64_t low_of_all = 0, high_of_all = std::numeric_limits<int64_t>::max();  // that every row sees

  void set(int row, RunRange seen) {
    low[row] = static_cast<float>(seen.low);
    high[row] = static_cast<float>(seen.high);
    low_of_all = std::max(low_of_all, seen.low);
    high_of_all = std::min(high_of_all, seen.high);
    if (seen.low >= seen.high) return;
    first = std::min(first, seen.low);
    stop = std::max(stop, seen.high);
  }
};

// Hides what query rows do not see in the products of one panel.
void hide_unseen(float* products, const VisibleRuns& visible, int64_t panel, int64_t runs) {
  for (int64_t r = 0; r < runs; ++r) {
    const vec run = set1(static_cast<float>(panel * BLOCK + r));
    const vec next = add(run, set1(1.0f));
    for (int n = 0; n < BLOCK; n += LANES) {
      float* row = products + r * BLOCK + n;
      const uint32_t seen =
          at_least(run, load(visible.low + n)) & at_least(load(visible.high + n), next);
      store(row, keep(seen, load(row)));
    }
  }
}

// Adds what a bias by distance gives to runs, for query rows; -1 is none.
void add_run_bias(const EstimateArguments& a, float* products, const int64_t* query_rows, int64_t h,
                  int64_t first, int64_t runs) {
  const float unit = a.scale == 0 ? LOG2E : 1.0f / std::abs(a.scale);
  for (int row = 0; row < BLOCK; ++row) {
    if (query_rows[row] < 0) continue;
    const float* bias = a.run_bias + h * a.run_head + (a.num_queries - 1 - query_rows[row]);
    for (int64_t r = 0; r < runs; ++r)
      products[r * BLOCK + row] += bias[(first + r) * a.pool[h]] * unit;
  }
}

// Takes the exponentials of the first `runs` of a panel, summed over the runs of each key block,
// `ratio` each.
void sum_panel(const float* products, const float* weight, vec exponent, int64_t runs,
               int64_t ratio, float* sums, float* greatest, float* total) {
  constexpr int VECTORS_PER_ROW = BLOCK / LANES;
  vec most[VECTORS_PER_ROW], all[VECTORS_PER_ROW];
  for (int v = 0; v < VECTORS_PER_ROW; ++v) most[v] = set1(NEGATIVE_INFINITY), all[v] = set1(0.0f);
  for (int64_t r = 0; r < runs; ++r)
    for (int v = 0; v < VECTORS_PER_ROW; ++v)
      most[v] =
          maximum(most[v], fma(load(products + r * BLOCK + v * LANES), exponent, set1(weight[r])));
  for (int v = 0; v < VECTORS_PER_ROW; ++v) {
    store(greatest + v * LANES, most[v]);
    most[v] = finite_or_zero(most[v]);
  }
  for (int64_t first = 0; first < runs; first += ratio, sums += BLOCK) {
    vec block[VECTORS_PER_ROW];
    for (int v = 0; v < VECTORS_PER_ROW; ++v) block[v] = set1(0.0f);
    for (int64_t r = first; r < first + ratio; ++r)
      for (int v = 0; v < VECTORS_PER_ROW; ++v)
        block[v] =
            add(block[v],
                exp2_vec(sub(fma(load(products + r * BLOCK + v * LANES), exponent, set1(weight[r])),
                             most[v])));
    for (int v = 0; v < VECTORS_PER_ROW; ++v) {
      store(sums + v * LANES, block[v]);
      all[v] = add(all[v], block[v]);
    }
  }
  for (int v = 0; v < VECTORS_PER_ROW; ++v) store(total + v * LANES, all[v]);
}

// Takes softmax shares of the key blocks first <= kb < stop. They are summed over the query rows of
// each query block into `scores`, and marked in `sharp` where that of one row is at least `least`.
void score_blocks(UnionScratch& s, int64_t first, int64_t stop, int64_t ratio, int64_t rows,
                  float least) {
  const int64_t key_blocks = static_cast<int64_t>(s.sharp.size()), at_once = BLOCK / rows;
  for (int64_t kb = first; kb < stop; ++kb) {
    const float* sums = s.sums.get() + kb * BLOCK;
    const float* factors = s.factors.get() + kb * ratio / BLOCK * BLOCK;
    uint64_t sharp = 0;
    vec sum = set1(0.0f);
    for (int n = 0; n < BLOCK; n += LANES) {
      const vec share = mul(load(sums + n), load(factors + n));
      sharp |= uint64_t(at_least(share, set1(least))) << n;
      sum = add(sum, share);
      if ((n + LANES) % rows != 0 && rows >= LANES) continue;
      float of_blocks[LANES];
      sum = sum_neighbours(sum, std::min<int64_t>(rows, LANES));
      store(of_blocks, maximum(sum, set1(0.0f)));  // NaN cannot be ranked
      for (int64_t lane = 0; lane < LANES; lane += rows)
        s.scores.get()[(n + lane) / rows * key_blocks + kb] = of_blocks[lane];
      sum = set1(0.0f);
    }
    s.sharp[kb] = 0;
    for (int64_t i = 0; i < at_once; ++i)
      s.sharp[kb] |= uint64_t((sharp >> i * rows & low_bits(rows)) != 0) << i;
  }
}

// Scores all key blocks, for the query rows of `blocks` query blocks from `first` on.
void score_query_rows(const EstimateArguments& a, UnionScratch& s, const PooledKeys& runs,
                      const TensorView& query, int64_t b, int64_t h, int64_t first,
                      int64_t blocks) {
  const int64_t rows = a.rows[h], pool = a.pool[h], ratio = BLOCK / pool;
  const int64_t end = a.query_offset + a.num_queries;
  const int64_t key_blocks = static_cast<int64_t>(s.sharp.size());
  VisibleRuns visible;
  const input* query_rows[BLOCK] = {};
  int64_t looking[BLOCK];  // these rows of the queries; -1 for none
  for (int row = 0; row < BLOCK; ++row) {
    const int64_t block = first + row / rows;
    const int64_t last = std::min(end, (block + 1) * BLOCK) - 1;
    const int64_t p = last - (rows - 1 - row % rows) * (BLOCK / rows), n = p - a.query_offset;
    RunRange seen{0, 0};
    looking[row] = -1;
    if (row < blocks * rows && n >= 0 && p >= block * BLOCK && query_is_real(a, b, n)) {
      query_rows[row] = query.at(b, a.heads[h], n);
      looking[row] = n;
      const int64_t hidden = a.window > 0 ? p - a.window - (pool - 1) : -1;
      seen = {hidden < 0 ? 0 : hidden / pool + 1,
              a.causal ? std::min(runs.count, p / pool + 1) : runs.count};
    }
    visible.set(row, seen);
  }
  s.query_rows.pack(a, [&](int row) { return query_rows[row]; });
  const vec exponent = exponent_of_product(a);
  const int64_t first_panel = std::min(visible.first, visible.stop) / BLOCK;
  const int64_t stop_panel = (visible.stop + BLOCK - 1) / BLOCK;
  for (int64_t panel = first_panel; panel < stop_panel; ++panel) {
    const int64_t start = panel * BLOCK;
    const int64_t seen = std::min<int64_t>(BLOCK, round_up(visible.stop - start, ratio));
    multiply_pooled_keys(runs, start, static_cast<int>(round_up(seen, ROW_STEP)), s.query_rows,
                         s.products.get());
    if constexpr (BIASED)
      add_run_bias(a, s.products.get(), looking, h, start, std::min(seen, runs.count - start));
    if (start < visible.low_of_all || start + seen > visible.high_of_all)
      hide_unseen(s.products.get(), visible, panel, seen);
    sum_panel(s.products.get(), runs.weight + start, exponent, seen, ratio,
              s.sums.get() + start / ratio * BLOCK, s.factors.get() + start,
              s.totals.get() + start);
  }
  find_factors(s.factors.get() + first_panel * BLOCK, s.totals.get() + first_panel * BLOCK,
               stop_panel - first_panel);
  const int64_t low = first_panel * BLOCK / ratio;
  const int64_t high = std::min(key_blocks, (visible.stop + ratio - 1) / ratio);
  std::fill(s.sharp.begin(), s.sharp.end(), 0);
  for (int64_t i = 0; i < blocks; ++i) {
    float* scores = s.scores.get() + i * key_blocks;
    std::fill(scores, scores + low, 0.0f);
    std::fill(scores + high, scores + key_blocks, 0.0f);
  }
  score_blocks(s, low, high, ratio, rows, a.row_share[h]);
}

// Writes the lists of the query blocks from `first` on whose query rows make one product.
void choose_blocks(const EstimateArguments& a, UnionScratch& s, const PooledKeys& runs,
                   const Extent& extent, const TensorView& query, int64_t b, int64_t h,
                   int64_t first, int64_t blocks) {
  score_query_rows(a, s, runs, query, b, h, first, blocks);
  const int64_t key_blocks = static_cast<int64_t>(s.sharp.size());
  for (int64_t i = 0; i < blocks; ++i) {
    const float* scores = s.scores.get() + i * key_blocks;
    s.selection.scores.assign(scores, scores + key_blocks);
    s.selection.start(a, extent, b, h, first + i, BLOCK);
    auto& rest = s.selection.rest;
    const auto others = std::partition(rest.begin(), rest.end(), [&](const auto& entry) {
      return s.sharp[-entry.second] >> i & 1;
    });
    s.selection.take_all(rest.begin(), others);
    s.selection.take_mass(others, a.mass[h]);
    s.selection.write(a, b, h, BLOCK);
  }
}

int estimate_union(const EstimateArguments& a) {
  const TensorView query{static_cast<const input*>(a.query), a.query_batch, a.query_head,
                         a.query_row};
  const TensorView key{static_cast<const input*>(a.key), a.key_batch, a.key_head, a.key_row};
  const AllPooledKeys all(a);
  const Extent extent(a);
  const int64_t padded = round_up(a.num_keys, BLOCK), first_block = a.query_offset / BLOCK;
  const std::vector<HeadsTogether> together = put_together(a);
  const int64_t looks = static_cast<int64_t>(together.size());
  int64_t most = 0;  // products of the head with the most of them
  for (int64_t h = 0; h < a.num_heads; ++h)
    most = std::max(most, round_up(a.num_blocks * a.rows[h], BLOCK) / BLOCK);
#pragma omp parallel num_threads(a.threads)
  {
    UnionScratch s(all.width(), padded / BLOCK);
    for (int64_t t = 0; t < a.batch * a.num_heads; ++t) {
      const int64_t b = t / a.num_heads, h = t % a.num_heads;
      if (!all.owns(h)) continue;
      const PooledKeys runs = all.of(b, h);
#pragma omp single
      find_centre(a, runs, key, b, a.heads[h] / a.group);
#pragma omp for schedule(static) nowait
      for (int64_t panel = 0; panel < runs.padded / BLOCK; ++panel)
        pool_keys(a, runs, s.mean.get(), key, b, a.heads[h] / a.group, a.pool[h], panel);
    }
#pragma omp barrier
    const TileScope tiles;
    if (a.column_width > 0) {
      VerticalColumnScratch columns(padded);
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t t = 0; t < a.batch * looks; ++t) {
        const int64_t b = t / looks;
        const HeadsTogether& heads = together[t % looks];
        sum_vertical_columns(a, columns, query, key, extent, b, heads);
        for (int head = 0; head < heads.count; ++head)
          write_vertical_columns(a, columns, columns.sums.data() + head * padded, b,
                                 heads.first + head);
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < a.batch * a.num_heads * most; ++t) {
      const int64_t b = t / most / a.num_heads, h = t / most % a.num_heads;
      const int64_t at_once = BLOCK / a.rows[h];
      const int64_t i = (most - 1 - t % most) * at_once;  // the longest first
      if (i < a.num_blocks)
        choose_blocks(a, s, all.of(b, h), extent, query, b, h, first_block + i,
                      std::min(at_once, a.num_blocks - i));
    }
  }
  return 0;
}

}  // namespace

extern "C" int union_index(const EstimateArguments* arguments) {
  try {
    return estimate_union(*arguments);
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
