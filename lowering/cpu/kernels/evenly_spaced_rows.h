// Some rows of a query that stand for all of it. evenly_spaced_rows in
// lowering/reference/query_rows.py says which they are.
#pragma once

#include <algorithm>
#include <cstdint>

#include "inputs.h"

namespace {

// Rows spread evenly over the real ones of a batch row, the last one included.
struct EvenlySpacedRows {
  int64_t first = 0, count, rows;

  EvenlySpacedRows(const EstimateArguments& a, const Extent& extent, int64_t b, int64_t of_rows)
      : count(extent.last_query[b] + 1),
        rows(of_rows) {
    const bool padding_shows = a.num_keys >= a.query_offset + a.num_queries;
    if (padding_shows && count > 0)
      first = std::max<int64_t>(0, extent.first_key[b] - a.query_offset);
    count -= first;
  }
  // The n-th of them. It may lie before the first or be padding.
  int64_t at(int64_t n) const { return first + (n + 1) * count / rows - 1; }
};

}  // namespace
