// Sparse attention of one layer over a SparseIndex. lowering/reference/attention.py says what it
// means.
//
// b batch row      h query head   g kv head       i query block, counted from the first query
// qb, kb  query and key block on the grid of absolute positions      p position of a query
// tile    64 queries x 64 keys: a key block, or 64 vertical columns that were gathered
// strip   up to STRIP tiles that share one softmax update
//
// Only D, Dv, dtype, the width of a strip, softcap and the instruction set are compiled in.
// Windows, padding, index forms and vertical columns decide something once per tile of 64 x 64
// cells, where a branch costs nothing. Compiling them in would only multiply the libraries.
#pragma once

#include <omp.h>
#include <algorithm>
#include <array>
#include <deque>
#include <new>

#include "gemm.h"
#include "indexing.h"
#include "memory.h"
#include "pack.h"
#include "query_block.h"
#include "softmax_strip.h"

namespace {

void pack_block(const AttentionArguments& a, const PackedKeyValues& p, const SharedScores& shared,
                packed* staging, int64_t b, int64_t g, int64_t kb) {
  const TensorView key{static_cast<const input*>(a.key), a.key_batch, a.key_head, a.key_row};
  const TensorView value{static_cast<const input*>(a.value), a.value_batch, a.value_head,
                         a.value_row};
  const int64_t slot = (b * a.kv_heads + g) * p.key_blocks + kb;
  const int64_t first = kb * BLOCK;
  const uint64_t valid = valid_keys(a, b, kb);
  word* packed_keys = p.keys.get() + slot * KEY_WORDS;
  if (!INT8_SCORES && ROWS_ARE_WORDS && first + BLOCK <= a.num_keys && a.key_row % PAIR == 0) {
    transpose_rows(packed_keys, reinterpret_cast<const word*>(key.at(b, g, first)), DEPTH,
                   a.key_row / PAIR);
  } else {
    pack_scored_keys(packed_keys, staging, shared.centre(b, g), [&](int r) -> const input* {
      return valid >> r & 1 ? key.at(b, g, first + r) : nullptr;
    });
  }
  if (kb >= p.in_place) {
    pack_weighted_values(p.packed_values(a, b, g, kb), staging, [&](int r) -> const input* {
      return valid >> r & 1 ? value.at(b, g, first + r) : nullptr;
    });
  }
  if (g == 0) p.valid.get()[b * p.key_blocks + kb] = valid;
}

void pack_vertical_columns(const AttentionArguments& a, const PackedKeyValues& p,
                           const SharedScores& shared, packed* staging, int64_t b, int64_t h,
                           int64_t chunk) {
  const int64_t count = a.column_count[b * a.heads + h] - chunk * BLOCK;
  if (count <= 0) return;
  const int32_t* positions = a.column_index + (b * a.heads + h) * a.max_columns + chunk * BLOCK;
  const TensorView key{static_cast<const input*>(a.key), a.key_batch, a.key_head, a.key_row};
  const TensorView value{static_cast<const input*>(a.value), a.value_batch, a.value_head,
                         a.value_row};
  const int64_t g = h / (a.heads / a.kv_heads);
  const int64_t slot = (b * a.heads + h) * p.chunks + chunk;
  const auto exists = [&](int r) {
    return r < count && positions[r] >= 0 && positions[r] < a.num_keys;
  };
  pack_scored_keys(
      p.column_keys.get() + slot * KEY_WORDS, staging, shared.centre(b, g),
      [&](int r) -> const input* { return exists(r) ? key.at(b, g, positions[r]) : nullptr; });
  pack_weighted_values(
      p.column_values.get() + slot * VALUE_WORDS, staging,
      [&](int r) -> const input* { return exists(r) ? value.at(b, g, positions[r]) : nullptr; });
}

// Computes the rows of a query block over its tiles and writes them to `out`. `next` is the block
// that this thread computes after it.
void attend(const AttentionArguments& a, const SharedScores& shared, AttentionScratch& s,
            const QueryBlock& block, const QueryBlock& next) {
  const TensorView query{static_cast<const input*>(a.query), a.query_batch, a.query_head,
                         a.query_row};
  const int64_t n = block.first - a.query_offset;
  s.scores.take_query(a, block, query, shared.centre(block.b, block.h / (a.heads / a.kv_heads)));
  const float sink = a.sinks ? a.sinks[block.h] * LOG2E : NEGATIVE_INFINITY;
  // In fp16, weights that are relative to a far greater sink would be zero: it is added at the end.
  const float first = HALF_VALUES ? NEGATIVE_INFINITY : sink;
  std::fill_n(s.maximum, BLOCK, first);
  std::fill_n(s.sum, BLOCK, first == NEGATIVE_INFINITY ? 0.0f : 1.0f);
  std::fill_n(s.scale, BLOCK, 1.0f);
  std::memset(s.out.get(), 0, BLOCK * VALUE_WIDTH * sizeof(float));

  input* out =
      static_cast<input*>(a.out) + block.b * a.out_batch + block.h * a.out_head + n * a.out_row;
  const Exponents exponents(a);
  const Tile* tiles = block.tiles.data();
  const int64_t total = static_cast<int64_t>(block.tiles.size());
  for (int64_t done = 0, count; done < total; done += count) {
    const int64_t left = total - done, strips = (left + STRIP - 1) / STRIP;
    count = (left + strips - 1) / strips;
    const Tile* following = tiles + done + count;
    int64_t known = left - count;
    Prefetch prefetch;
    if (strips == 1) {
      following = next.tiles.data();
      known = static_cast<int64_t>(next.tiles.size());
      prefetch.out = out;
      prefetch.out_rows = block.rows;
      if (known) {
        prefetch.query = query.at(next.b, next.h, next.first - a.query_offset);
        prefetch.query_rows = next.rows;
      }
    }
    for (int64_t t = 0; t < count; ++t)
      prefetch.keys[t] = t < known ? following[t].keys : tiles[done + t].values;
    add_strip(a, s, block, tiles + done, static_cast<int>(count), exponents, prefetch);
  }
  for (int r = 0; r < block.rows; ++r) {
    float* row = s.out.get() + r * VALUE_WIDTH;
    float part = 1.0f;  // of a row's weight that is not the sink's
    if (HALF_VALUES && sink != NEGATIVE_INFINITY) {
      const float greatest = std::max(s.maximum[r], sink);
      part = std::exp2(s.maximum[r] - greatest);
      s.sum[r] = s.sum[r] * part + std::exp2(sink - greatest);
      s.maximum[r] = greatest;
    }
    const vec factor = set1(s.sum[r] == 0.0f ? 0.0f : part / s.sum[r]);
    for (int d = 0; d < VALUE_WIDTH; d += LANES) store(row + d, mul(load(row + d), factor));
    unpack_row(out + r * a.out_row, row, VALUE_DIM);
  }
  if (a.lse) {
    // Maxima are exponents of 2. A row that saw nothing has no sum: minus infinity.
    float* lse = a.lse + (block.b * a.heads + block.h) * a.num_queries + n;
    for (int r = 0; r < block.rows; ++r) lse[r] = (s.maximum[r] + std::log2(s.sum[r])) / LOG2E;
  }
}

}  // namespace

extern "C" int sparse_attention(const AttentionArguments* arguments) {
  const AttentionArguments& a = *arguments;
  try {
    const PackedKeyValues in(a);
    SharedScores shared(a);
    const int64_t blocks = a.batch * a.kv_heads * in.key_blocks;
    const int64_t chunks = a.batch * a.heads * in.chunks;
    const int64_t tasks = a.batch * a.heads * a.num_blocks;
    const int64_t out_items = (a.batch - 1) * a.out_batch + (a.heads - 1) * a.out_head +
        (a.num_queries - 1) * a.out_row + VALUE_DIM;
    advise_huge_pages(a.out, out_items * sizeof(input));
    // They are allocated here, because an exception must not leave a thread of the parallel region.
    std::deque<AttentionScratch> scratches(a.threads);
    std::deque<std::array<QueryBlock, 2>> query_blocks;
    for (int64_t t = 0; t < a.threads; ++t)
      query_blocks.push_back({QueryBlock(in), QueryBlock(in)});
    int64_t claimed = 0;
#pragma omp parallel num_threads(a.threads)
    {
      AttentionScratch& scratch = scratches[omp_get_thread_num()];
#pragma omp for schedule(static)
      for (int64_t t = 0; t < a.batch * a.kv_heads; ++t) shared.prepare(a, t);
#pragma omp for schedule(static) nowait
      for (int64_t t = 0; t < chunks; ++t)
        pack_vertical_columns(a, in, shared, scratch.staging.get(), t / in.chunks / a.heads,
                              t / in.chunks % a.heads, t % in.chunks);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < blocks; ++t)
        pack_block(a, in, shared, scratch.staging.get(), t / in.key_blocks / a.kv_heads,
                   t / in.key_blocks % a.kv_heads, t % in.key_blocks);
      const TileScope tiles;
      // Heads come one after the other, and in each the longest rows first, so that the last tasks
      // are the short ones. A thread takes one task ahead, to know what comes after the one that it
      // computes.
      const auto take = [&](QueryBlock& block) {
        int64_t t;
#pragma omp atomic capture
        t = claimed++;
        block.tiles.clear();
        if (t >= tasks) return false;
        list_tiles(a, in, block, t / a.num_blocks / a.heads, t / a.num_blocks % a.heads,
                   a.num_blocks - 1 - t % a.num_blocks);
        return true;
      };
      QueryBlock *current = &query_blocks[omp_get_thread_num()][0],
                 *next = &query_blocks[omp_get_thread_num()][1];
      for (bool some = take(*current), more; some; some = more) {
        more = take(*next);
        attend(a, shared, scratch, *current, *next);
        std::swap(current, next);
      }
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
