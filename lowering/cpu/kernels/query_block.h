// What a query block of a head attends to. It is listed before it is computed, so that what comes
// next is known and can be fetched.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "indexing.h"
#include "memory.h"
#include "tile_bounds.h"
#include "vector_types.h"

namespace {

// Whether the rows of V are a packed panel as they lie in memory, as those of a cache in fp32 are.
// Chunks of a prompt would pack all values that are cached again and again.
inline bool values_lie_packed(const AttentionArguments& a) {
  return !HALF_VALUES && INPUT_IS_PACKED && PAIR == 1 && VALUE_DIM == VALUE_WIDTH &&
      a.value_row == VALUE_WIDTH;
}

// K and V of the whole call, packed, and what the attention mask says of each key block.
struct PackedKeyValues {
  int64_t key_blocks, chunks;  // chunks: of 64 columns, per head
  int64_t in_place;            // blocks of V of each kv head that are read where they are
  Buffer<word> keys, values, column_keys, column_values;
  Buffer<uint64_t> valid;  // [B, key_blocks], a bit per key: it exists and is no padding

  // packs: false where only the sizes and `valid` are wanted, to list tiles by.
  explicit PackedKeyValues(const AttentionArguments& a, bool packs = true)
      : key_blocks((a.num_keys + BLOCK - 1) / BLOCK),
        chunks((a.longest_columns + BLOCK - 1) / BLOCK),
        in_place(values_lie_packed(a) ? a.num_keys / BLOCK : 0),
        keys(packs * a.batch * a.kv_heads * key_blocks * KEY_WORDS),
        values(packs * a.batch * a.kv_heads * (key_blocks - in_place) * VALUE_WORDS),
        column_keys(packs * a.batch * a.heads * chunks * KEY_WORDS),
        column_values(packs * a.batch * a.heads * chunks * VALUE_WORDS),
        valid(a.batch * key_blocks) {}

  // Where the packed values of a block are that is not read in place.
  word* packed_values(const AttentionArguments& a, int64_t b, int64_t kv_head, int64_t kb) const {
    const int64_t slot = (b * a.kv_heads + kv_head) * (key_blocks - in_place) + kb - in_place;
    return values.get() + slot * VALUE_WORDS;
  }
  const word* values_of(const AttentionArguments& a, int64_t b, int64_t kv_head, int64_t kb) const {
    if (kb >= in_place) return packed_values(a, b, kv_head, kb);
    const TensorView value{static_cast<const input*>(a.value), a.value_batch, a.value_head,
                           a.value_row};
    return reinterpret_cast<const word*>(value.at(b, kv_head, kb * BLOCK));
  }
};

// A tile is 64 keys: a key block, or 64 vertical columns that were gathered.
struct Tile {
  const word *keys, *values;
  TileBounds bounds;
  bool masked;             // some row sees but some of them
  uint64_t visible;        // a bit per key: some row sees it
  int64_t first;           // position of the block's first key
  const int32_t* columns;  // positions, or null for a block
};

// A query block of a head: its place, the positions of its rows, and its tiles.
struct QueryBlock {
  int64_t b, h, i, first;
  int rows;
  std::vector<Tile> tiles;
  std::vector<uint8_t> selected;  // per key block, while tiles are listed

  explicit QueryBlock(const PackedKeyValues& in) : selected(in.key_blocks + 1, 0) {
    tiles.reserve(in.key_blocks + in.chunks);
  }
};

// A bit per key of a block: it exists and is no padding.
inline uint64_t valid_keys(const AttentionArguments& a, int64_t b, int64_t kb) {
  const int64_t first = kb * BLOCK;
  uint64_t bits = low_bits(a.num_keys - first);
  if (a.key_mask) {
    for (int r = 0; r < BLOCK && first + r < a.num_keys; ++r)
      if (!a.key_mask[b * a.num_keys + first + r]) bits &= ~(uint64_t(1) << r);
  }
  return bits;
}

// Lists the key block if some row sees a key of it.
void list_block(const AttentionArguments& a, const PackedKeyValues& in, QueryBlock& block,
                int64_t kb) {
  const int64_t low = kb * BLOCK, high = low + BLOCK - 1;
  const int64_t first = block.first, last = first + block.rows - 1;
  if (kb < 0 || kb >= in.key_blocks || (a.causal && low > last)) return;
  block.selected[kb] = 1;
  const uint64_t valid = in.valid.get()[block.b * in.key_blocks + kb];
  const bool ahead = a.window > 0 && !a.causal;  // the window ends ahead of a row, too
  const bool in_window =
      a.window <= 0 || (first - high < a.window && (!ahead || low - last < a.window));
  if (!in_window || valid == 0) return;
  const bool full = valid == ~uint64_t(0) && (!a.causal || high <= first) &&
      (a.window <= 0 || last - low < a.window) && (!ahead || high - first < a.window);
  TileBounds bounds{64 - __builtin_clzll(valid)};
  if (a.causal) bounds.first = static_cast<int>(std::min<int64_t>(first - low + 1, BLOCK));
  const int64_t kv_head = block.h / (a.heads / a.kv_heads);
  const int64_t slot = (block.b * a.kv_heads + kv_head) * in.key_blocks + kb;
  block.tiles.push_back({in.keys.get() + slot * KEY_WORDS, in.values_of(a, block.b, kv_head, kb),
                         bounds, !full, valid, low, nullptr});
}

// Lists those vertical columns of a chunk that some row sees and whose blocks are not selected.
void list_vertical_columns(const AttentionArguments& a, const PackedKeyValues& in,
                           QueryBlock& block, int64_t chunk, const int32_t* columns, int64_t size,
                           int64_t limit) {
  const int64_t first = block.first, last = first + block.rows - 1;
  const uint64_t* valid = in.valid.get() + block.b * in.key_blocks;
  uint64_t bits = 0;
  bool edge = false;  // some row's window ends inside of the chunk
  for (int t = 0; t < size; ++t) {
    const int64_t j = columns[t];
    if (j < 0 || j >= limit || block.selected[j / BLOCK]) continue;
    if (!(valid[j / BLOCK] >> (j % BLOCK) & 1)) continue;
    if (a.window > 0 && (first - j >= a.window || j - last >= a.window)) continue;
    bits |= uint64_t(1) << t;
    edge = edge || (a.window > 0 && (last - j >= a.window || j - first >= a.window));
  }
  if (bits == 0) return;
  const int64_t slot = (block.b * a.heads + block.h) * in.chunks + chunk;
  block.tiles.push_back(
      {in.column_keys.get() + slot * KEY_WORDS, in.column_values.get() + slot * VALUE_WORDS,
       TileBounds{64 - __builtin_clzll(bits)}, edge || bits != ~uint64_t(0), bits, 0, columns});
}

// Lists all tiles of query block i, counted from the first query.
void list_tiles(const AttentionArguments& a, const PackedKeyValues& in, QueryBlock& block,
                int64_t b, int64_t h, int64_t i) {
  const int64_t qb = a.query_offset / BLOCK + i;
  block.b = b, block.h = h, block.i = i;
  block.first = std::max(qb * BLOCK, a.query_offset);
  block.rows =
      static_cast<int>(std::min((qb + 1) * BLOCK, a.query_offset + a.num_queries) - block.first);
  block.tiles.clear();
  const int32_t head_slot = a.head_slots[h];
  if (head_slot >= 0) {
    const int64_t list = (b * a.num_lists + head_slot) * a.num_blocks + i;
    const int32_t count = a.block_count[list];
    if (count < 0)
      for (int64_t kb = 0; kb < in.key_blocks; ++kb) list_block(a, in, block, kb);
    for (int32_t n = 0; n < count; ++n)
      list_block(a, in, block, a.block_index[list * a.max_blocks + n]);
  } else {
    const int64_t list = b * a.num_diagonals + (-1 - head_slot);
    const int32_t count = a.diagonal_count[list];
    const int64_t stop = a.causal ? qb + 1 : in.key_blocks;
    if (count < 0)
      for (int64_t kb = 0; kb < stop; ++kb) list_block(a, in, block, kb);
    for (int32_t n = 0; n < count; ++n)
      list_block(a, in, block, qb - a.diagonal_index[list * a.max_diagonals + n]);
  }
  const int64_t columns = a.max_columns ? a.column_count[b * a.heads + h] : 0;
  const int32_t* positions = a.column_index + (b * a.heads + h) * a.max_columns;
  const int64_t limit = a.causal ? std::min(qb * BLOCK, a.num_keys) : a.num_keys;
  for (int64_t c = 0; c * BLOCK < columns && positions[c * BLOCK] < limit; ++c)
    list_vertical_columns(a, in, block, c, positions + c * BLOCK,
                          std::min<int64_t>(BLOCK, columns - c * BLOCK), limit);
  std::fill(block.selected.begin(), block.selected.end(), 0);
}

// Fills in, per row of a masked tile, a bit per key that it sees.
void fill_mask(const AttentionArguments& a, const QueryBlock& block, const Tile& tile,
               uint64_t* row_bits) {
  int behind = 0;  // columns that the row's window has left behind
  int before = 0;  // columns that lie before the window's end
  for (int r = 0; r < block.rows; ++r) {
    const int64_t p = block.first + r;
    uint64_t bits = tile.visible;
    if (tile.columns) {
      while (a.window > 0 && behind < tile.bounds.keys && p - tile.columns[behind] >= a.window)
        ++behind;
      bits &= ~low_bits(behind);
      while (before < tile.bounds.keys && (a.window <= 0 || tile.columns[before] - p < a.window))
        ++before;
      bits &= low_bits(before);
    } else {
      if (a.causal) bits &= low_bits(p - tile.first + 1);
      if (a.window > 0) bits &= ~low_bits(p - a.window + 1 - tile.first);
      if (a.window > 0 && !a.causal) bits &= low_bits(p + a.window - tile.first);
    }
    row_bits[r] = bits;
  }
}

}  // namespace
