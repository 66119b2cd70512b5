// Exact attention of single query rows, summed over rows. row_attention in
// lowering/reference/query_rows.py says what it means.
//
// row    one query row of a product     panel  64 keys, packed as a B operand
// tile   scores of QUERY_ROWS rows with the keys of a panel; those of all panels stay in a strip
//
// Every score is computed and exponentiated once, relative to the greatest of its row in its tile.
// What a row of a tile is to be multiplied with follows when all tiles are done. Memory is O(N) per
// thread, and QUERY_ROWS is small so that a strip of some thousand keys stays in the cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "gemm.h"
#include "inputs.h"
#include "memory.h"
#include "pack.h"

namespace {

constexpr int QUERY_ROWS = FEW_ROWS;  // of one product

// Where distances are summed too, a tile is written askew: row r begins QUERY_ROWS - 1 - r floats
// into its row, so that a column of the tile is one distance. The rest of the row stays zero.
constexpr int TILE_WIDTH =
    SUMS_DISTANCES ? (BLOCK + QUERY_ROWS + LANES - 1) / LANES * LANES : BLOCK;
constexpr int ROW_STRIDE = SUMS_DISTANCES ? TILE_WIDTH - 1 : BLOCK;
constexpr int FIRST_ROW = SUMS_DISTANCES ? QUERY_ROWS - 1 : 0,
              TILE_FLOATS = QUERY_ROWS * TILE_WIDTH;
constexpr int SLOTS = (QUERY_ROWS + LANES - 1) / LANES * LANES;  // numbers of one tile, one per row

// Sums of one head that are taken at the same time. The number is fixed, so that results do not
// depend on the number of threads.
constexpr int PARTS = 4;

// The keys of the kv heads that are asked for.
class KeyPanels {
  std::vector<int64_t> kv_heads_, slot_;  // before what count_slots() fills them for

 public:
  const int64_t panels, slots;

  explicit KeyPanels(const EstimateArguments& a)
      : panels((a.num_keys + BLOCK - 1) / BLOCK),
        slots(count_slots(a)),
        words_(a.batch * slots * panels * DEPTH * BLOCK),
        real_(a.batch * panels) {
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t j = 0; j < a.num_keys; ++j)
        if (key_is_real(a, b, j)) real_[b * panels + j / BLOCK] |= uint64_t(1) << j % BLOCK;
  }

  // Packs the t-th of batch * slots * panels.
  void pack(const EstimateArguments& a, const TensorView& key, packed* staging, int64_t t) {
    const int64_t b = t / panels / slots, head = kv_heads_[t / panels % slots];
    const int64_t first = t % panels * BLOCK;
    const uint64_t real = real_keys(b, t % panels);
    pack_keys(words_.get() + t * DEPTH * BLOCK, staging, [&](int r) -> const input* {
      return real >> r & 1 ? key.at(b, head, first + r) : nullptr;
    });
  }

  const word* of(int64_t b, int64_t h) const {
    return words_.get() + (b * slots + slot_[h]) * panels * DEPTH * BLOCK;
  }
  uint64_t real_keys(int64_t b, int64_t panel) const { return real_[b * panels + panel]; }

 private:
  int64_t count_slots(const EstimateArguments& a) {
    for (int64_t h = 0; h < a.num_heads; ++h) {
      const int64_t head = a.heads[h] / a.group;
      const auto found = std::find(kv_heads_.begin(), kv_heads_.end(), head);
      slot_.push_back(found - kv_heads_.begin());
      if (found == kv_heads_.end()) kv_heads_.push_back(head);
    }
    return static_cast<int64_t>(kv_heads_.size());
  }

  Buffer<word> words_;
  std::vector<uint64_t> real_;
};

struct QueryRowScratch {
  Buffer<packed> rows;
  Buffer<float> strip;          // [panels, QUERY_ROWS, TILE_WIDTH]
  Buffer<float> factor, total;  // [panels, SLOTS]

  explicit QueryRowScratch(int64_t panels)
      : rows(BLOCK * DEPTH * PAIR),
        strip(panels * TILE_FLOATS),
        factor(panels * SLOTS),
        total(panels * SLOTS) {
    if (SUMS_DISTANCES) std::fill_n(strip.get(), panels * TILE_FLOATS, 0.0f);
  }
};

// The rows of one product, in ascending order. Row r sees the real keys low[r] <= j < high[r].
struct QueryRows {
  int count;
  int64_t low[QUERY_ROWS], high[QUERY_ROWS];
  int64_t row[QUERY_ROWS];  // of the queries, where it exists
  bool exists[QUERY_ROWS];

  // The rows that see anything of a panel are neighbours.
  int first_of(int64_t panel) const {
    int r = 0;
    while (r < count && high[r] <= panel * BLOCK) ++r;
    return r;
  }
  int stop_of(int64_t panel) const {
    int r = count;
    while (r > 0 && low[r - 1] >= (panel + 1) * BLOCK) --r;
    return r;
  }
  uint64_t visible(int r, int64_t panel) const {
    if (!exists[r]) return 0;
    return low_bits(high[r] - panel * BLOCK) & ~low_bits(low[r] - panel * BLOCK);
  }
};

// row_at(r) is a row of `query`, which may lie before its first or be padding.
template <typename RowAt>
QueryRows pack_query_rows(const EstimateArguments& a, QueryRowScratch& s, const TensorView& query,
                          int64_t b, int64_t h, int count, const RowAt& row_at) {
  QueryRows query_rows;
  query_rows.count = count;
  for (int r = 0; r < QUERY_ROWS; ++r) {
    packed* out = s.rows.get() + r * DEPTH * PAIR;
    const int64_t n = r < count ? row_at(r) : -1;
    query_rows.row[r] = n;
    query_rows.exists[r] = n >= 0 && query_is_real(a, b, n);
    if (query_rows.exists[r] && a.scale != 0)
      pack_row(out, query.at(b, a.heads[h], n), HEAD_DIM, DEPTH * PAIR);
    else std::memset(out, 0, DEPTH * sizeof(word));
    const int64_t p = a.query_offset + n;
    query_rows.low[r] = a.window > 0 ? std::max<int64_t>(0, p - a.window + 1) : 0;
    query_rows.high[r] = a.causal ? std::min(a.num_keys, p + 1) : a.num_keys;
  }
  return query_rows;
}

// Adds the bias by distance to some rows of a tile.
void add_bias_to_rows(const EstimateArguments& a, float* tile, const QueryRows& query_rows,
                      int64_t h, int first, int stop, int64_t panel) {
  const vec unit = set1(a.scale == 0 ? 1.0f : 1.0f / a.scale);
  for (int r = first; r < stop; ++r) {
    if (!query_rows.exists[r]) continue;
    float* row = tile + FIRST_ROW + r * ROW_STRIDE;
    const float* bias =
        a.distance_bias + h * a.bias_head + (a.num_queries - 1 - query_rows.row[r]) + panel * BLOCK;
    for (int n = 0; n < BLOCK; n += LANES) store(row + n, fma(load(bias + n), unit, load(row + n)));
  }
}

// Takes the exponentials of some rows of a tile, relative to the greatest exponent of each in it.
// `greatest` and `total` of them are [SLOTS].
void exponentiate_tile(float* tile, const QueryRows& query_rows, int first, int stop, int64_t panel,
                       uint64_t real, float scale, float* greatest, float* total) {
  const vec factor = set1(scale), sign = set1(scale < 0 ? -1.0f : 1.0f);
  std::fill_n(greatest, SLOTS, NEGATIVE_INFINITY);
  std::fill_n(total, SLOTS, 0.0f);
  for (int r = first; r < stop; ++r) {
    float* row = tile + FIRST_ROW + r * ROW_STRIDE;
    const uint64_t visible = query_rows.visible(r, panel) & real;
    if (visible != ~uint64_t(0)) {
      for (int n = 0; n < BLOCK; n += LANES)
        store(row + n, mul(keep(visible >> n, mul(load(row + n), sign)), sign));
    }
    vec most = set1(NEGATIVE_INFINITY), sum = set1(0.0f);
    for (int n = 0; n < BLOCK; n += LANES) most = maximum(mul(load(row + n), factor), most);
    greatest[r] = reduce_max(most);
    const vec shift = finite_or_zero(set1(greatest[r]));
    for (int n = 0; n < BLOCK; n += LANES) {
      const vec e = exp2_vec(sub(mul(load(row + n), factor), shift));
      store(row + n, e);
      sum = add(sum, e);
    }
    total[r] = reduce_add(sum);
  }
}

// Puts in the place of the greatest exponents what the exponentials of each tile are to be
// multiplied with to be shares of the softmax. seen[r] tells whether row r sees a key; one with NaN
// counts as none.
void find_factors(float* greatest, const float* total, int64_t panels, int count, uint8_t* seen) {
  for (int n = 0; n < SLOTS; n += LANES) {
    vec most = set1(NEGATIVE_INFINITY), sum = set1(0.0f);
    for (int64_t t = n; t < panels * SLOTS; t += SLOTS) most = maximum(most, load(greatest + t));
    most = finite_or_zero(most);
    for (int64_t t = n; t < panels * SLOTS; t += SLOTS) {
      const vec factor = exp2_vec(sub(load(greatest + t), most));
      store(greatest + t, factor);
      sum = fma(factor, load(total + t), sum);
    }
    float inverse[LANES];
    store(inverse, sum);
    for (int r = 0; r < LANES; ++r) {
      inverse[r] = inverse[r] > 0.0f ? 1.0f / inverse[r] : 0.0f;
      if (n + r < count) seen[n + r] = inverse[r] > 0.0f;
    }
    for (int64_t t = n; t < panels * SLOTS; t += SLOTS)
      store(greatest + t, mul(load(greatest + t), load(inverse)));
  }
}

// Adds factor[r] * tile[r][c] to sums[c], over some rows.
template <int COLUMNS>
void add_tile(float* sums, const float* tile, int stride, const float* factor, int first,
              int stop) {
  vec sum[COLUMNS / LANES];
  for (int v = 0; v < COLUMNS / LANES; ++v) sum[v] = load(sums + v * LANES);
  for (int r = first; r < stop; ++r) {
    if (!(factor[r] > 0.0f)) continue;  // nothing to add, or NaN
    const vec share = set1(factor[r]);
    for (int v = 0; v < COLUMNS / LANES; ++v)
      sum[v] = fma(load(tile + r * stride + v * LANES), share, sum[v]);
  }
  for (int v = 0; v < COLUMNS / LANES; ++v) store(sums + v * LANES, sum[v]);
}

// Adds the softmax weights of the rows of one product to `by_key` and, with SUMS_DISTANCES, to
// `by_distance`: its entry e is the distance `position of row 0 + QUERY_ROWS - 1 - e`.
void add_query_rows(const EstimateArguments& a, QueryRowScratch& s, const KeyPanels& keys,
                    const QueryRows& query_rows, int64_t b, int64_t h, float* by_key,
                    float* by_distance, uint8_t* seen) {
  const int64_t low = query_rows.low[0] / BLOCK;
  const int64_t reach = std::max<int64_t>(0, query_rows.high[query_rows.count - 1]);
  const int64_t high = std::max(low, (reach + BLOCK - 1) / BLOCK);
  const int rows = std::min<int>(QUERY_ROWS, round_up(query_rows.count, FEW_ROW_STEP));
  const float scale = (a.scale == 0 ? 1.0f : a.scale) * LOG2E;
  const word* row_words = reinterpret_cast<const word*>(s.rows.get());
  for (int64_t panel = low; panel < high; ++panel) {
    float* tile = s.strip.get() + (panel - low) * TILE_FLOATS;
    const word* words = keys.of(b, h) + panel * DEPTH * BLOCK;
    multiply<false>(row_words, DEPTH, &words, 1, DEPTH, BLOCK, tile + FIRST_ROW, ROW_STRIDE, rows,
                    BLOCK, nullptr);
    if constexpr (BIASED)
      add_bias_to_rows(a, tile, query_rows, h, query_rows.first_of(panel),
                       query_rows.stop_of(panel), panel);
    exponentiate_tile(tile, query_rows, query_rows.first_of(panel), query_rows.stop_of(panel),
                      panel, keys.real_keys(b, panel), scale,
                      s.factor.get() + (panel - low) * SLOTS,
                      s.total.get() + (panel - low) * SLOTS);
  }
  find_factors(s.factor.get(), s.total.get(), high - low, query_rows.count, seen);
  for (int64_t panel = low; panel < high; ++panel) {
    const float* tile = s.strip.get() + (panel - low) * TILE_FLOATS;
    const float* factor = s.factor.get() + (panel - low) * SLOTS;
    const int first = query_rows.first_of(panel), stop = query_rows.stop_of(panel);
    add_tile<BLOCK>(by_key + panel * BLOCK, tile + FIRST_ROW, ROW_STRIDE, factor, first, stop);
    if (SUMS_DISTANCES)
      add_tile<TILE_WIDTH>(by_distance + panel * BLOCK, tile, TILE_WIDTH, factor, first, stop);
  }
}

}  // namespace
