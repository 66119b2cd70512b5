#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <immintrin.h>
#include <iterator>
#include <limits>
#include <mutex>
#include <new>
#include <omp.h>
#include <sys/mman.h>
#include <vector>

// ---- spec.h
// mpass CPU kernels. Generated for: attention, bfloat16, D=128, DV=128, strips of 4 tiles, amx.

// The headers of the instruction set, and whether products are of bf16 pairs.
#define VECTOR_HEADER "vector_avx512_bf16.h"
#define GEMM_HEADER "gemm_amx.h"
#define GEMM_INT8_HEADER "gemm_int8_amx.h"
#define POOLED_KEYS_HEADER "pooled_keys_packed.h"
#define SCORES_HEADER "scores_packed.h"
#define WEIGHTS_HEADER "weights_packed.h"
#define USES_BF16 1

namespace {

struct float32_tag {};
struct bfloat16_tag {};
struct float16_tag {};
using input = uint16_t;
using input_tag = bfloat16_tag;
using packed = uint16_t;  // element of packed K and V
using packed_tag = bfloat16_tag;
using word = uint32_t;  // what the micro-GEMM broadcasts
using weight = uint16_t;  // element of P
using weight_tag = bfloat16_tag;
constexpr int PAIR = 2;  // packed elements per word
constexpr bool INPUT_IS_PACKED = true;

constexpr int HEAD_DIM = 128, VALUE_DIM = 128;
constexpr int DEPTH = 64;  // words of a packed row of queries or keys
constexpr int INT8_DEPTH = 32;  // words of four 8-bit numbers of such a row
constexpr int VALUE_WIDTH = 128;  // floats of an output row with its padding
constexpr int BLOCK = 64;  // positions per block of queries and of keys
constexpr int STRIP = 4;  // tiles per softmax update
constexpr bool SOFTCAP = false;
constexpr bool INT8_SCORES = false;  // scores of attention are
constexpr bool HALF_VALUES = false;  // P x V is in fp16
constexpr bool SUMS_DISTANCES = false;
constexpr bool BIASED = false;  // by distance

constexpr int32_t ALL_BLOCKS = -1;  // lowering/index.py
constexpr int LAST_QUERIES = 64;
constexpr int64_t SINK_COLUMNS = 30;
constexpr int64_t LOCAL_DIAGONALS = 100;

// The numbers of a call: field by field the ctypes structure of the caller.
struct AttentionArguments {
  const void* query;
  const void* key;
  const void* value;
  void* out;
  float* lse;
  const uint8_t* key_mask;
  const float* sinks;
  const int32_t* block_count;
  const int32_t* block_index;
  const int32_t* diagonal_count;
  const int32_t* diagonal_index;
  const int32_t* column_count;
  const int32_t* column_index;
  const int32_t* head_slots;
  const float* distance_bias;
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
  int64_t bias_head;
  float scale;
  float softcap;
};

}  // namespace

// ---- tile_bounds.h
// Which part of a tile of scores any row sees.

namespace {

// The keys of a tile that a row sees: those of the first `keys`, and for row r at most `first + r`.
struct TileBounds {
  int keys = BLOCK, first = BLOCK;
  int of_row(int r) const { return std::min(keys, first + r); }
};

}  // namespace

// ---- vector_types.h
// Constants that every vector header builds on.

namespace {

constexpr float LOG2E = 1.44269504088896341f;
constexpr float NEGATIVE_INFINITY = -std::numeric_limits<float>::infinity();
// Words of one packed block. In 8 bits two numbers of each key and a line of what holds for all of
// them follow; in fp16, where pairs of values are words, such a line.
constexpr int LINE_WORDS = 16;
constexpr int KEY_WORDS = INT8_SCORES ? (INT8_DEPTH + 2) * BLOCK + LINE_WORDS : DEPTH * BLOCK;
constexpr int VALUE_WORDS =
    HALF_VALUES ? BLOCK / 2 * VALUE_WIDTH + LINE_WORDS : BLOCK / PAIR * VALUE_WIDTH;

}  // namespace

// ---- vector_avx512.h
// AVX-512, with 16 floats per register.

namespace {

using vec = __m512;
constexpr int LANES = 16;
constexpr float LOWEST_EXPONENT = -127.0f;  // 2 to it is zero, and to what lies below

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
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, set1(NEGATIVE_INFINITY), _CMP_NEQ_UQ), x);
}
inline vec load(const uint16_t* p, bfloat16_tag) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline vec load(const uint16_t* p, float16_tag) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
// x * 2^n, and zero where n is -126 or less. Microcode makes results that are no normal numbers, in
// more than a hundred cycles, and each hidden key would be one.
inline vec scale_by_power(vec x, vec n) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n, set1(-126.0f), _CMP_NLE_UQ), x, n);
}
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

// Bit n tells whether x[n] >= least[n].
inline uint32_t at_least(vec x, vec least) { return _mm512_cmp_ps_mask(x, least, _CMP_GE_OQ); }

// Every lane becomes the sum of the `count` lanes it stands with. `count` is 1, 2, 4 .. LANES.
inline vec sum_neighbours(vec x, int64_t count) {
  if (count > 1) x = add(x, _mm512_permute_ps(x, 0xb1));
  if (count > 2) x = add(x, _mm512_permute_ps(x, 0x4e));
  if (count > 4) x = add(x, _mm512_shuffle_f32x4(x, x, 0xb1));
  if (count > 8) x = add(x, _mm512_shuffle_f32x4(x, x, 0x4e));
  return x;
}

// Multiplies the lanes by the Hadamard matrix of 1 and -1.
inline vec rotate_lanes(vec x) {
  vec y = _mm512_permute_ps(x, 0xb1);
  x = _mm512_mask_sub_ps(add(y, x), 0xaaaa, y, x);
  y = _mm512_permute_ps(x, 0x4e);
  x = _mm512_mask_sub_ps(add(y, x), 0xcccc, y, x);
  y = _mm512_shuffle_f32x4(x, x, 0xb1);
  x = _mm512_mask_sub_ps(add(y, x), 0xf0f0, y, x);
  y = _mm512_shuffle_f32x4(x, x, 0x4e);
  return _mm512_mask_sub_ps(add(y, x), 0xff00, y, x);
}

// Stores LANES words, each of a 16-bit number of the even row and the one below it in the odd row.
inline void store_pairs(uint32_t* out, const uint16_t* even_row, const uint16_t* odd_row) {
  const __m256i even = _mm256_loadu_si256((const __m256i*)even_row);
  const __m256i odd = _mm256_loadu_si256((const __m256i*)odd_row);
  const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                                        _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
  _mm512_storeu_si512(out, pairs);
}

// Transposes [16, in_stride] words to [16, out_stride] words.
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
    _mm512_storeu_si512(out + (4 + i) * out_stride,
                        _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0x88));
    _mm512_storeu_si512(out + (8 + i) * out_stride, _mm512_shuffle_i32x4(y[i], y[8 + i], 0xdd));
    _mm512_storeu_si512(out + (12 + i) * out_stride,
                        _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0xdd));
  }
}

}  // namespace

// ---- vector_avx512_bf16.h
// AVX-512 with products of bf16 pairs.

namespace {

// Adds a.even * b.even + a.odd * b.odd to each lane.
inline vec dot(vec acc, uint32_t a, __m512i b) {
  return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
}
inline __m512i load_words(const uint32_t* b) { return _mm512_loadu_si512(b); }

// Stores two vectors, `low` first.
inline void store(uint16_t* p, vec low, vec high, bfloat16_tag) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

}  // namespace

// ---- vector.h
// The vector layer, on top of the header of an instruction set: vector_<name>.h holds all that
// differs between them, together with gemm_<name>.h.
//
// `vec` holds LANES floats. `word` is what a micro-kernel broadcasts and multiplies: one float, or
// for bf16 arithmetic a pair of bf16 that belong to two neighbouring steps of the reduction.

namespace {

inline vec load(const float* p, float32_tag) { return load(p); }
inline void store(float* p, vec x, float32_tag) { store(p, x); }
inline void store(float* p, vec low, vec high, float32_tag) {
  store(p, low);
  store(p + LANES, high);
}

#if !USES_BF16
inline vec dot(vec acc, float a, vec b) { return fma(set1(a), b, acc); }
inline vec load_words(const float* b) { return load(b); }
#endif

// A word, or a packed number, with the other sign.
inline float negate(float x) { return -x; }
inline uint16_t negate(uint16_t bf16) { return bf16 ^ 0x8000; }
inline uint32_t negate(uint32_t bf16_pair) { return bf16_pair ^ 0x80008000u; }

// 2^x for x <= 126. It is zero far below, and NaN stays NaN. The integer part is taken out, and a
// minimax polynomial on [-1/2, 1/2] does the rest.
inline vec exp2_vec(vec x) {
  x = maximum(set1(LOWEST_EXPONENT), x);
  const vec n = round_nearest(x);
  const vec r = sub(x, n);
  if constexpr (USES_BF16 || INT8_SCORES) {  // degree 3, relative error 7.5e-5 (bf16: 2e-3)
    vec p = set1(0.0551716691f);
    p = fma(p, r, set1(0.242611122f));
    p = fma(p, r, set1(0.693260985f));
    p = fma(p, r, set1(0.999928074f));
    return scale_by_power(p, n);
  } else {  // degree 5, relative error 7.5e-8
    vec p = set1(0.0013276472f);
    p = fma(p, r, set1(0.00967554133f));
    p = fma(p, r, set1(0.0555071327f));
    p = fma(p, r, set1(0.240221197f));
    p = fma(p, r, set1(0.693146967f));
    p = fma(p, r, set1(1.00000007f));
    return scale_by_power(p, n);
  }
}

}  // namespace

// ---- gemm_amx.h
// The micro-GEMM in AMX tiles of bf16 pairs. gemm.h says what its arguments are.

namespace {

constexpr int ROW_STEP = 64, COLUMN_STEP = 32;   // rows come in whole query blocks
constexpr int COLUMNS_AT_ONCE = COLUMN_STEP;     // so many cost no more than one
constexpr int FEW_ROWS = 32, FEW_ROW_STEP = 32;  // of a product of few rows

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tile registers belong to whoever runs on the thread, so the configuration of others is put back.
class TileScope {
 public:
  TileScope() {
    _tile_storeconfig(&saved_);
    const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~TileScope() {
    if (saved_.palette != 0) _tile_loadconfig(&saved_);
    else _tile_release();
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  alignas(64) TileConfig saved_;
};

// Says how many bytes to fetch per step: none here.
constexpr int fetch_step(int, int, int) { return 0; }

template <bool ACCUMULATE, int FETCH = 0>
void multiply(const word* a, int lda, const word* const* panels, int num_panels, int steps, int ldb,
              float* c, int ldc, int rows, int columns, const float* row_scale,
              const TileBounds* bounds = nullptr, const word* const* = nullptr) {
  if (ACCUMULATE) {
    for (int r = 0; r < rows; ++r) {
      if (row_scale[r] == 1.0f) continue;
      for (int n = 0; n < columns; n += LANES)
        store(c + r * ldc + n, mul(load(c + r * ldc + n), set1(row_scale[r])));
    }
  }
  for (int n = 0; n < columns; n += 32) {
    for (int r = 0; r < rows; r += 32) {
      if (!ACCUMULATE && bounds && bounds->of_row(r + 31) <= n) continue;
      float* c0 = c + r * ldc + n;
      float* c1 = c0 + 16 * ldc;
      if (ACCUMULATE) {
        _tile_loadd(0, c0, ldc * 4);
        _tile_loadd(1, c0 + 16, ldc * 4);
        _tile_loadd(2, c1, ldc * 4);
        _tile_loadd(3, c1 + 16, ldc * 4);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      const word* a0 = a + r * lda;
      for (int p = 0; p < num_panels; ++p) {
        const word* b = panels[p] + n;
        const int seen = ACCUMULATE && bounds ? (bounds[p].of_row(r + 31) + 1) / 2 : steps;
        for (int k = 0; k < steps; k += 16, a0 += 16, b += 16 * ldb) {
          if (k >= seen) continue;
          _tile_loadd(6, b, ldb * 4);
          _tile_loadd(4, a0, lda * 4);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, b + 16, ldb * 4);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, a0 + 16 * lda, lda * 4);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, c0, ldc * 4);
      _tile_stored(1, c0 + 16, ldc * 4);
      _tile_stored(2, c1, ldc * 4);
      _tile_stored(3, c1 + 16, ldc * 4);
    }
  }
}

}  // namespace

// ---- gemm.h
// The micro-GEMM computes C [rows, columns] (+)= A [rows, panels * steps] x B, in words.
//
// A          is row-major with `lda` words per row; one word is broadcast at a time.
// B          is `num_panels` panels, each [steps, ldb] words. The reduction goes on from panel to panel,
//            so that a strip's P x V reads and writes its accumulators once.
// C          is row-major floats, `ldc` per row.
// row_scale  multiplies, with ACCUMULATE, row r of C by row_scale[r] before the sum.
// bounds     tells, per panel, which keys any of some rows sees, or is null. Q x K^T leaves out other
//            columns (C keeps what it had there), P x V leaves out other steps of the reduction.
// prefetch   points, with FETCH, per panel of B to memory that is read soon. The index chooses which
//            memory that is, so no hardware can foresee it: each step of the product fetches FETCH
//            bytes of it.

// ---- indexing.h
// Rows of the inputs, and arithmetic on positions and bits.

namespace {

// One tensor [B, H, N, D]. Its strides are in elements, and the last one is 1.
struct TensorView {
  const input* data;
  int64_t batch, head, row;
  const input* at(int64_t b, int64_t h, int64_t n) const {
    return data + b * batch + h * head + n * row;
  }
};

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

inline uint64_t low_bits(int64_t count) {
  return count <= 0 ? 0 : count >= 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
}

}  // namespace

// ---- memory.h
// Scratch memory of a call, and the pool that keeps it between calls.

namespace {

// Asks for huge pages for memory that will be written for the first time now. Faulting it in 4 KiB
// at a time costs a tenth of a sparse call.
inline void advise_huge_pages(void* data, size_t bytes) {
  constexpr uintptr_t PAGE = 4096, HUGE_PAGE = uintptr_t(1) << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t stop = (reinterpret_cast<uintptr_t>(data) + bytes) / PAGE * PAGE;
  if (stop >= first + 2 * HUGE_PAGE)
    madvise(reinterpret_cast<void*>(first), stop - first, MADV_HUGEPAGE);
}

// Memory is kept between calls, because layers follow one another, and pages that are new to the
// process cost up to a third of a call on 128 tokens: the system clears them first, and may have
// lent them elsewhere.
class MemoryPool {
 public:
  ~MemoryPool() {
    for (const Block& block : blocks_) std::free(block.data);
  }
  // Returns memory of just this size, or null.
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

inline MemoryPool& memory_pool() {
  static MemoryPool pool;
  return pool;
}

// Scratch memory of one call. What it holds at first is undefined.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t count) {
    constexpr size_t HUGE_PAGE = size_t(1) << 21;
    const size_t bytes = count * sizeof(T);
    const size_t alignment = bytes >= 2 * HUGE_PAGE ? HUGE_PAGE : 64;
    bytes_ = std::max((bytes + alignment - 1) / alignment, size_t(1)) * alignment;
    data_ = static_cast<T*>(memory_pool().take(bytes_));
    if (data_) return;
    data_ = static_cast<T*>(std::aligned_alloc(alignment, bytes_));
    if (!data_) throw std::bad_alloc();
    advise_huge_pages(data_, bytes_);
  }
  ~Buffer() { memory_pool().give(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
  size_t bytes_;
};

}  // namespace

// ---- pack.h
// Packing turns rows of the inputs into the layouts that the micro-GEMM reads.
//
// rows       [64][depth]        converted to `packed`, zero beyond the data      (A operand)
// keys       [depth / PAIR][64] words, transposed: one block of K                (B of Q x K^T)
// values     [64 / PAIR][DV]    words, neighbouring keys paired: one block of V  (B of P x V)

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

// ---- query_block.h
// What a query block of a head attends to. It is listed before it is computed, so that what comes
// next is known and can be fetched.

namespace {

// Whether the rows of V are a packed panel as they lie in memory, as those of a cache in fp32 are.
// Chunks of a prompt would pack all values that are cached again and again.
inline bool values_lie_packed(const AttentionArguments& a) {
  return !HALF_VALUES && INPUT_IS_PACKED && PAIR == 1 && VALUE_DIM == VALUE_WIDTH &&
      a.value_row == VALUE_WIDTH;
}

// K and V of the whole call, packed, and what the attention mask says of each key block.
struct PackedKeyValues {
  int64_t key_blocks, chunks;  // chunks: of 64 columns, per head
  int64_t in_place;            // blocks of V of each kv head that are read where they are
  Buffer<word> keys, values, column_keys, column_values;
  Buffer<uint64_t> valid;  // [B, key_blocks], a bit per key: it exists and is no padding

  // packs: false where only the sizes and `valid` are wanted, to list tiles by.
  explicit PackedKeyValues(const AttentionArguments& a, bool packs = true)
      : key_blocks((a.num_keys + BLOCK - 1) / BLOCK),
        chunks((a.longest_columns + BLOCK - 1) / BLOCK),
        in_place(values_lie_packed(a) ? a.num_keys / BLOCK : 0),
        keys(packs * a.batch * a.kv_heads * key_blocks * KEY_WORDS),
        values(packs * a.batch * a.kv_heads * (key_blocks - in_place) * VALUE_WORDS),
        column_keys(packs * a.batch * a.heads * chunks * KEY_WORDS),
        column_values(packs * a.batch * a.heads * chunks * VALUE_WORDS),
        valid(a.batch * key_blocks) {}

  // Where the packed values of a block are that is not read in place.
  word* packed_values(const AttentionArguments& a, int64_t b, int64_t kv_head, int64_t kb) const {
    const int64_t slot = (b * a.kv_heads + kv_head) * (key_blocks - in_place) + kb - in_place;
    return values.get() + slot * VALUE_WORDS;
  }
  const word* values_of(const AttentionArguments& a, int64_t b, int64_t kv_head, int64_t kb) const {
    if (kb >= in_place) return packed_values(a, b, kv_head, kb);
    const TensorView value{static_cast<const input*>(a.value), a.value_batch, a.value_head,
                           a.value_row};
    return reinterpret_cast<const word*>(value.at(b, kv_head, kb * BLOCK));
  }
};

// A tile is 64 keys: a key block, or 64 vertical columns that were gathered.
struct Tile {
  const word *keys, *values;
  TileBounds bounds;
  bool masked;             // some row sees but some of them
  uint64_t visible;        // a bit per key: some row sees it
  int64_t first;           // position of the block's first key
  const int32_t* columns;  // positions, or null for a block
};

// A query block of a head: its place, the positions of its rows, and its tiles.
struct QueryBlock {
  int64_t b, h, i, first;
  int rows;
  std::vector<Tile> tiles;
  std::vector<uint8_t> selected;  // per key block, while tiles are listed

  explicit QueryBlock(const PackedKeyValues& in) : selected(in.key_blocks + 1, 0) {
    tiles.reserve(in.key_blocks + in.chunks);
  }
};

// A bit per key of a block: it exists and is no padding.
inline uint64_t valid_keys(const AttentionArguments& a, int64_t b, int64_t kb) {
  const int64_t first = kb * BLOCK;
  uint64_t bits = low_bits(a.num_keys - first);
  if (a.key_mask) {
    for (int r = 0; r < BLOCK && first + r < a.num_keys; ++r)
      if (!a.key_mask[b * a.num_keys + first + r]) bits &= ~(uint64_t(1) << r);
  }
  return bits;
}

// Lists the key block if some row sees a key of it.
void list_block(const AttentionArguments& a, const PackedKeyValues& in, QueryBlock& block,
                int64_t kb) {
  const int64_t low = kb * BLOCK, high = low + BLOCK - 1;
  const int64_t first = block.first, last = first + block.rows - 1;
  if (kb < 0 || kb >= in.key_blocks || (a.causal && low > last)) return;
  block.selected[kb] = 1;
  const uint64_t valid = in.valid.get()[block.b * in.key_blocks + kb];
  const bool ahead = a.window > 0 && !a.causal;  // the window ends ahead of a row, too
  const bool in_window =
      a.window <= 0 || (first - high < a.window && (!ahead || low - last < a.window));
  if (!in_window || valid == 0) return;
  const bool full = valid == ~uint64_t(0) && (!a.causal || high <= first) &&
      (a.window <= 0 || last - low < a.window) && (!ahead || high - first < a.window);
  TileBounds bounds{64 - __builtin_clzll(valid)};
  if (a.causal) bounds.first = static_cast<int>(std::min<int64_t>(first - low + 1, BLOCK));
  const int64_t kv_head = block.h / (a.heads / a.kv_heads);
  const int64_t slot = (block.b * a.kv_heads + kv_head) * in.key_blocks + kb;
  block.tiles.push_back({in.keys.get() + slot * KEY_WORDS, in.values_of(a, block.b, kv_head, kb),
                         bounds, !full, valid, low, nullptr});
}

// Lists those vertical columns of a chunk that some row sees and whose blocks are not selected.
void list_vertical_columns(const AttentionArguments& a, const PackedKeyValues& in,
                           QueryBlock& block, int64_t chunk, const int32_t* columns, int64_t size,
                           int64_t limit) {
  const int64_t first = block.first, last = first + block.rows - 1;
  const uint64_t* valid = in.valid.get() + block.b * in.key_blocks;
  uint64_t bits = 0;
  bool edge = false;  // some row's window ends inside of the chunk
  for (int t = 0; t < size; ++t) {
    const int64_t j = columns[t];
    if (j < 0 || j >= limit || block.selected[j / BLOCK]) continue;
    if (!(valid[j / BLOCK] >> (j % BLOCK) & 1)) continue;
    if (a.window > 0 && (first - j >= a.window || j - last >= a.window)) continue;
    bits |= uint64_t(1) << t;
    edge = edge || (a.window > 0 && (last - j >= a.window || j - first >= a.window));
  }
  if (bits == 0) return;
  const int64_t slot = (block.b * a.heads + block.h) * in.chunks + chunk;
  block.tiles.push_back(
      {in.column_keys.get() + slot * KEY_WORDS, in.column_values.get() + slot * VALUE_WORDS,
       TileBounds{64 - __builtin_clzll(bits)}, edge || bits != ~uint64_t(0), bits, 0, columns});
}

// Lists all tiles of query block i, counted from the first query.
void list_tiles(const AttentionArguments& a, const PackedKeyValues& in, QueryBlock& block,
                int64_t b, int64_t h, int64_t i) {
  const int64_t qb = a.query_offset / BLOCK + i;
  block.b = b, block.h = h, block.i = i;
  block.first = std::max(qb * BLOCK, a.query_offset);
  block.rows =
      static_cast<int>(std::min((qb + 1) * BLOCK, a.query_offset + a.num_queries) - block.first);
  block.tiles.clear();
  const int32_t head_slot = a.head_slots[h];
  if (head_slot >= 0) {
    const int64_t list = (b * a.num_lists + head_slot) * a.num_blocks + i;
    const int32_t count = a.block_count[list];
    if (count < 0)
      for (int64_t kb = 0; kb < in.key_blocks; ++kb) list_block(a, in, block, kb);
    for (int32_t n = 0; n < count; ++n)
      list_block(a, in, block, a.block_index[list * a.max_blocks + n]);
  } else {
    const int64_t list = b * a.num_diagonals + (-1 - head_slot);
    const int32_t count = a.diagonal_count[list];
    const int64_t stop = a.causal ? qb + 1 : in.key_blocks;
    if (count < 0)
      for (int64_t kb = 0; kb < stop; ++kb) list_block(a, in, block, kb);
    for (int32_t n = 0; n < count; ++n)
      list_block(a, in, block, qb - a.diagonal_index[list * a.max_diagonals + n]);
  }
  const int64_t columns = a.max_columns ? a.column_count[b * a.heads + h] : 0;
  const int32_t* positions = a.column_index + (b * a.heads + h) * a.max_columns;
  const int64_t limit = a.causal ? std::min(qb * BLOCK, a.num_keys) : a.num_keys;
  for (int64_t c = 0; c * BLOCK < columns && positions[c * BLOCK] < limit; ++c)
    list_vertical_columns(a, in, block, c, positions + c * BLOCK,
                          std::min<int64_t>(BLOCK, columns - c * BLOCK), limit);
  std::fill(block.selected.begin(), block.selected.end(), 0);
}

// Fills in, per row of a masked tile, a bit per key that it sees.
void fill_mask(const AttentionArguments& a, const QueryBlock& block, const Tile& tile,
               uint64_t* row_bits) {
  int behind = 0;  // columns that the row's window has left behind
  int before = 0;  // columns that lie before the window's end
  for (int r = 0; r < block.rows; ++r) {
    const int64_t p = block.first + r;
    uint64_t bits = tile.visible;
    if (tile.columns) {
      while (a.window > 0 && behind < tile.bounds.keys && p - tile.columns[behind] >= a.window)
        ++behind;
      bits &= ~low_bits(behind);
      while (before < tile.bounds.keys && (a.window <= 0 || tile.columns[before] - p < a.window))
        ++before;
      bits &= low_bits(before);
    } else {
      if (a.causal) bits &= low_bits(p - tile.first + 1);
      if (a.window > 0) bits &= ~low_bits(p - a.window + 1 - tile.first);
      if (a.window > 0 && !a.causal) bits &= low_bits(p + a.window - tile.first);
    }
    row_bits[r] = bits;
  }
}

}  // namespace

// ---- scores_packed_block.h
// Products of the packed queries of a block with packed keys.

namespace {

// The query rows of a block, and the scores of a strip [BLOCK, STRIP * BLOCK].
struct PackedScores {
  Buffer<packed> query;
  Buffer<float> scores;

  PackedScores() : query(BLOCK * DEPTH * PAIR), scores(BLOCK * STRIP * BLOCK) {}

  void pack_query(const AttentionArguments& a, const QueryBlock& block, const TensorView& rows) {
    for (int r = 0; r < BLOCK; ++r) {
      packed* row = query.get() + r * DEPTH * PAIR;
      if (r < block.rows && a.scale != 0)
        pack_row(row, rows.at(block.b, block.h, block.first - a.query_offset + r), HEAD_DIM,
                 DEPTH * PAIR);
      else std::memset(row, 0, DEPTH * sizeof(word));
      if (a.scale < 0)  // maxima are taken before scaling, so the sign goes into the query
        for (int d = 0; d < DEPTH * PAIR; ++d) row[d] = negate(row[d]);
    }
  }

  // Multiplies the `computed` rows with the keys of a tile, whose values are fetched meanwhile.
  void multiply_tile(const Tile& tile, int t, int computed) {
    constexpr int FETCH_VALUES = fetch_step(VALUE_WORDS, DEPTH, BLOCK);
    multiply<false, FETCH_VALUES>(reinterpret_cast<const word*>(query.get()), DEPTH, &tile.keys, 1,
                                  DEPTH, BLOCK, scores.get() + t * BLOCK, STRIP * BLOCK, computed,
                                  BLOCK, nullptr, &tile.bounds, &tile.values);
  }
};

}  // namespace

// ---- scores_packed.h
// Scores of a strip by products of packed queries and keys, as exact as packing is.

namespace {

// What a call shares between its threads beside packed keys.
struct SharedScores {
  explicit SharedScores(const AttentionArguments&) {}
  void prepare(const AttentionArguments&, int64_t) {}
  const float* centre(int64_t, int64_t) const { return nullptr; }
};

// Packs 64 keys. row(r) is row r of the input, or null where there is none.
template <typename Row>
void pack_scored_keys(word* out, packed* staging, const float*, const Row& row) {
  pack_keys(out, staging, row);
}

// The query rows of a block, and the scores of a strip [BLOCK, STRIP * BLOCK].
struct ScoreScratch : PackedScores {
  void take_query(const AttentionArguments& a, const QueryBlock& block, const TensorView& rows,
                  const float*) {
    pack_query(a, block, rows);
  }

  // A score is factor(r) * number + shift(r).
  float factor(int) const { return 1.0f; }
  float shift(int) const { return 0.0f; }

  void compute(const AttentionArguments&, const QueryBlock&, const Tile* tiles, int count,
               int computed) {
    for (int t = 0; t < count; ++t) multiply_tile(tiles[t], t, computed);
  }
};

}  // namespace

// ---- weights_packed.h
// P x V of a strip by products of packed weights and values.

namespace {

// Packs 64 values. row(r) is row r of the input, or null where there is none.
template <typename Row>
void pack_weighted_values(word* out, packed* staging, const Row& row) {
  pack_values(out, staging, row);
}

struct ValueScratch {};

// Multiplies each row of `out` by its scale and adds what the tiles of a strip give. A panel of
// `fetched` per tile is fetched meanwhile.
inline void add_values(const AttentionArguments&, ValueScratch&, const QueryBlock&,
                       const weight* weights, const Tile* tiles, int count, int computed,
                       float* out, const float* scale, const word* const* fetched) {
  constexpr int FETCH_KEYS = fetch_step(KEY_WORDS, BLOCK / PAIR, VALUE_WIDTH);
  const word* values[STRIP];
  TileBounds bounds[STRIP];
  for (int t = 0; t < count; ++t) values[t] = tiles[t].values, bounds[t] = tiles[t].bounds;
  multiply<true, FETCH_KEYS>(reinterpret_cast<const word*>(weights), STRIP * BLOCK / PAIR, values,
                             count, BLOCK / PAIR, VALUE_WIDTH, out, VALUE_WIDTH, computed,
                             VALUE_WIDTH, scale, bounds, fetched);
}

}  // namespace

// ---- softmax_strip.h
// One softmax update of a query block: scores of a strip of tiles, their exponentials, and P x V.

namespace {

// What one thread works on.
struct AttentionScratch {
  ScoreScratch scores;
  ValueScratch of_values;
  Buffer<packed> staging;
  Buffer<weight> weights;
  Buffer<float> out;
  alignas(64) uint64_t row_bits[STRIP][BLOCK];
  alignas(64) float maximum[BLOCK], sum[BLOCK], scale[BLOCK];

  AttentionScratch()
      : staging(BLOCK * std::max(DEPTH * PAIR, VALUE_WIDTH)),
        weights(BLOCK * STRIP * BLOCK),
        out(BLOCK * VALUE_WIDTH) {
    std::memset(weights.get(), 0, BLOCK * STRIP * BLOCK * sizeof(weight));
  }
};

// What turns scores into exponents of 2.
struct Exponents {
  float scale, cap_exponent = 0.0f, cap = 0.0f;

  explicit Exponents(const AttentionArguments& a)
      : scale(SOFTCAP || a.scale == 0 ? 1.0f : LOG2E * std::abs(a.scale)) {
    if constexpr (SOFTCAP) {
      cap_exponent = 2.0f * LOG2E * std::abs(a.scale) / a.softcap;
      cap = a.softcap * LOG2E;
    }
  }
};

// Takes softcap * tanh(score * scale / softcap), in units of log2, of `count` scores. A score is
// number * to_exponent + shift.
inline void cap_scores(float* scores, int count, float to_exponent, float cap, float shift = 0.0f) {
  for (int n = 0; n < count; n += LANES) {
    // tanh(x) is 1 - 2 / (e^2x + 1). At |x| = 20 it is 1 to the last bit.
    vec x = fma(load(scores + n), set1(to_exponent), set1(shift));
    x = sub(set1(0.0f), maximum(set1(-57.0f), sub(set1(0.0f), maximum(set1(-57.0f), x))));
    const vec e = add(exp2_vec(x), set1(1.0f));
    store(scores + n, mul(set1(cap), sub(set1(1.0f), divide(set1(2.0f), e))));
  }
}

// Exponents of 2 from which on they are rounded before the greatest is taken from them.
//
// fma(score, factor, -greatest) leaves what was rounded off the greatest exponent, at most its
// size / 2^24. All weights of the row have that in common, so that it cancels, and the others are
// exact. It must stay small, though, or the weights overflow, or are all zero. Rounded exponents
// give 0 at the greatest whatever its size.
constexpr float LARGE_EXPONENT = 16777216.0f;

// Takes 2^exponent(score) of one row of the strip, as P x V reads it, and returns the sum.
template <typename Exponent>
inline float exponentiate(weight* out, const float* scores, int width, const Exponent& exponent) {
  vec sum = set1(0.0f);
  if constexpr (sizeof(weight) == 2) {
    for (int n = 0; n < width; n += 2 * LANES) {
      const vec low = exp2_vec(exponent(load(scores + n)));
      const vec high = exp2_vec(exponent(load(scores + n + LANES)));
      sum = add(sum, add(low, high));
      store(out + n, low, high, weight_tag{});
    }
  } else {
    for (int n = 0; n < width; n += LANES) {
      const vec x = exp2_vec(exponent(load(scores + n)));
      sum = add(sum, x);
      store(out + n, x, weight_tag{});
    }
  }
  return reduce_add(sum);
}

// Takes e^(score - maximum) of one row of the strip and returns the sum.
inline float exponentiate(weight* out, const float* scores, int width, float scale, float shift) {
  const vec factor = set1(scale), offset = set1(shift);
  if (std::abs(shift) < LARGE_EXPONENT)
    return exponentiate(out, scores, width, [&](vec x) { return fma(x, factor, offset); });
  return exponentiate(out, scores, width, [&](vec x) { return add(mul(x, factor), offset); });
}

// What is read or written soon: it is fetched into the second cache while other work is done.
struct Prefetch {
  const word* keys[STRIP];       // a panel per tile of the strip, fetched by its P x V
  const input* query = nullptr;  // rows that are fetched by the softmax of as many rows
  input* out = nullptr;
  int query_rows = 0, out_rows = 0;

  // It is always inlined: GCC 12 takes a function that only fetches for one without effect.
  __attribute__((always_inline)) void fetch_rows(const AttentionArguments& a, int r) const {
    constexpr int LINE = 64 / sizeof(input);
    for (int d = 0; d < HEAD_DIM && r < query_rows; d += LINE)
      __builtin_prefetch(query + r * a.query_row + d, 0, 2);
    for (int d = 0; d < VALUE_DIM && r < out_rows; d += LINE)
      __builtin_prefetch(out + r * a.out_row + d, 1, 2);
  }
};

// Adds scores, exponentials and P x V of `count` tiles on top of `out`.
void add_strip(const AttentionArguments& a, AttentionScratch& s, const QueryBlock& block,
               const Tile* tiles, int count, const Exponents& exponents, const Prefetch& prefetch) {
  const int computed = (block.rows + ROW_STEP - 1) / ROW_STEP * ROW_STEP;
  float* scores = s.scores.scores.get();
  weight* weights = s.weights.get();
  for (int t = 0; t < count; ++t)
    if (tiles[t].masked) fill_mask(a, block, tiles[t], s.row_bits[t]);
  s.scores.compute(a, block, tiles, count, computed);
  for (int r = 0; r < block.rows; ++r) {
    float* row = scores + r * STRIP * BLOCK;
    prefetch.fetch_rows(a, r);
    float factor = s.scores.factor(r) * exponents.scale;
    float shift = s.scores.shift(r) * exponents.scale;
    if constexpr (SOFTCAP) {
      const float to_exponent = exponents.cap_exponent;
      cap_scores(row, count * BLOCK, s.scores.factor(r) * to_exponent, exponents.cap,
                 s.scores.shift(r) * to_exponent);
      factor = exponents.scale, shift = 0.0f;
    }
    vec highest = set1(NEGATIVE_INFINITY);
    for (int t = 0; t < count; ++t) {
      float* tile = row + t * BLOCK;
      if (tiles[t].masked) {
        for (int n = 0; n < BLOCK; n += LANES)
          store(tile + n, keep(s.row_bits[t][r] >> n, load(tile + n)));
      }
      for (int n = 0; n < BLOCK; n += LANES) highest = maximum(highest, load(tile + n));
    }
    const float before = s.maximum[r];
    const float after = std::max(before, reduce_max(highest) * factor + shift);
    // At -inf nothing is visible yet. Zero keeps the exponents at -inf instead of NaN.
    const float least = after == NEGATIVE_INFINITY ? 0.0f : after;
    s.scale[r] = before == least ? 1.0f : std::exp2(before - least);
    s.maximum[r] = after;
    s.sum[r] = s.sum[r] * s.scale[r] +
        exponentiate(weights + r * STRIP * BLOCK, row, count * BLOCK, factor, shift - least);
  }
  add_values(a, s.of_values, block, weights, tiles, count, computed, s.out.get(), s.scale,
             prefetch.keys);
}

}  // namespace

// ---- attention.h
// Sparse attention of one layer over a SparseIndex. lowering/reference/attention.py says what it
// means.
//
// b batch row      h query head   g kv head       i query block, counted from the first query
// qb, kb  query and key block on the grid of absolute positions      p position of a query
// tile    64 queries x 64 keys: a key block, or 64 vertical columns that were gathered
// strip   up to STRIP tiles that share one softmax update
//
// Only D, Dv, dtype, the width of a strip, softcap and the instruction set are compiled in.
// Windows, padding, index forms and vertical columns decide something once per tile of 64 x 64
// cells, where a branch costs nothing. Compiling them in would only multiply the libraries.

namespace {

void pack_block(const AttentionArguments& a, const PackedKeyValues& p, const SharedScores& shared,
                packed* staging, int64_t b, int64_t g, int64_t kb) {
  const TensorView key{static_cast<const input*>(a.key), a.key_batch, a.key_head, a.key_row};
  const TensorView value{static_cast<const input*>(a.value), a.value_batch, a.value_head,
                         a.value_row};
  const int64_t slot = (b * a.kv_heads + g) * p.key_blocks + kb;
  const int64_t first = kb * BLOCK;
  const uint64_t valid = valid_keys(a, b, kb);
  word* packed_keys = p.keys.get() + slot * KEY_WORDS;
  if (!INT8_SCORES && ROWS_ARE_WORDS && first + BLOCK <= a.num_keys && a.key_row % PAIR == 0) {
    transpose_rows(packed_keys, reinterpret_cast<const word*>(key.at(b, g, first)), DEPTH,
                   a.key_row / PAIR);
  } else {
    pack_scored_keys(packed_keys, staging, shared.centre(b, g), [&](int r) -> const input* {
      return valid >> r & 1 ? key.at(b, g, first + r) : nullptr;
    });
  }
  if (kb >= p.in_place) {
    pack_weighted_values(p.packed_values(a, b, g, kb), staging, [&](int r) -> const input* {
      return valid >> r & 1 ? value.at(b, g, first + r) : nullptr;
    });
  }
  if (g == 0) p.valid.get()[b * p.key_blocks + kb] = valid;
}

void pack_vertical_columns(const AttentionArguments& a, const PackedKeyValues& p,
                           const SharedScores& shared, packed* staging, int64_t b, int64_t h,
                           int64_t chunk) {
  const int64_t count = a.column_count[b * a.heads + h] - chunk * BLOCK;
  if (count <= 0) return;
  const int32_t* positions = a.column_index + (b * a.heads + h) * a.max_columns + chunk * BLOCK;
  const TensorView key{static_cast<const input*>(a.key), a.key_batch, a.key_head, a.key_row};
  const TensorView value{static_cast<const input*>(a.value), a.value_batch, a.value_head,
                         a.value_row};
  const int64_t g = h / (a.heads / a.kv_heads);
  const int64_t slot = (b * a.heads + h) * p.chunks + chunk;
  const auto exists = [&](int r) {
    return r < count && positions[r] >= 0 && positions[r] < a.num_keys;
  };
  pack_scored_keys(
      p.column_keys.get() + slot * KEY_WORDS, staging, shared.centre(b, g),
      [&](int r) -> const input* { return exists(r) ? key.at(b, g, positions[r]) : nullptr; });
  pack_weighted_values(
      p.column_values.get() + slot * VALUE_WORDS, staging,
      [&](int r) -> const input* { return exists(r) ? value.at(b, g, positions[r]) : nullptr; });
}

// Computes the rows of a query block over its tiles and writes them to `out`. `next` is the block
// that this thread computes after it.
void attend(const AttentionArguments& a, const SharedScores& shared, AttentionScratch& s,
            const QueryBlock& block, const QueryBlock& next) {
  const TensorView query{static_cast<const input*>(a.query), a.query_batch, a.query_head,
                         a.query_row};
  const int64_t n = block.first - a.query_offset;
  s.scores.take_query(a, block, query, shared.centre(block.b, block.h / (a.heads / a.kv_heads)));
  const float sink = a.sinks ? a.sinks[block.h] * LOG2E : NEGATIVE_INFINITY;
  // In fp16, weights that are relative to a far greater sink would be zero: it is added at the end.
  const float first = HALF_VALUES ? NEGATIVE_INFINITY : sink;
  std::fill_n(s.maximum, BLOCK, first);
  std::fill_n(s.sum, BLOCK, first == NEGATIVE_INFINITY ? 0.0f : 1.0f);
  std::fill_n(s.scale, BLOCK, 1.0f);
  std::memset(s.out.get(), 0, BLOCK * VALUE_WIDTH * sizeof(float));

  input* out =
      static_cast<input*>(a.out) + block.b * a.out_batch + block.h * a.out_head + n * a.out_row;
  const Exponents exponents(a);
  const Tile* tiles = block.tiles.data();
  const int64_t total = static_cast<int64_t>(block.tiles.size());
  for (int64_t done = 0, count; done < total; done += count) {
    const int64_t left = total - done, strips = (left + STRIP - 1) / STRIP;
    count = (left + strips - 1) / strips;
    const Tile* following = tiles + done + count;
    int64_t known = left - count;
    Prefetch prefetch;
    if (strips == 1) {
      following = next.tiles.data();
      known = static_cast<int64_t>(next.tiles.size());
      prefetch.out = out;
      prefetch.out_rows = block.rows;
      if (known) {
        prefetch.query = query.at(next.b, next.h, next.first - a.query_offset);
        prefetch.query_rows = next.rows;
      }
    }
    for (int64_t t = 0; t < count; ++t)
      prefetch.keys[t] = t < known ? following[t].keys : tiles[done + t].values;
    add_strip(a, s, block, tiles + done, static_cast<int>(count), exponents, prefetch);
  }
  for (int r = 0; r < block.rows; ++r) {
    float* row = s.out.get() + r * VALUE_WIDTH;
    float part = 1.0f;  // of a row's weight that is not the sink's
    if (HALF_VALUES && sink != NEGATIVE_INFINITY) {
      const float greatest = std::max(s.maximum[r], sink);
      part = std::exp2(s.maximum[r] - greatest);
      s.sum[r] = s.sum[r] * part + std::exp2(sink - greatest);
      s.maximum[r] = greatest;
    }
    const vec factor = set1(s.sum[r] == 0.0f ? 0.0f : part / s.sum[r]);
    for (int d = 0; d < VALUE_WIDTH; d += LANES) store(row + d, mul(load(row + d), factor));
    unpack_row(out + r * a.out_row, row, VALUE_DIM);
  }
  if (a.lse) {
    // Maxima are exponents of 2. A row that saw nothing has no sum: minus infinity.
    float* lse = a.lse + (block.b * a.heads + block.h) * a.num_queries + n;
    for (int r = 0; r < block.rows; ++r) lse[r] = (s.maximum[r] + std::log2(s.sum[r])) / LOG2E;
  }
}

}  // namespace

extern "C" int sparse_attention(const AttentionArguments* arguments) {
  const AttentionArguments& a = *arguments;
  try {
    const PackedKeyValues in(a);
    SharedScores shared(a);
    const int64_t blocks = a.batch * a.kv_heads * in.key_blocks;
    const int64_t chunks = a.batch * a.heads * in.chunks;
    const int64_t tasks = a.batch * a.heads * a.num_blocks;
    const int64_t out_items = (a.batch - 1) * a.out_batch + (a.heads - 1) * a.out_head +
        (a.num_queries - 1) * a.out_row + VALUE_DIM;
    advise_huge_pages(a.out, out_items * sizeof(input));
    // They are allocated here, because an exception must not leave a thread of the parallel region.
    std::deque<AttentionScratch> scratches(a.threads);
    std::deque<std::array<QueryBlock, 2>> query_blocks;
    for (int64_t t = 0; t < a.threads; ++t)
      query_blocks.push_back({QueryBlock(in), QueryBlock(in)});
    int64_t claimed = 0;
#pragma omp parallel num_threads(a.threads)
    {
      AttentionScratch& scratch = scratches[omp_get_thread_num()];
#pragma omp for schedule(static)
      for (int64_t t = 0; t < a.batch * a.kv_heads; ++t) shared.prepare(a, t);
#pragma omp for schedule(static) nowait
      for (int64_t t = 0; t < chunks; ++t)
        pack_vertical_columns(a, in, shared, scratch.staging.get(), t / in.chunks / a.heads,
                              t / in.chunks % a.heads, t % in.chunks);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < blocks; ++t)
        pack_block(a, in, shared, scratch.staging.get(), t / in.key_blocks / a.kv_heads,
                   t / in.key_blocks % a.kv_heads, t % in.key_blocks);
      const TileScope tiles;
      // Heads come one after the other, and in each the longest rows first, so that the last tasks
      // are the short ones. A thread takes one task ahead, to know what comes after the one that it
      // computes.
      const auto take = [&](QueryBlock& block) {
        int64_t t;
#pragma omp atomic capture
        t = claimed++;
        block.tiles.clear();
        if (t >= tasks) return false;
        list_tiles(a, in, block, t / a.num_blocks / a.heads, t / a.num_blocks % a.heads,
                   a.num_blocks - 1 - t % a.num_blocks);
        return true;
      };
      QueryBlock *current = &query_blocks[omp_get_thread_num()][0],
                 *next = &query_blocks[omp_get_thread_num()][1];
      for (bool some = take(*current), more; some; some = more) {
        more = take(*next);
        attend(a, shared, scratch, *current, *next);
        std::swap(current, next);
      }
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
