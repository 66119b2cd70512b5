// Scores of a strip with a bias by distance added to them, in units of scores: nothing that comes
// after has to know.
#pragma once

#include "distance_bias.h"
#include "scores_packed_block.h"

namespace {

struct SharedScores {
  explicit SharedScores(const AttentionArguments&) {}
  void prepare(const AttentionArguments&, int64_t) {}
  const float* centre(int64_t, int64_t) const { return nullptr; }
};

template <typename Row>
void pack_scored_keys(word* out, packed* staging, const float*, const Row& row) {
  pack_keys(out, staging, row);
}

// Adds the bias to the scores of one row with the keys of a tile.
inline void add_bias(float* scores, const float* bias, const Tile& tile, float unit) {
  if (!tile.columns) return add_bias(scores, bias + tile.first, BLOCK, unit);
  float own[BLOCK] = {};
  for (int k = 0; k < tile.bounds.keys; ++k)
    if (tile.visible >> k & 1) own[k] = bias[tile.columns[k]];
  add_bias(scores, own, BLOCK, unit);
}

// The query rows of a block, and the scores of a strip [BLOCK, STRIP * BLOCK].
struct ScoreScratch : PackedScores {
  void take_query(const AttentionArguments& a, const QueryBlock& block, const TensorView& rows,
                  const float*) {
    pack_query(a, block, rows);
  }

  // A score is factor(r) * number + shift(r).
  float factor(int) const { return 1.0f; }
  float shift(int) const { return 0.0f; }

  void compute(const AttentionArguments& a, const QueryBlock& block, const Tile* tiles, int count,
               int computed) {
    const float unit = bias_unit(a);
    const int64_t n = block.first - a.query_offset;
    for (int t = 0; t < count; ++t) {
      multiply_tile(tiles[t], t, computed);
      for (int r = 0; r < block.rows; ++r)
        add_bias(scores.get() + r * STRIP * BLOCK + t * BLOCK, bias_of_row(a, block.h, n + r),
                 tiles[t], unit);
    }
  }
};

}  // namespace
