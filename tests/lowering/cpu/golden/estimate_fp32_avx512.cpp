// mpass CPU kernels, generated for: estimate, float32, D=64, avx512.
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
#include <iterator>
#include <limits>
#include <mutex>
#include <new>
#include <vector>

namespace {

struct float32_tag {};
struct bfloat16_tag {};
struct float16_tag {};
using input = float;
using input_tag = float32_tag;
using packed_tag = float32_tag;

constexpr float LOG2E = 1.44269504088896341f;
constexpr int BLOCK = 64;
constexpr int STRIP = 4;
constexpr int HEAD_DIM = 64, VALUE_DIM = 64;
constexpr int DEPTH = 64, VALUE_WIDTH = 64;

using word = float;
constexpr int PAIR = 1;  // reduction steps that one word holds
using packed = float;  // element of packed K, V and of P
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
// out the integer part: degree 5, relative error 7.5e-8.
inline vec exp2_vec(vec x) {
  x = maximum(set1(-160.0f), x);
  const vec n = round_nearest(x);
  const vec r = sub(x, n);
  vec p = set1(0.0013276472f);
  p = fma(p, r, set1(0.00967554133f));
  p = fma(p, r, set1(0.0555071327f));
  p = fma(p, r, set1(0.240221197f));
  p = fma(p, r, set1(0.693146967f));
  p = fma(p, r, set1(1.00000007f));
  return scale_by_power(p, n);
}
constexpr int KEY_WORDS = DEPTH * BLOCK, VALUE_WORDS = BLOCK / PAIR * VALUE_WIDTH;  // of one block

// The keys of a tile that a row sees: those of the first `keys`, and row r at most `first + r`.
struct Reach {
  int keys = BLOCK, first = BLOCK;
  int of_row(int r) const { return std::min(keys, first + r); }
};

constexpr int ROW_STEP = 2, COLUMN_STEP = LANES;
constexpr int ROWS = 8;  // 8 x 3 accumulators, 3 of B, 1 of A
constexpr int VECTORS = 3;

struct TileScope {};

// Bytes to fetch per step, so that a product of BLOCK rows and `steps` x `columns` of B fetches
// `words`: no more at a time, or the fetches hold up the loads of the product itself.
constexpr int fetch_step(int words, int steps, int columns) {
  const int passes = std::max(1, columns / (VECTORS * LANES)) * ((BLOCK + ROWS - 1) / ROWS);
  return (words * int(sizeof(word)) + passes * steps - 1) / (passes * steps);
}

inline vec dot(vec acc, word a, vec b) { return fma(set1(a), b, acc); }
inline vec load_words(const word* b) { return load(b); }

// R rows from `row` on, V vectors from `column` on. Not inlined: within its callers, GCC 12 runs out
// of registers for the accumulators.
template <int R, int V, bool ACCUMULATE, int FETCH>
__attribute__((noinline)) void multiply_tile(const word* a, int lda, const word* const* panels,
                                             int num_panels, int steps, int row, int column,
                                             int ldb, float* c, int ldc, const float* row_scale,
                                             const Reach* reach, const word* const* ahead) {
  if constexpr (!ACCUMULATE && V > 1) {
    if (reach && reach->of_row(row + R - 1) <= column + (V - 1) * LANES)
      return multiply_tile<R, V - 1, ACCUMULATE, FETCH>(a, lda, panels, num_panels, steps, row,
                                                        column, ldb, c, ldc, row_scale, reach,
                                                        ahead);
  }
  a += row * lda;
  c += row * ldc + column;
  const int done = (column / (VECTORS * LANES) * ((BLOCK + ROWS - 1) / ROWS) + row / ROWS) * steps;
  vec acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      acc[r][v] = ACCUMULATE ? mul(load(c + r * ldc + v * LANES), set1(row_scale[row + r])) : set1(0.0f);
  }
  for (int p = 0; p < num_panels; ++p) {
    const word* b = panels[p] + column;
    const char* line = FETCH ? reinterpret_cast<const char*>(ahead[p]) + done * FETCH : nullptr;
    const int seen =
        ACCUMULATE && reach ? (reach[p].of_row(row + R - 1) + PAIR - 1) / PAIR : steps;
    for (int k = 0; k < seen; ++k, b += ldb) {
      if constexpr (FETCH > 0) _mm_prefetch(line + k * FETCH, _MM_HINT_T1);
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

template <int V, bool ACCUMULATE, int FETCH>
inline void multiply_columns(const word* a, int lda, const word* const* panels, int num_panels,
                             int steps, int column, int ldb, float* c, int ldc, int rows,
                             const float* row_scale, const Reach* reach,
                             const word* const* ahead) {
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

template <bool ACCUMULATE, int FETCH = 0>
void multiply(const word* a, int lda, const word* const* panels, int num_panels, int steps,
              int ldb, float* c, int ldc, int rows, int columns, const float* row_scale,
              const Reach* reach = nullptr, const word* const* ahead = nullptr) {
  int n = 0;
  for (; n + VECTORS * LANES <= columns; n += VECTORS * LANES)
    multiply_columns<VECTORS, ACCUMULATE, FETCH>(a, lda, panels, num_panels, steps, n, ldb, c, ldc,
                                                 rows, row_scale, reach, ahead);
  for (; n < columns; n += LANES)
    multiply_columns<1, ACCUMULATE, 0>(a, lda, panels, num_panels, steps, n, ldb, c, ldc, rows,
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
    packed* target = out + r * VALUE_WIDTH;
    const input* in = row(r);
    if (in) pack_row(target, in, VALUE_DIM, VALUE_WIDTH);
    else std::memset(target, 0, VALUE_WIDTH * sizeof(packed));
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

// Memory between calls. Layers follow one another, and pages that are new to the process cost up to
// a third of a call on 128 tokens: the system clears them first, and may have lent them elsewhere.
class Kept {
 public:
  ~Kept() {
    for (const Block& block : blocks_) std::free(block.data);
  }
  // Memory of just this size, or null.
  void* take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto block = blocks_.rbegin(); block != blocks_.rend(); ++block) {
      if (block->bytes != bytes) continue;
      void* data = block->data;
      total_ -= bytes;
      blocks_.erase(std::next(block).base());
      return data;
    }
    return nullptr;
  }
  // Frees what has not been asked for longest, if it would be more than LIMIT in all.
  void give(void* data, size_t bytes) {
    if (bytes > LIMIT) return std::free(data);
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!blocks_.empty() && total_ + bytes > LIMIT) {
      total_ -= blocks_.front().bytes;
      std::free(blocks_.front().data);
      blocks_.pop_front();
    }
    try {
      blocks_.push_back({data, bytes});
      total_ += bytes;
    } catch (const std::bad_alloc&) {
      std::free(data);
    }
  }

 private:
  static constexpr size_t LIMIT = size_t(64) << 20;
  struct Block {
    void* data;
    size_t bytes;
  };
  std::mutex mutex_;
  std::deque<Block> blocks_;
  size_t total_ = 0;
};

inline Kept& kept() {
  static Kept memory;
  return memory;
}

// Scratch memory of one call; what it holds at first is of no use.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t count) {
    constexpr size_t HUGE_PAGE = size_t(1) << 21;
    const size_t bytes = count * sizeof(T);
    const size_t alignment = bytes >= 2 * HUGE_PAGE ? HUGE_PAGE : 64;
    bytes_ = std::max((bytes + alignment - 1) / alignment, size_t(1)) * alignment;
    data_ = static_cast<T*>(kept().take(bytes_));
    if (data_) return;
    data_ = static_cast<T*>(std::aligned_alloc(alignment, bytes_));
    if (!data_) throw std::bad_alloc();
    advise_huge_pages(data_, bytes_);
  }
  ~Buffer() { kept().give(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
  size_t bytes_;
};
struct Arguments {
  const void* query;
  const void* key;
  const uint8_t* key_mask;
  const int32_t* heads;
  const int32_t* first_sizes;
  const int32_t* second_sizes;
  int32_t* first_count;
  int32_t* first_index;
  int32_t* second_count;
  int32_t* second_index;
  int64_t batch;
  int64_t num_heads;
  int64_t group;
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
  int64_t first_width;
  int64_t second_width;
  int64_t query_offset;
  int64_t window;
  int64_t causal;
  int64_t threads;
  float scale;
};

struct Rows {  // one tensor [B, H, N, D], strides in elements, the last one 1
  const input* data;
  int64_t batch, head, row;
  const input* at(int64_t b, int64_t h, int64_t n) const {
    return data + b * batch + h * head + n * row;
  }
};

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline bool key_is_real(const Arguments& a, int64_t b, int64_t j) {
  return !a.key_mask || a.key_mask[b * a.num_keys + j];
}

inline bool query_is_real(const Arguments& a, int64_t b, int64_t n) {
  // Padding can be read off for queries too where their positions are keys.
  return a.num_keys < a.query_offset + a.num_queries || key_is_real(a, b, a.query_offset + n);
}

// What is no padding, per batch row.
struct Extent {
  std::vector<int64_t> first_key;  // 0 where there is none
  std::vector<int64_t> last_query;  // row of `query`, -1 where there is none

  explicit Extent(const Arguments& a) : first_key(a.batch), last_query(a.batch) {
    for (int64_t b = 0; b < a.batch; ++b) {
      int64_t first = 0, last = a.num_queries - 1;
      while (first < a.num_keys && !key_is_real(a, b, first)) ++first;
      while (last >= 0 && !query_is_real(a, b, last)) --last;
      first_key[b] = first == a.num_keys ? 0 : first;
      last_query[b] = last;
    }
  }
};

constexpr int64_t SINK_COLUMNS = 30;
constexpr int64_t LOCAL_DIAGONALS = 100;
constexpr int64_t CHUNK = 4096;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

// Marks the `count` largest of `n` values; ties go to the smaller index, NaN counts as largest.
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

// Positions of the marks, ascending, zeros behind them.
void write_list(int32_t* count, int32_t* entries, const uint8_t* marks, int64_t n, int64_t width) {
  int64_t written = 0;
  for (int64_t i = 0; i < n && written < width; ++i)
    if (marks[i]) entries[written++] = static_cast<int32_t>(i);
  *count = static_cast<int32_t>(written);
  std::fill(entries + written, entries + width, 0);
}

// ---- vertical-slash ----

constexpr int LAST_QUERIES = 64;
static_assert(LAST_QUERIES == BLOCK, "a tile of transposed scores is BLOCK x BLOCK");

// Floats per row of a tile of scores: products come in whole column steps.
template <int QUERIES>
constexpr int SCORE_WIDTH = QUERIES < COLUMN_STEP ? COLUMN_STEP : QUERIES;

inline uint64_t low_bits(int64_t count) {
  return count <= 0 ? 0 : count >= 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
}

// Queries as a B operand, [DEPTH, BLOCK] words; row(q): row q of the input, or null. Their products
// are to be multiplied with exponent_of_product(): the sign of the scale is in them.
template <typename Row>
void pack_queries(const Arguments& a, word* out, packed* staging, const Row& row) {
  pack_keys(out, staging, [&](int q) { return a.scale != 0 ? row(q) : nullptr; });
  if (a.scale < 0) {
    for (int n = 0; n < DEPTH * BLOCK; ++n)
      out[n] = -out[n];
  }
}

// The last queries of one head, as a B operand [DEPTH, LAST_QUERIES].
template <int QUERIES = LAST_QUERIES>
void pack_last_queries(const Arguments& a, word* out, packed* staging, const Rows& query, int64_t b,
                       int64_t head, int64_t first_row) {
  pack_queries(a, out, staging, [&](int q) -> const input* {
    return q < QUERIES && first_row + q >= 0 ? query.at(b, head, first_row + q) : nullptr;
  });
}

inline vec exponent_of_product(const Arguments& a) {
  return set1(a.scale == 0 ? 1.0f : LOG2E * std::abs(a.scale));
}

// Products of the keys of one block with the last queries, [BLOCK, SCORE_WIDTH], -inf where the mask
// hides the key.
template <int QUERIES = LAST_QUERIES>
void score_block(const Arguments& a, const word* queries, packed* staging, const Rows& key,
                 int64_t b, int64_t kv_head, int64_t first, int64_t first_row, float* scores) {
  constexpr int WIDTH = SCORE_WIDTH<QUERIES>;
  const int count = static_cast<int>(std::min<int64_t>(BLOCK, a.num_keys - first));
  const bool in_place = HEAD_DIM == DEPTH * PAIR && count == BLOCK && a.key_row % PAIR == 0;
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
    float* row = scores + r * WIDTH;
    for (int n = 0; n < QUERIES; n += LANES)
      store(row + n, keep(visible >> n, load(row + n)));
  }
}

// The exponentials of one block, fp16 [BLOCK, QUERIES], relative to the greatest score of each
// query in it; greatest (exponents of 2) and total of them: [QUERIES].
template <int QUERIES = LAST_QUERIES>
void exponentiate_block(const float* scores, vec exponent, uint16_t* weights, float* greatest,
                        float* total) {
  constexpr int VECTORS_PER_ROW = QUERIES / LANES, WIDTH = SCORE_WIDTH<QUERIES>;
  vec most[VECTORS_PER_ROW], sum[VECTORS_PER_ROW];
  for (int v = 0; v < VECTORS_PER_ROW; ++v)
    most[v] = set1(NEGATIVE_INFINITY), sum[v] = set1(0.0f);
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

// What the exponentials of each block are to be multiplied with to be shares of the softmax, in the
// place of `greatest`; both arrays are [blocks, QUERIES]. Zeros for a query that sees nothing.
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

struct Sums {
  Extent extent;
  int64_t chunks, wave, stride, blocks;
  Buffer<word> queries;  // [wave, DEPTH, LAST_QUERIES] words: B operands
  Buffer<uint16_t> weights;  // [wave, blocks, BLOCK, LAST_QUERIES] fp16
  Buffer<float> factors, totals;  // [wave, blocks, LAST_QUERIES]
  Buffer<float> columns;  // [B, h, num_keys]
  Buffer<float> diagonals;  // [B, h, chunks, stride]: by distance to the chunk's last key

  explicit Sums(const Arguments& a)
      : extent(a),
        chunks((a.num_keys + CHUNK - 1) / CHUNK),
        wave(std::min(a.batch * a.num_heads, (2 * a.threads + chunks - 1) / chunks)),
        stride(CHUNK + 2 * BLOCK),
        blocks((a.num_keys + BLOCK - 1) / BLOCK),
        queries(wave * DEPTH * LAST_QUERIES),
        weights(wave * blocks * BLOCK * LAST_QUERIES),
        factors(wave * blocks * LAST_QUERIES),
        totals(wave * blocks * LAST_QUERIES),
        columns(a.batch * a.num_heads * a.num_keys),
        diagonals(a.batch * a.num_heads * chunks * stride) {}

  // Row of the first of the last queries.
  int64_t first_row(int64_t b) const { return extent.last_query[b] - (LAST_QUERIES - 1); }
};

struct EstimateScratch {
  Buffer<packed> staging;
  Buffer<float> scores, skewed;
  std::vector<uint32_t> order, sorted;
  std::vector<float> values;
  std::vector<uint8_t> marks, blocks;

  EstimateScratch()
      : staging(BLOCK * DEPTH * PAIR), scores(BLOCK * BLOCK), skewed(BLOCK * 2 * BLOCK) {
    std::memset(skewed.get(), 0, BLOCK * 2 * BLOCK * sizeof(float));
  }
};

// First pass over a chunk: the weights of its keys, relative to each block's greatest. slot: of the
// head in its wave.
void weigh_chunk(const Arguments& a, const Sums& sums, EstimateScratch& s, int64_t b, int64_t h,
                 int64_t slot, int64_t chunk) {
  const Rows key{static_cast<const input*>(a.key), a.key_batch, a.key_head, a.key_row};
  const word* queries = sums.queries.get() + slot * DEPTH * LAST_QUERIES;
  const vec exponent = exponent_of_product(a);
  const int64_t stop = std::min(sums.blocks, (chunk + 1) * (CHUNK / BLOCK));
  for (int64_t n = chunk * (CHUNK / BLOCK); n < stop; ++n) {
    const int64_t block = slot * sums.blocks + n;
    score_block(a, queries, s.staging.get(), key, b, a.heads[h] / a.group, n * BLOCK,
                sums.first_row(b), s.scores.get());
    exponentiate_block(s.scores.get(), exponent, sums.weights.get() + block * BLOCK * LAST_QUERIES,
                       sums.factors.get() + block * LAST_QUERIES,
                       sums.totals.get() + block * LAST_QUERIES);
  }
}

// Second pass over a chunk: shares of the softmax, summed per key and per distance.
void sum_chunk(const Arguments& a, const Sums& sums, EstimateScratch& s, int64_t head,
               int64_t slot, int64_t chunk) {
  constexpr int VECTORS_PER_ROW = LAST_QUERIES / LANES;
  const int64_t start = chunk * CHUNK, stop = std::min(a.num_keys, start + CHUNK);
  float* columns = sums.columns.get() + head * a.num_keys;
  float* diagonals = sums.diagonals.get() + (head * sums.chunks + chunk) * sums.stride;
  std::fill_n(diagonals, sums.stride, 0.0f);
  for (int64_t first = start; first < stop; first += BLOCK) {
    const int64_t block = slot * sums.blocks + first / BLOCK;
    const uint16_t* weights = sums.weights.get() + block * BLOCK * LAST_QUERIES;
    vec factor[VECTORS_PER_ROW];
    for (int v = 0; v < VECTORS_PER_ROW; ++v)
      factor[v] = load(sums.factors.get() + block * LAST_QUERIES + v * LANES);
    float* skewed = s.skewed.get();
    for (int r = 0; r < BLOCK; ++r) {
      float* target = skewed + r * 2 * BLOCK + (BLOCK - 1 - r);
      vec sum = set1(0.0f);
      for (int v = 0; v < VECTORS_PER_ROW; ++v) {
        const vec share =
            mul(load(weights + r * LAST_QUERIES + v * LANES, float16_tag{}), factor[v]);
        store(target + v * LANES, share);
        sum = add(sum, share);
      }
      if (first + r < stop) columns[first + r] = reduce_add(sum);
    }
    // Entry e of the skewed sums: distance e + (p0 - first - 63), p0 the first query's position.
    float* out = diagonals + (start + CHUNK - BLOCK - first);
    for (int n = 0; n < 2 * BLOCK; n += LANES) {
      vec sum = load(out + n);
      for (int r = 0; r < BLOCK; ++r) sum = add(sum, load(skewed + r * 2 * BLOCK + n));
      store(out + n, sum);
    }
  }
}

void select_vertical_slash(const Arguments& a, const Sums& sums, EstimateScratch& s, int64_t b,
                           int64_t h) {
  const int64_t head = b * a.num_heads + h, n = a.num_keys;
  s.marks.resize(n);
  float* columns = sums.columns.get() + head * n;
  const int64_t sink = sums.extent.first_key[b];
  for (int64_t j = sink; j < std::min(n, sink + SINK_COLUMNS); ++j) columns[j] = INFINITE;
  mark_largest(s.marks.data(), columns, n, std::max<int64_t>(SINK_COLUMNS, a.first_sizes[h]),
               s.order, s.sorted);
  write_list(a.first_count + head, a.first_index + head * a.first_width, s.marks.data(), n,
             a.first_width);

  s.values.assign(n, 0.0f);
  const int64_t p0 = a.query_offset + sums.first_row(b);
  for (int64_t c = sums.chunks - 1; c >= 0; --c) {  // the nearest keys first
    const float* diagonals = sums.diagonals.get() + (head * sums.chunks + c) * sums.stride;
    const int64_t base = p0 - (c + 1) * CHUNK + 1;  // distance of entry 0
    const int64_t low = std::max<int64_t>(0, -base);
    for (int64_t e = low; e < sums.stride; ++e)
      s.values[std::min(n - 1, base + e)] += diagonals[e];
  }
  for (int64_t d = 0; d < std::min(n, LOCAL_DIAGONALS); ++d) s.values[d] = INFINITE;
  mark_largest(s.marks.data(), s.values.data(), n,
               std::max<int64_t>(LOCAL_DIAGONALS, a.second_sizes[h]), s.order, s.sorted);
  const int64_t reach = a.window > 0 ? std::min(n, a.window) : n;
  s.blocks.assign((n + BLOCK - 1) / BLOCK + 1, 0);
  s.blocks[0] = 1;
  for (int64_t d = 0; d < reach; ++d) {
    if (!s.marks[d]) continue;
    s.blocks[d / BLOCK] = 1;
    if (d % BLOCK) s.blocks[d / BLOCK + 1] = 1;
  }
  write_list(a.second_count + head, a.second_index + head * a.second_width, s.blocks.data(),
             static_cast<int64_t>(s.blocks.size()), a.second_width);
}

int estimate_vertical_slash(const Arguments& a) {
  const Rows query{static_cast<const input*>(a.query), a.query_batch, a.query_head, a.query_row};
  const Sums sums(a);
  const int64_t heads = a.batch * a.num_heads;
#pragma omp parallel num_threads(a.threads)
  {
    EstimateScratch s;
    for (int64_t first = 0; first < heads; first += sums.wave) {
      const int64_t count = std::min(sums.wave, heads - first);
#pragma omp for schedule(static)
      for (int64_t slot = 0; slot < count; ++slot) {
        const int64_t b = (first + slot) / a.num_heads, h = (first + slot) % a.num_heads;
        pack_last_queries(a, sums.queries.get() + slot * DEPTH * LAST_QUERIES, s.staging.get(),
                          query, b, a.heads[h], sums.first_row(b));
      }
      {
        const TileScope tiles;
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < count * sums.chunks; ++t) {
          const int64_t slot = t / sums.chunks, head = first + slot;
          weigh_chunk(a, sums, s, head / a.num_heads, head % a.num_heads, slot, t % sums.chunks);
        }
      }
#pragma omp for schedule(static)
      for (int64_t slot = 0; slot < count; ++slot)
        find_factors(sums.factors.get() + slot * sums.blocks * LAST_QUERIES,
                     sums.totals.get() + slot * sums.blocks * LAST_QUERIES, sums.blocks);
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < count * sums.chunks; ++t) {
        const int64_t slot = t / sums.chunks;
        sum_chunk(a, sums, s, first + slot, slot, t % sums.chunks);
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < heads; ++t)
      select_vertical_slash(a, sums, s, t / a.num_heads, t % a.num_heads);
  }
  return 0;
}

// ---- block top-k ----

constexpr int POOLED = (HEAD_DIM + LANES - 1) / LANES * LANES;  // floats of one pooled row

// Sum of the rows [first, stop) of one head that are no padding; returns how many there are.
template <typename Real>
float sum_rows(float* out, const Rows& rows, int64_t b, int64_t head, int64_t first, int64_t stop,
               const Real& real) {
  std::fill_n(out, POOLED, 0.0f);
  float count = 0.0f;
  for (int64_t n = first; n < stop; ++n) {
    if (!real(n)) continue;
    const input* row = rows.at(b, head, n);
    int d = 0;
    for (; d + LANES <= HEAD_DIM; d += LANES)
      store(out + d, add(load(out + d), load(row + d, input_tag{})));
    if (d < HEAD_DIM) {
      input tail[LANES] = {};
      std::memcpy(tail, row + d, (HEAD_DIM - d) * sizeof(input));
      store(out + d, add(load(out + d), load(tail, input_tag{})));
    }
    count += 1.0f;
  }
  return count;
}

// Means over groups of `repeat` blocks, of sums [blocks, POOLED] with their counts. Block 0 of
// `sums` is the `lead`-th block of its group.
void pool_means(std::vector<float>& means, const float* sums, const float* counts, int64_t blocks,
                int64_t lead, int64_t repeat) {
  const int64_t groups = (lead + blocks + repeat - 1) / repeat;
  means.assign(groups * POOLED, 0.0f);
  for (int64_t group = 0; group < groups; ++group) {
    float count = 0.0f;
    float* mean = means.data() + group * POOLED;
    const int64_t stop = std::min(blocks, (group + 1) * repeat - lead);
    for (int64_t n = std::max<int64_t>(0, group * repeat - lead); n < stop; ++n) {
      for (int d = 0; d < POOLED; d += LANES)
        store(mean + d, add(load(mean + d), load(sums + n * POOLED + d)));
      count += counts[n];
    }
    const vec total = set1(std::max(count, 1.0f));
    for (int d = 0; d < POOLED; d += LANES) store(mean + d, divide(load(mean + d), total));
  }
}

// Lists of the key blocks of largest pooled score, for all query blocks of one head.
void select_blocks(const Arguments& a, EstimateScratch& s, const float* query_sums,
                   const float* query_counts, const float* key_sums, const float* key_counts,
                   int64_t key_blocks, int64_t b, int64_t h) {
  const int64_t repeat = a.second_sizes[h] / BLOCK, first = a.query_offset / BLOCK;
  const int64_t lead = first % repeat;
  std::vector<float> queries, keys;
  pool_means(queries, query_sums, query_counts, a.num_blocks, lead, repeat);
  pool_means(keys, key_sums, key_counts, key_blocks, 0, repeat);
  const int64_t groups = static_cast<int64_t>(queries.size()) / POOLED;
  const int64_t columns = static_cast<int64_t>(keys.size()) / POOLED;
  s.values.resize(columns);
  s.marks.resize(columns);
  s.blocks.resize(key_blocks);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t row = group + first / repeat;  // on the absolute grid of pooled blocks
    const float* query = queries.data() + group * POOLED;
    const auto allowed = [&](int64_t column) {
      const int64_t distance = row - column;
      return (!a.causal || distance >= 0) &&
          (a.window <= 0 || (distance - 1) * repeat * BLOCK < a.window - 1);
    };
    for (int64_t column = 0; column < columns; ++column) {
      if (!allowed(column)) {
        s.values[column] = NEGATIVE_INFINITY;
        continue;
      }
      const float* key = keys.data() + column * POOLED;
      vec sum = set1(0.0f);
      for (int d = 0; d < POOLED; d += LANES) sum = fma(load(query + d), load(key + d), sum);
      s.values[column] = a.causal && column == row ? INFINITE : reduce_add(sum);
    }
    mark_largest(s.marks.data(), s.values.data(), columns, a.first_sizes[h], s.order, s.sorted);
    for (int64_t n = 0; n < repeat; ++n) {
      const int64_t i = group * repeat + n - lead;  // query block
      if (i < 0 || i >= a.num_blocks) continue;
      for (int64_t kb = 0; kb < key_blocks; ++kb) {
        const bool chosen = s.marks[kb / repeat] && allowed(kb / repeat);
        s.blocks[kb] = a.causal ? (chosen && kb <= first + i) || kb == first + i : chosen;
      }
      const int64_t list = (b * a.num_heads + h) * a.num_blocks + i;
      write_list(a.first_count + list, a.first_index + list * a.first_width, s.blocks.data(),
                 key_blocks, a.first_width);
    }
  }
}

int estimate_block_top_k(const Arguments& a) {
  const int64_t key_blocks = (a.num_keys + BLOCK - 1) / BLOCK;
  const int64_t first = a.query_offset / BLOCK;
  const int64_t heads = a.batch * a.num_heads;
  const Rows query{static_cast<const input*>(a.query), a.query_batch, a.query_head, a.query_row};
  const Rows key{static_cast<const input*>(a.key), a.key_batch, a.key_head, a.key_row};
  const Buffer<float> query_sums(heads * a.num_blocks * POOLED), query_counts(heads * a.num_blocks);
  const Buffer<float> key_sums(a.batch * a.kv_heads * key_blocks * POOLED);
  const Buffer<float> key_counts(a.batch * a.kv_heads * key_blocks);
#pragma omp parallel num_threads(a.threads)
  {
    EstimateScratch s;
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < a.batch * a.kv_heads * key_blocks; ++t) {
      const int64_t b = t / key_blocks / a.kv_heads, kb = t % key_blocks;
      key_counts.get()[t] = sum_rows(
          key_sums.get() + t * POOLED, key, b, t / key_blocks % a.kv_heads, kb * BLOCK,
          std::min(a.num_keys, (kb + 1) * BLOCK), [&](int64_t j) { return key_is_real(a, b, j); });
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < heads * a.num_blocks; ++t) {
      const int64_t b = t / a.num_blocks / a.num_heads, h = t / a.num_blocks % a.num_heads;
      const int64_t low = (first + t % a.num_blocks) * BLOCK - a.query_offset;
      query_counts.get()[t] = sum_rows(
          query_sums.get() + t * POOLED, query, b, a.heads[h], std::max<int64_t>(0, low),
          std::min(a.num_queries, low + BLOCK), [&](int64_t n) {
            return query_is_real(a, b, n);
          });
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < heads; ++t) {
      const int64_t b = t / a.num_heads, h = t % a.num_heads;
      const int64_t g = b * a.kv_heads + a.heads[h] / a.group;
      select_blocks(a, s, query_sums.get() + t * a.num_blocks * POOLED,
                    query_counts.get() + t * a.num_blocks, key_sums.get() + g * key_blocks * POOLED,
                    key_counts.get() + g * key_blocks, key_blocks, b, h);
    }
  }
  return 0;
}

}  // namespace

extern "C" int vertical_slash_index(const Arguments* arguments) {
  try {
    return estimate_vertical_slash(*arguments);
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

extern "C" int block_top_k_index(const Arguments* arguments) {
  try {
    return estimate_block_top_k(*arguments);
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
