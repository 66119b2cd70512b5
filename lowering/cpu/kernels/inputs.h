// What all estimators read of a call: its arguments, and which of its positions are padding.
//
// b batch row     h entry of `heads`, one query head each     j key position     n row of `query`
#pragma once

#include <cstdint>
#include <vector>

#include "indexing.h"

namespace {

inline bool key_is_real(const EstimateArguments& a, int64_t b, int64_t j) {
  return !a.key_mask || a.key_mask[b * a.num_keys + j];
}

inline bool query_is_real(const EstimateArguments& a, int64_t b, int64_t n) {
  // Padding can be told of queries too where their positions are keys.
  return a.num_keys < a.query_offset + a.num_queries || key_is_real(a, b, a.query_offset + n);
}

// The span of each batch row that is not padding.
struct Extent {
  std::vector<int64_t> first_key;   // 0 where there is none
  std::vector<int64_t> last_query;  // row of `query`, -1 where there is none

  explicit Extent(const EstimateArguments& a) : first_key(a.batch), last_query(a.batch) {
    for (int64_t b = 0; b < a.batch; ++b) {
      int64_t first = 0, last = a.num_queries - 1;
      while (first < a.num_keys && !key_is_real(a, b, first)) ++first;
      while (last >= 0 && !query_is_real(a, b, last)) --last;
      first_key[b] = first == a.num_keys ? 0 : first;
      last_query[b] = last;
    }
  }
};

}  // namespace
