// The largest of many values, as lists of their places.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();

// What one thread marks with.
struct MarkScratch {
  std::vector<uint32_t> order, sorted;
  std::vector<float> values;
  std::vector<uint8_t> marks, blocks;
};

// Marks the `count` largest of `n` values. Ties go to the smaller index, and NaN counts as largest.
void mark_largest(uint8_t* marks, const float* values, int64_t n, int64_t count,
                  std::vector<uint32_t>& order, std::vector<uint32_t>& sorted) {
  if (count >= n) {
    std::fill_n(marks, n, 1);
    return;
  }
  std::fill_n(marks, n, 0);
  if (count <= 0) return;
  order.resize(n);
  for (int64_t i = 0; i < n; ++i) {  // floats as integers of the same order, -0 as +0
    const float value = values[i] == 0.0f ? 0.0f : values[i];
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    order[i] = value != value ? ~0u : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
  sorted.assign(order.begin(), order.end());
  std::nth_element(sorted.begin(), sorted.begin() + (count - 1), sorted.end(),
                   std::greater<uint32_t>());
  const uint32_t threshold = sorted[count - 1];
  int64_t left = count;
  for (int64_t i = 0; i < n; ++i) {
    marks[i] = order[i] > threshold;
    left -= marks[i];
  }
  for (int64_t i = 0; i < n && left > 0; ++i) {
    if (order[i] != threshold) continue;
    marks[i] = 1;
    --left;
  }
}

// Writes the positions of the marks in ascending order, with zeros behind them.
void write_list(int32_t* count, int32_t* entries, const uint8_t* marks, int64_t n, int64_t width) {
  int64_t written = 0;
  for (int64_t i = 0; i < n && written < width; ++i)
    if (marks[i]) entries[written++] = static_cast<int32_t>(i);
  *count = static_cast<int32_t>(written);
  std::fill(entries + written, entries + width, 0);
}

}  // namespace
