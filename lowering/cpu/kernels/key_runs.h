// Runs of keys. A run is what one column of a product stands for: the mean of `length` keys
// (pooled_keys in lowering/reference/pooled_keys.py), or `length` keys one after the other, which
// meet as many queries (lowering/reference/x_attention.py).
//
// s  run
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "inputs.h"
#include "memory.h"
#include "pack.h"
#include "sum_rows.h"

namespace {

// The runs of one kv head's keys, packed in panels of 64 runs each: as B operands, or as rows one
// after the other.
struct KeyRuns {
  int64_t count, padded;
  int64_t parts;  // rows of keys that a run consists of
  word* panels;   // [padded / 64, parts, DEPTH, 64] or [padded, DEPTH]
  float* weight;  // [padded] what is added to a product, in units of log2; -inf for no keys
};

// The runs of all heads. Heads with the same kv head and the same length share them.
class AllKeyRuns {
 public:
  // `length` has the positions per run, by entry of `heads`. With `whole` a run keeps its rows,
  // else it is their mean.
  AllKeyRuns(const EstimateArguments& a, const int32_t* length, bool whole)
      : heads_(lay_out(a, length, whole)),
        panels_(a.batch * words_),
        weights_(a.batch * runs_) {}

  int64_t owner(int64_t h) const { return heads_[h].owner; }
  bool owns(int64_t h) const { return owner(h) == h; }
  int64_t width() const { return width_; }  // runs of the longest, padded
  int64_t parts() const { return parts_; }  // rows of keys of the deepest

  KeyRuns of(int64_t b, int64_t h) const {
    const Head& head = heads_[heads_[h].owner];
    return {head.count, head.padded, head.parts, panels_.get() + b * words_ + head.first_word,
            weights_.get() + b * runs_ + head.first_run};
  }

 private:
  struct Head {
    int64_t owner, count, padded, parts, first_run, first_word;
  };

  std::vector<Head> lay_out(const EstimateArguments& a, const int32_t* length, bool whole) {
    std::vector<Head> heads(a.num_heads);
    for (int64_t h = 0; h < a.num_heads; ++h) {
      const int64_t count = (round_up(a.num_keys, BLOCK) + length[h] - 1) / length[h];
      heads[h] = {h, count, round_up(count, BLOCK), whole ? length[h] : 1, runs_, words_};
      for (int64_t other = 0; other < h && heads[h].owner == h; ++other)
        if (a.heads[other] / a.group == a.heads[h] / a.group && length[other] == length[h])
          heads[h].owner = other;
      width_ = std::max(width_, heads[h].padded);
      parts_ = std::max(parts_, heads[h].parts);
      if (heads[h].owner != h) continue;
      runs_ += heads[h].padded;
      words_ += heads[h].padded * heads[h].parts * DEPTH;
    }
    return heads;
  }

  int64_t width_ = 0, parts_ = 1, runs_ = 0, words_ = 0;  // before what lay_out() counts for
  std::vector<Head> heads_;
  Buffer<word> panels_;
  Buffer<float> weights_;
};

// Packs the mean of the `count` rows of such a sum, or zeros if there are none.
inline void pack_mean(packed* out, const float* sum, int64_t count) {
  const vec total = set1(static_cast<float>(std::max<int64_t>(count, 1)));
  packed wide[POOLED];
  for (int d = 0; d < POOLED; d += LANES)
    store(wide + d, divide(load(sum + d), total), packed_tag{});
  std::memset(out, 0, DEPTH * sizeof(word));
  std::memcpy(out, wide, HEAD_DIM * sizeof(packed));
}

// Packs the means of the 64 runs of one panel, a row of DEPTH words each. `sum` has room for POOLED
// floats. With `log_size` a run weighs as many keys as it has, else as one.
void pool_runs(const EstimateArguments& a, const KeyRuns& runs, float* sum, const TensorView& key,
               int64_t b, int64_t kv_head, int64_t length, int64_t panel, bool log_size,
               word* out) {
  for (int r = 0; r < BLOCK; ++r) {
    const int64_t run = panel * BLOCK + r, first = run * length;
    const int64_t count =
        sum_rows(sum, key, b, kv_head, first, std::min(a.num_keys, first + length),
                 [&](int64_t j) { return key_is_real(a, b, j); });
    runs.weight[run] = count == 0 ? NEGATIVE_INFINITY
        : log_size                ? std::log2(static_cast<float>(count))
                                  : 0.0f;
    pack_mean(reinterpret_cast<packed*>(out + r * DEPTH), sum, count);
  }
}

// The runs that a query row sees are low <= s < high.
struct RunRange {
  int64_t low, high;
};

}  // namespace
