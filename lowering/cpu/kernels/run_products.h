// Products of query rows with runs of keys, a row of runs per query row.
//
// ROWS_AT_ONCE rows are multiplied with all runs that they see. What the product leaves stays in a
// strip of one row of runs per query row, so memory is O(N) per thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "block_lists.h"
#include "gemm.h"
#include "key_runs.h"
#include "memory.h"
#include "pack.h"

namespace {

constexpr int ROWS_AT_ONCE = BLOCK;

struct RunScratch {
  Buffer<packed> rows;
  Buffer<float> mean, strip, sums;
  BlockSelection selection;
  int64_t stride;  // of the strip: no power of two, whose rows would share cache sets

  explicit RunScratch(const AllKeyRuns& all)
      : rows(BLOCK * all.parts() * DEPTH * PAIR),
        mean(POOLED),
        strip(ROWS_AT_ONCE * (all.width() + LANES)),
        sums(all.width() + LANES),
        stride(all.width() + LANES) {
    std::fill_n(sums.get(), stride, 0.0f);
  }
};

// Packs the means of the 64 runs of one panel as a B operand.
void pool_panel(const EstimateArguments& a, const KeyRuns& runs, RunScratch& s,
                const TensorView& key, int64_t b, int64_t kv_head, int64_t length, int64_t panel,
                bool log_size) {
  word* rows = reinterpret_cast<word*>(s.rows.get());
  pool_runs(a, runs, s.mean.get(), key, b, kv_head, length, panel, log_size, rows);
  transpose_rows(runs.panels + panel * DEPTH * BLOCK, rows, DEPTH);
}

// Visits rows one after the other. `pack(index, out)` packs one and returns what it sees (for
// nothing it leaves zeros), `add_row(strip row, seen)` takes its products, and `finish(tile)`
// follows on every `per_tile` rows.
template <typename Pack, typename Add, typename Finish>
void visit_rows(RunScratch& s, const KeyRuns& runs, int64_t num_rows, int64_t per_tile,
                const Pack& pack, const Add& add_row, const Finish& finish) {
  const int64_t depth = runs.parts * DEPTH;
  for (int64_t first = 0; first < num_rows; first += ROWS_AT_ONCE) {
    RunRange seen[ROWS_AT_ONCE];
    int64_t reach = 0;
    for (int r = 0; r < ROWS_AT_ONCE; ++r) {
      packed* out = s.rows.get() + r * depth * PAIR;
      seen[r] = first + r < num_rows ? pack(first + r, out) : RunRange{0, 0};
      if (seen[r].low >= seen[r].high) std::memset(out, 0, depth * sizeof(word));
      else reach = std::max(reach, seen[r].high);
    }
    const word* parts[BLOCK];
    for (int64_t panel = 0; panel * BLOCK < reach; ++panel) {
      for (int64_t n = 0; n < runs.parts; ++n)
        parts[n] = runs.panels + (panel * runs.parts + n) * DEPTH * BLOCK;
      multiply<false>(reinterpret_cast<const word*>(s.rows.get()), static_cast<int>(depth), parts,
                      static_cast<int>(runs.parts), DEPTH, BLOCK, s.strip.get() + panel * BLOCK,
                      static_cast<int>(s.stride), ROWS_AT_ONCE, BLOCK, nullptr);
    }
    for (int64_t index = first; index < std::min(num_rows, first + ROWS_AT_ONCE); ++index) {
      const RunRange of_row = seen[index - first];
      if (of_row.low < of_row.high) add_row(s.strip.get() + (index - first) * s.stride, of_row);
      if ((index + 1) % per_tile == 0) finish(index / per_tile);
    }
  }
}

// Packs one query row, as zeros where the scale is 0: the products are zero then.
inline void pack_query(const EstimateArguments& a, packed* out, const input* row) {
  if (a.scale == 0) std::memset(out, 0, DEPTH * sizeof(word));
  else pack_row(out, row, HEAD_DIM, DEPTH * PAIR);
}

// The factor from products to exponents of 2.
inline vec exponent_factor(float scale) { return set1((scale == 0 ? 1.0f : scale) * LOG2E); }

// Adds what a bias by distance gives to the runs that a row sees. Run s has the entry
// s * step of `bias`; the products are still to be multiplied with the scale.
inline void add_run_bias(float* row, RunRange seen, const float* bias, int64_t step, float scale) {
  const float unit = scale == 0 ? 1.0f : 1.0f / scale;
  for (int64_t s = seen.low; s < seen.high; ++s) row[s] += bias[s * step] * unit;
}

// Where the bias of groups of keys stands for a group of queries: entry s is that of key group s.
inline const float* bias_of_group(const EstimateArguments& a, int64_t h, int64_t group) {
  return a.run_bias + h * a.run_head + a.run_head / 2 - group;
}

// The row that a row of the strip has among those that are multiplied at once.
inline int64_t place_in_strip(const RunScratch& s, const float* row) {
  return (row - s.strip.get()) / s.stride;
}

// Hides what a row does not see in the vectors at the edges of what it does.
inline void hide_edges(float* row, RunRange seen, float scale) {
  const int64_t first = seen.low / LANES * LANES, last = (seen.high - 1) / LANES * LANES;
  const float hidden = scale < 0 ? -NEGATIVE_INFINITY : NEGATIVE_INFINITY;
  for (int64_t s = first; s < seen.low; ++s) row[s] = hidden;
  for (int64_t s = seen.high; s < last + LANES; ++s) row[s] = hidden;
}

// The greatest exponent of a row.
inline float greatest_of(const float* row, const float* weight, RunRange seen, vec factor) {
  vec top = set1(NEGATIVE_INFINITY);
  for (int64_t s = seen.low / LANES * LANES; s < seen.high; s += LANES)
    top = maximum(fma(load(row + s), factor, load(weight + s)), top);
  return reduce_max(top);
}

// Softmax of a row. The exponentials stay in the strip; their sum is returned, or 0 if the row sees
// no keys.
inline float exponentiate_row(float* row, const float* weight, RunRange seen, float scale) {
  hide_edges(row, seen, scale);
  const vec factor = exponent_factor(scale);
  const float greatest = greatest_of(row, weight, seen, factor);
  if (greatest == NEGATIVE_INFINITY) return 0.0f;
  const vec peak = set1(greatest);
  vec total = set1(0.0f);
  for (int64_t s = seen.low / LANES * LANES; s < seen.high; s += LANES) {
    const vec e = exp2_vec(sub(fma(load(row + s), factor, load(weight + s)), peak));
    store(row + s, e);
    total = add(total, e);
  }
  return reduce_add(total);
}

// Takes the sums over the runs of each of `blocks` key blocks. The sums over rows are zero again
// then.
inline void take_sums(RunScratch& s, int64_t runs, int64_t per_block, int64_t blocks) {
  float* sums = s.sums.get();
  s.selection.scores.resize(blocks);
  for (int64_t kb = 0; kb < blocks; ++kb) {
    float sum = 0.0f;
    for (int64_t n = kb * per_block; n < std::min(runs, (kb + 1) * per_block); ++n) sum += sums[n];
    s.selection.scores[kb] = sum;
  }
  std::fill_n(sums, s.stride, 0.0f);
}

}  // namespace
