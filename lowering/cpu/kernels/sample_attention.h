// Finds the vertical columns that hold a share of the attention of sampled rows.
// lowering/reference/sample_attention.py says what it means.
#pragma once

#include <omp.h>
#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <new>
#include <vector>

#include "evenly_spaced_rows.h"
#include "inputs.h"
#include "query_rows.h"
#include "top_share.h"

namespace {

// Sums the attention of every PARTS-th product of rows of one head, per key.
void sum_part(const EstimateArguments& a, QueryRowScratch& s, const KeyPanels& keys,
              const TensorView& query, const EvenlySpacedRows& evenly_spaced, int64_t b, int64_t h,
              int64_t part, float* sums) {
  uint8_t seen[QUERY_ROWS];
  std::fill_n(sums, keys.panels * BLOCK, 0.0f);
  for (int64_t n = part * QUERY_ROWS; n < evenly_spaced.rows; n += PARTS * QUERY_ROWS) {
    const int count = static_cast<int>(std::min<int64_t>(QUERY_ROWS, evenly_spaced.rows - n));
    const QueryRows query_rows =
        pack_query_rows(a, s, query, b, h, count, [&](int r) { return evenly_spaced.at(n + r); });
    add_query_rows(a, s, keys, query_rows, b, h, sums, nullptr, seen);
  }
}

// Writes the fewest keys that hold the coverage, within the limit. `sums` are those of all parts.
void write_vertical_columns(const EstimateArguments& a, Ranked* entries, uint8_t* marks,
                            const float* sums, int64_t stride, int64_t b, int64_t h) {
  int64_t count = 0;
  double total = 0.0;
  for (int64_t j = 0; j < a.num_keys; ++j) {
    float sum = 0.0f;
    for (int64_t part = 0; part < PARTS; ++part) sum += sums[part * stride + j];
    if (!(sum > 0.0f)) continue;
    entries[count++] = rank_score(sum, j);
    total += sum;
  }
  const float coverage = a.coverage[h], enough = coverage * static_cast<float>(total);
  // These are the keys that do not hold enough, and the next one.
  const int64_t kept = std::min(count, 1 + take_largest(entries, count, [&](float sum) {
                                         return coverage >= 1.0f || sum < enough;
                                       }));
  const int64_t room = std::min<int64_t>(kept, a.columns[h]);
  if (room < kept)
    std::nth_element(entries, entries + room, entries + kept, std::greater<Ranked>());
  std::fill_n(marks, a.num_keys, 0);
  for (int64_t n = 0; n < room; ++n) marks[place_of(entries[n])] = 1;
  const int64_t head = b * a.num_heads + h;
  int32_t* columns = a.column_index + head * a.column_width;
  for (int64_t j = 0; j < a.num_keys; ++j)
    if (marks[j]) *columns++ = static_cast<int32_t>(j);
  a.column_count[head] = static_cast<int32_t>(room);
}

int estimate_sample_attention(const EstimateArguments& a) {
  const TensorView query{static_cast<const input*>(a.query), a.query_batch, a.query_head,
                         a.query_row};
  const TensorView key{static_cast<const input*>(a.key), a.key_batch, a.key_head, a.key_row};
  const Extent extent(a);
  KeyPanels keys(a);
  const int64_t heads = a.batch * a.num_heads, stride = keys.panels * BLOCK;
  const Buffer<float> sums(heads * PARTS * stride);
  // They are allocated here, because an exception must not leave a thread of the parallel region.
  std::deque<QueryRowScratch> scratches;
  for (int64_t t = 0; t < a.threads; ++t) scratches.emplace_back(keys.panels);
  const Buffer<Ranked> entries(a.threads * a.num_keys);
  const Buffer<uint8_t> marks(a.threads * a.num_keys);
#pragma omp parallel num_threads(a.threads)
  {
    QueryRowScratch& s = scratches[omp_get_thread_num()];
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a.batch * keys.slots * keys.panels; ++t)
      keys.pack(a, key, s.rows.get(), t);
    const TileScope tiles;
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < heads * PARTS; ++t) {
      const int64_t b = t / PARTS / a.num_heads, h = t / PARTS % a.num_heads;
      const EvenlySpacedRows evenly_spaced(a, extent, b, a.rows[h]);
      sum_part(a, s, keys, query, evenly_spaced, b, h, t % PARTS, sums.get() + t * stride);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < heads; ++t) {
      const int64_t own = omp_get_thread_num() * a.num_keys;
      write_vertical_columns(a, entries.get() + own, marks.get() + own,
                             sums.get() + t * PARTS * stride, stride, t / a.num_heads,
                             t % a.num_heads);
    }
  }
  return 0;
}

}  // namespace

extern "C" int sample_attention_index(const EstimateArguments* arguments) {
  try {
    return estimate_sample_attention(*arguments);
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
