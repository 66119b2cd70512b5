// What the estimators of block lists share: which key blocks a block of queries keeps, by score.
// lowering/reference/block_lists.py says what it means.
//
// b batch row     h entry of `heads`, one query head each     kb key block     p position of a query
// size  positions per block of queries and of keys, a multiple of BLOCK
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <utility>
#include <vector>

#include "inputs.h"

namespace {

// The choice of one block of queries. Forced blocks are kept at once, then others by score while
// there is room. Sums over scores run over the blocks that the mask allows.
struct BlockSelection {
  using Entry = std::pair<float, int32_t>;  // score and -kb: ties go to the smaller block
  int64_t block, low, high;                 // the mask allows key blocks low <= kb < high
  int64_t room;
  float total, held, best;
  bool everything;
  std::vector<float> scores;  // of all key blocks, set by the caller
  std::vector<uint8_t> kept;
  std::vector<Entry> rest;  // allowed and not kept so far

  void start(const EstimateArguments& a, const Extent& extent, int64_t b, int64_t h,
             int64_t of_block, int64_t size) {
    block = of_block;
    const int64_t blocks = static_cast<int64_t>(scores.size());
    high = a.causal ? std::min(blocks, block + 1) : blocks;
    low = a.window > 0 ? std::max<int64_t>(0, block - (a.window - 2 + size) / size) : 0;
    const int64_t sinks = extent.first_key[b] / size, sinks_end = sinks + a.sink_blocks[h];
    const int64_t local = a.causal ? std::max(1, a.local_blocks[h]) : a.local_blocks[h];
    const int64_t last = extent.last_query[b];
    const int64_t last_block = last < 0 ? -1 : (a.query_offset + last) / size;
    everything = block > last_block - a.last_blocks[h] && block <= last_block;
    room = a.max_blocks[h] * BLOCK / size;
    total = held = best = 0.0f;
    kept.assign(blocks, 0);
    rest.clear();
    for (int64_t kb = low; kb < high; ++kb) {
      const float score = scores[kb] > 0.0f ? scores[kb] : 0.0f;  // NaN cannot be ranked
      total += score;
      best = std::max(best, score);
      const bool forced = (kb >= sinks && kb < sinks_end) || std::abs(block - kb) < local;
      if (forced && room > 0) {
        kept[kb] = 1;
        held += score;
        --room;
      } else {
        rest.emplace_back(score, static_cast<int32_t>(-kb));
      }
    }
  }

  // Keeps the best entries of a range of `rest` for as long as `wanted()` is true and there is
  // room.
  template <typename Iterator, typename Wanted>
  void take(Iterator begin, Iterator end, const Wanted& wanted) {
    if (begin == end || room <= 0 || !wanted()) return;
    std::make_heap(begin, end);
    for (; begin != end && room > 0 && wanted(); --end, --room) {
      held += begin->first;
      kept[-begin->second] = 1;
      std::pop_heap(begin, end);
    }
  }

  // Keeps the entries of a range, or the best of them where there is not room for all.
  template <typename Iterator>
  void take_all(Iterator begin, Iterator end) {
    if (end - begin > room) {
      std::nth_element(begin, begin + room, end, std::greater<Entry>());
      end = begin + room;
    }
    room -= end - begin;
    for (; begin != end; ++begin) {
      held += begin->first;
      kept[-begin->second] = 1;
    }
  }

  // Keeps the best others until `mass` of the scores is held. A mass of 1 keeps all.
  template <typename Iterator>
  void take_mass(Iterator begin, float mass) {
    const float enough = mass * total;
    take(begin, rest.end(), [&] { return mass >= 1.0f || held < enough; });
  }

  // Keeps the others that score at least `share` of the best.
  void take_above(float share) {
    const float least = share * best;
    const auto end = std::partition(rest.begin(), rest.end(), [&](const Entry& entry) {
      return entry.first >= least && entry.first > 0.0f;
    });
    take_all(rest.begin(), end);
  }

  // Writes the lists of the query blocks that this block of queries consists of.
  void write(const EstimateArguments& a, int64_t b, int64_t h, int64_t size) const {
    const int64_t repeat = size / BLOCK, first_block = a.query_offset / BLOCK;
    const int64_t key_blocks = (a.num_keys + BLOCK - 1) / BLOCK;
    for (int64_t fine = block * repeat; fine < (block + 1) * repeat; ++fine) {
      const int64_t i = fine - first_block;
      if (i < 0 || i >= a.num_blocks) continue;
      const int64_t list = (b * a.num_heads + h) * a.num_blocks + i;
      int32_t* entries = a.block_index + list * a.list_width;
      const int64_t end = a.causal ? std::min(key_blocks, fine + 1) : key_blocks;
      const int64_t reach =
          a.window > 0 ? std::max<int64_t>(0, fine - (a.window - 2 + BLOCK) / BLOCK) : 0;
      if (everything && end - reach > a.list_width) {
        a.block_count[list] = ALL_BLOCKS;
        continue;
      }
      int64_t written = 0;
      for (int64_t kb = low; kb < high; ++kb) {
        if (!kept[kb] && !everything) continue;
        const int64_t stop = std::min(end, (kb + 1) * repeat);
        for (int64_t n = std::max(reach, kb * repeat); n < stop; ++n)
          entries[written++] = static_cast<int32_t>(n);
      }
      a.block_count[list] = static_cast<int32_t>(written);
    }
  }
};

}  // namespace
