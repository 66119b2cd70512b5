// What an index loses of some query rows, by the exact softmax of these rows over all their keys.
// lowering/row_losses.py says what it means.
//
// r  one of the rows of a unit: a query row of one query head, at the position p
// A unit is up to BLOCK rows of one kv head: its query heads take turns, and positions ascend. The
// units of a task, which are of the same kv head, share the packed keys of a strip; `first` is the
// first row of a unit that sees any of these.
#pragma once

#include <omp.h>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <new>
#include <vector>

#include "distance_bias.h"
#include "gemm.h"
#include "indexing.h"
#include "memory.h"
#include "pack.h"
#include "query_block.h"
#include "softmax_strip.h"

namespace {

constexpr int WIDTH = STRIP * BLOCK;  // cells of a row in a strip

// Key blocks kb .. kb + tiles, and what a unit makes of them.
struct KeyStrip {
  Buffer<packed> staging, probabilities;
  Buffer<word> keys, values;
  Buffer<float> scores;
  uint64_t valid[STRIP];
  int64_t kb = 0;
  int tiles = 0;

  KeyStrip()
      : staging(BLOCK * std::max(DEPTH * PAIR, VALUE_WIDTH)),
        probabilities(BLOCK * WIDTH),
        keys(STRIP * KEY_WORDS),
        values(STRIP * VALUE_WORDS),
        scores(BLOCK * WIDTH) {
    std::memset(probabilities.get(), 0, BLOCK * WIDTH * sizeof(packed));
  }
};

struct RowUnit {
  Buffer<packed> query;
  Buffer<float> out;
  std::vector<uint8_t> chosen;  // [BLOCK, key blocks]
  std::vector<int64_t> cursor;  // per query head of the kv head: its next vertical column
  int64_t position[BLOCK], head[BLOCK], start = 0;
  alignas(64) float maximum[BLOCK], total[BLOCK], lost[BLOCK], scale[BLOCK];
  bool sees[BLOCK];
  int rows = 0, first = 0;

  explicit RowUnit(const AttentionArguments& a)
      : query(BLOCK * DEPTH * PAIR),
        out(BLOCK * VALUE_WIDTH),
        chosen(BLOCK * ((a.num_keys + BLOCK - 1) / BLOCK)),
        cursor(a.heads / a.kv_heads) {}
};

// Marks the key blocks that a row's query block selects.
void mark_chosen(const AttentionArguments& a, int64_t b, int64_t h, int64_t p, uint8_t* chosen) {
  const int64_t blocks = (a.num_keys + BLOCK - 1) / BLOCK, qb = p / BLOCK;
  const int32_t slot = a.head_slots[h];
  const bool listed = slot >= 0;
  const int64_t list = listed
      ? (b * a.num_lists + slot) * a.num_blocks + qb - a.query_offset / BLOCK
      : b * a.num_diagonals + (-1 - slot);
  const int32_t count = listed ? a.block_count[list] : a.diagonal_count[list];
  std::fill_n(chosen, blocks, count < 0);
  for (int32_t n = 0; n < count; ++n) {
    const int64_t kb = listed ? a.block_index[list * a.max_blocks + n]
                              : qb - a.diagonal_index[list * a.max_diagonals + n];
    if (kb >= 0 && kb < blocks) chosen[kb] = 1;
  }
}

// Takes the rows of a unit, from `start` on of those of a kv head.
void start_unit(const AttentionArguments& a, const RowLossArguments& m, RowUnit& s, int64_t b,
                int64_t g, int64_t start) {
  const TensorView query{static_cast<const input*>(a.query), a.query_batch, a.query_head,
                         a.query_row};
  const int64_t group = a.heads / a.kv_heads, blocks = (a.num_keys + BLOCK - 1) / BLOCK;
  s.start = start;
  s.first = 0;
  s.rows = static_cast<int>(std::min<int64_t>(BLOCK, m.count * group - start));
  for (int r = 0; r < BLOCK; ++r) {
    packed* row = s.query.get() + r * DEPTH * PAIR;
    if (r >= s.rows) {
      std::memset(row, 0, DEPTH * sizeof(word));
      continue;
    }
    const int64_t n = m.positions[(start + r) / group], h = g * group + (start + r) % group;
    s.position[r] = n + a.query_offset;
    s.head[r] = h;
    if (a.scale != 0) pack_row(row, query.at(b, h, n), HEAD_DIM, DEPTH * PAIR);
    else std::memset(row, 0, DEPTH * sizeof(word));
    if (a.scale < 0)
      for (int d = 0; d < DEPTH * PAIR; ++d) row[d] = negate(row[d]);
    const float sink = a.sinks ? a.sinks[h] * LOG2E : NEGATIVE_INFINITY;
    s.maximum[r] = sink;
    s.total[r] = sink == NEGATIVE_INFINITY ? 0.0f : 1.0f;
    s.lost[r] = 0.0f;
    s.sees[r] = false;
    mark_chosen(a, b, h, s.position[r], s.chosen.data() + r * blocks);
  }
  std::fill(s.cursor.begin(), s.cursor.end(), 0);
  std::fill_n(s.scale, BLOCK, 1.0f);
  std::memset(s.out.get(), 0, BLOCK * VALUE_WIDTH * sizeof(float));
}

// A bit per key of a block: the row at position p sees it.
inline uint64_t seen_keys(const AttentionArguments& a, uint64_t valid, int64_t p, int64_t low) {
  if (a.causal) valid &= low_bits(p - low + 1);
  if (a.window > 0) valid &= ~low_bits(p - a.window + 1 - low);
  if (a.window > 0 && !a.causal) valid &= low_bits(p + a.window - low);
  return valid;
}

// Takes exponentials of the scores of one row in a strip, in their place, and adds to what is known
// of the row: all of it, and what no key block keeps.
void weigh_row(const AttentionArguments& a, const RowLossArguments& m, RowUnit& s, KeyStrip& strip,
               const Exponents& exponents, int r) {
  const int64_t blocks = (a.num_keys + BLOCK - 1) / BLOCK, p = s.position[r];
  const int tiles = strip.tiles;
  float* row = strip.scores.get() + r * WIDTH;
  if constexpr (BIASED)
    add_bias(row, bias_of_row(a, s.head[r], p - a.query_offset) + strip.kb * BLOCK, tiles * BLOCK,
             bias_unit(a));
  if constexpr (SOFTCAP) cap_scores(row, tiles * BLOCK, exponents.cap_exponent, exponents.cap);
  vec highest = set1(NEGATIVE_INFINITY);
  for (int t = 0; t < tiles; ++t) {
    const uint64_t bits = seen_keys(a, strip.valid[t], p, (strip.kb + t) * BLOCK);
    for (int n = 0; n < BLOCK; n += LANES) {
      float* cells = row + t * BLOCK + n;
      if (bits != ~uint64_t(0)) store(cells, keep(bits >> n, load(cells)));
      highest = maximum(highest, load(cells));
    }
  }
  const float most = reduce_max(highest), before = s.maximum[r];
  const float after = std::max(before, most * exponents.scale);
  const float shift = after == NEGATIVE_INFINITY ? 0.0f : after;
  s.sees[r] |= most != NEGATIVE_INFINITY;
  s.maximum[r] = after;
  s.scale[r] = before == shift ? 1.0f : std::exp2(before - shift);
  float total = s.total[r] * s.scale[r], lost = s.lost[r] * s.scale[r];
  const uint8_t* chosen = s.chosen.data() + r * blocks + strip.kb;
  for (int t = 0; t < tiles; ++t) {
    vec sum = set1(0.0f);
    for (int n = 0; n < BLOCK; n += LANES) {
      float* cells = row + t * BLOCK + n;
      const vec x = exp2_vec(sub(mul(load(cells), set1(exponents.scale)), set1(shift)));
      store(cells, x);
      sum = add(sum, x);
    }
    const float of_tile = reduce_add(sum);
    total += of_tile;
    if (!chosen[t]) lost += of_tile;
  }
  s.total[r] = total;
  s.lost[r] = lost;
  if (!m.exact) return;
  packed* out = strip.probabilities.get() + r * WIDTH;
  for (int n = 0; n < tiles * BLOCK; n += 2 * LANES)
    store(out + n, load(row + n), load(row + n + LANES), packed_tag{});
}

// Gives back the vertical columns of a strip, for the rows that have not selected their blocks. A
// column counts for the query blocks after its own.
void keep_columns(const AttentionArguments& a, RowUnit& s, const KeyStrip& strip, int64_t b,
                  int64_t g) {
  const int64_t low = strip.kb * BLOCK, high = low + strip.tiles * BLOCK;
  const int64_t group = a.heads / a.kv_heads, blocks = (a.num_keys + BLOCK - 1) / BLOCK;
  for (int64_t k = 0; k < group; ++k) {
    const int64_t of_head = b * a.heads + g * group + k, count = a.column_count[of_head];
    const int32_t* columns = a.column_index + of_head * a.max_columns;
    int64_t begin = s.cursor[k];
    while (begin < count && columns[begin] < low) ++begin;
    int64_t end = begin;
    while (end < count && columns[end] < high) ++end;
    s.cursor[k] = end;
    for (int r = s.first; r < s.rows && begin < end; ++r) {
      if (s.head[r] != g * group + k) continue;
      const uint8_t* chosen = s.chosen.data() + r * blocks;
      const float* row = strip.scores.get() + r * WIDTH - low;
      const int64_t limit = a.causal ? s.position[r] / BLOCK * BLOCK : a.num_keys;
      float kept = 0.0f;
      for (int64_t n = begin; n < end && columns[n] < limit; ++n)
        kept += chosen[columns[n] / BLOCK] ? 0.0f : row[columns[n]];
      s.lost[r] -= kept;
    }
  }
}

// Packs the keys of a strip, and their values if outputs are wanted.
void pack_strip(const AttentionArguments& a, const RowLossArguments& m, KeyStrip& strip, int64_t b,
                int64_t g) {
  const TensorView key{static_cast<const input*>(a.key), a.key_batch, a.key_head, a.key_row};
  const TensorView value{static_cast<const input*>(a.value), a.value_batch, a.value_head,
                         a.value_row};
  for (int t = 0; t < strip.tiles; ++t) {
    const int64_t low = (strip.kb + t) * BLOCK;
    strip.valid[t] = valid_keys(a, b, strip.kb + t);
    pack_keys(strip.keys.get() + t * KEY_WORDS, strip.staging.get(), [&](int r) -> const input* {
      return low + r < a.num_keys ? key.at(b, g, low + r) : nullptr;
    });
    if (m.exact)
      pack_values(strip.values.get() + t * VALUE_WORDS, strip.staging.get(),
                  [&](int r) -> const input* {
                    return low + r < a.num_keys ? value.at(b, g, low + r) : nullptr;
                  });
  }
}

// Weighs the keys of a strip for the rows of a unit that see any.
void weigh_strip(const AttentionArguments& a, const RowLossArguments& m, RowUnit& s,
                 KeyStrip& strip, const Exponents& exponents, int64_t b, int64_t g) {
  while (a.causal && s.first < s.rows && s.position[s.first] < strip.kb * BLOCK) ++s.first;
  if (s.first == s.rows) return;
  const int from = s.first / FEW_ROW_STEP * FEW_ROW_STEP;
  const int computed = static_cast<int>(round_up(s.rows, FEW_ROW_STEP)) - from;
  const word* values[STRIP];
  for (int t = 0; t < strip.tiles; ++t) {
    const word* keys = strip.keys.get() + t * KEY_WORDS;
    values[t] = strip.values.get() + t * VALUE_WORDS;
    multiply<false>(reinterpret_cast<const word*>(s.query.get()) + from * DEPTH, DEPTH, &keys, 1,
                    DEPTH, BLOCK, strip.scores.get() + from * WIDTH + t * BLOCK, WIDTH, computed,
                    BLOCK, nullptr);
  }
  for (int r = s.first; r < s.rows; ++r) weigh_row(a, m, s, strip, exponents, r);
  if (a.max_columns) keep_columns(a, s, strip, b, g);
  if (!m.exact) return;
  std::fill(s.scale + from, s.scale + s.first, 1.0f);
  for (int r = from; r < s.first; ++r)  // rows that are done, which the product takes along
    std::memset(strip.probabilities.get() + r * WIDTH, 0, WIDTH * sizeof(packed));
  multiply<true>(reinterpret_cast<const word*>(strip.probabilities.get()) + from * WIDTH / PAIR,
                 WIDTH / PAIR, values, strip.tiles, BLOCK / PAIR, VALUE_WIDTH,
                 s.out.get() + from * VALUE_WIDTH, VALUE_WIDTH, computed, VALUE_WIDTH,
                 s.scale + from);
}

// Writes shares of what a row gives away in all; -1 for a row that sees nothing.
void finish_unit(const AttentionArguments& a, const RowLossArguments& m, RowUnit& s, int64_t b) {
  const int64_t group = a.heads / a.kv_heads;
  for (int r = 0; r < s.rows; ++r) {
    const int64_t place = (b * a.heads + s.head[r]) * m.count + (s.start + r) / group;
    const float inverse = s.total[r] > 0.0f ? 1.0f / s.total[r] : 0.0f;
    m.lost[place] = s.sees[r] ? std::max(0.0f, s.lost[r] * inverse) : -1.0f;
    if (!m.exact) continue;
    for (int d = 0; d < VALUE_DIM; ++d)
      m.exact[place * VALUE_DIM + d] = s.out.get()[r * VALUE_WIDTH + d] * inverse;
  }
}

}  // namespace

extern "C" int row_losses(const AttentionArguments* arguments, const RowLossArguments* more) {
  const AttentionArguments& a = *arguments;
  const RowLossArguments& m = *more;
  try {
    const int64_t kv_heads = a.batch * a.kv_heads, blocks = (a.num_keys + BLOCK - 1) / BLOCK;
    const int64_t units = round_up(m.count * (a.heads / a.kv_heads), BLOCK) / BLOCK;
    // As many tasks per kv head as keep the threads busy.
    const int64_t parts = std::min(units, (a.threads + kv_heads - 1) / kv_heads);
    const int64_t each = (units + parts - 1) / parts;
    std::deque<std::deque<RowUnit>> scratches(a.threads);
    std::deque<KeyStrip> strips(a.threads);
    for (auto& own : scratches)
      for (int64_t u = 0; u < each; ++u) own.emplace_back(a);
#pragma omp parallel num_threads(a.threads)
    {
      std::deque<RowUnit>& own = scratches[omp_get_thread_num()];
      KeyStrip& strip = strips[omp_get_thread_num()];
      const Exponents exponents(a);
      const TileScope tiles;
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < kv_heads * parts; ++t) {
        const int64_t b = t / parts / a.kv_heads, g = t / parts % a.kv_heads;
        int64_t count = 0, low = a.num_keys + a.query_offset + a.num_queries, high = 0;
        for (int64_t u = t % parts; u < units; u += parts) {
          RowUnit& unit = own[count++];
          start_unit(a, m, unit, b, g, u * BLOCK);
          low = std::min(low, unit.position[0]);
          high = std::max(high, unit.position[unit.rows - 1]);
        }
        const int64_t stop = a.causal ? std::min(blocks, high / BLOCK + 1) : blocks;
        strip.kb = a.window > 0 ? std::max<int64_t>(0, low - a.window + 1) / BLOCK : 0;
        for (; strip.kb < stop; strip.kb += strip.tiles) {
          strip.tiles = static_cast<int>(std::min<int64_t>(STRIP, stop - strip.kb));
          pack_strip(a, m, strip, b, g);
          for (int64_t u = 0; u < count; ++u) weigh_strip(a, m, own[u], strip, exponents, b, g);
        }
        for (int64_t u = 0; u < count; ++u) finish_unit(a, m, own[u], b);
      }
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
