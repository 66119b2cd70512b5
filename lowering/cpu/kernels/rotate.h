// The Hadamard rotation of 64 channels: it spreads what is large in few of them over all, so that
// levels of the greatest one are fine, and changes no product of two rows.
#pragma once

#include "vector.h"

namespace {

constexpr int GROUP = 64;  // channels that are rotated together
constexpr int VECTORS_PER_GROUP = GROUP / LANES;
constexpr float ROOT = 8.0f;  // of GROUP: the matrix below is orthogonal but for it

// Multiplies a group by the Hadamard matrix of 1 and -1.
inline void rotate(vec (&group)[VECTORS_PER_GROUP]) {
  for (vec& x : group) x = rotate_lanes(x);
  for (int step = 1; step < VECTORS_PER_GROUP; step *= 2)
    for (int v = 0; v < VECTORS_PER_GROUP; ++v) {
      if (v & step) continue;
      const vec even = group[v], odd = group[v + step];
      group[v] = add(even, odd);
      group[v + step] = sub(even, odd);
    }
}

}  // namespace
