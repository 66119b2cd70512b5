// mpass CPU kernels, generated for: attention, bfloat16, D=128, DV=128, strips of 4 tiles, avx512_bf16.
//
// D head_dim, DV value dim, DEPTH words of one packed query or key row, VALUE_WIDTH floats of one
// output row with padding. BLOCK positions per block of queries and of keys; a word is a float, or
// for bf16 arithmetic a pair of bf16.
#include <immintrin.h>
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <new>
#include <vector>

namespace {

struct float32_tag {};
struct bfloat16_tag {};
struct float16_tag {};
using input = uint16_t;
using input_tag = bfloat16_tag;
using packed_tag = bfloat16_tag;

constexpr float LOG2E = 1.44269504088896341f;
constexpr int BLOCK = 64;
constexpr int STRIP = 4;
constexpr int HEAD_DIM = 128, VALUE_DIM = 128;
constexpr int DEPTH = 64, VALUE_WIDTH = 128;

using word = uint32_t;
constexpr int PAIR = 2;  // reduction steps that one word holds
using packed = uint16_t;  // element of packed K, V and of P
constexpr float NEGATIVE_INFINITY = -std::numeric_limits<float>::infinity();

using vec = __m512;
constexpr int LANES = 16;
inline vec set1(float x) { return _mm512_set1_ps(x); }
inline vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vec x) { _mm512_storeu_ps(p, x); }
inline vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
inline vec sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
inline vec mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
inline vec divide(vec a, vec b) { return _mm512_div_ps(a, b); }
inline vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
inline vec maximum(vec a, vec b) { return _mm512_max_ps(a, b); }  // b where either is NaN
inline float reduce_max(vec x) { return _mm512_reduce_max_ps(x); }
inline float reduce_add(vec x) { return _mm512_reduce_add_ps(x); }
// x where the lane's bit is set, else -inf.
inline vec keep(uint64_t bits, vec x) {
  return _mm512_mask_mov_ps(set1(NEGATIVE_INFINITY), static_cast<__mmask16>(bits), x);
}
// 0 where x is -inf, else x.
inline vec finite_or_zero(vec x) {
  return _mm512_maskz_mov_ps(
      _mm512_cmp_ps_mask(x, set1(NEGATIVE_INFINITY), _CMP_NEQ_UQ), x);
}
inline vec load(const uint16_t* p, bfloat16_tag) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline vec load(const uint16_t* p, float16_tag) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
inline vec scale_by_power(vec x, vec n) { return _mm512_scalef_ps(x, n); }
inline vec round_nearest(vec x) { return _mm512_roundscale_ps(x, 0); }
inline void store(uint16_t* p, vec x, float16_tag) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(uint16_t* p, vec x, bfloat16_tag) {  // to nearest, ties to even
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                                  _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
inline vec load(const float* p, float32_tag) { return load(p); }
inline void store(float* p, vec x, float32_tag) { store(p, x); }

// 2^x for x <= 126, zero far below; NaN stays NaN. Minimax polynomial on [-1/2, 1/2] after taking
// out the integer part: degree 3, relative error 7.5e-5 (bf16 rounds at 2e-3).
inline vec exp2_vec(vec x) {
  x = maximum(set1(-160.0f), x);
  const vec n = round_nearest(x);
  const vec r = sub(x, n);
  vec p = set1(0.0551716691f);
  p = fma(p, r, set1(0.242611122f));
  p = fma(p, r, set1(0.693260985f));
  p = fma(p, r, set1(0.999928074f));
  return scale_by_power(p, n);
}
constexpr int KEY_WORDS = DEPTH * BLOCK, VALUE_WORDS = BLOCK / PAIR * VALUE_WIDTH;  // of one block

// The keys of a tile that a row sees: those of the first `keys`, and row r at most `first + r`.
struct Reach {
  int keys = BLOCK, first = BLOCK;
  int of_row(int r) const { return std::min(keys, first + r); }
};

// Panels of a tile that is read soon. Which one that is, is the index's choice and no stream that
// the hardware could see, so each step of a product fetches one line of them.
struct Ahead {
  const word* keys;    // KEY_WORDS, read next
  const word* values;  // VALUE_WORDS, read after that
  // The DEPTH lines that the given group of rows fetches.
  const word* lines(int group) const {
    constexpr int LINE = 64 / sizeof(word), KEY_GROUPS = KEY_WORDS / (DEPTH * LINE);
    if (group < KEY_GROUPS) return keys + group * DEPTH * LINE;
    return values + std::max(0, std::min((group - KEY_GROUPS) * DEPTH * LINE,
                                         VALUE_WORDS - DEPTH * LINE));
  }
};

constexpr int ROW_STEP = 2;
constexpr int ROWS = 6;  // 6 x 4 accumulators, 4 of B, 1 of A
constexpr int VECTORS = 4;

struct TileScope {};

// acc += a.even * b.even + a.odd * b.odd, per lane
inline vec dot(vec acc, word a, __m512i b) {
  return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
}
inline __m512i load_words(const word* b) { return _mm512_loadu_si512(b); }

// R rows from `row` on, V vectors from `column` on.
template <int R, int V, bool ACCUMULATE, bool FETCH>
inline void multiply_tile(const word* a, int lda, const word* const* panels, int num_panels,
                          int steps, int row, int column, int ldb, float* c, int ldc,
                          const float* row_scale, const Reach* reach, const Ahead& ahead) {
  if constexpr (!ACCUMULATE && V > 1) {
    if (reach && reach->of_row(row + R - 1) <= column + (V - 1) * LANES)
      return multiply_tile<R, V - 1, ACCUMULATE, FETCH>(a, lda, panels, num_panels, steps, row,
                                                        column, ldb, c, ldc, row_scale, reach,
                                                        ahead);
  }
  a += row * lda;
  c += row * ldc + column;
  const word* line = FETCH ? ahead.lines(row / ROWS) : nullptr;
  vec acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      acc[r][v] = ACCUMULATE ? mul(load(c + r * ldc + v * LANES), set1(row_scale[row + r])) : set1(0.0f);
  }
  for (int p = 0; p < num_panels; ++p) {
    const word* b = panels[p] + column;
    const int seen =
        ACCUMULATE && reach ? (reach[p].of_row(row + R - 1) + PAIR - 1) / PAIR : steps;
    for (int k = 0; k < seen; ++k, b += ldb) {
      if constexpr (FETCH) _mm_prefetch(line + k * (64 / sizeof(word)), _MM_HINT_T1);
      decltype(load_words(b)) factor[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) factor[v] = load_words(b + v * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const word broadcast = a[r * lda + k];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[r][v] = dot(acc[r][v], broadcast, factor[v]);
      }
    }
    a += steps;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(c + r * ldc + v * LANES, acc[r][v]);
  }
}

template <int V, bool ACCUMULATE, bool FETCH>
inline void multiply_columns(const word* a, int lda, const word* const* panels, int num_panels,
                             int steps, int column, int ldb, float* c, int ldc, int rows,
                             const float* row_scale, const Reach* reach, const Ahead& ahead) {
  int r = 0;
  if constexpr (!ACCUMULATE) {
    while (reach && r + ROWS <= rows && reach->of_row(r + ROWS - 1) <= column) r += ROWS;
  }
  for (; r + ROWS <= rows; r += ROWS)
    multiply_tile<ROWS, V, ACCUMULATE, FETCH>(a, lda, panels, num_panels, steps, r, column, ldb, c,
                                              ldc, row_scale, reach, ahead);
  for (; r + 4 <= rows; r += 4)
    multiply_tile<4, V, ACCUMULATE, FETCH>(a, lda, panels, num_panels, steps, r, column, ldb, c,
                                           ldc, row_scale, reach, ahead);
  for (; r < rows; r += 2)
    multiply_tile<2, V, ACCUMULATE, FETCH>(a, lda, panels, num_panels, steps, r, column, ldb, c,
                                           ldc, row_scale, reach, ahead);
}

template <bool ACCUMULATE, bool FETCH = false>
void multiply(const word* a, int lda, const word* const* panels, int num_panels, int steps,
              int ldb, float* c, int ldc, int rows, int columns, const float* row_scale,
              const Reach* reach = nullptr, const Ahead& ahead = {}) {
  int n = 0;
  for (; n + VECTORS * LANES <= columns; n += VECTORS * LANES)
    multiply_columns<VECTORS, ACCUMULATE, FETCH>(a, lda, panels, num_panels, steps, n, ldb, c, ldc,
                                                 rows, row_scale, reach, ahead);
  for (; n < columns; n += LANES)
    multiply_columns<1, ACCUMULATE, FETCH>(a, lda, panels, num_panels, steps, n, ldb, c, ldc, rows,
                                           row_scale, reach, ahead);
}
// One row of `dim` inputs to `padded` packed elements, zeros at the end.
inline void pack_row(packed* out, const input* in, int dim, int padded) {
  std::memcpy(out, in, dim * sizeof(packed));
  if (dim < padded) std::memset(out + dim, 0, (padded - dim) * sizeof(packed));
}

// The first `dim` floats of a row as inputs; reads whole vectors.
inline void unpack_row(input* out, const float* row, int dim) {
  int d = 0;
  for (; d + LANES <= dim; d += LANES) store(out + d, load(row + d), input_tag{});
  if (d < dim) {
    input tail[LANES];
    store(tail, load(row + d), input_tag{});
    std::memcpy(out + d, tail, (dim - d) * sizeof(input));
  }
}

// [16, in_stride] words -> [16, out_stride] words, transposed.
inline void transpose(word* out, int out_stride, const word* in, int in_stride) {
  __m512i x[16], y[16];
  for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(in + i * in_stride);
  for (int i = 0; i < 8; ++i) {
    y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
    y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    x[4 * i] = _mm512_unpacklo_epi64(y[4 * i], y[4 * i + 2]);
    x[4 * i + 1] = _mm512_unpackhi_epi64(y[4 * i], y[4 * i + 2]);
    x[4 * i + 2] = _mm512_unpacklo_epi64(y[4 * i + 1], y[4 * i + 3]);
    x[4 * i + 3] = _mm512_unpackhi_epi64(y[4 * i + 1], y[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88);
    y[4 + i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
    y[8 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
    y[12 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(out + i * out_stride, _mm512_shuffle_i32x4(y[i], y[8 + i], 0x88));
    _mm512_storeu_si512(out + (4 + i) * out_stride, _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0x88));
    _mm512_storeu_si512(out + (8 + i) * out_stride, _mm512_shuffle_i32x4(y[i], y[8 + i], 0xdd));
    _mm512_storeu_si512(out + (12 + i) * out_stride, _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0xdd));
  }
}

// 64 packed rows of `depth` words -> [depth, 64] words.
inline void transpose_rows(word* out, const word* rows, int depth) {
  int d = 0;
  for (; d + LANES <= depth; d += LANES)
    for (int r = 0; r < BLOCK; r += LANES)
      transpose(out + d * BLOCK + r, BLOCK, rows + r * depth + d, depth);
  for (; d < depth; ++d)
    for (int r = 0; r < BLOCK; ++r) out[d * BLOCK + r] = rows[r * depth + d];
}

// One block of keys: row(r) is row r of the input, or null where there is none.
template <typename Row>
void pack_keys(word* out, packed* rows, const Row& row) {
  for (int r = 0; r < BLOCK; ++r) {
    const input* in = row(r);
    if (in) pack_row(rows + r * DEPTH * PAIR, in, HEAD_DIM, DEPTH * PAIR);
    else std::memset(rows + r * DEPTH * PAIR, 0, DEPTH * sizeof(word));
  }
  transpose_rows(out, reinterpret_cast<const word*>(rows), DEPTH);
}

// One block of values, as above.
template <typename Row>
void pack_values(word* out, packed* rows, const Row& row) {
  for (int r = 0; r < BLOCK; ++r) {
    packed* target = rows + r * VALUE_WIDTH;
    const input* in = row(r);
    if (in) pack_row(target, in, VALUE_DIM, VALUE_WIDTH);
    else std::memset(target, 0, VALUE_WIDTH * sizeof(packed));
  }
  for (int r = 0; r < BLOCK; r += 2) {
    for (int n = 0; n < VALUE_WIDTH; n += 16) {
      const __m256i even = _mm256_loadu_si256((const __m256i*)(rows + r * VALUE_WIDTH + n));
      const __m256i odd = _mm256_loadu_si256((const __m256i*)(rows + (r + 1) * VALUE_WIDTH + n));
      const __m512i pairs = _mm512_or_si512(
          _mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
      _mm512_storeu_si512(out + r / 2 * VALUE_WIDTH + n, pairs);
    }
  }
}

// Asks for huge pages for memory that will be written first now: faulting it in 4 KiB at a time
// costs a tenth of a sparse call.
inline void advise_huge_pages(void* data, size_t bytes) {
  constexpr uintptr_t PAGE = 4096, HUGE_PAGE = uintptr_t(1) << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t stop = (reinterpret_cast<uintptr_t>(data) + bytes) / PAGE * PAGE;
  if (stop >= first + 2 * HUGE_PAGE)
    madvise(reinterpret_cast<void*>(first), stop - first, MADV_HUGEPAGE);
}

// Scratch memory of one call.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t count) {
    constexpr size_t HUGE_PAGE = size_t(1) << 21;
    const size_t bytes = count * sizeof(T);
    const size_t alignment = bytes >= 2 * HUGE_PAGE ? HUGE_PAGE : 64;
    const size_t rounded = std::max((bytes + alignment - 1) / alignment, size_t(1)) * alignment;
    data_ = static_cast<T*>(std::aligned_alloc(alignment, rounded));
    if (!data_) throw std::bad_alloc();
    advise_huge_pages(data_, rounded);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};
// The numbers of a call: field by field the ctypes structure of the caller.
struct Arguments {
  const void* query;
  const void* key;
  const void* value;
  void* out;
  const uint8_t* key_mask;
  const float* sinks;
  const int32_t* block_count;
  const int32_t* block_index;
  const int32_t* diagonal_count;
  const int32_t* diagonal_index;
  const int32_t* column_count;
  const int32_t* column_index;
  const int32_t* head_slots;
  int64_t batch;
  int64_t heads;
  int64_t kv_heads;
  int64_t num_queries;
  int64_t num_keys;
  int64_t num_blocks;
  int64_t query_batch;
  int64_t query_head;
  int64_t query_row;
  int64_t key_batch;
  int64_t key_head;
  int64_t key_row;
  int64_t value_batch;
  int64_t value_head;
  int64_t value_row;
  int64_t out_batch;
  int64_t out_head;
  int64_t out_row;
  int64_t num_lists;
  int64_t max_blocks;
  int64_t num_diagonals;
  int64_t max_diagonals;
  int64_t max_columns;
  int64_t longest_columns;
  int64_t query_offset;
  int64_t window;
  int64_t causal;
  int64_t threads;
  float scale;
  float softcap;
};

struct Rows {  // one tensor [B, H, N, D], strides in elements, the last one 1
  const input* data;
  int64_t batch, head, row;
  const input* at(int64_t b, int64_t h, int64_t n) const {
    return data + b * batch + h * head + n * row;
  }
};

inline uint64_t low_bits(int64_t count) {
  return count <= 0 ? 0 : count >= 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
}

// K and V of the whole call, packed, and what the attention mask says of each key block.
struct Packed {
  int64_t key_blocks, chunks;  // chunks: of 64 columns, per head
  Buffer<word> keys, values, column_keys, column_values;
  Buffer<uint64_t> valid;  // [B, key_blocks], a bit per key: it exists and is no padding

  explicit Packed(const Arguments& a)
      : key_blocks((a.num_keys + BLOCK - 1) / BLOCK),
        chunks((a.longest_columns + BLOCK - 1) / BLOCK),
        keys(a.batch * a.kv_heads * key_blocks * KEY_WORDS),
        values(a.batch * a.kv_heads * key_blocks * VALUE_WORDS),
        column_keys(a.batch * a.heads * chunks * KEY_WORDS),
        column_values(a.batch * a.heads * chunks * VALUE_WORDS),
        valid(a.batch * key_blocks) {}
};

// What one thread works on.
struct Scratch {
  Buffer<packed> query, staging, probabilities;
  Buffer<float> scores, out;
  std::vector<uint8_t> selected;  // per key block
  alignas(64) uint64_t row_bits[STRIP][BLOCK];
  bool masked[STRIP];
  Reach reach[STRIP];
  const word* keys[STRIP];
  const word* values[STRIP];
  int tiles = 0;
  alignas(64) float maximum[BLOCK], sum[BLOCK], scale[BLOCK], shift[BLOCK];

  explicit Scratch(int64_t key_blocks)
      : query(BLOCK * DEPTH * PAIR),
        staging(BLOCK * std::max(DEPTH * PAIR, VALUE_WIDTH)),
        probabilities(BLOCK * STRIP * BLOCK),
        scores(BLOCK * STRIP * BLOCK),
        out(BLOCK * VALUE_WIDTH),
        selected(key_blocks + 1, 0) {
    std::memset(probabilities.get(), 0, BLOCK * STRIP * BLOCK * sizeof(packed));
  }
};

void pack_block(const Arguments& a, const Packed& p, packed* staging, int64_t b, int64_t g,
                int64_t kb) {
  const Rows key{static_cast<const input*>(a.key), a.key_batch, a.key_head, a.key_row};
  const Rows value{static_cast<const input*>(a.value), a.value_batch, a.value_head, a.value_row};
  const int64_t slot = (b * a.kv_heads + g) * p.key_blocks + kb;
  const int64_t first = kb * BLOCK;
  pack_keys(p.keys.get() + slot * KEY_WORDS, staging, [&](int r) -> const input* {
    return first + r < a.num_keys ? key.at(b, g, first + r) : nullptr;
  });
  pack_values(p.values.get() + slot * VALUE_WORDS, staging, [&](int r) -> const input* {
    return first + r < a.num_keys ? value.at(b, g, first + r) : nullptr;
  });
  if (g == 0) {
    uint64_t bits = low_bits(a.num_keys - first);
    if (a.key_mask) {
      for (int r = 0; r < BLOCK && first + r < a.num_keys; ++r)
        if (!a.key_mask[b * a.num_keys + first + r]) bits &= ~(uint64_t(1) << r);
    }
    p.valid.get()[b * p.key_blocks + kb] = bits;
  }
}

void pack_columns(const Arguments& a, const Packed& p, packed* staging, int64_t b, int64_t h,
                  int64_t chunk) {
  const int64_t count = a.column_count[b * a.heads + h] - chunk * BLOCK;
  if (count <= 0) return;
  const int32_t* positions =
      a.column_index + (b * a.heads + h) * a.max_columns + chunk * BLOCK;
  const Rows key{static_cast<const input*>(a.key), a.key_batch, a.key_head, a.key_row};
  const Rows value{static_cast<const input*>(a.value), a.value_batch, a.value_head, a.value_row};
  const int64_t g = h / (a.heads / a.kv_heads);
  const int64_t slot = (b * a.heads + h) * p.chunks + chunk;
  const auto exists = [&](int r) {
    return r < count && positions[r] >= 0 && positions[r] < a.num_keys;
  };
  pack_keys(p.column_keys.get() + slot * KEY_WORDS, staging, [&](int r) -> const input* {
    return exists(r) ? key.at(b, g, positions[r]) : nullptr;
  });
  pack_values(p.column_values.get() + slot * VALUE_WORDS, staging, [&](int r) -> const input* {
    return exists(r) ? value.at(b, g, positions[r]) : nullptr;
  });
}


// e^(score - maximum) of one row of the strip, as P x V reads it; returns the sum.
inline float exponentiate(packed* out, const float* scores, int width, float scale, float shift) {
  const vec factor = set1(scale), offset = set1(shift);
  vec sum = set1(0.0f);
  for (int n = 0; n < width; n += 2 * LANES) {
    const vec low = exp2_vec(fma(load(scores + n), factor, offset));
    const vec high = exp2_vec(fma(load(scores + n + LANES), factor, offset));
    sum = add(sum, add(low, high));
    _mm512_storeu_si512(out + n, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  return reduce_add(sum);
}

// One softmax update: scores of the strip's tiles, their exponentials, and P x V on top of `out`.
void flush_strip(Scratch& s, int rows, float scale, float cap_exponent, float cap) {
  if (s.tiles == 0) return;
  const int width = s.tiles * BLOCK;
  const int computed = (rows + ROW_STEP - 1) / ROW_STEP * ROW_STEP;
  float* scores = s.scores.get();
  packed* probabilities = s.probabilities.get();
  for (int t = 0; t < s.tiles; ++t) {
    const Ahead ahead{s.keys[std::min(t + 1, s.tiles - 1)], s.values[t]};
    multiply<false, true>(reinterpret_cast<const word*>(s.query.get()), DEPTH, &s.keys[t], 1,
                          DEPTH, BLOCK, scores + t * BLOCK, STRIP * BLOCK, computed, BLOCK,
                          nullptr, &s.reach[t], ahead);
  }
  for (int r = 0; r < rows; ++r) {
    float* row = scores + r * STRIP * BLOCK;
    vec highest = set1(NEGATIVE_INFINITY);
    for (int t = 0; t < s.tiles; ++t) {
      float* tile = row + t * BLOCK;
      if (s.masked[t]) {
        for (int n = 0; n < BLOCK; n += LANES)
          store(tile + n, keep(s.row_bits[t][r] >> n, load(tile + n)));
      }
      for (int n = 0; n < BLOCK; n += LANES) highest = maximum(highest, load(tile + n));
    }
    const float before = s.maximum[r];
    const float after = std::max(before, reduce_max(highest) * scale);
    // -inf: nothing visible yet; zero keeps the exponents at -inf instead of NaN.
    const float shift = after == NEGATIVE_INFINITY ? 0.0f : after;
    s.scale[r] = before == shift ? 1.0f : std::exp2(before - shift);
    s.maximum[r] = after;
    s.sum[r] = s.sum[r] * s.scale[r] +
        exponentiate(probabilities + r * STRIP * BLOCK, row, width, scale, -shift);
  }
  multiply<true>(reinterpret_cast<const word*>(probabilities), STRIP * BLOCK / PAIR, s.values,
                 s.tiles, BLOCK / PAIR, VALUE_WIDTH, s.out.get(), VALUE_WIDTH, computed,
                 VALUE_WIDTH, s.scale, s.reach);
  s.tiles = 0;
}

// All keys that one query block of one head selects.
void attend(const Arguments& a, const Packed& packed_inputs, Scratch& s, int64_t b, int64_t h,
            int64_t i) {
  const Packed& in = packed_inputs;
  const int64_t qb = a.query_offset / BLOCK + i;
  const int64_t first = std::max(qb * BLOCK, a.query_offset);
  const int64_t stop = std::min((qb + 1) * BLOCK, a.query_offset + a.num_queries);
  const int rows = static_cast<int>(stop - first);
  const int64_t last = stop - 1;
  const int64_t g = h / (a.heads / a.kv_heads);
  const uint64_t* valid = in.valid.get() + b * in.key_blocks;
  const float cap = 0.0f, cap_exponent = 0.0f;
  const float scale = a.scale == 0 ? 1.0f : LOG2E * std::abs(a.scale);

  const Rows query{static_cast<const input*>(a.query), a.query_batch, a.query_head, a.query_row};
  for (int r = 0; r < BLOCK; ++r) {
    packed* row = s.query.get() + r * DEPTH * PAIR;
    if (r < rows && a.scale != 0)
      pack_row(row, query.at(b, h, first - a.query_offset + r), HEAD_DIM, DEPTH * PAIR);
    else std::memset(row, 0, DEPTH * sizeof(word));
    if (a.scale < 0)  // maxima are taken before scaling, so the sign goes into the query
      for (int d = 0; d < DEPTH * PAIR; ++d) row[d] = row[d] ^ 0x8000;
  }
  const float sink = a.sinks ? a.sinks[h] * LOG2E : NEGATIVE_INFINITY;
  std::fill_n(s.maximum, BLOCK, sink);
  std::fill_n(s.sum, BLOCK, sink == NEGATIVE_INFINITY ? 0.0f : 1.0f);
  std::fill_n(s.scale, BLOCK, 1.0f);
  std::memset(s.out.get(), 0, BLOCK * VALUE_WIDTH * sizeof(float));

  const auto push = [&](const word* keys, const word* values, bool masked, Reach reach) {
    s.keys[s.tiles] = keys;
    s.values[s.tiles] = values;
    s.masked[s.tiles] = masked;
    s.reach[s.tiles] = reach;
    if (++s.tiles == STRIP) flush_strip(s, rows, scale, cap_exponent, cap);
  };

  const auto visit_block = [&](int64_t kb) {
    if (kb < 0 || kb >= in.key_blocks || (a.causal && kb > qb)) return;
    s.selected[kb] = 1;
    const int64_t low = kb * BLOCK, high = low + BLOCK - 1;
    const bool in_window = a.window <= 0 || first - high < a.window;
    if (!in_window || valid[kb] == 0) return;
    const bool full = valid[kb] == ~uint64_t(0) && (!a.causal || high <= first) &&
        (a.window <= 0 || last - low < a.window);
    if (!full) {
      for (int r = 0; r < rows; ++r) {
        uint64_t bits = valid[kb];
        if (a.causal) bits &= low_bits(first + r - low + 1);
        if (a.window > 0) bits &= ~low_bits(first + r - a.window + 1 - low);
        s.row_bits[s.tiles][r] = bits;
      }
    }
    const int64_t slot = (b * a.kv_heads + g) * in.key_blocks + kb;
    Reach reach{64 - __builtin_clzll(valid[kb])};
    if (a.causal) reach.first = static_cast<int>(std::min<int64_t>(first - low + 1, BLOCK));
    push(in.keys.get() + slot * KEY_WORDS, in.values.get() + slot * VALUE_WORDS, !full, reach);
  };

  const int32_t head_slot = a.head_slots[h];
  if (head_slot >= 0) {
    const int64_t list = (b * a.num_lists + head_slot) * a.num_blocks + i;
    const int32_t count = a.block_count[list];
    if (count < 0)
      for (int64_t kb = 0; kb < in.key_blocks; ++kb) visit_block(kb);
    for (int32_t n = 0; n < count; ++n)
      visit_block(a.block_index[list * a.max_blocks + n]);
  } else {
    const int64_t list = b * a.num_diagonals + (-1 - head_slot);
    const int32_t count = a.diagonal_count[list];
    if (count < 0)
      for (int64_t kb = 0; kb <= qb; ++kb) visit_block(kb);
    for (int32_t n = 0; n < count; ++n)
      visit_block(qb - a.diagonal_index[list * a.max_diagonals + n]);
  }

  const int64_t columns = a.max_columns ? a.column_count[b * a.heads + h] : 0;
  const int32_t* positions = a.column_index + (b * a.heads + h) * a.max_columns;
  const int64_t limit = a.causal ? std::min(qb * BLOCK, a.num_keys) : a.num_keys;
  for (int64_t c = 0; c * BLOCK < columns && positions[c * BLOCK] < limit; ++c) {
    const int32_t* chunk = positions + c * BLOCK;
    const int64_t size = std::min<int64_t>(BLOCK, columns - c * BLOCK);
    uint64_t bits = 0;
    bool edge = false;  // some row's window ends inside of the chunk
    for (int t = 0; t < size; ++t) {
      const int64_t j = chunk[t];
      if (j < 0 || j >= limit || s.selected[j / BLOCK]) continue;
      if (!(valid[j / BLOCK] >> (j % BLOCK) & 1)) continue;
      if (a.window > 0 && first - j >= a.window) continue;
      bits |= uint64_t(1) << t;
      edge = edge || (a.window > 0 && last - j >= a.window);
    }
    if (bits == 0) continue;
    const bool masked = edge || bits != ~uint64_t(0);
    if (masked) {
      int64_t behind = 0;  // columns that the row's window has left behind
      for (int r = 0; r < rows; ++r) {
        if (edge)
          while (behind < size && first + r - chunk[behind] >= a.window) ++behind;
        s.row_bits[s.tiles][r] = bits & ~low_bits(behind);
      }
    }
    const int64_t slot = (b * a.heads + h) * in.chunks + c;
    push(in.column_keys.get() + slot * KEY_WORDS, in.column_values.get() + slot * VALUE_WORDS,
         masked, Reach{64 - __builtin_clzll(bits)});
  }
  flush_strip(s, rows, scale, cap_exponent, cap);
  std::fill(s.selected.begin(), s.selected.end(), 0);

  input* out = static_cast<input*>(a.out) + b * a.out_batch + h * a.out_head +
      (first - a.query_offset) * a.out_row;
  for (int r = 0; r < rows; ++r) {
    float* row = s.out.get() + r * VALUE_WIDTH;
    const vec factor = set1(s.sum[r] == 0.0f ? 0.0f : 1.0f / s.sum[r]);
    for (int d = 0; d < VALUE_WIDTH; d += LANES) store(row + d, mul(load(row + d), factor));
    unpack_row(out + r * a.out_row, row, VALUE_DIM);
  }
}

}  // namespace

extern "C" int sparse_attention(const Arguments* arguments) {
  const Arguments& a = *arguments;
  try {
    const Packed in(a);
    const int64_t blocks = a.batch * a.kv_heads * in.key_blocks;
    const int64_t chunks = a.batch * a.heads * in.chunks;
    const int64_t tasks = a.batch * a.heads * a.num_blocks;
    const int64_t out_items = (a.batch - 1) * a.out_batch + (a.heads - 1) * a.out_head +
        (a.num_queries - 1) * a.out_row + VALUE_DIM;
    advise_huge_pages(a.out, out_items * sizeof(input));
    // Allocated here, because an exception must not leave a thread of the parallel region.
    std::deque<Scratch> scratches;
    for (int64_t t = 0; t < a.threads; ++t) scratches.emplace_back(in.key_blocks);
#pragma omp parallel num_threads(a.threads)
    {
      Scratch& scratch = scratches[omp_get_thread_num()];
#pragma omp for schedule(static) nowait
      for (int64_t t = 0; t < chunks; ++t)
        pack_columns(a, in, scratch.staging.get(), t / in.chunks / a.heads, t / in.chunks % a.heads,
                     t % in.chunks);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < blocks; ++t)
        pack_block(a, in, scratch.staging.get(), t / in.key_blocks / a.kv_heads,
                   t / in.key_blocks % a.kv_heads, t % in.key_blocks);
      const TileScope tiles;
      // Head by head, the longest rows first: the last tasks are the short ones.
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < tasks; ++t)
        attend(a, in, scratch, t / a.num_blocks / a.heads, t / a.num_blocks % a.heads,
               a.num_blocks - 1 - t % a.num_blocks);
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
