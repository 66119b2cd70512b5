// Finds the vertical columns and diagonals with the most attention of the last queries.
// vertical_slash_index in lowering/reference/vertical_slash.py says what it means.
//
// A column sum is the sum of one row of transposed weights, and diagonal sums are column sums of
// the tile written askew. The weights of a few heads exist at a time, so memory is O(N) per thread.
//
// chunk  CHUNK keys, the unit of work: fixed, so that sums do not depend on the threads
// wave   heads whose weights exist at the same time
#pragma once

#include <omp.h>
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "last_queries.h"
#include "mark_largest.h"
#include "memory.h"

namespace {

constexpr int64_t CHUNK = 4096;

struct VerticalSlashSums {
  Extent extent;
  int64_t chunks, wave, stride, blocks;
  Buffer<word> queries;           // [wave, DEPTH, LAST_QUERIES] words: B operands
  Buffer<uint16_t> weights;       // [wave, blocks, BLOCK, LAST_QUERIES] fp16
  Buffer<float> factors, totals;  // [wave, blocks, LAST_QUERIES]
  Buffer<float> columns;          // [B, h, num_keys]
  Buffer<float> diagonals;        // [B, h, chunks, stride]: by distance to the chunk's last key

  explicit VerticalSlashSums(const EstimateArguments& a)
      : extent(a),
        chunks((a.num_keys + CHUNK - 1) / CHUNK),
        wave(std::min(a.batch * a.num_heads, (2 * a.threads + chunks - 1) / chunks)),
        stride(CHUNK + 2 * BLOCK),
        blocks((a.num_keys + BLOCK - 1) / BLOCK),
        queries(wave * DEPTH * LAST_QUERIES),
        weights(wave * blocks * BLOCK * LAST_QUERIES),
        factors(wave * blocks * LAST_QUERIES),
        totals(wave * blocks * LAST_QUERIES),
        columns(a.batch * a.num_heads * a.num_keys),
        diagonals(a.batch * a.num_heads * chunks * stride) {}

  // Row of the first of the last queries.
  int64_t first_row(int64_t b) const { return extent.last_query[b] - (LAST_QUERIES - 1); }
};

struct VerticalSlashScratch : MarkScratch {
  Buffer<packed> staging;
  Buffer<float> scores, skewed;

  VerticalSlashScratch()
      : staging(BLOCK * DEPTH * PAIR),
        scores(BLOCK * BLOCK),
        skewed(BLOCK * 2 * BLOCK) {
    std::memset(skewed.get(), 0, BLOCK * 2 * BLOCK * sizeof(float));
  }
};

// The first pass over a chunk takes the weights of its keys, relative to the greatest of each
// block. `slot` is that of the head in its wave.
void weigh_chunk(const EstimateArguments& a, const VerticalSlashSums& sums, VerticalSlashScratch& s,
                 int64_t b, int64_t h, int64_t slot, int64_t chunk) {
  const TensorView key{static_cast<const input*>(a.key), a.key_batch, a.key_head, a.key_row};
  const word* queries = sums.queries.get() + slot * DEPTH * LAST_QUERIES;
  const vec exponent = exponent_of_product(a);
  const int64_t stop = std::min(sums.blocks, (chunk + 1) * (CHUNK / BLOCK));
  for (int64_t n = chunk * (CHUNK / BLOCK); n < stop; ++n) {
    const int64_t block = slot * sums.blocks + n;
    score_block(a, queries, s.staging.get(), key, b, a.heads[h] / a.group, n * BLOCK,
                sums.first_row(b), s.scores.get());
    if constexpr (BIASED)
      add_bias_to_block<LAST_QUERIES, 1>(a, h, n * BLOCK, s.scores.get(),
                                         [&](int q) { return sums.first_row(b) + q; });
    exponentiate_block(s.scores.get(), exponent, sums.weights.get() + block * BLOCK * LAST_QUERIES,
                       sums.factors.get() + block * LAST_QUERIES,
                       sums.totals.get() + block * LAST_QUERIES);
  }
}

// The second pass over a chunk sums shares of the softmax per key and per distance.
void sum_chunk(const EstimateArguments& a, const VerticalSlashSums& sums, VerticalSlashScratch& s,
               int64_t head, int64_t slot, int64_t chunk) {
  constexpr int VECTORS_PER_ROW = LAST_QUERIES / LANES;
  const int64_t start = chunk * CHUNK, stop = std::min(a.num_keys, start + CHUNK);
  float* columns = sums.columns.get() + head * a.num_keys;
  float* diagonals = sums.diagonals.get() + (head * sums.chunks + chunk) * sums.stride;
  std::fill_n(diagonals, sums.stride, 0.0f);
  for (int64_t first = start; first < stop; first += BLOCK) {
    const int64_t block = slot * sums.blocks + first / BLOCK;
    const uint16_t* weights = sums.weights.get() + block * BLOCK * LAST_QUERIES;
    vec factor[VECTORS_PER_ROW];
    for (int v = 0; v < VECTORS_PER_ROW; ++v)
      factor[v] = load(sums.factors.get() + block * LAST_QUERIES + v * LANES);
    float* skewed = s.skewed.get();
    for (int r = 0; r < BLOCK; ++r) {
      float* target = skewed + r * 2 * BLOCK + (BLOCK - 1 - r);
      vec sum = set1(0.0f);
      for (int v = 0; v < VECTORS_PER_ROW; ++v) {
        const vec share =
            mul(load(weights + r * LAST_QUERIES + v * LANES, float16_tag{}), factor[v]);
        store(target + v * LANES, share);
        sum = add(sum, share);
      }
      if (first + r < stop) columns[first + r] = reduce_add(sum);
    }
    // Entry e of the skewed sums is the distance e + (p0 - first - 63), where p0 is the position of
    // the first query.
    float* out = diagonals + (start + CHUNK - BLOCK - first);
    for (int n = 0; n < 2 * BLOCK; n += LANES) {
      vec sum = load(out + n);
      for (int r = 0; r < BLOCK; ++r) sum = add(sum, load(skewed + r * 2 * BLOCK + n));
      store(out + n, sum);
    }
  }
}

void select_vertical_slash(const EstimateArguments& a, const VerticalSlashSums& sums,
                           VerticalSlashScratch& s, int64_t b, int64_t h) {
  const int64_t head = b * a.num_heads + h, n = a.num_keys;
  s.marks.resize(n);
  float* columns = sums.columns.get() + head * n;
  const int64_t sink = sums.extent.first_key[b];
  for (int64_t j = sink; j < std::min(n, sink + SINK_COLUMNS); ++j) columns[j] = INFINITE;
  mark_largest(s.marks.data(), columns, n, std::max<int64_t>(SINK_COLUMNS, a.first_sizes[h]),
               s.order, s.sorted);
  write_list(a.first_count + head, a.first_index + head * a.first_width, s.marks.data(), n,
             a.first_width);

  s.values.assign(n, 0.0f);
  const int64_t p0 = a.query_offset + sums.first_row(b);
  for (int64_t c = sums.chunks - 1; c >= 0; --c) {  // the nearest keys first
    const float* diagonals = sums.diagonals.get() + (head * sums.chunks + c) * sums.stride;
    const int64_t base = p0 - (c + 1) * CHUNK + 1;  // distance of entry 0
    const int64_t low = std::max<int64_t>(0, -base);
    for (int64_t e = low; e < sums.stride; ++e) s.values[std::min(n - 1, base + e)] += diagonals[e];
  }
  for (int64_t d = 0; d < std::min(n, LOCAL_DIAGONALS); ++d) s.values[d] = INFINITE;
  mark_largest(s.marks.data(), s.values.data(), n,
               std::max<int64_t>(LOCAL_DIAGONALS, a.second_sizes[h]), s.order, s.sorted);
  const int64_t reach = a.window > 0 ? std::min(n, a.window) : n;
  s.blocks.assign((n + BLOCK - 1) / BLOCK + 1, 0);
  s.blocks[0] = 1;
  for (int64_t d = 0; d < reach; ++d) {
    if (!s.marks[d]) continue;
    s.blocks[d / BLOCK] = 1;
    if (d % BLOCK) s.blocks[d / BLOCK + 1] = 1;
  }
  write_list(a.second_count + head, a.second_index + head * a.second_width, s.blocks.data(),
             static_cast<int64_t>(s.blocks.size()), a.second_width);
}

int estimate_vertical_slash(const EstimateArguments& a) {
  const TensorView query{static_cast<const input*>(a.query), a.query_batch, a.query_head,
                         a.query_row};
  const VerticalSlashSums sums(a);
  const int64_t heads = a.batch * a.num_heads;
#pragma omp parallel num_threads(a.threads)
  {
    VerticalSlashScratch s;
    for (int64_t first = 0; first < heads; first += sums.wave) {
      const int64_t count = std::min(sums.wave, heads - first);
#pragma omp for schedule(static)
      for (int64_t slot = 0; slot < count; ++slot) {
        const int64_t b = (first + slot) / a.num_heads, h = (first + slot) % a.num_heads;
        pack_last_queries(a, sums.queries.get() + slot * DEPTH * LAST_QUERIES, s.staging.get(),
                          query, b, a.heads[h], sums.first_row(b));
      }
      {
        const TileScope tiles;
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < count * sums.chunks; ++t) {
          const int64_t slot = t / sums.chunks, head = first + slot;
          weigh_chunk(a, sums, s, head / a.num_heads, head % a.num_heads, slot, t % sums.chunks);
        }
      }
#pragma omp for schedule(static)
      for (int64_t slot = 0; slot < count; ++slot)
        find_factors(sums.factors.get() + slot * sums.blocks * LAST_QUERIES,
                     sums.totals.get() + slot * sums.blocks * LAST_QUERIES, sums.blocks);
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < count * sums.chunks; ++t) {
        const int64_t slot = t / sums.chunks;
        sum_chunk(a, sums, s, first + slot, slot, t % sums.chunks);
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < heads; ++t)
      select_vertical_slash(a, sums, s, t / a.num_heads, t % a.num_heads);
  }
  return 0;
}

}  // namespace
