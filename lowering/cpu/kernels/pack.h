// Packing turns rows of the inputs into the layouts that the micro-GEMM reads.
//
// rows       [64][depth]        converted to `packed`, zero beyond the data      (A operand)
// keys       [depth / PAIR][64] words, transposed: one block of K                (B of Q x K^T)
// values     [64 / PAIR][DV]    words, neighbouring keys paired: one block of V  (B of P x V)
#pragma once

#include <cstring>

#include "vector.h"

namespace {

// Whether a row of keys is words of a packed row as it lies in memory.
constexpr bool ROWS_ARE_WORDS = INPUT_IS_PACKED && HEAD_DIM == DEPTH * PAIR;

// Packs one row of `dim` inputs to `padded` elements, with zeros at the end.
inline void pack_row(packed* out, const input* in, int dim, int padded) {
  if constexpr (INPUT_IS_PACKED) {
    std::memcpy(out, in, dim * sizeof(packed));
  } else {
    int d = 0;
    for (; d + LANES <= dim; d += LANES) store(out + d, load(in + d, input_tag{}), packed_tag{});
    if (d < dim) {
      input tail[LANES] = {};
      packed converted[LANES];
      std::memcpy(tail, in + d, (dim - d) * sizeof(input));
      store(converted, load(tail, input_tag{}), packed_tag{});
      std::memcpy(out + d, converted, (dim - d) * sizeof(packed));
    }
  }
  if (dim < padded) std::memset(out + dim, 0, (padded - dim) * sizeof(packed));
}

// Writes the first `dim` floats of a row as inputs. It reads whole vectors.
inline void unpack_row(input* out, const float* row, int dim) {
  int d = 0;
  for (; d + LANES <= dim; d += LANES) store(out + d, load(row + d), input_tag{});
  if (d < dim) {
    input tail[LANES];
    store(tail, load(row + d), input_tag{});
    std::memcpy(out + d, tail, (dim - d) * sizeof(input));
  }
}

// Transposes 64 packed rows of `depth` words, `stride` words apart, to [depth, 64] words.
inline void transpose_rows(word* out, const word* rows, int depth, int64_t stride) {
  int d = 0;
  for (; d + LANES <= depth; d += LANES)
    for (int r = 0; r < BLOCK; r += LANES)
      transpose(out + d * BLOCK + r, BLOCK, rows + r * stride + d, static_cast<int>(stride));
  for (; d < depth; ++d)
    for (int r = 0; r < BLOCK; ++r) out[d * BLOCK + r] = rows[r * stride + d];
}

inline void transpose_rows(word* out, const word* rows, int depth) {
  transpose_rows(out, rows, depth, depth);
}

// Packs 64 rows of `dim` inputs as columns, `depth` words each. row(r) is row r of the input, or
// null where there is none.
template <int dim, int depth, typename Row>
void pack_columns(word* out, packed* rows, const Row& row) {
  for (int r = 0; r < BLOCK; ++r) {
    const input* in = row(r);
    if (in) pack_row(rows + r * depth * PAIR, in, dim, depth * PAIR);
    else std::memset(rows + r * depth * PAIR, 0, depth * sizeof(word));
  }
  transpose_rows(out, reinterpret_cast<const word*>(rows), depth);
}

// Packs 64 rows of `dim` inputs as `width` words per row, or pair of rows, with row(r) as above.
template <int dim, int width, typename Row>
void pack_panel(word* out, packed* rows, const Row& row) {
  for (int r = 0; r < BLOCK; ++r) {
    packed* target = (USES_BF16 ? rows : reinterpret_cast<packed*>(out)) + r * width;
    const input* in = row(r);
    if (in) pack_row(target, in, dim, width);
    else std::memset(target, 0, width * sizeof(packed));
  }
#if USES_BF16
  for (int r = 0; r < BLOCK; r += 2)
    for (int n = 0; n < width; n += LANES)
      store_pairs(out + r / 2 * width + n, rows + r * width + n, rows + (r + 1) * width + n);
#endif
}

// Packs one block of keys.
template <typename Row>
void pack_keys(word* out, packed* rows, const Row& row) {
  pack_columns<HEAD_DIM, DEPTH>(out, rows, row);
}

// Packs one block of values.
template <typename Row>
void pack_values(word* out, packed* rows, const Row& row) {
  pack_panel<VALUE_DIM, VALUE_WIDTH>(out, rows, row);
}

}  // namespace
