// Scores of a strip by products of packed queries and keys, as exact as packing is.
#pragma once

#include "scores_packed_block.h"

namespace {

// What a call shares between its threads beside packed keys.
struct SharedScores {
  explicit SharedScores(const AttentionArguments&) {}
  void prepare(const AttentionArguments&, int64_t) {}
  const float* centre(int64_t, int64_t) const { return nullptr; }
};

// Packs 64 keys. row(r) is row r of the input, or null where there is none.
template <typename Row>
void pack_scored_keys(word* out, packed* staging, const float*, const Row& row) {
  pack_keys(out, staging, row);
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

  void compute(const AttentionArguments&, const QueryBlock&, const Tile* tiles, int count,
               int computed) {
    for (int t = 0; t < count; ++t) multiply_tile(tiles[t], t, computed);
  }
};

}  // namespace
