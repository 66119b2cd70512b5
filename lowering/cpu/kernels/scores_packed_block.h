// Products of the packed queries of a block with packed keys.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "gemm.h"
#include "memory.h"
#include "pack.h"
#include "query_block.h"

namespace {

// The query rows of a block, and the scores of a strip [BLOCK, STRIP * BLOCK].
struct PackedScores {
  Buffer<packed> query;
  Buffer<float> scores;

  PackedScores() : query(BLOCK * DEPTH * PAIR), scores(BLOCK * STRIP * BLOCK) {}

  void pack_query(const AttentionArguments& a, const QueryBlock& block, const TensorView& rows) {
    for (int r = 0; r < BLOCK; ++r) {
      packed* row = query.get() + r * DEPTH * PAIR;
      if (r < block.rows && a.scale != 0)
        pack_row(row, rows.at(block.b, block.h, block.first - a.query_offset + r), HEAD_DIM,
                 DEPTH * PAIR);
      else std::memset(row, 0, DEPTH * sizeof(word));
      if (a.scale < 0)  // maxima are taken before scaling, so the sign goes into the query
        for (int d = 0; d < DEPTH * PAIR; ++d) row[d] = negate(row[d]);
    }
  }

  // Multiplies the `computed` rows with the keys of a tile, whose values are fetched meanwhile.
  void multiply_tile(const Tile& tile, int t, int computed) {
    constexpr int FETCH_VALUES = fetch_step(VALUE_WORDS, DEPTH, BLOCK);
    multiply<false, FETCH_VALUES>(reinterpret_cast<const word*>(query.get()), DEPTH, &tile.keys, 1,
                                  DEPTH, BLOCK, scores.get() + t * BLOCK, STRIP * BLOCK, computed,
                                  BLOCK, nullptr, &tile.bounds, &tile.values);
  }
};

}  // namespace
