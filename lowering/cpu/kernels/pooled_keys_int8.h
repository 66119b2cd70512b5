// Products of pooled keys with query rows in 8-bit numbers, at twice the rate of bf16 pairs. They
// only choose blocks, so each row is rounded to 255 levels of its greatest number.
//
// The same vector, the mean of some keys, is subtracted from all pooled keys first: softmax is
// invariant to it, and what all keys share would take most of the levels (SageAttention, arXiv
// 2410.02367, section 4.2).
//
// runs        [padded, INT8_DEPTH] words of four numbers each  (A operand)
// query rows  [INT8_DEPTH, BLOCK] words                        (B operand)
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "gemm.h"
#include "int8_rows.h"
#include "key_runs.h"
#include "memory.h"
#include "pack.h"
#include GEMM_INT8_HEADER

namespace {

constexpr int64_t CENTRE_STEP = BLOCK;  // every so many keys make the vector that is subtracted

// The pooled keys of one kv head. `weight` is as in KeyRuns.
struct PooledKeys {
  int64_t count, padded;
  uint32_t* panels;
  float *weight, *step;  // [padded] step: what 1 is worth in a run's row
  float* centre;         // [POOLED]
};

// The pooled keys of all heads.
class AllPooledKeys {
 public:
  explicit AllPooledKeys(const EstimateArguments& a)
      : all_(a, a.pool, /*whole=*/false),
        heads_(a.num_heads),
        steps_(a.batch * heads_ * all_.width()),
        centres_(a.batch * heads_ * POOLED) {}

  bool owns(int64_t h) const { return all_.owner(h) == h; }
  int64_t width() const { return all_.width(); }

  PooledKeys of(int64_t b, int64_t h) const {
    const KeyRuns runs = all_.of(b, h);
    const int64_t slot = b * heads_ + all_.owner(h);
    return {runs.count,
            runs.padded,
            reinterpret_cast<uint32_t*>(runs.panels),
            runs.weight,
            steps_.get() + slot * all_.width(),
            centres_.get() + slot * POOLED};
  }

 private:
  AllKeyRuns all_;
  int64_t heads_;
  Buffer<float> steps_, centres_;
};

// Finds the vector that is subtracted from all pooled keys of a kv head.
void find_centre(const EstimateArguments& a, const PooledKeys& runs, const TensorView& key,
                 int64_t b, int64_t kv_head) {
  float* centre = runs.centre;
  const int64_t count = sum_rows(centre, key, b, kv_head, 0, a.num_keys, [&](int64_t j) {
    return j % CENTRE_STEP == 0 && key_is_real(a, b, j);
  });
  const vec total = set1(static_cast<float>(std::max<int64_t>(count, 1)));
  for (int d = 0; d < POOLED; d += LANES) store(centre + d, divide(load(centre + d), total));
}

// Pools the keys of the 64 runs of one panel. `mean` has room for POOLED floats.
void pool_keys(const EstimateArguments& a, const PooledKeys& runs, float* mean,
               const TensorView& key, int64_t b, int64_t kv_head, int64_t length, int64_t panel) {
  for (int64_t run = panel * BLOCK; run < (panel + 1) * BLOCK; ++run) {
    const int64_t count =
        sum_rows(mean, key, b, kv_head, run * length, std::min(a.num_keys, (run + 1) * length),
                 [&](int64_t j) { return key_is_real(a, b, j); });
    runs.weight[run] = count == 0 ? NEGATIVE_INFINITY : std::log2(static_cast<float>(count));
    const vec total = set1(static_cast<float>(std::max<int64_t>(count, 1)));
    for (int d = 0; d < POOLED; d += LANES)
      store(mean + d, sub(divide(load(mean + d), total), load(runs.centre + d)));
    uint32_t* out = runs.panels + run * INT8_DEPTH;
    runs.step[run] = step_of(mean);
    pack_int8(out, mean, runs.step[run]);
    if constexpr (INT8_ROWS_ARE_UNSIGNED)
      for (int k = 0; k < INT8_DEPTH; ++k) out[k] ^= 0x80808080u;  // 128 more
  }
}

// BLOCK query rows as a B operand, with what a product is to be multiplied with.
struct PackedQueryRows {
  Buffer<uint32_t> rows, words;
  Buffer<float> row;
  alignas(64) float step[BLOCK];
  alignas(64) int32_t start[BLOCK];  // of a product's sum: it takes 128 off from the runs' numbers

  PackedQueryRows() : rows(BLOCK * INT8_DEPTH), words(BLOCK * INT8_DEPTH), row(POOLED) {}

  // row_at(r) is row r of the input, or null. The sign of the scale goes into the steps.
  template <typename RowAt>
  void pack(const EstimateArguments& a, const RowAt& row_at) {
    for (int r = 0; r < BLOCK; ++r) {
      const input* in = a.scale != 0 ? row_at(r) : nullptr;
      step[r] = 0.0f, start[r] = 0;
      uint32_t* out = rows.get() + r * INT8_DEPTH;
      if (!in) {
        std::memset(out, 0, INT8_DEPTH * sizeof(uint32_t));
        continue;
      }
      widen_row(row.get(), in);
      const float own = step_of(row.get());
      start[r] = -128 * pack_int8(out, row.get(), own);
      step[r] = a.scale < 0 ? -own : own;
    }
    transpose_rows(reinterpret_cast<word*>(words.get()), reinterpret_cast<word*>(rows.get()),
                   INT8_DEPTH);
  }
};

// Computes products [rows, BLOCK] of `rows` runs, a multiple of ROW_STEP, from `first` on, with all
// query rows.
inline void multiply_pooled_keys(const PooledKeys& runs, int64_t first, int rows,
                                 const PackedQueryRows& query_rows, float* products) {
  multiply_int8(runs.panels + first * INT8_DEPTH, runs.step + first, query_rows.words.get(),
                query_rows.step, query_rows.start, rows, products);
}

}  // namespace
