// mpass CPU kernels, generated for: tiles, bfloat16, D=64, avx512_bf16.
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
  const float* share;
  const float* mass;
  const int32_t* block_size;
  const int32_t* sink_blocks;
  const int32_t* local_blocks;
  const int32_t* last_blocks;
  const int32_t* max_blocks;
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

// Adds e^(product - greatest) of one line to the sums of its tile, and keeps `greatest` up to date.
void add_exponentials(float* sums, float* row, const float* weight, Seen seen, int64_t runs,
                      float scale, float* greatest) {
  hide_edges(row, seen, scale);
  const vec exponent = exponent_factor(scale);
  const float top = greatest_of(row, weight, seen, exponent);
  if (top == NEGATIVE_INFINITY) return;
  if (top > *greatest) {
    const vec factor = set1(std::exp2(*greatest - top));
    for (int64_t s = 0; s < runs; s += LANES) store(sums + s, mul(load(sums + s), factor));
    *greatest = top;
  }
  const vec peak = set1(*greatest);
  for (int64_t s = seen.low / LANES * LANES; s < seen.high; s += LANES)
    store(sums + s, add(load(sums + s), exp2_vec(sub(
        fma(load(row + s), exponent, load(weight + s)), peak))));
}

// Lists of one tile of queries.
void choose_tile(const Arguments& a, RunScratch& s, const Runs& runs, const Extent& extent,
                 const Rows& query, int64_t b, int64_t h, int64_t tile) {
  const int64_t size = a.block_size[h];
  float greatest = NEGATIVE_INFINITY;
  const auto pack = [&](int64_t line, packed* out) -> Seen {
    const int64_t p = tile * size + line, n = p - a.query_offset;
    if (n < 0 || n >= a.num_queries || !query_is_real(a, b, n)) return {0, 0};
    pack_query(a, out, query.at(b, a.heads[h], n));
    // Only blocks that the row sees whole.
    const int64_t low = a.window > 0 && p >= a.window ? (p - a.window) / size + 1 : 0;
    return {low, a.causal ? std::min(runs.count, (p + 1) / size) : runs.count};
  };
  const auto add_line = [&](float* row, Seen seen) {
    add_exponentials(s.sums.get(), row, runs.weight, seen, runs.padded, a.scale, &greatest);
  };
  visit_lines(s, runs, size, size, pack, add_line, [&](int64_t) {
    take_sums(s, runs.count, 1, runs.count);
    s.selection.start(a, extent, b, h, tile, size);
    if (a.mass[h] > 0.0f) s.selection.take_mass(s.selection.rest.begin(), a.mass[h]);
    else s.selection.take_above(a.share[h]);
    s.selection.write(a, b, h, size);
  });
}

int estimate_tiles(const Arguments& a) {
  const Rows query{static_cast<const input*>(a.query), a.query_batch, a.query_head, a.query_row};
  const Rows key{static_cast<const input*>(a.key), a.key_batch, a.key_head, a.key_row};
  const AllRuns all(a, a.block_size, /*whole=*/false);
  const Extent extent(a);
  const int64_t end = a.query_offset + a.num_queries;
  int64_t most = 0;  // tiles of the head with the most of them
  for (int64_t h = 0; h < a.num_heads; ++h)
    most = std::max(most, (end - 1) / a.block_size[h] - a.query_offset / a.block_size[h] + 1);
#pragma omp parallel num_threads(a.threads)
  {
    RunScratch s(all);
    for (int64_t t = 0; t < a.batch * a.num_heads; ++t) {
      const int64_t b = t / a.num_heads, h = t % a.num_heads;
      if (!all.owns(h)) continue;
      const Runs runs = all.of(b, h);
#pragma omp for schedule(static) nowait
      for (int64_t panel = 0; panel < runs.padded / BLOCK; ++panel)
        pool_panel(a, runs, s, key, b, a.heads[h] / a.group, a.block_size[h], panel, false);
    }
#pragma omp barrier
    const TileScope tiles;
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < a.batch * a.num_heads * most; ++t) {
      const int64_t b = t / most / a.num_heads, h = t / most % a.num_heads;
      const int64_t tile = (end - 1) / a.block_size[h] - t % most;  // the longest first
      if (tile >= a.query_offset / a.block_size[h])
        choose_tile(a, s, all.of(b, h), extent, query, b, h, tile);
    }
  }
  return 0;
}

}  // namespace

extern "C" int tiles_index(const Arguments* arguments) {
  try {
    return estimate_tiles(*arguments);
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
