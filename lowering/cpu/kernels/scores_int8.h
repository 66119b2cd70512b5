// Scores of a strip by products of 8-bit numbers.
//
// Each query row and each key is rounded to 255 levels of its greatest number, after a rotation of
// every 64 channels that leaves products as they are (half of the error goes). The mean of some
// keys is subtracted from all keys of a head first: what all keys share would take most of the
// levels, and it adds the same to every score of a row (SageAttention, arXiv 2410.02367, section
// 4.2). That is added again, so that scores are what they would be without.
//
// How far a score can be off is known before it is computed. Tiles where that is too much are
// multiplied as they are without 8-bit numbers: huge scores, outliers, infinity and NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "int8_rows.h"
#include "rotate.h"
#include "scores_packed_block.h"
#include GEMM_INT8_HEADER

namespace {

// The most that rounding may put a score off: a standard error, in nats, if roundings are
// independent of each other.
constexpr float MOST_ERROR = 0.15f;

// Exponents that subtraction of the mean key may add at most, so that adding it loses nothing.
constexpr float MOST_SHIFT = 4096.0f;

// Rows of other sizes have steps or squares that are no numbers in fp32.
constexpr float LEAST_SIZE = 1e-15f, MOST_SIZE = 1e15f;

constexpr int64_t CENTRE_KEYS = 512;  // at least so many make the vector that is subtracted
constexpr float NO_NUMBER = std::numeric_limits<float>::quiet_NaN();

// 64 keys as they are packed: a B operand, and what its columns are worth.
struct Int8Keys {
  uint32_t* levels;  // [INT8_DEPTH, BLOCK]
  float* step;       // [BLOCK]
  int32_t* start;    // [BLOCK], of a product's sum: it takes 128 off from the rows' numbers
  float* most;       // [2], the greatest square of a length and the greatest step; NaN if unfit

  explicit Int8Keys(const word* slot)
      : levels(reinterpret_cast<uint32_t*>(const_cast<word*>(slot))),
        step(reinterpret_cast<float*>(levels + INT8_DEPTH * BLOCK)),
        start(reinterpret_cast<int32_t*>(step + BLOCK)),
        most(reinterpret_cast<float*>(start + BLOCK)) {}
};

inline float dot_rows(const float* x, const float* y) {
  vec sum = set1(0.0f);
  for (int d = 0; d < POOLED; d += LANES) sum = fma(load(x + d), load(y + d), sum);
  return reduce_add(sum);
}

// Rotates whole groups of channels, the same of queries and of keys.
inline void rotate_channels(float* row) {
  for (int first = 0; first + GROUP <= HEAD_DIM; first += GROUP) {
    vec group[VECTORS_PER_GROUP];
    for (int v = 0; v < VECTORS_PER_GROUP; ++v) group[v] = load(row + first + v * LANES);
    rotate(group);
    for (int v = 0; v < VECTORS_PER_GROUP; ++v)
      store(row + first + v * LANES, mul(group[v], set1(1.0f / ROOT)));
  }
}

// A row in levels. `squares` is the square of its length, NaN where it cannot be rounded; a step of
// 0 is that of a row of zeros.
struct Rounded {
  float squares, step;
  int32_t sum;
};

inline Rounded round_row(uint32_t* out, const float* row) {
  const float squares = dot_rows(row, row);
  const bool fits = squares < MOST_SIZE * MOST_SIZE;
  const float step = fits ? step_of(row) : 1.0f;
  if (!fits || squares == 0.0f || step < LEAST_SIZE) {
    std::memset(out, 0, INT8_DEPTH * sizeof(uint32_t));
    const bool zero = fits && std::all_of(row, row + POOLED, [](float x) { return x == 0.0f; });
    return {zero ? 0.0f : NO_NUMBER, 0.0f, 0};
  }
  const int32_t sum = pack_int8(out, row, step);
  return {squares, step, sum};
}

// The greatest of some numbers, NaN if one of them is.
inline void take_greatest(float& most, float x) {
  if (!(x <= most)) most = most != most ? most : x;
}

// The vectors that are subtracted from the keys of each kv head.
class SharedScores {
 public:
  explicit SharedScores(const AttentionArguments& a)
      : kv_heads_(a.kv_heads),
        centres_(a.batch * a.kv_heads * POOLED) {}

  // Finds that of the t-th of batch * kv_heads.
  void prepare(const AttentionArguments& a, int64_t t) {
    const TensorView key{static_cast<const input*>(a.key), a.key_batch, a.key_head, a.key_row};
    const int64_t every = std::max<int64_t>(1, a.num_keys / CENTRE_KEYS);
    const int64_t b = t / kv_heads_;
    float* out = centres_.get() + t * POOLED;
    const int64_t count = sum_rows(out, key, b, t % kv_heads_, 0, a.num_keys, [&](int64_t j) {
      return j % every == 0 && (!a.key_mask || a.key_mask[b * a.num_keys + j]);
    });
    const vec total = set1(static_cast<float>(std::max<int64_t>(count, 1)));
    for (int d = 0; d < POOLED; d += LANES) store(out + d, divide(load(out + d), total));
    if (!(dot_rows(out, out) < MOST_SIZE * MOST_SIZE)) std::fill_n(out, POOLED, 0.0f);
  }

  const float* centre(int64_t b, int64_t g) const {
    return centres_.get() + (b * kv_heads_ + g) * POOLED;
  }

 private:
  int64_t kv_heads_;
  Buffer<float> centres_;
};

// Packs 64 keys. row(r) is row r of the input, or null where there is none.
template <typename Row>
void pack_scored_keys(word* out, packed* staging, const float* centre, const Row& row) {
  uint32_t* levels = reinterpret_cast<uint32_t*>(staging);
  const Int8Keys keys(out);
  alignas(64) float wide[POOLED];
  keys.most[0] = keys.most[1] = 0.0f;
  for (int r = 0; r < BLOCK; ++r) {
    const input* in = row(r);
    std::fill_n(wide, POOLED, 0.0f);
    if (in) {
      widen_row(wide, in);
      for (int d = 0; d < POOLED; d += LANES)
        store(wide + d, sub(load(wide + d), load(centre + d)));
      rotate_channels(wide);
    }
    const Rounded rounded = round_row(levels + r * INT8_DEPTH, wide);
    keys.step[r] = rounded.step;
    keys.start[r] = INT8_ROWS_ARE_UNSIGNED ? -128 * rounded.sum : 0;
    take_greatest(keys.most[0], rounded.squares);
    take_greatest(keys.most[1], rounded.step);
  }
  transpose_rows(reinterpret_cast<word*>(keys.levels), reinterpret_cast<const word*>(levels),
                 INT8_DEPTH);
}

// The query rows of a block, and the scores of a strip [BLOCK, STRIP * BLOCK].
struct ScoreScratch {
  PackedScores exact;
  Buffer<float>& scores;
  Buffer<uint32_t> query;  // [BLOCK, INT8_DEPTH]
  Buffer<word> panel;      // keys of a tile that is multiplied exactly
  Buffer<packed> staging;
  TensorView rows{};
  float steps[BLOCK], shifts[BLOCK];
  float most_squares = 0.0f, most_step = 0.0f;
  bool packed_query = false;  // `exact` holds the rows of this block
  bool in_steps = true;       // the scores of the strip are

  ScoreScratch()
      : scores(exact.scores),
        query(BLOCK * INT8_DEPTH),
        panel(DEPTH * BLOCK),
        staging(BLOCK * DEPTH * PAIR) {}

  void take_query(const AttentionArguments& a, const QueryBlock& block, const TensorView& given,
                  const float* centre) {
    rows = given;
    packed_query = false;
    most_squares = most_step = 0.0f;
    alignas(64) float wide[POOLED];
    for (int r = 0; r < BLOCK; ++r) {
      uint32_t* out = query.get() + r * INT8_DEPTH;
      steps[r] = 1.0f, shifts[r] = 0.0f;
      if (r >= block.rows || a.scale == 0) {
        std::memset(out, 0, INT8_DEPTH * sizeof(uint32_t));
      } else {
        widen_row(wide, rows.at(block.b, block.h, block.first - a.query_offset + r));
        if (a.scale < 0)  // maxima are taken before scaling, so the sign goes into the query
          for (int d = 0; d < POOLED; d += LANES) store(wide + d, sub(set1(0.0f), load(wide + d)));
        shifts[r] = dot_rows(wide, centre);
        rotate_channels(wide);
        const Rounded rounded = round_row(out, wide);
        if (rounded.step > 0.0f) steps[r] = rounded.step;
        take_greatest(most_squares, rounded.squares);
        take_greatest(most_step, rounded.step);
        const float shift = std::abs(shifts[r] * a.scale) * LOG2E;
        if (!(shift <= MOST_SHIFT)) most_squares = NO_NUMBER;
      }
      if constexpr (INT8_ROWS_ARE_UNSIGNED)
        for (int k = 0; k < INT8_DEPTH; ++k) out[k] ^= 0x80808080u;  // 128 more
    }
  }

  float factor(int r) const { return in_steps ? steps[r] : 1.0f; }
  float shift(int r) const { return in_steps ? shifts[r] : 0.0f; }

  // Whether 8 bits are enough for a tile. A number that is rounded to steps is off by a step's
  // share of 1 / 12 in the mean square.
  bool fits(const AttentionArguments& a, const Int8Keys& keys) const {
    const float squares =
        most_step * most_step * keys.most[0] + keys.most[1] * keys.most[1] * most_squares;
    return a.scale * a.scale * squares / 12 <= MOST_ERROR * MOST_ERROR;
  }

  void multiply_exactly(const AttentionArguments& a, const QueryBlock& block, const Tile& tile,
                        int t, int computed) {
    if (!packed_query) exact.pack_query(a, block, rows);
    packed_query = true;
    const TensorView key{static_cast<const input*>(a.key), a.key_batch, a.key_head, a.key_row};
    const int64_t g = block.h / (a.heads / a.kv_heads);
    pack_keys(panel.get(), staging.get(), [&](int r) -> const input* {
      if (!(tile.visible >> r & 1)) return nullptr;
      return key.at(block.b, g, tile.columns ? tile.columns[r] : tile.first + r);
    });
    Tile whole = tile;
    whole.keys = panel.get();
    exact.multiply_tile(whole, t, computed);
  }

  void compute(const AttentionArguments& a, const QueryBlock& block, const Tile* tiles, int count,
               int computed) {
    bool fit[STRIP];
    in_steps = true;
    for (int t = 0; t < count; ++t) {
      const Int8Keys keys(tiles[t].keys);
      fit[t] = fits(a, keys);
      in_steps = in_steps && fit[t];
      if (fit[t])
        multiply_int8<VALUE_WORDS* int(sizeof(word))>(
            query.get(), nullptr, keys.levels, keys.step, keys.start, computed,
            scores.get() + t * BLOCK, STRIP * BLOCK,
            reinterpret_cast<const char*>(tiles[t].values));
      else multiply_exactly(a, block, tiles[t], t, computed);
    }
    if (in_steps) return;
    for (int t = 0; t < count; ++t) {
      if (!fit[t]) continue;
      for (int r = 0; r < block.rows; ++r) {
        float* tile = scores.get() + r * STRIP * BLOCK + t * BLOCK;
        const vec step = set1(steps[r]), shift = set1(shifts[r]);
        for (int n = 0; n < BLOCK; n += LANES) store(tile + n, fma(load(tile + n), step, shift));
      }
    }
  }
};

}  // namespace
