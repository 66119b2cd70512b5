// Gradients of sparse attention over a SparseIndex. lowering/reference/backward.py says what they
// mean; attention.h says what the letters are.
//
// A tile is computed turned round, keys by queries, so that P^T and the gradients of the scores
// are left operands of the products for values and keys as they come out of the exponentials, and
// what belongs to a query (its log-sum-exp) is a vector and no broadcast.
//
// A unit is one kv head and some of the query blocks of its query heads. It sums up the gradients
// of the keys and values in memory of its own, and units are added in their order at the end: no
// atomics, and the same bits in every run. Gathered columns have sums of their own, which are added
// to those of their keys when a query head is done.
#pragma once

#include <omp.h>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <new>

#include "gemm.h"
#include "indexing.h"
#include "memory.h"
#include "pack.h"
#include "query_block.h"
#include "softmax_strip.h"

namespace {

constexpr int padded(int size, int multiple) { return (size + multiple - 1) / multiple * multiple; }

constexpr int QUERY_WIDTH = padded(HEAD_DIM, COLUMN_STEP);  // floats of a gradient of a key
constexpr int VALUE_DEPTH = (VALUE_DIM + PAIR - 1) / PAIR;  // words of a packed row of values
constexpr int TURNED_ROWS = padded(HEAD_DIM, ROW_STEP);     // rows of K^T
constexpr int KEY_ROWS = BLOCK * DEPTH, VALUE_ROWS = BLOCK * VALUE_DEPTH;  // words
constexpr int TILE_WORDS = KEY_ROWS + VALUE_ROWS + TURNED_ROWS * BLOCK / PAIR;
constexpr int GRAD_WIDTH = QUERY_WIDTH + VALUE_WIDTH;  // of a key and its value
constexpr int KEY_STEP = 8;                            // keys of a tile come in eights

// Packs 64 keys and values as left operands: rows of K, rows of V, rows of K^T.
template <typename Key, typename Value>
void pack_tile(word* out, const Key& key, const Value& value) {
  packed* keys = reinterpret_cast<packed*>(out);
  packed* values = reinterpret_cast<packed*>(out + KEY_ROWS);
  packed* turned = reinterpret_cast<packed*>(out + KEY_ROWS + VALUE_ROWS);
  for (int r = 0; r < BLOCK; ++r) {
    const input* in = key(r);
    if (in) pack_row(keys + r * DEPTH * PAIR, in, HEAD_DIM, DEPTH * PAIR);
    else std::memset(keys + r * DEPTH * PAIR, 0, DEPTH * sizeof(word));
    in = value(r);
    if (in) pack_row(values + r * VALUE_DEPTH * PAIR, in, VALUE_DIM, VALUE_DEPTH * PAIR);
    else std::memset(values + r * VALUE_DEPTH * PAIR, 0, VALUE_DEPTH * sizeof(word));
  }
  for (int d = 0; d < TURNED_ROWS; ++d)
    for (int r = 0; r < BLOCK; ++r)
      turned[d * BLOCK + r] = d < HEAD_DIM ? keys[r * DEPTH * PAIR + d] : packed(0);
}

// What one thread works on.
struct BackwardScratch {
  Buffer<packed> staging, weights, grad_scores;
  Buffer<word> queries, grads, query_panel, grad_panel, pairs, columns;
  Buffer<float> scores, grad_weights, grad_query, grad_columns;
  alignas(64) float exponent[BLOCK], dots[BLOCK];
  alignas(64) float ones[TURNED_ROWS > BLOCK ? TURNED_ROWS : BLOCK];
  alignas(64) float row[padded(HEAD_DIM, LANES)];

  explicit BackwardScratch(int64_t chunks)
      : staging(BLOCK * std::max({DEPTH * PAIR, VALUE_DEPTH * PAIR, QUERY_WIDTH, VALUE_WIDTH})),
        weights(BLOCK * BLOCK),
        grad_scores(BLOCK * BLOCK),
        queries(DEPTH * BLOCK),
        grads(VALUE_DEPTH * BLOCK),
        query_panel(BLOCK / PAIR * QUERY_WIDTH),
        grad_panel(BLOCK / PAIR * VALUE_WIDTH),
        pairs(BLOCK / PAIR * BLOCK),
        columns(chunks * TILE_WORDS),
        scores(BLOCK * BLOCK),
        grad_weights(BLOCK * BLOCK),
        grad_query(TURNED_ROWS * BLOCK),
        grad_columns(chunks * BLOCK * GRAD_WIDTH) {
    std::fill(std::begin(ones), std::end(ones), 1.0f);
    std::fill(std::begin(row), std::end(row), 0.0f);
  }
};

// A bit per query of the block that sees key `k` of a tile.
inline uint64_t queries_of_key(const AttentionArguments& a, const QueryBlock& block,
                               const Tile& tile, int k) {
  if (!(tile.visible >> k & 1)) return 0;
  uint64_t bits = low_bits(block.rows);
  const int64_t distance = (tile.columns ? tile.columns[k] : tile.first + k) - block.first;
  if (a.causal) bits &= ~low_bits(distance);
  if (a.window > 0) bits &= low_bits(distance + a.window);
  return bits;
}

// Weights and gradients of scores of one key of a tile, for LANES queries.
struct Softmax {
  float factor, cap_exponent = 0.0f, cap = 0.0f;

  explicit Softmax(const AttentionArguments& a) : factor(a.scale * LOG2E) {
    if constexpr (SOFTCAP) {
      cap_exponent = 2.0f * LOG2E * a.scale / a.softcap;
      cap = a.softcap * LOG2E;
    }
  }
  // score: of q and k as they are; exponent: minus the log-sum-exp; both in units of log2.
  void operator()(vec score, vec exponent, vec grad_weight, vec dots, bool masked, uint64_t bits,
                  vec* weight, vec* grad_score) const {
    vec x, slope = set1(1.0f);
    if constexpr (SOFTCAP) {
      // tanh(x) is 1 - 2 / (e^2x + 1). At |x| = 20 it is 1 to the last bit.
      vec y = mul(score, set1(cap_exponent));
      y = sub(set1(0.0f), maximum(set1(-57.0f), sub(set1(0.0f), maximum(set1(-57.0f), y))));
      const vec bent = sub(set1(1.0f), divide(set1(2.0f), add(exp2_vec(y), set1(1.0f))));
      slope = sub(set1(1.0f), mul(bent, bent));
      x = fma(bent, set1(cap), exponent);
    } else {
      x = fma(score, set1(factor), exponent);
    }
    if (masked) x = keep(bits, x);
    *weight = exp2_vec(x);
    *grad_score = mul(*weight, sub(grad_weight, dots));
    if constexpr (SOFTCAP) *grad_score = mul(*grad_score, slope);
  }
};

// A bias by distance and its gradient, from the last distance to the first: of a query row and the
// key at position k they stand k before those of the key at position 0.
struct TurnedBias {
  const float* bias = nullptr;
  float* grad = nullptr;
};

// Where that of row n of the queries stands, for the key at position 0. grad: sums of the head.
inline TurnedBias bias_of_block(const AttentionArguments& a, const BackwardArguments& g,
                                float* grad, int64_t h, int64_t n) {
  if constexpr (!BIASED) return {};
  return {g.turned_bias + h * a.bias_head + n + a.num_keys - 1, grad + n + a.num_keys - 1};
}

// Adds what a tile gives to the gradients of the block's queries, and of the tile's keys and
// values: rows of GRAD_WIDTH floats, the key's first.
void add_tile(const AttentionArguments& a, BackwardScratch& s, const QueryBlock& block,
              const Tile& tile, const word* data, float* grad_keys, const Softmax& softmax,
              const TurnedBias& turned) {
  const int count = padded(tile.bounds.keys, KEY_STEP);
  const word *queries = s.queries.get(), *grads = s.grads.get();
  float *scores = s.scores.get(), *grad_weights = s.grad_weights.get();
  packed *weights = s.weights.get(), *grad_scores = s.grad_scores.get();
  multiply<false>(data, DEPTH, &queries, 1, DEPTH, BLOCK, scores, BLOCK, count, BLOCK, nullptr);
  multiply<false>(data + KEY_ROWS, VALUE_DEPTH, &grads, 1, VALUE_DEPTH, BLOCK, grad_weights, BLOCK,
                  count, BLOCK, nullptr);
  const bool masked = tile.masked;
  for (int k = 0; k < count; ++k) {
    const uint64_t bits = masked ? queries_of_key(a, block, tile, k) : ~uint64_t(0);
    const float *score = scores + k * BLOCK, *grad = grad_weights + k * BLOCK;
    packed *weight = weights + k * BLOCK, *grad_score = grad_scores + k * BLOCK;
    const bool biased = BIASED && (tile.visible >> k & 1);
    const int64_t place = !biased ? 0 : tile.columns ? tile.columns[k] : tile.first + k;
    for (int n = 0; n < BLOCK; n += 2 * LANES) {
      vec w[2], g[2];
      for (int i = 0; i < 2; ++i) {
        const int q = n + i * LANES;
        vec exponent = load(s.exponent + q);
        if (biased) exponent = fma(load(turned.bias - place + q), set1(LOG2E), exponent);
        softmax(load(score + q), exponent, load(grad + q), load(s.dots + q), masked, bits >> q,
                &w[i], &g[i]);
        if (biased) {
          float* sum = turned.grad - place + q;
          store(sum, add(load(sum), g[i]));
        }
      }
      store(weight + n, w[0], w[1], packed_tag{});
      store(grad_score + n, g[0], g[1], packed_tag{});
    }
  }
  const word* panel = s.grad_panel.get();
  multiply<true>(reinterpret_cast<const word*>(weights), BLOCK / PAIR, &panel, 1, BLOCK / PAIR,
                 VALUE_WIDTH, grad_keys + QUERY_WIDTH, GRAD_WIDTH, count, VALUE_WIDTH, s.ones);
  panel = s.query_panel.get();
  multiply<true>(reinterpret_cast<const word*>(grad_scores), BLOCK / PAIR, &panel, 1, BLOCK / PAIR,
                 QUERY_WIDTH, grad_keys, GRAD_WIDTH, count, QUERY_WIDTH, s.ones);
#if USES_BF16
  for (int k = 0; k < count; k += 2)
    for (int n = 0; n < BLOCK; n += LANES)
      store_pairs(s.pairs.get() + k / 2 * BLOCK + n, grad_scores + k * BLOCK + n,
                  grad_scores + (k + 1) * BLOCK + n);
  panel = s.pairs.get();
#else
  panel = reinterpret_cast<const word*>(grad_scores);
#endif
  multiply<true>(data + KEY_ROWS + VALUE_ROWS, BLOCK / PAIR, &panel, 1, count / PAIR, BLOCK,
                 s.grad_query.get(), BLOCK, TURNED_ROWS, BLOCK, s.ones);
}

// Everything that one query block gives. keys: packed blocks of its kv head; grad_keys: sums of
// them; positions: of its head's columns.
void add_block(const AttentionArguments& a, const BackwardArguments& g, BackwardScratch& s,
               const QueryBlock& block, const word* keys, float* grad_keys,
               const int32_t* positions, const Softmax& softmax, float* grad_line) {
  const TensorView query{static_cast<const input*>(a.query), a.query_batch, a.query_head,
                         a.query_row};
  const TensorView grad_out{static_cast<const input*>(g.grad_out), g.grad_out_batch,
                            g.grad_out_head, g.grad_out_row};
  const int64_t n = block.first - a.query_offset;
  const auto queries = [&](int r) -> const input* {
    return r < block.rows ? query.at(block.b, block.h, n + r) : nullptr;
  };
  const auto grads = [&](int r) -> const input* {
    return r < block.rows ? grad_out.at(block.b, block.h, n + r) : nullptr;
  };
  packed* staging = s.staging.get();
  pack_columns<HEAD_DIM, DEPTH>(s.queries.get(), staging, queries);
  pack_columns<VALUE_DIM, VALUE_DEPTH>(s.grads.get(), staging, grads);
  pack_panel<HEAD_DIM, QUERY_WIDTH>(s.query_panel.get(), staging, queries);
  pack_panel<VALUE_DIM, VALUE_WIDTH>(s.grad_panel.get(), staging, grads);
  const int64_t first = (block.b * a.heads + block.h) * a.num_queries + n;
  for (int r = 0; r < BLOCK; ++r) {
    const float lse = r < block.rows ? a.lse[first + r] : 0.0f;
    // A row that saw nothing sees nothing here either; zero keeps infinity minus infinity away.
    s.exponent[r] = lse == NEGATIVE_INFINITY ? 0.0f : -lse * LOG2E;
    s.dots[r] = r < block.rows ? g.dots[first + r] : 0.0f;
  }
  std::memset(s.grad_query.get(), 0, TURNED_ROWS * BLOCK * sizeof(float));
  const TurnedBias turned = bias_of_block(a, g, grad_line, block.h, n);
  for (const Tile& tile : block.tiles) {
    if (tile.columns) {
      const int64_t chunk = (tile.columns - positions) / BLOCK;
      add_tile(a, s, block, tile, s.columns.get() + chunk * TILE_WORDS,
               s.grad_columns.get() + chunk * BLOCK * GRAD_WIDTH, softmax, turned);
    } else {
      add_tile(a, s, block, tile, keys + tile.first / BLOCK * TILE_WORDS,
               grad_keys + tile.first * GRAD_WIDTH, softmax, turned);
    }
  }
  input* out = static_cast<input*>(g.grad_query) + first * HEAD_DIM;
  for (int r = 0; r < block.rows; ++r) {
    for (int d = 0; d < HEAD_DIM; ++d) s.row[d] = s.grad_query.get()[d * BLOCK + r] * a.scale;
    unpack_row(out + r * HEAD_DIM, s.row, HEAD_DIM);
  }
}

// Gathers the columns of a query head, and forgets the sums of the head before.
int64_t gather_columns(const AttentionArguments& a, BackwardScratch& s, int64_t b, int64_t h) {
  const int64_t count = a.max_columns ? a.column_count[b * a.heads + h] : 0;
  const int32_t* positions = a.column_index + (b * a.heads + h) * a.max_columns;
  const int64_t kv_head = h / (a.heads / a.kv_heads);
  const TensorView key{static_cast<const input*>(a.key), a.key_batch, a.key_head, a.key_row};
  const TensorView value{static_cast<const input*>(a.value), a.value_batch, a.value_head,
                         a.value_row};
  for (int64_t c = 0; c * BLOCK < count; ++c) {
    const int32_t* own = positions + c * BLOCK;
    const auto exists = [&](int r) {
      return c * BLOCK + r < count && own[r] >= 0 && own[r] < a.num_keys;
    };
    pack_tile(
        s.columns.get() + c * TILE_WORDS,
        [&](int r) { return exists(r) ? key.at(b, kv_head, own[r]) : nullptr; },
        [&](int r) { return exists(r) ? value.at(b, kv_head, own[r]) : nullptr; });
  }
  std::memset(s.grad_columns.get(), 0, padded(count, BLOCK) * GRAD_WIDTH * sizeof(float));
  return count;
}

inline void add_row(float* to, const float* from) {
  for (int d = 0; d < GRAD_WIDTH; d += LANES) store(to + d, add(load(to + d), load(from + d)));
}

// One unit: every `parts`-th query block, from `part` on, of all query heads of a kv head.
void add_unit(const AttentionArguments& a, const BackwardArguments& g, const PackedKeyValues& in,
              BackwardScratch& s, QueryBlock& block, const word* keys, float* grad_keys,
              float* grad_lines, int64_t b, int64_t kv_head, int64_t part) {
  const Softmax softmax(a);
  const int64_t group = a.heads / a.kv_heads;
  std::memset(grad_keys, 0, in.key_blocks * BLOCK * GRAD_WIDTH * sizeof(float));
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    const int32_t* positions = a.column_index + (b * a.heads + h) * a.max_columns;
    const int64_t count = gather_columns(a, s, b, h);
    for (int64_t i = part; i < a.num_blocks; i += g.parts) {
      list_tiles(a, in, block, b, h, i);
      add_block(a, g, s, block, keys, grad_keys, positions, softmax,
                BIASED ? grad_lines + (h - kv_head * group) * g.line : nullptr);
    }
    for (int64_t c = 0; c < count; ++c)
      if (positions[c] >= 0 && positions[c] < a.num_keys)
        add_row(grad_keys + positions[c] * GRAD_WIDTH, s.grad_columns.get() + c * GRAD_WIDTH);
  }
}

}  // namespace

extern "C" int attention_backward(const AttentionArguments* arguments,
                                  const BackwardArguments* gradients) {
  const AttentionArguments& a = *arguments;
  const BackwardArguments& g = *gradients;
  try {
    const PackedKeyValues in(a, false);
    const int64_t heads = a.batch * a.kv_heads, blocks = heads * in.key_blocks;
    const int64_t rows = in.key_blocks * BLOCK;
    Buffer<word> tiles(blocks * TILE_WORDS);
    Buffer<float> sums(heads * g.parts * rows * GRAD_WIDTH);
    std::deque<BackwardScratch> scratches;
    std::deque<QueryBlock> query_blocks;
    for (int64_t t = 0; t < a.threads; ++t) {
      scratches.emplace_back(in.chunks);
      query_blocks.emplace_back(in);
    }
    const TensorView key{static_cast<const input*>(a.key), a.key_batch, a.key_head, a.key_row};
    const TensorView value{static_cast<const input*>(a.value), a.value_batch, a.value_head,
                           a.value_row};
#pragma omp parallel num_threads(a.threads)
    {
      BackwardScratch& scratch = scratches[omp_get_thread_num()];
      QueryBlock& query_block = query_blocks[omp_get_thread_num()];
#pragma omp for schedule(static)
      for (int64_t t = 0; t < blocks; ++t) {
        const int64_t b = t / in.key_blocks / a.kv_heads, kv_head = t / in.key_blocks % a.kv_heads;
        const int64_t kb = t % in.key_blocks, first = kb * BLOCK;
        const auto exists = [&](int r) { return first + r < a.num_keys; };
        pack_tile(
            tiles.get() + t * TILE_WORDS,
            [&](int r) { return exists(r) ? key.at(b, kv_head, first + r) : nullptr; },
            [&](int r) { return exists(r) ? value.at(b, kv_head, first + r) : nullptr; });
        if (kv_head == 0) in.valid.get()[b * in.key_blocks + kb] = valid_keys(a, b, kb);
      }
      const TileScope tile_registers;
#pragma omp for schedule(dynamic)
      for (int64_t unit = 0; unit < heads * g.parts; ++unit) {
        const int64_t head = unit / g.parts;
        add_unit(a, g, in, scratch, query_block, tiles.get() + head * in.key_blocks * TILE_WORDS,
                 sums.get() + unit * rows * GRAD_WIDTH,
                 BIASED ? g.grad_bias + unit * (a.heads / a.kv_heads) * g.line : nullptr,
                 head / a.kv_heads, head % a.kv_heads, unit % g.parts);
      }
#pragma omp for schedule(static)
      for (int64_t row = 0; row < heads * rows; ++row) {
        const int64_t head = row / rows, j = row % rows;
        if (j >= a.num_keys) continue;
        float* sum = sums.get() + (head * g.parts * rows + j) * GRAD_WIDTH;
        for (int64_t part = 1; part < g.parts; ++part) add_row(sum, sum + part * rows * GRAD_WIDTH);
        for (int d = 0; d < QUERY_WIDTH; d += LANES)
          store(sum + d, mul(load(sum + d), set1(a.scale)));
        const int64_t place = head * a.num_keys + j;
        unpack_row(static_cast<input*>(g.grad_key) + place * HEAD_DIM, sum, HEAD_DIM);
        unpack_row(static_cast<input*>(g.grad_value) + place * VALUE_DIM, sum + QUERY_WIDTH,
                   VALUE_DIM);
      }
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
