// P x V of a strip by products of packed weights and values.
#pragma once

#include <cstdint>

#include "gemm.h"
#include "memory.h"
#include "pack.h"
#include "query_block.h"

namespace {

// Packs 64 values. row(r) is row r of the input, or null where there is none.
template <typename Row>
void pack_weighted_values(word* out, packed* staging, const Row& row) {
  pack_values(out, staging, row);
}

struct ValueScratch {};

// Multiplies each row of `out` by its scale and adds what the tiles of a strip give. A panel of
// `fetched` per tile is fetched meanwhile.
inline void add_values(const AttentionArguments&, ValueScratch&, const QueryBlock&,
                       const weight* weights, const Tile* tiles, int count, int computed,
                       float* out, const float* scale, const word* const* fetched) {
  constexpr int FETCH_KEYS = fetch_step(KEY_WORDS, BLOCK / PAIR, VALUE_WIDTH);
  const word* values[STRIP];
  TileBounds bounds[STRIP];
  for (int t = 0; t < count; ++t) values[t] = tiles[t].values, bounds[t] = tiles[t].bounds;
  multiply<true, FETCH_KEYS>(reinterpret_cast<const word*>(weights), STRIP * BLOCK / PAIR, values,
                             count, BLOCK / PAIR, VALUE_WIDTH, out, VALUE_WIDTH, computed,
                             VALUE_WIDTH, scale, bounds, fetched);
}

}  // namespace
