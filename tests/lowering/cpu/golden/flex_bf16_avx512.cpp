// mpass CPU kernels, generated for: flex, bfloat16, D=64, avx512_bf16.
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
  const float* gamma;
  const float* tau;
  const int32_t* min_budget;
  const int32_t* max_budget;
  const int32_t* block_size;
  const int32_t* max_blocks;
  const int32_t* sink_blocks;
  const int32_t* local_blocks;
  const int32_t* last_blocks;
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

constexpr int32_t ALL_BLOCKS = -1;  // lowering/index.py

// The choice of one block of queries: forced blocks at once, then others by score while there is
// room. Sums over scores run over the blocks that the mask allows.
struct Selection {
  using Entry = std::pair<float, int32_t>;  // score and -kb: ties go to the smaller block
  int64_t block, low, high;  // the mask allows key blocks low <= kb < high
  int64_t room;
  float total, held, best;
  bool everything;
  std::vector<float> scores;  // of all key blocks, set by the caller
  std::vector<uint8_t> kept;
  std::vector<Entry> rest;  // allowed and not kept so far

  void start(const Arguments& a, const Extent& extent, int64_t b, int64_t h, int64_t of_block,
             int64_t size) {
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

  // Keeps the best entries of a range of `rest` for as long as `wanted()` and there is room.
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

  // Keeps the entries of a range, the best of them where there is not room for all.
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

  // Keeps the best others until `mass` of the scores is held; a mass of 1 keeps all.
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

  // The lists of the query blocks that this block of queries consists of.
  void write(const Arguments& a, int64_t b, int64_t h, int64_t size) const {
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

constexpr int POOLED = (HEAD_DIM + LANES - 1) / LANES * LANES;  // floats of one mean

// Runs of one kv head's keys, packed in panels of 64 runs each: B operands, or rows one after the
// other.
struct Runs {
  int64_t count, padded;
  int64_t parts;  // rows of keys that a run consists of
  word* panels;  // [padded / 64, parts, DEPTH, 64] or [padded, DEPTH]
  float* weight;  // [padded] what is added to a product, in units of log2; -inf for no keys
};

// The runs of all heads: those that share a kv head and a length share them.
class AllRuns {
 public:
  // length: positions per run, by entry of `heads`; whole: a run keeps its rows, else their mean.
  AllRuns(const Arguments& a, const int32_t* length, bool whole)
      : heads_(lay_out(a, length, whole)), panels_(a.batch * words_), weights_(a.batch * runs_) {}

  int64_t owner(int64_t h) const { return heads_[h].owner; }
  bool owns(int64_t h) const { return owner(h) == h; }
  int64_t width() const { return width_; }  // runs of the longest, padded
  int64_t parts() const { return parts_; }  // rows of keys of the deepest

  Runs of(int64_t b, int64_t h) const {
    const Head& head = heads_[heads_[h].owner];
    return {head.count, head.padded, head.parts, panels_.get() + b * words_ + head.first_word,
            weights_.get() + b * runs_ + head.first_run};
  }

 private:
  struct Head {
    int64_t owner, count, padded, parts, first_run, first_word;
  };

  std::vector<Head> lay_out(const Arguments& a, const int32_t* length, bool whole) {
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

// Sum of the rows first <= n < stop for which `real(n)`, [POOLED]; returns how many there are.
template <typename Real>
int64_t sum_rows(float* sum, const Rows& rows, int64_t b, int64_t head, int64_t first, int64_t stop,
                 const Real& real) {
  std::fill_n(sum, POOLED, 0.0f);
  int64_t count = 0;
  for (int64_t n = first; n < stop; ++n) {
    if (!real(n)) continue;
    ++count;
    const input* row = rows.at(b, head, n);
    int d = 0;
    for (; d + LANES <= HEAD_DIM; d += LANES)
      store(sum + d, add(load(sum + d), load(row + d, input_tag{})));
    if (d < HEAD_DIM) {
      input tail[LANES] = {};
      std::memcpy(tail, row + d, (HEAD_DIM - d) * sizeof(input));
      store(sum + d, add(load(sum + d), load(tail, input_tag{})));
    }
  }
  return count;
}

// The mean of `count` rows of that sum; zeros if there are none.
inline void pack_mean(packed* out, const float* sum, int64_t count) {
  const vec total = set1(static_cast<float>(std::max<int64_t>(count, 1)));
  packed wide[POOLED];
  for (int d = 0; d < POOLED; d += LANES)
    store(wide + d, divide(load(sum + d), total), packed_tag{});
  std::memset(out, 0, DEPTH * sizeof(word));
  std::memcpy(out, wide, HEAD_DIM * sizeof(packed));
}

// Means of the 64 runs of one panel, a row of DEPTH words each. sum: room for POOLED floats;
// log_size: a run weighs as many keys as it has, else as one.
void pool_runs(const Arguments& a, const Runs& runs, float* sum, const Rows& key, int64_t b,
               int64_t kv_head, int64_t length, int64_t panel, bool log_size, word* out) {
  for (int r = 0; r < BLOCK; ++r) {
    const int64_t run = panel * BLOCK + r, first = run * length;
    const int64_t count = sum_rows(sum, key, b, kv_head, first,
                                   std::min(a.num_keys, first + length),
                                   [&](int64_t j) { return key_is_real(a, b, j); });
    runs.weight[run] = count == 0 ? NEGATIVE_INFINITY
        : log_size                ? std::log2(static_cast<float>(count))
                                  : 0.0f;
    pack_mean(reinterpret_cast<packed*>(out + r * DEPTH), sum, count);
  }
}

// The runs that a line sees: low <= s < high.
struct Seen {
  int64_t low, high;
};

constexpr int ROWS_AT_ONCE = BLOCK;

struct RunScratch {
  Buffer<packed> rows;
  Buffer<float> mean, strip, sums;
  Selection selection;
  int64_t stride;  // of the strip: no power of two, whose rows would share cache sets

  explicit RunScratch(const AllRuns& all)
      : rows(BLOCK * all.parts() * DEPTH * PAIR),
        mean(POOLED),
        strip(ROWS_AT_ONCE * (all.width() + LANES)),
        sums(all.width() + LANES),
        stride(all.width() + LANES) {
    std::fill_n(sums.get(), stride, 0.0f);
  }
};

// Means of the 64 runs of one panel, as a B operand.
void pool_panel(const Arguments& a, const Runs& runs, RunScratch& s, const Rows& key, int64_t b,
                int64_t kv_head, int64_t length, int64_t panel, bool log_size) {
  word* rows = reinterpret_cast<word*>(s.rows.get());
  pool_runs(a, runs, s.mean.get(), key, b, kv_head, length, panel, log_size, rows);
  transpose_rows(runs.panels + panel * DEPTH * BLOCK, rows, DEPTH);
}

// Lines one after the other: `pack(line, out)` packs one and tells what it sees (nothing: zeros);
// `add(strip row, seen)` takes its products; `finish(tile)` follows on every `per_tile` lines.
template <typename Pack, typename Add, typename Finish>
void visit_lines(RunScratch& s, const Runs& runs, int64_t lines, int64_t per_tile, const Pack& pack,
                 const Add& add_line, const Finish& finish) {
  const int64_t depth = runs.parts * DEPTH;
  for (int64_t first = 0; first < lines; first += ROWS_AT_ONCE) {
    Seen seen[ROWS_AT_ONCE];
    int64_t reach = 0;
    for (int r = 0; r < ROWS_AT_ONCE; ++r) {
      packed* out = s.rows.get() + r * depth * PAIR;
      seen[r] = first + r < lines ? pack(first + r, out) : Seen{0, 0};
      if (seen[r].low >= seen[r].high) std::memset(out, 0, depth * sizeof(word));
      else reach = std::max(reach, seen[r].high);
    }
    const word* parts[BLOCK];
    for (int64_t panel = 0; panel * BLOCK < reach; ++panel) {
      for (int64_t n = 0; n < runs.parts; ++n)
        parts[n] = runs.panels + (panel * runs.parts + n) * DEPTH * BLOCK;
      multiply<false>(reinterpret_cast<const word*>(s.rows.get()), static_cast<int>(depth), parts,
                      static_cast<int>(runs.parts), DEPTH, BLOCK, s.strip.get() + panel * BLOCK,
                      static_cast<int>(s.stride), ROWS_AT_ONCE, BLOCK, nullptr);
    }
    for (int64_t line = first; line < std::min(lines, first + ROWS_AT_ONCE); ++line) {
      const Seen of_line = seen[line - first];
      if (of_line.low < of_line.high) add_line(s.strip.get() + (line - first) * s.stride, of_line);
      if ((line + 1) % per_tile == 0) finish(line / per_tile);
    }
  }
}

// One query row; zeros where the scale is 0, which makes the products what they are to be.
inline void pack_query(const Arguments& a, packed* out, const input* row) {
  if (a.scale == 0) std::memset(out, 0, DEPTH * sizeof(word));
  else pack_row(out, row, HEAD_DIM, DEPTH * PAIR);
}

// From products to exponents of 2.
inline vec exponent_factor(float scale) { return set1((scale == 0 ? 1.0f : scale) * LOG2E); }

// Hides what a line does not see in the vectors at the edges of what it does.
inline void hide_edges(float* row, Seen seen, float scale) {
  const int64_t first = seen.low / LANES * LANES, last = (seen.high - 1) / LANES * LANES;
  const float hidden = scale < 0 ? -NEGATIVE_INFINITY : NEGATIVE_INFINITY;
  for (int64_t s = first; s < seen.low; ++s) row[s] = hidden;
  for (int64_t s = seen.high; s < last + LANES; ++s) row[s] = hidden;
}

// The greatest exponent of a line.
inline float greatest_of(const float* row, const float* weight, Seen seen, vec factor) {
  vec top = set1(NEGATIVE_INFINITY);
  for (int64_t s = seen.low / LANES * LANES; s < seen.high; s += LANES)
    top = maximum(fma(load(row + s), factor, load(weight + s)), top);
  return reduce_max(top);
}

// Softmax of a line: exponentials stay in the strip; returns their sum, or 0 if it sees no keys.
inline float exponentiate_line(float* row, const float* weight, Seen seen, float scale) {
  hide_edges(row, seen, scale);
  const vec factor = exponent_factor(scale);
  const float greatest = greatest_of(row, weight, seen, factor);
  if (greatest == NEGATIVE_INFINITY) return 0.0f;
  const vec peak = set1(greatest);
  vec total = set1(0.0f);
  for (int64_t s = seen.low / LANES * LANES; s < seen.high; s += LANES) {
    const vec e = exp2_vec(sub(fma(load(row + s), factor, load(weight + s)), peak));
    store(row + s, e);
    total = add(total, e);
  }
  return reduce_add(total);
}

// Sums over the runs of each of `blocks` key blocks; the sums over lines are zero again.
inline void take_sums(RunScratch& s, int64_t runs, int64_t per_block, int64_t blocks) {
  float* sums = s.sums.get();
  s.selection.scores.resize(blocks);
  for (int64_t kb = 0; kb < blocks; ++kb) {
    float sum = 0.0f;
    for (int64_t n = kb * per_block; n < std::min(runs, (kb + 1) * per_block); ++n) sum += sums[n];
    s.selection.scores[kb] = sum;
  }
  std::fill_n(sums, s.stride, 0.0f);
}

constexpr int LINES = 12;  // of one product
constexpr int LINE_STEP = 2;  // lines are multiplied in steps of

// A tile is written askew where distances are summed, too: line r begins LINES - 1 - r floats into
// its row, so that a column of the tile is one distance. The rest of the row stays zero.
constexpr bool DISTANCES = true;
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

// What the last rows of one head add up to, in PARTS: by key, and by distance from the end on.
struct LastRows {
  int64_t most;  // rows of the head with the most of them
  int64_t key_floats, distance_floats;
  Buffer<float> sums;  // [B, h, PARTS, key_floats + distance_floats]
  Buffer<uint8_t> seen;  // [B, h, most]: whether the row sees any key

  LastRows(const Arguments& a, int64_t panels)
      : most(*std::max_element(a.block_size, a.block_size + a.num_heads)),
        key_floats(panels * BLOCK),
        distance_floats(panels * BLOCK + most + TILE_ROW),
        sums(a.batch * a.num_heads * PARTS * (key_floats + distance_floats)),
        seen(a.batch * a.num_heads * most) {}

  float* by_key(int64_t head, int64_t part) const {
    return sums.get() + (head * PARTS + part) * (key_floats + distance_floats);
  }
  float* by_distance(int64_t head, int64_t part) const { return by_key(head, part) + key_floats; }
  uint8_t* of_rows(int64_t head) const { return seen.get() + head * most; }
};

struct FlexScratch : RunScratch {
  LineScratch lines;
  Buffer<Ranked> ranked;
  std::vector<float> vertical, slash;  // shares of single keys and distances
  std::vector<float> vertical_blocks, slash_blocks, proxy;
  std::vector<uint8_t> vertical_kept, slash_kept;
  Buffer<float> pooled;  // [tiles, key blocks] of one head
  Buffer<uint8_t> pooled_kept;

  FlexScratch(const Arguments& a, const AllRuns& all, int64_t panels, int64_t cells)
      : RunScratch(all),
        lines(panels),
        ranked(std::max(a.num_keys, cells)),
        vertical(a.num_keys),
        slash(a.num_keys),
        vertical_blocks(panels),
        slash_blocks(panels),
        proxy(panels),
        vertical_kept(panels),
        slash_kept(panels),
        pooled(cells),
        pooled_kept(cells) {
    selection.scores.reserve(panels);
    selection.kept.reserve(panels);
    selection.rest.reserve(panels);
  }
};

// Attention of every PARTS-th product of the last `size` rows of one head.
void sum_part(const Arguments& a, LineScratch& s, const KeyPanels& keys, const LastRows& rows,
              const Rows& query, int64_t last, int64_t b, int64_t h, int64_t part) {
  const int64_t head = b * a.num_heads + h, size = a.block_size[h];
  float* by_key = rows.by_key(head, part);
  std::fill_n(by_key, rows.key_floats + rows.distance_floats, 0.0f);
  for (int64_t n = part * LINES; n < size; n += PARTS * LINES) {
    const int count = static_cast<int>(std::min<int64_t>(LINES, size - n));
    const int64_t first = last - (size - 1) + n;
    const Lines lines = pack_lines(a, s, query, b, h, count, [&](int r) { return first + r; });
    // Entry e is the distance `position of the last row + LINES - 1 - e`, whatever the product.
    add_lines(a, s, keys, lines, b, h, by_key, rows.by_distance(head, part) + (last - first),
              rows.of_rows(head) + n);
  }
}

// Shares of the last rows' attention by key and by distance, of the rows that see any key.
void take_shares(const Arguments& a, FlexScratch& s, const LastRows& rows, int64_t last,
                    int64_t b, int64_t h) {
  const int64_t head = b * a.num_heads + h, n = a.num_keys;
  const uint8_t* seen = rows.of_rows(head);
  const int64_t live = std::count(seen, seen + a.block_size[h], 1);
  const float share = 1.0f / static_cast<float>(std::max<int64_t>(live, 1));
  std::fill(s.vertical.begin(), s.vertical.end(), 0.0f);
  std::fill(s.slash.begin(), s.slash.end(), 0.0f);
  const int64_t farthest = a.query_offset + last + LINES - 1;  // the distance of entry 0
  for (int64_t part = 0; part < PARTS; ++part) {
    const float* by_key = rows.by_key(head, part);
    const float* by_distance = rows.by_distance(head, part);
    for (int64_t j = 0; j < n; ++j) s.vertical[j] += by_key[j] * share;
    for (int64_t e = 0; e < rows.distance_floats; ++e)
      s.slash[std::clamp<int64_t>(farthest - e, 0, n - 1)] += by_distance[e] * share;
  }
}

// Blocks whose keys hold `gamma` of the shares, counted as the released code does.
int64_t count_covering(const Arguments& a, FlexScratch& s, const std::vector<float>& shares,
                       int64_t h) {
  for (int64_t j = 0; j < a.num_keys; ++j) s.ranked.get()[j] = rank_score(shares[j], j);
  const float gamma = a.gamma[h];
  const int64_t keys = take_largest(s.ranked.get(), a.num_keys, [&](float sum) {
    return gamma >= 1.0f || sum <= gamma;
  });
  return (keys + 1) / a.block_size[h] + 1;
}

void sum_blocks(const std::vector<float>& shares, std::vector<float>& blocks, int64_t size) {
  std::fill(blocks.begin(), blocks.end(), 0.0f);
  for (size_t j = 0; j < shares.size(); ++j) blocks[j / size] += shares[j];
}

// Marks the first of some blocks and the best of the others, `count` together.
void keep_blocks(FlexScratch& s, const float* scores, int64_t blocks, int64_t count,
                 uint8_t* kept) {
  Ranked* ranked = s.ranked.get();
  for (int64_t kb = 0; kb < blocks; ++kb)
    ranked[kb] = rank_score(kb == 0 ? -NEGATIVE_INFINITY : scores[kb], kb);
  if (count < blocks)
    std::nth_element(ranked, ranked + count, ranked + blocks, std::greater<Ranked>());
  std::fill_n(kept, blocks, 0);
  for (int64_t n = 0; n < std::min(count, blocks); ++n) kept[place_of(ranked[n])] = 1;
}

// Whether the mean of the last rows, against mean keys, weighs blocks nearly as the rows do: the
// Jensen-Shannon distance of both.
bool mean_is_near(const Arguments& a, FlexScratch& s, const LastRows& rows, const Runs& runs,
                  const Rows& query, int64_t last, int64_t b, int64_t h) {
  const uint8_t* seen = rows.of_rows(b * a.num_heads + h);
  const int64_t first = last - (a.block_size[h] - 1);
  std::fill(s.proxy.begin(), s.proxy.end(), 0.0f);
  const auto pack = [&](int64_t, packed* out) -> Seen {
    const int64_t count =
        sum_rows(s.mean.get(), query, b, a.heads[h], std::max<int64_t>(0, first), last + 1,
                 [&](int64_t n) { return a.scale != 0 && seen[n - first]; });
    pack_mean(out, s.mean.get(), count);
    return {0, runs.count};
  };
  const auto add_line = [&](float* row, Seen line) {
    const float total = exponentiate_line(row, runs.weight, line, a.scale);
    if (!(total > 0.0f)) return;
    for (int64_t kb = 0; kb < runs.count; ++kb) s.proxy[kb] = row[kb] / total;
  };
  visit_lines(s, runs, 1, 1, pack, add_line, [](int64_t) {});
  double divergence = 0.0;
  for (int64_t kb = 0; kb < runs.count; ++kb) {
    const double left = s.proxy[kb], right = s.vertical_blocks[kb], middle = (left + right) / 2;
    if (left > 0) divergence += 0.5 * left * std::log(left / middle);
    if (right > 0) divergence += 0.5 * right * std::log(right / middle);
  }
  return std::sqrt(std::max(0.0, divergence)) < a.tau[h];
}

// Attention of mean queries to mean keys, and the pairs of blocks that hold `gamma` of it, over all
// tiles together.
void keep_pairs(const Arguments& a, FlexScratch& s, const Runs& runs, const Rows& query, int64_t b,
                int64_t h, int64_t first_tile, int64_t tiles) {
  const int64_t size = a.block_size[h];
  int64_t tile = first_tile, count = 0;
  const auto pack = [&](int64_t line, packed* out) -> Seen {
    const int64_t of_line = first_tile + line, first = of_line * size - a.query_offset;
    const int64_t real = sum_rows(
        s.mean.get(), query, b, a.heads[h], std::max<int64_t>(0, first),
        std::min(a.num_queries, first + size),
        [&](int64_t n) { return a.scale != 0 && query_is_real(a, b, n); });
    pack_mean(out, s.mean.get(), real);
    const int64_t low =
        a.window > 0 ? std::max<int64_t>(0, of_line - (a.window - 2 + size) / size) : 0;
    return {low, a.causal ? std::min(runs.count, of_line + 1) : runs.count};
  };
  const auto add_line = [&](float* row, Seen line) {
    const float total = exponentiate_line(row, runs.weight, line, a.scale);
    if (!(total > 0.0f)) return;
    float* shares = s.pooled.get() + (tile - first_tile) * runs.count;
    for (int64_t kb = line.low; kb < line.high; ++kb) {
      shares[kb] = row[kb] / total;
      if (shares[kb] > 0.0f)
        s.ranked.get()[count++] = rank_score(shares[kb], (tile - first_tile) * runs.count + kb);
    }
  };
  std::fill_n(s.pooled.get(), tiles * runs.count, 0.0f);
  std::fill_n(s.pooled_kept.get(), tiles * runs.count, 0);
  visit_lines(s, runs, tiles, 1, pack, add_line, [&](int64_t) { ++tile; });
  const float gamma = a.gamma[h], enough = gamma * static_cast<float>(tiles);
  const int64_t kept = take_largest(s.ranked.get(), count, [&](float sum) {
    return gamma >= 1.0f || sum <= enough;
  });
  for (int64_t n = 0; n < kept; ++n) s.pooled_kept.get()[place_of(s.ranked.get()[n])] = 1;
}

// What one head keeps, and its lists.
void choose_head(const Arguments& a, FlexScratch& s, const LastRows& rows, const Runs& runs,
                 const Extent& extent, const Rows& query, int64_t b, int64_t h) {
  const int64_t size = a.block_size[h], blocks = runs.count, last = extent.last_query[b];
  const int64_t first_tile = a.query_offset / size;
  const int64_t tiles = (a.query_offset + a.num_queries - 1) / size + 1 - first_tile;
  const int64_t fewest = std::min((a.min_budget[h] + size - 1) / size, blocks);
  const int64_t most = std::min((a.max_budget[h] + size - 1) / size, blocks);
  take_shares(a, s, rows, last, b, h);
  sum_blocks(s.vertical, s.vertical_blocks, size);
  sum_blocks(s.slash, s.slash_blocks, size);
  const bool aware = a.tau[h] > 0.0f && mean_is_near(a, s, rows, runs, query, last, b, h);
  const auto budget = [&](const std::vector<float>& shares) {
    return aware ? fewest : std::clamp(count_covering(a, s, shares, h), fewest, most);
  };
  keep_blocks(s, s.vertical_blocks.data(), blocks, budget(s.vertical), s.vertical_kept.data());
  keep_blocks(s, s.slash_blocks.data(), blocks, budget(s.slash), s.slash_kept.data());
  if (aware) keep_pairs(a, s, runs, query, b, h, first_tile, tiles);

  s.selection.scores.resize(blocks);
  for (int64_t tile = first_tile; tile < first_tile + tiles; ++tile) {
    const int64_t cells = (tile - first_tile) * blocks;
    const auto distance = [&](int64_t kb) { return std::clamp<int64_t>(tile - kb, 0, blocks - 1); };
    for (int64_t kb = 0; kb < blocks; ++kb)
      s.selection.scores[kb] =
          aware ? s.pooled.get()[cells + kb] : s.vertical_blocks[kb] + s.slash_blocks[distance(kb)];
    s.selection.start(a, extent, b, h, tile, size);
    auto& rest = s.selection.rest;
    const auto others = std::partition(rest.begin(), rest.end(), [&](const auto& entry) {
      const int64_t kb = -entry.second;
      return s.vertical_kept[kb] || s.slash_kept[distance(kb)] ||
          (aware && s.pooled_kept.get()[cells + kb]);
    });
    s.selection.take(rest.begin(), others, [] { return true; });
    s.selection.write(a, b, h, size);
  }
}

int estimate_flex(const Arguments& a) {
  const Rows query{static_cast<const input*>(a.query), a.query_batch, a.query_head, a.query_row};
  const Rows key{static_cast<const input*>(a.key), a.key_batch, a.key_head, a.key_row};
  const AllRuns all(a, a.block_size, /*whole=*/false);
  const Extent extent(a);
  KeyPanels keys(a);
  const LastRows rows(a, keys.panels);
  const int64_t heads = a.batch * a.num_heads;
  int64_t cells = 0;  // of tiles and key blocks, of the head that has most and may need them
  for (int64_t h = 0; h < a.num_heads; ++h) {
    const int64_t size = a.block_size[h], end = a.query_offset + a.num_queries - 1;
    const int64_t tiles = end / size + 1 - a.query_offset / size;
    if (a.tau[h] > 0.0f) cells = std::max(cells, tiles * all.of(0, h).count);
  }
  // Allocated here, because an exception must not leave a thread of the parallel region.
  std::deque<FlexScratch> scratches;
  for (int64_t t = 0; t < a.threads; ++t) scratches.emplace_back(a, all, keys.panels, cells);
#pragma omp parallel num_threads(a.threads)
  {
    FlexScratch& s = scratches[omp_get_thread_num()];
    for (int64_t t = 0; t < heads; ++t) {
      const int64_t b = t / a.num_heads, h = t % a.num_heads;
      if (!all.owns(h)) continue;
      const Runs runs = all.of(b, h);
#pragma omp for schedule(static) nowait
      for (int64_t panel = 0; panel < runs.padded / BLOCK; ++panel)
        pool_panel(a, runs, s, key, b, a.heads[h] / a.group, a.block_size[h], panel, false);
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a.batch * keys.slots * keys.panels; ++t)
      keys.pack(a, key, s.lines.rows.get(), t);
    const TileScope configured;
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < heads * PARTS; ++t) {
      const int64_t b = t / PARTS / a.num_heads, h = t / PARTS % a.num_heads;
      sum_part(a, s.lines, keys, rows, query, extent.last_query[b], b, h, t % PARTS);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < heads; ++t) {
      const int64_t b = t / a.num_heads, h = t % a.num_heads;
      choose_head(a, s, rows, all.of(b, h), extent, query, b, h);
    }
  }
  return 0;
}

}  // namespace

extern "C" int flex_index(const Arguments* arguments) {
  try {
    return estimate_flex(*arguments);
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
