// Where the bias by distance of a query row stands, and what it is in scores.
// lowering/distance_bias.py says which number belongs to which pair.
#pragma once

#include <cmath>
#include <cstdint>

#include "vector.h"

namespace {

// What a number of the bias is in scores that are still to be multiplied with the scale.
inline float bias_unit(const AttentionArguments& a) {
  return a.scale == 0 ? LOG2E : 1.0f / std::abs(a.scale);
}

// What is added to the scores of row n of the queries; entry k is that of the key at position k.
inline const float* bias_of_row(const AttentionArguments& a, int64_t h, int64_t n) {
  return a.distance_bias + h * a.bias_head + (a.num_queries - 1 - n);
}

// Adds numbers of the bias to as many scores, whole vectors of them.
inline void add_bias(float* scores, const float* bias, int count, float unit) {
  for (int k = 0; k < count; k += LANES)
    store(scores + k, fma(load(bias + k), set1(unit), load(scores + k)));
}

}  // namespace
