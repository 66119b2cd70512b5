// mpass CPU kernels, generated for: sampled, bfloat16, D=64, avx512_bf16.
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
using input = uint16_t;
using input_tag = bfloat16_tag;
using packed_tag = bfloat16_tag;

constexpr float LOG2E = 1.44269504088896341f;
constexpr int BLOCK = 64;
constexpr int STRIP = 4;
constexpr int HEAD_DIM = 64, VALUE_DIM = 64;
constexpr int DEPTH = 32, VALUE_WIDTH = 64;

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

constexpr int ROW_STEP = 2, COLUMN_STEP = LANES;
constexpr int ROWS = 6;  // 6 x 4 accumulators, 4 of B, 1 of A
constexpr int VECTORS = 4;

struct TileScope {};

// Bytes to fetch per step, so that a product of BLOCK rows and `steps` x `columns` of B fetches
// `words`: no more at a time, or the fetches hold up the loads of the product itself.
constexpr int fetch_step(int words, int steps, int columns) {
  const int passes = std::max(1, columns / (VECTORS * LANES)) * ((BLOCK + ROWS - 1) / ROWS);
  return (words * int(sizeof(word)) + passes * steps - 1) / (passes * steps);
}

// acc += a.even * b.even + a.odd * b.odd, per lane
inline vec dot(vec acc, word a, __m512i b) {
  return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
}
inline __m512i load_words(const word* b) { return _mm512_loadu_si512(b); }

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
  const float* coverage;
  const int32_t* rows;
  const int32_t* columns;
  int32_t* block_count;
  int32_t* block_index;
  int32_t* column_count;
  int32_t* column_index;
  int64_t batch;
  int64_t num_heads;
  int64_t group;
  int64_t num_queries;
  int64_t num_keys;
  int64_t num_blocks;
  int64_t query_batch;
  int64_t query_head;
  int64_t query_row;
  int64_t key_batch;
  int64_t key_head;
  int64_t key_row;
  int64_t list_width;
  int64_t column_width;
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

constexpr int LINES = 12;  // of one product
constexpr int LINE_STEP = 2;  // lines are multiplied in steps of

// A tile is written askew where distances are summed, too: line r begins LINES - 1 - r floats into
// its row, so that a column of the tile is one distance. The rest of the row stays zero.
constexpr bool DISTANCES = false;
constexpr int TILE_ROW = DISTANCES ? (BLOCK + LINES + LANES - 1) / LANES * LANES : BLOCK;
constexpr int LINE_STRIDE = DISTANCES ? TILE_ROW - 1 : BLOCK;
constexpr int FIRST_LINE = DISTANCES ? LINES - 1 : 0, TILE = LINES * TILE_ROW;
constexpr int SLOTS = (LINES + LANES - 1) / LANES * LANES;  // numbers of one tile, one per line

// Sums of one head, taken at the same time: a fixed number, so that no number of threads shows.
constexpr int PARTS = 4;

inline uint64_t low_bits(int64_t count) {
  return count <= 0 ? 0 : count >= 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
}

// The keys of the kv heads that are asked for.
class KeyPanels {
  std::vector<int64_t> kv_heads_, slot_;  // before what count_slots() fills them for

 public:
  const int64_t panels, slots;

  explicit KeyPanels(const Arguments& a)
      : panels((a.num_keys + BLOCK - 1) / BLOCK),
        slots(count_slots(a)),
        words_(a.batch * slots * panels * DEPTH * BLOCK),
        real_(a.batch * panels) {
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t j = 0; j < a.num_keys; ++j)
        if (key_is_real(a, b, j)) real_[b * panels + j / BLOCK] |= uint64_t(1) << j % BLOCK;
  }

  // The t-th of batch * slots * panels.
  void pack(const Arguments& a, const Rows& key, packed* staging, int64_t t) {
    const int64_t b = t / panels / slots, head = kv_heads_[t / panels % slots];
    const int64_t first = t % panels * BLOCK;
    const uint64_t real = real_keys(b, t % panels);
    pack_keys(words_.get() + t * DEPTH * BLOCK, staging, [&](int r) -> const input* {
      return real >> r & 1 ? key.at(b, head, first + r) : nullptr;
    });
  }

  const word* of(int64_t b, int64_t h) const {
    return words_.get() + (b * slots + slot_[h]) * panels * DEPTH * BLOCK;
  }
  uint64_t real_keys(int64_t b, int64_t panel) const { return real_[b * panels + panel]; }

 private:
  int64_t count_slots(const Arguments& a) {
    for (int64_t h = 0; h < a.num_heads; ++h) {
      const int64_t head = a.heads[h] / a.group;
      const auto found = std::find(kv_heads_.begin(), kv_heads_.end(), head);
      slot_.push_back(found - kv_heads_.begin());
      if (found == kv_heads_.end()) kv_heads_.push_back(head);
    }
    return static_cast<int64_t>(kv_heads_.size());
  }

  Buffer<word> words_;
  std::vector<uint64_t> real_;
};

struct LineScratch {
  Buffer<packed> rows;
  Buffer<float> strip;  // [panels, LINES, TILE_ROW]
  Buffer<float> factor, total;  // [panels, SLOTS]

  explicit LineScratch(int64_t panels)
      : rows(BLOCK * DEPTH * PAIR),
        strip(panels * TILE),
        factor(panels * SLOTS),
        total(panels * SLOTS) {
    if (DISTANCES) std::fill_n(strip.get(), panels * TILE, 0.0f);
  }
};

// Lines of one product, in ascending order: line r sees the real keys low[r] <= j < high[r].
struct Lines {
  int count;
  int64_t low[LINES], high[LINES];
  bool exists[LINES];

  // The lines that see anything of a panel are neighbours.
  int first_of(int64_t panel) const {
    int r = 0;
    while (r < count && high[r] <= panel * BLOCK) ++r;
    return r;
  }
  int stop_of(int64_t panel) const {
    int r = count;
    while (r > 0 && low[r - 1] >= (panel + 1) * BLOCK) --r;
    return r;
  }
  uint64_t visible(int r, int64_t panel) const {
    if (!exists[r]) return 0;
    return low_bits(high[r] - panel * BLOCK) & ~low_bits(low[r] - panel * BLOCK);
  }
};

// row_at(r): row of `query`, which may lie before its first or be padding.
template <typename RowAt>
Lines pack_lines(const Arguments& a, LineScratch& s, const Rows& query, int64_t b, int64_t h,
                 int count, const RowAt& row_at) {
  Lines lines;
  lines.count = count;
  for (int r = 0; r < LINES; ++r) {
    packed* out = s.rows.get() + r * DEPTH * PAIR;
    const int64_t n = r < count ? row_at(r) : -1;
    lines.exists[r] = n >= 0 && query_is_real(a, b, n);
    if (lines.exists[r] && a.scale != 0)
      pack_row(out, query.at(b, a.heads[h], n), HEAD_DIM, DEPTH * PAIR);
    else
      std::memset(out, 0, DEPTH * sizeof(word));
    const int64_t p = a.query_offset + n;
    lines.low[r] = a.window > 0 ? std::max<int64_t>(0, p - a.window + 1) : 0;
    lines.high[r] = a.causal ? std::min(a.num_keys, p + 1) : a.num_keys;
  }
  return lines;
}

// Exponentials of some lines of a tile, relative to the greatest exponent of each in it; greatest
// and total of them: [SLOTS].
void exponentiate_tile(float* tile, const Lines& lines, int first, int stop, int64_t panel,
                       uint64_t real, float scale, float* greatest, float* total) {
  const vec factor = set1(scale), sign = set1(scale < 0 ? -1.0f : 1.0f);
  std::fill_n(greatest, SLOTS, NEGATIVE_INFINITY);
  std::fill_n(total, SLOTS, 0.0f);
  for (int r = first; r < stop; ++r) {
    float* line = tile + FIRST_LINE + r * LINE_STRIDE;
    const uint64_t visible = lines.visible(r, panel) & real;
    if (visible != ~uint64_t(0)) {
      for (int n = 0; n < BLOCK; n += LANES)
        store(line + n, mul(keep(visible >> n, mul(load(line + n), sign)), sign));
    }
    vec most = set1(NEGATIVE_INFINITY), sum = set1(0.0f);
    for (int n = 0; n < BLOCK; n += LANES) most = maximum(mul(load(line + n), factor), most);
    greatest[r] = reduce_max(most);
    const vec shift = finite_or_zero(set1(greatest[r]));
    for (int n = 0; n < BLOCK; n += LANES) {
      const vec e = exp2_vec(sub(mul(load(line + n), factor), shift));
      store(line + n, e);
      sum = add(sum, e);
    }
    total[r] = reduce_add(sum);
  }
}

// What the exponentials of each tile are to be multiplied with to be shares of the softmax, in the
// place of the greatest exponents; seen[r]: whether line r sees a key. One with NaN counts as none.
void find_factors(float* greatest, const float* total, int64_t panels, int count, uint8_t* seen) {
  for (int n = 0; n < SLOTS; n += LANES) {
    vec most = set1(NEGATIVE_INFINITY), sum = set1(0.0f);
    for (int64_t t = n; t < panels * SLOTS; t += SLOTS) most = maximum(most, load(greatest + t));
    most = finite_or_zero(most);
    for (int64_t t = n; t < panels * SLOTS; t += SLOTS) {
      const vec factor = exp2_vec(sub(load(greatest + t), most));
      store(greatest + t, factor);
      sum = fma(factor, load(total + t), sum);
    }
    float inverse[LANES];
    store(inverse, sum);
    for (int r = 0; r < LANES; ++r) {
      inverse[r] = inverse[r] > 0.0f ? 1.0f / inverse[r] : 0.0f;
      if (n + r < count) seen[n + r] = inverse[r] > 0.0f;
    }
    for (int64_t t = n; t < panels * SLOTS; t += SLOTS)
      store(greatest + t, mul(load(greatest + t), load(inverse)));
  }
}

// sums[c] += factor[r] * tile[r][c] over some lines.
template <int COLUMNS>
void add_tile(float* sums, const float* tile, int stride, const float* factor, int first,
              int stop) {
  vec sum[COLUMNS / LANES];
  for (int v = 0; v < COLUMNS / LANES; ++v) sum[v] = load(sums + v * LANES);
  for (int r = first; r < stop; ++r) {
    if (!(factor[r] > 0.0f)) continue;  // nothing to add, or NaN
    const vec share = set1(factor[r]);
    for (int v = 0; v < COLUMNS / LANES; ++v)
      sum[v] = fma(load(tile + r * stride + v * LANES), share, sum[v]);
  }
  for (int v = 0; v < COLUMNS / LANES; ++v) store(sums + v * LANES, sum[v]);
}

// Adds the softmax weights of the lines of one product to `by_key` and, where DISTANCES are summed,
// to `by_distance`: its entry e is the distance `position of line 0 + LINES - 1 - e`.
void add_lines(const Arguments& a, LineScratch& s, const KeyPanels& keys, const Lines& lines,
               int64_t b, int64_t h, float* by_key, float* by_distance, uint8_t* seen) {
  const int64_t low = lines.low[0] / BLOCK;
  const int64_t reach = std::max<int64_t>(0, lines.high[lines.count - 1]);
  const int64_t high = std::max(low, (reach + BLOCK - 1) / BLOCK);
  const int rows = std::min<int>(LINES, round_up(lines.count, LINE_STEP));
  const float scale = (a.scale == 0 ? 1.0f : a.scale) * LOG2E;
  const word* row_words = reinterpret_cast<const word*>(s.rows.get());
  for (int64_t panel = low; panel < high; ++panel) {
    float* tile = s.strip.get() + (panel - low) * TILE;
    const word* words = keys.of(b, h) + panel * DEPTH * BLOCK;
    multiply<false>(row_words, DEPTH, &words, 1, DEPTH, BLOCK, tile + FIRST_LINE, LINE_STRIDE, rows,
                    BLOCK, nullptr);
    exponentiate_tile(tile, lines, lines.first_of(panel), lines.stop_of(panel), panel,
                      keys.real_keys(b, panel), scale, s.factor.get() + (panel - low) * SLOTS,
                      s.total.get() + (panel - low) * SLOTS);
  }
  find_factors(s.factor.get(), s.total.get(), high - low, lines.count, seen);
  for (int64_t panel = low; panel < high; ++panel) {
    const float* tile = s.strip.get() + (panel - low) * TILE;
    const float* factor = s.factor.get() + (panel - low) * SLOTS;
    const int first = lines.first_of(panel), stop = lines.stop_of(panel);
    add_tile<BLOCK>(by_key + panel * BLOCK, tile + FIRST_LINE, LINE_STRIDE, factor, first, stop);
    if (DISTANCES)
      add_tile<TILE_ROW>(by_distance + panel * BLOCK, tile, TILE_ROW, factor, first, stop);
  }
}

// A score, 0 or more, and the place it stands at, as one number: greater scores first, and of equal
// ones the smaller place. A total order whatever the bits of the score say.
using Ranked = uint64_t;

inline Ranked rank_score(float score, int64_t place) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  return static_cast<Ranked>(bits) << 32 | static_cast<uint32_t>(~place);
}

inline float score_of(Ranked ranked) {
  const uint32_t bits = static_cast<uint32_t>(ranked >> 32);
  float score;
  std::memcpy(&score, &bits, sizeof(score));
  return score;
}

inline int64_t place_of(Ranked ranked) { return static_cast<uint32_t>(~ranked); }

// The largest entries, moved to the front, for as long as `within(their sum)`; returns how many.
// The one that follows them is the next in order. Each step halves what is left: O(count).
template <typename Within>
int64_t take_largest(Ranked* entries, int64_t count, const Within& within) {
  int64_t first = 0, stop = count;
  double held = 0.0;
  while (first < stop) {
    const int64_t middle = first + (stop - first) / 2;
    std::nth_element(entries + first, entries + middle, entries + stop, std::greater<Ranked>());
    double sum = held;
    for (int64_t n = first; n <= middle; ++n) sum += score_of(entries[n]);
    if (within(static_cast<float>(sum))) held = sum, first = middle + 1;
    else stop = middle;
  }
  return first;
}

// Rows spread evenly over the real ones of a batch row, the last one included.
struct Spread {
  int64_t first = 0, count, rows;

  Spread(const Arguments& a, const Extent& extent, int64_t b, int64_t h)
      : count(extent.last_query[b] + 1), rows(a.rows[h]) {
    const bool padding_shows = a.num_keys >= a.query_offset + a.num_queries;
    if (padding_shows && count > 0)
      first = std::max<int64_t>(0, extent.first_key[b] - a.query_offset);
    count -= first;
  }
  int64_t at(int64_t n) const { return first + (n + 1) * count / rows - 1; }
};

// Attention of every PARTS-th product of rows of one head, summed per key.
void sum_part(const Arguments& a, LineScratch& s, const KeyPanels& keys, const Rows& query,
              const Spread& spread, int64_t b, int64_t h, int64_t part, float* sums) {
  uint8_t seen[LINES];
  std::fill_n(sums, keys.panels * BLOCK, 0.0f);
  for (int64_t n = part * LINES; n < spread.rows; n += PARTS * LINES) {
    const int count = static_cast<int>(std::min<int64_t>(LINES, spread.rows - n));
    const Lines lines =
        pack_lines(a, s, query, b, h, count, [&](int r) { return spread.at(n + r); });
    add_lines(a, s, keys, lines, b, h, sums, nullptr, seen);
  }
}

// The fewest keys that hold the coverage, within the limit; sums: of all parts.
void write_columns(const Arguments& a, Ranked* entries, uint8_t* marks, const float* sums,
                   int64_t stride, int64_t b, int64_t h) {
  int64_t count = 0;
  double total = 0.0;
  for (int64_t j = 0; j < a.num_keys; ++j) {
    float sum = 0.0f;
    for (int64_t part = 0; part < PARTS; ++part) sum += sums[part * stride + j];
    if (!(sum > 0.0f)) continue;
    entries[count++] = rank_score(sum, j);
    total += sum;
  }
  const float coverage = a.coverage[h], enough = coverage * static_cast<float>(total);
  // Those that do not hold enough, and the next one.
  const int64_t kept = std::min(count, 1 + take_largest(entries, count, [&](float sum) {
    return coverage >= 1.0f || sum < enough;
  }));
  const int64_t room = std::min<int64_t>(kept, a.columns[h]);
  if (room < kept)
    std::nth_element(entries, entries + room, entries + kept, std::greater<Ranked>());
  std::fill_n(marks, a.num_keys, 0);
  for (int64_t n = 0; n < room; ++n) marks[place_of(entries[n])] = 1;
  const int64_t head = b * a.num_heads + h;
  int32_t* columns = a.column_index + head * a.column_width;
  for (int64_t j = 0; j < a.num_keys; ++j)
    if (marks[j]) *columns++ = static_cast<int32_t>(j);
  a.column_count[head] = static_cast<int32_t>(room);
}

int estimate_sampled(const Arguments& a) {
  const Rows query{static_cast<const input*>(a.query), a.query_batch, a.query_head, a.query_row};
  const Rows key{static_cast<const input*>(a.key), a.key_batch, a.key_head, a.key_row};
  const Extent extent(a);
  KeyPanels keys(a);
  const int64_t heads = a.batch * a.num_heads, stride = keys.panels * BLOCK;
  const Buffer<float> sums(heads * PARTS * stride);
  // Allocated here, because an exception must not leave a thread of the parallel region.
  std::deque<LineScratch> scratches;
  for (int64_t t = 0; t < a.threads; ++t) scratches.emplace_back(keys.panels);
  const Buffer<Ranked> entries(a.threads * a.num_keys);
  const Buffer<uint8_t> marks(a.threads * a.num_keys);
#pragma omp parallel num_threads(a.threads)
  {
    LineScratch& s = scratches[omp_get_thread_num()];
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a.batch * keys.slots * keys.panels; ++t)
      keys.pack(a, key, s.rows.get(), t);
    const TileScope tiles;
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < heads * PARTS; ++t) {
      const int64_t b = t / PARTS / a.num_heads, h = t / PARTS % a.num_heads;
      const Spread spread(a, extent, b, h);
      sum_part(a, s, keys, query, spread, b, h, t % PARTS, sums.get() + t * stride);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < heads; ++t) {
      const int64_t own = omp_get_thread_num() * a.num_keys;
      write_columns(a, entries.get() + own, marks.get() + own, sums.get() + t * PARTS * stride,
                    stride, t / a.num_heads, t % a.num_heads);
    }
  }
  return 0;
}

}  // namespace

extern "C" int sampled_index(const Arguments* arguments) {
  try {
    return estimate_sampled(*arguments);
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
