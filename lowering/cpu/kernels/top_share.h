// The largest of many scores that together hold a share of their sum.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>

namespace {

// A score, 0 or more, and the place it stands at, as one number. Greater scores come first, and of
// equal ones the smaller place. The order is total whatever the bits of the score say.
using Ranked = uint64_t;

inline Ranked rank_score(float score, int64_t place) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  return static_cast<Ranked>(bits) << 32 | static_cast<uint32_t>(~place);
}

inline float score_of(Ranked ranked) {
  const uint32_t bits = static_cast<uint32_t>(ranked >> 32);
  float score;
  std::memcpy(&score, &bits, sizeof(score));
  return score;
}

inline int64_t place_of(Ranked ranked) { return static_cast<uint32_t>(~ranked); }

// Moves the largest entries to the front, for as long as `within(their sum)` is true, and returns
// how many they are. The one that follows them is the next in order. Each step halves what is left,
// so the cost is O(count).
template <typename Within>
int64_t take_largest(Ranked* entries, int64_t count, const Within& within) {
  int64_t first = 0, stop = count;
  double held = 0.0;
  while (first < stop) {
    const int64_t middle = first + (stop - first) / 2;
    std::nth_element(entries + first, entries + middle, entries + stop, std::greater<Ranked>());
    double sum = held;
    for (int64_t n = first; n <= middle; ++n) sum += score_of(entries[n]);
    if (within(static_cast<float>(sum))) held = sum, first = middle + 1;
    else stop = middle;
  }
  return first;
}

}  // namespace
