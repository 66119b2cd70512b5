// Products of pooled keys with query rows in packed words, as all other products are taken.
//
// runs        [padded, DEPTH] words  (A operand)
// query rows  [DEPTH, BLOCK] words   (B operand)
#pragma once

#include "gemm.h"
#include "key_runs.h"
#include "last_queries.h"
#include "memory.h"

namespace {

using PooledKeys = KeyRuns;

// The pooled keys of all heads.
class AllPooledKeys {
 public:
  explicit AllPooledKeys(const EstimateArguments& a) : all_(a, a.pool, /*whole=*/false) {}
  bool owns(int64_t h) const { return all_.owner(h) == h; }
  int64_t width() const { return all_.width(); }
  PooledKeys of(int64_t b, int64_t h) const { return all_.of(b, h); }

 private:
  AllKeyRuns all_;
};

// Nothing is subtracted from pooled keys here.
void find_centre(const EstimateArguments&, const PooledKeys&, const TensorView&, int64_t, int64_t) {
}

// Pools the keys of the 64 runs of one panel. `mean` has room for POOLED floats.
void pool_keys(const EstimateArguments& a, const PooledKeys& runs, float* mean,
               const TensorView& key, int64_t b, int64_t kv_head, int64_t length, int64_t panel) {
  pool_runs(a, runs, mean, key, b, kv_head, length, panel, true,
            runs.panels + panel * BLOCK * DEPTH);
}

// BLOCK query rows as a B operand.
struct PackedQueryRows {
  Buffer<packed> staging;
  Buffer<word> words;

  PackedQueryRows() : staging(BLOCK * DEPTH * PAIR), words(DEPTH * BLOCK) {}

  // row_at(r) is row r of the input, or null.
  template <typename RowAt>
  void pack(const EstimateArguments& a, const RowAt& row_at) {
    pack_queries(a, words.get(), staging.get(), row_at);
  }
};

// Computes products [rows, BLOCK] of `rows` runs, a multiple of ROW_STEP, from `first` on, with all
// query rows.
void multiply_pooled_keys(const PooledKeys& runs, int64_t first, int rows,
                          const PackedQueryRows& query_rows, float* products) {
  const word* words = query_rows.words.get();
  multiply<false>(runs.panels + first * DEPTH, DEPTH, &words, 1, DEPTH, BLOCK, products, BLOCK,
                  rows, BLOCK, nullptr);
}

}  // namespace
