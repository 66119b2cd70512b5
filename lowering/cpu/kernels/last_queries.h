// Softmax weights of the last queries over all keys. last_query_sums in
// lowering/reference/vertical_slash.py says what they mean.
//
// j  key position     q  one of the last QUERIES queries
// first_row  row of the first one, negative where the prompt has fewer
//
// The query heads of a kv head may look together: their queries stand side by side, and a block of
// keys is read once for all.
//
// Scores are taken transposed, a row of QUERIES per key: keys need no packing, and the softmax runs
// down the rows without horizontal sums. The exponentials of a block of keys are relative to that
// block's own greatest score per query, so that every score is computed and exponentiated once.
// What a block is to be multiplied with follows when all are done.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "gemm.h"
#include "inputs.h"
#include "pack.h"

namespace {

static_assert(LAST_QUERIES == BLOCK, "a tile of transposed scores is BLOCK x BLOCK");

// Floats per row of a tile of scores. Products come in whole column steps.
template <int QUERIES>
constexpr int SCORE_WIDTH = (QUERIES + COLUMN_STEP - 1) / COLUMN_STEP * COLUMN_STEP;

// Repeats the low `count` bits, those of one head, for each of HEADS heads.
template <int HEADS>
inline uint64_t for_each_head(uint64_t bits, int count) {
  if (HEADS == 1) return bits;
  uint64_t all = 0;
  for (int head = 0; head < HEADS; ++head) all |= (bits & low_bits(count)) << head * count;
  return all;
}

// Packs queries as a B operand, [DEPTH, BLOCK] words. row(q) is row q of the input, or null. The
// products are to be multiplied with exponent_of_product(): the sign of the scale is in them.
template <typename Row>
void pack_queries(const EstimateArguments& a, word* out, packed* staging, const Row& row) {
  pack_keys(out, staging, [&](int q) { return a.scale != 0 ? row(q) : nullptr; });
  if (a.scale < 0) {
    for (int n = 0; n < DEPTH * BLOCK; ++n) out[n] = negate(out[n]);
  }
}

// Packs the last queries of one head as a B operand [DEPTH, LAST_QUERIES].
template <int QUERIES = LAST_QUERIES>
void pack_last_queries(const EstimateArguments& a, word* out, packed* staging,
                       const TensorView& query, int64_t b, int64_t head, int64_t first_row) {
  pack_queries(a, out, staging, [&](int q) -> const input* {
    return q < QUERIES && first_row + q >= 0 ? query.at(b, head, first_row + q) : nullptr;
  });
}

inline vec exponent_of_product(const EstimateArguments& a) {
  return set1(a.scale == 0 ? 1.0f : LOG2E * std::abs(a.scale));
}

// Multiplies the keys of one block with the last queries of each of HEADS heads, [BLOCK,
// SCORE_WIDTH]. Where the mask hides a key the product is -inf.
template <int QUERIES = LAST_QUERIES, int HEADS = 1>
void score_block(const EstimateArguments& a, const word* queries, packed* staging,
                 const TensorView& key, int64_t b, int64_t kv_head, int64_t first,
                 int64_t first_row, float* scores) {
  constexpr int WIDTH = SCORE_WIDTH<QUERIES * HEADS>;
  const int count = static_cast<int>(std::min<int64_t>(BLOCK, a.num_keys - first));
  const bool in_place = ROWS_ARE_WORDS && count == BLOCK && a.key_row % PAIR == 0;
  const word* rows = reinterpret_cast<const word*>(staging);
  int stride = DEPTH;
  if (in_place) {
    rows = reinterpret_cast<const word*>(key.at(b, kv_head, first));
    stride = static_cast<int>(a.key_row / PAIR);
  } else {
    for (int r = 0; r < BLOCK; ++r) {
      packed* row = staging + r * DEPTH * PAIR;
      if (r < count) pack_row(row, key.at(b, kv_head, first + r), HEAD_DIM, DEPTH * PAIR);
      else std::memset(row, 0, DEPTH * sizeof(word));
    }
  }
  multiply<false>(rows, stride, &queries, 1, DEPTH, LAST_QUERIES, scores, WIDTH, BLOCK, WIDTH,
                  nullptr);

  const int64_t position = a.query_offset + first_row;  // of the first of the last queries
  if (count == BLOCK && first_row >= 0 && !a.key_mask && a.window <= 0 &&
      (!a.causal || first + BLOCK - 1 <= position))
    return;
  for (int r = 0; r < BLOCK; ++r) {
    const int64_t j = first + r;
    uint64_t visible = r < count && key_is_real(a, b, j) ? ~low_bits(-first_row) : 0;
    if (a.causal) visible &= ~low_bits(j - position);
    if (a.window > 0) visible &= low_bits(j + a.window - position);
    if (visible == ~uint64_t(0)) continue;
    visible = for_each_head<HEADS>(visible, QUERIES);
    float* row = scores + r * WIDTH;
    for (int n = 0; n < QUERIES * HEADS; n += LANES)
      store(row + n, keep(visible >> n, load(row + n)));
  }
}

// Adds the bias by distance to such products. row(q) is the row of a head's q-th query.
template <int QUERIES, int HEADS, typename Row>
void add_bias_to_block(const EstimateArguments& a, int64_t h, int64_t first, float* scores,
                       const Row& row) {
  constexpr int WIDTH = SCORE_WIDTH<QUERIES * HEADS>;
  const float unit = a.scale == 0 ? LOG2E : 1.0f / std::abs(a.scale);
  const int count = static_cast<int>(std::min<int64_t>(BLOCK, a.num_keys - first));
  for (int q = 0; q < QUERIES * HEADS; ++q) {
    const int64_t n = row(q % QUERIES);
    if (n < 0) continue;
    const float* bias =
        a.distance_bias + (h + q / QUERIES) * a.bias_head + (a.num_queries - 1 - n) + first;
    for (int r = 0; r < count; ++r) scores[r * WIDTH + q] += bias[r] * unit;
  }
}

// Takes the exponentials of one block, fp16 [BLOCK, QUERIES], relative to the greatest score of
// each query in it. `greatest` (as exponents of 2) and `total` of them are [QUERIES].
template <int QUERIES = LAST_QUERIES>
void exponentiate_block(const float* scores, vec exponent, uint16_t* weights, float* greatest,
                        float* total) {
  constexpr int VECTORS_PER_ROW = QUERIES / LANES, WIDTH = SCORE_WIDTH<QUERIES>;
  vec most[VECTORS_PER_ROW], sum[VECTORS_PER_ROW];
  for (int v = 0; v < VECTORS_PER_ROW; ++v) most[v] = set1(NEGATIVE_INFINITY), sum[v] = set1(0.0f);
  for (int r = 0; r < BLOCK; ++r)
    for (int v = 0; v < VECTORS_PER_ROW; ++v)
      most[v] = maximum(most[v], load(scores + r * WIDTH + v * LANES));
  for (int v = 0; v < VECTORS_PER_ROW; ++v) {
    most[v] = mul(most[v], exponent);
    store(greatest + v * LANES, most[v]);
    most[v] = finite_or_zero(most[v]);
  }
  for (int r = 0; r < BLOCK; ++r) {
    for (int v = 0; v < VECTORS_PER_ROW; ++v) {
      const vec score = load(scores + r * WIDTH + v * LANES);
      const vec e = exp2_vec(sub(mul(score, exponent), most[v]));
      store(weights + r * QUERIES + v * LANES, e, float16_tag{});
      sum[v] = add(sum[v], e);
    }
  }
  for (int v = 0; v < VECTORS_PER_ROW; ++v) store(total + v * LANES, sum[v]);
}

// Puts in the place of `greatest` what the exponentials of each block are to be multiplied with to
// be shares of the softmax. Both arrays are [blocks, QUERIES]. A query that sees nothing gets
// zeros.
template <int QUERIES = LAST_QUERIES>
void find_factors(float* greatest, const float* total, int64_t blocks) {
  constexpr int VECTORS_PER_ROW = QUERIES / LANES;
  for (int v = 0; v < VECTORS_PER_ROW; ++v) {
    vec most = set1(NEGATIVE_INFINITY), sum = set1(0.0f);
    for (int64_t n = 0; n < blocks; ++n)
      most = maximum(most, load(greatest + n * QUERIES + v * LANES));
    most = finite_or_zero(most);
    for (int64_t n = 0; n < blocks; ++n) {
      float* of_block = greatest + n * QUERIES + v * LANES;
      const vec factor = exp2_vec(sub(load(of_block), most));
      store(of_block, factor);
      sum = fma(factor, load(total + n * QUERIES + v * LANES), sum);
    }
    float inverse[LANES];
    store(inverse, sum);
    for (float& value : inverse) value = value > 0.0f ? 1.0f / value : 0.0f;
    for (int64_t n = 0; n < blocks; ++n) {
      float* of_block = greatest + n * QUERIES + v * LANES;
      store(of_block, mul(load(of_block), load(inverse)));
    }
  }
}

}  // namespace
