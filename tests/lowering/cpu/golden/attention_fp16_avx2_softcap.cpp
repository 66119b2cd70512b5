// mpass CPU kernels, generated for: attention, float16, D=64, DV=80, strips of 4 tiles, softcap, avx2.
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
using input_tag = float16_tag;
using packed_tag = float32_tag;

constexpr float LOG2E = 1.44269504088896341f;
constexpr int BLOCK = 64;
constexpr int STRIP = 4;
constexpr int HEAD_DIM = 64, VALUE_DIM = 80;
constexpr int DEPTH = 64, VALUE_WIDTH = 80;

using word = float;
constexpr int PAIR = 1;  // reduction steps that one word holds
using packed = float;  // element of packed K, V and of P
constexpr float NEGATIVE_INFINITY = -std::numeric_limits<float>::infinity();

using vec = __m256;
constexpr int LANES = 8;
inline vec set1(float x) { return _mm256_set1_ps(x); }
inline vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, vec x) { _mm256_storeu_ps(p, x); }
inline vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
inline vec sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
inline vec mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
inline vec divide(vec a, vec b) { return _mm256_div_ps(a, b); }
inline vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
inline vec maximum(vec a, vec b) { return _mm256_max_ps(a, b); }  // b where either is NaN
inline float reduce_max(vec x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
}
inline float reduce_add(vec x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_shuffle_ps(y, y, 1)));
}
// x where the lane's bit is set, else -inf.
inline vec keep(uint64_t bits, vec x) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i on =
      _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), lane), lane);
  return _mm256_blendv_ps(set1(NEGATIVE_INFINITY), x, _mm256_castsi256_ps(on));
}
// 0 where x is -inf, else x.
inline vec finite_or_zero(vec x) {
  return _mm256_and_ps(x, _mm256_cmp_ps(x, set1(NEGATIVE_INFINITY), _CMP_NEQ_UQ));
}
inline vec load(const uint16_t* p, bfloat16_tag) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline vec load(const uint16_t* p, float16_tag) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
inline vec scale_by_power(vec x, vec n) {  // n in [-127, 127]; -127 gives zero
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return mul(x, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
}
inline vec round_nearest(vec x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline void store(uint16_t* p, vec x, float16_tag) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(uint16_t* p, vec x, bfloat16_tag) {  // to nearest, ties to even
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(sum, _mm256_set1_epi32(0x7fc00000), nan), 16);
  high = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(high));
}
inline vec load(const float* p, float32_tag) { return load(p); }
inline void store(float* p, vec x, float32_tag) { store(p, x); }

// 2^x for x <= 126, zero far below; NaN stays NaN. Minimax polynomial on [-1/2, 1/2] after taking
// out the integer part: degree 5, relative error 7.5e-8.
inline vec exp2_vec(vec x) {
  x = maximum(set1(-127.0f), x);
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
constexpr int ROWS = 6;  // 6 x 2 accumulators, 2 of B, 1 of A
constexpr int VECTORS = 2;

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
  int d = 0;
  for (; d + LANES <= dim; d += LANES) store(out + d, load(in + d, input_tag{}), packed_tag{});
  if (d < dim) {
    input tail[LANES] = {};
    packed converted[LANES];
    std::memcpy(tail, in + d, (dim - d) * sizeof(input));
    store(converted, load(tail, input_tag{}), packed_tag{});
    std::memcpy(out + d, converted, (dim - d) * sizeof(packed));
  }
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

// [8, in_stride] words -> [8, out_stride] words, transposed.
inline void transpose(word* out, int out_stride, const word* in, int in_stride) {
  __m256 x[8], y[8];
  for (int i = 0; i < 8; ++i) x[i] = load(in + i * in_stride);
  for (int i = 0; i < 4; ++i) {
    y[2 * i] = _mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]);
    y[2 * i + 1] = _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    x[4 * i] = _mm256_shuffle_ps(y[4 * i], y[4 * i + 2], 0x44);
    x[4 * i + 1] = _mm256_shuffle_ps(y[4 * i], y[4 * i + 2], 0xee);
    x[4 * i + 2] = _mm256_shuffle_ps(y[4 * i + 1], y[4 * i + 3], 0x44);
    x[4 * i + 3] = _mm256_shuffle_ps(y[4 * i + 1], y[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    store(out + i * out_stride, _mm256_permute2f128_ps(x[i], x[4 + i], 0x20));
    store(out + (4 + i) * out_stride, _mm256_permute2f128_ps(x[i], x[4 + i], 0x31));
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

// 64 keys: a key block, or 64 columns that were gathered.
struct Tile {
  const word *keys, *values;
  Reach reach;
  bool masked;  // some row sees but some of them
  uint64_t visible;  // a bit per key: some row sees it
  int64_t first;  // position of the block's first key
  const int32_t* columns;  // positions, or null for a block
};

// A query block of a head: its place, the positions of its rows, and its tiles.
struct Work {
  int64_t b, h, i, first;
  int rows;
  std::vector<Tile> tiles;
  std::vector<uint8_t> selected;  // per key block, while tiles are listed

  explicit Work(const Packed& in) : selected(in.key_blocks + 1, 0) {
    tiles.reserve(in.key_blocks + in.chunks);
  }
};

// The key block, if some row sees a key of it.
void list_block(const Arguments& a, const Packed& in, Work& work, int64_t kb) {
  const int64_t low = kb * BLOCK, high = low + BLOCK - 1;
  const int64_t first = work.first, last = first + work.rows - 1;
  if (kb < 0 || kb >= in.key_blocks || (a.causal && low > last)) return;
  work.selected[kb] = 1;
  const uint64_t valid = in.valid.get()[work.b * in.key_blocks + kb];
  const bool in_window = a.window <= 0 || first - high < a.window;
  if (!in_window || valid == 0) return;
  const bool full = valid == ~uint64_t(0) && (!a.causal || high <= first) &&
      (a.window <= 0 || last - low < a.window);
  Reach reach{64 - __builtin_clzll(valid)};
  if (a.causal) reach.first = static_cast<int>(std::min<int64_t>(first - low + 1, BLOCK));
  const int64_t kv_head = work.h / (a.heads / a.kv_heads);
  const int64_t slot = (work.b * a.kv_heads + kv_head) * in.key_blocks + kb;
  work.tiles.push_back({in.keys.get() + slot * KEY_WORDS, in.values.get() + slot * VALUE_WORDS,
                        reach, !full, valid, low, nullptr});
}

// Those columns of a chunk that some row sees and whose blocks are not selected.
void list_columns(const Arguments& a, const Packed& in, Work& work, int64_t chunk,
                  const int32_t* columns, int64_t size, int64_t limit) {
  const int64_t first = work.first, last = first + work.rows - 1;
  const uint64_t* valid = in.valid.get() + work.b * in.key_blocks;
  uint64_t bits = 0;
  bool edge = false;  // some row's window ends inside of the chunk
  for (int t = 0; t < size; ++t) {
    const int64_t j = columns[t];
    if (j < 0 || j >= limit || work.selected[j / BLOCK]) continue;
    if (!(valid[j / BLOCK] >> (j % BLOCK) & 1)) continue;
    if (a.window > 0 && first - j >= a.window) continue;
    bits |= uint64_t(1) << t;
    edge = edge || (a.window > 0 && last - j >= a.window);
  }
  if (bits == 0) return;
  const int64_t slot = (work.b * a.heads + work.h) * in.chunks + chunk;
  work.tiles.push_back({in.column_keys.get() + slot * KEY_WORDS,
                        in.column_values.get() + slot * VALUE_WORDS,
                        Reach{64 - __builtin_clzll(bits)}, edge || bits != ~uint64_t(0), bits, 0,
                        columns});
}

// All tiles of query block i, counted from the first query.
void list_tiles(const Arguments& a, const Packed& in, Work& work, int64_t b, int64_t h, int64_t i) {
  const int64_t qb = a.query_offset / BLOCK + i;
  work.b = b, work.h = h, work.i = i;
  work.first = std::max(qb * BLOCK, a.query_offset);
  work.rows = static_cast<int>(
      std::min((qb + 1) * BLOCK, a.query_offset + a.num_queries) - work.first);
  work.tiles.clear();
  const int32_t head_slot = a.head_slots[h];
  if (head_slot >= 0) {
    const int64_t list = (b * a.num_lists + head_slot) * a.num_blocks + i;
    const int32_t count = a.block_count[list];
    if (count < 0)
      for (int64_t kb = 0; kb < in.key_blocks; ++kb) list_block(a, in, work, kb);
    for (int32_t n = 0; n < count; ++n)
      list_block(a, in, work, a.block_index[list * a.max_blocks + n]);
  } else {
    const int64_t list = b * a.num_diagonals + (-1 - head_slot);
    const int32_t count = a.diagonal_count[list];
    if (count < 0)
      for (int64_t kb = 0; kb <= qb; ++kb) list_block(a, in, work, kb);
    for (int32_t n = 0; n < count; ++n)
      list_block(a, in, work, qb - a.diagonal_index[list * a.max_diagonals + n]);
  }
  const int64_t columns = a.max_columns ? a.column_count[b * a.heads + h] : 0;
  const int32_t* positions = a.column_index + (b * a.heads + h) * a.max_columns;
  const int64_t limit = a.causal ? std::min(qb * BLOCK, a.num_keys) : a.num_keys;
  for (int64_t c = 0; c * BLOCK < columns && positions[c * BLOCK] < limit; ++c)
    list_columns(a, in, work, c, positions + c * BLOCK,
                 std::min<int64_t>(BLOCK, columns - c * BLOCK), limit);
  std::fill(work.selected.begin(), work.selected.end(), 0);
}

// Per row of a masked tile, a bit per key that it sees.
void fill_mask(const Arguments& a, const Work& work, const Tile& tile, uint64_t* row_bits) {
  int behind = 0;  // columns that the row's window has left behind
  for (int r = 0; r < work.rows; ++r) {
    const int64_t p = work.first + r;
    uint64_t bits = tile.visible;
    if (tile.columns) {
      while (a.window > 0 && behind < tile.reach.keys && p - tile.columns[behind] >= a.window)
        ++behind;
      bits &= ~low_bits(behind);
    } else {
      if (a.causal) bits &= low_bits(p - tile.first + 1);
      if (a.window > 0) bits &= ~low_bits(p - a.window + 1 - tile.first);
    }
    row_bits[r] = bits;
  }
}
// What one thread works on.
struct Scratch {
  Buffer<packed> query, staging, probabilities;
  Buffer<float> scores, out;
  alignas(64) uint64_t row_bits[STRIP][BLOCK];
  alignas(64) float maximum[BLOCK], sum[BLOCK], scale[BLOCK];

  Scratch()
      : query(BLOCK * DEPTH * PAIR),
        staging(BLOCK * std::max(DEPTH * PAIR, VALUE_WIDTH)),
        probabilities(BLOCK * STRIP * BLOCK),
        scores(BLOCK * STRIP * BLOCK),
        out(BLOCK * VALUE_WIDTH) {
    std::memset(probabilities.get(), 0, BLOCK * STRIP * BLOCK * sizeof(packed));
  }
};

// From scores to exponents of 2.
struct Exponents {
  float scale, cap_exponent = 0.0f, cap = 0.0f;

  explicit Exponents(const Arguments& a)
      : scale(1.0f),
        cap_exponent(2.0f * LOG2E * std::abs(a.scale) / a.softcap),
        cap(a.softcap * LOG2E) {}
};

// softcap * tanh(score * scale / softcap), in units of log2, over `count` scores.
inline void cap_scores(float* scores, int count, float to_exponent, float cap) {
  for (int n = 0; n < count; n += LANES) {
    // tanh(x) = 1 - 2 / (e^2x + 1); at |x| = 20 it is 1 to the last bit.
    vec x = mul(load(scores + n), set1(to_exponent));
    x = sub(set1(0.0f), maximum(set1(-57.0f), sub(set1(0.0f), maximum(set1(-57.0f), x))));
    const vec e = add(exp2_vec(x), set1(1.0f));
    store(scores + n, mul(set1(cap), sub(set1(1.0f), divide(set1(2.0f), e))));
  }
}

// e^(score - maximum) of one row of the strip, as P x V reads it; returns the sum.
inline float exponentiate(packed* out, const float* scores, int width, float scale, float shift) {
  const vec factor = set1(scale), offset = set1(shift);
  vec sum = set1(0.0f);
  for (int n = 0; n < width; n += LANES) {
    const vec x = exp2_vec(fma(load(scores + n), factor, offset));
    sum = add(sum, x);
    store(out + n, x);
  }
  return reduce_add(sum);
}

// What is read or written soon: fetched into the second cache while other work is done.
struct Ahead {
  const word* keys[STRIP];  // a panel per tile of the strip, fetched by its P x V
  const input* query = nullptr;  // rows that are fetched by the softmax of as many rows
  input* out = nullptr;
  int query_rows = 0, out_rows = 0;

  // Inlined always: GCC 12 takes a function that only fetches for one without effect.
  __attribute__((always_inline)) void fetch_rows(const Arguments& a, int r) const {
    constexpr int LINE = 64 / sizeof(input);
    for (int d = 0; d < HEAD_DIM && r < query_rows; d += LINE)
      __builtin_prefetch(query + r * a.query_row + d, 0, 2);
    for (int d = 0; d < VALUE_DIM && r < out_rows; d += LINE)
      __builtin_prefetch(out + r * a.out_row + d, 1, 2);
  }
};

// Scores, exponentials and P x V of `count` tiles, on top of `out`.
void add_strip(const Arguments& a, Scratch& s, const Work& work, const Tile* tiles, int count,
               const Exponents& exponents, const Ahead& ahead) {
  constexpr int FETCH_VALUES = fetch_step(VALUE_WORDS, DEPTH, BLOCK);
  constexpr int FETCH_KEYS = fetch_step(KEY_WORDS, BLOCK / PAIR, VALUE_WIDTH);
  const int computed = (work.rows + ROW_STEP - 1) / ROW_STEP * ROW_STEP;
  float* scores = s.scores.get();
  packed* probabilities = s.probabilities.get();
  const word* values[STRIP];
  Reach reach[STRIP];
  for (int t = 0; t < count; ++t) {
    values[t] = tiles[t].values;
    reach[t] = tiles[t].reach;
    if (tiles[t].masked) fill_mask(a, work, tiles[t], s.row_bits[t]);
    multiply<false, FETCH_VALUES>(reinterpret_cast<const word*>(s.query.get()), DEPTH,
                                  &tiles[t].keys, 1, DEPTH, BLOCK, scores + t * BLOCK,
                                  STRIP * BLOCK, computed, BLOCK, nullptr, &reach[t], &values[t]);
  }
  for (int r = 0; r < work.rows; ++r) {
    float* row = scores + r * STRIP * BLOCK;
    ahead.fetch_rows(a, r);
    cap_scores(row, count * BLOCK, exponents.cap_exponent, exponents.cap);
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
    const float after = std::max(before, reduce_max(highest) * exponents.scale);
    // -inf: nothing visible yet; zero keeps the exponents at -inf instead of NaN.
    const float shift = after == NEGATIVE_INFINITY ? 0.0f : after;
    s.scale[r] = before == shift ? 1.0f : std::exp2(before - shift);
    s.maximum[r] = after;
    s.sum[r] = s.sum[r] * s.scale[r] +
        exponentiate(probabilities + r * STRIP * BLOCK, row, count * BLOCK, exponents.scale, -shift);
  }
  multiply<true, FETCH_KEYS>(reinterpret_cast<const word*>(probabilities), STRIP * BLOCK / PAIR,
                             values, count, BLOCK / PAIR, VALUE_WIDTH, s.out.get(), VALUE_WIDTH,
                             computed, VALUE_WIDTH, s.scale, reach, ahead.keys);
}

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

// The rows of a query block, over its tiles, to `out`. next: what this thread computes after it.
void attend(const Arguments& a, Scratch& s, const Work& work, const Work& next) {
  const Rows query{static_cast<const input*>(a.query), a.query_batch, a.query_head, a.query_row};
  const int64_t n = work.first - a.query_offset;
  for (int r = 0; r < BLOCK; ++r) {
    packed* row = s.query.get() + r * DEPTH * PAIR;
    if (r < work.rows && a.scale != 0)
      pack_row(row, query.at(work.b, work.h, n + r), HEAD_DIM, DEPTH * PAIR);
    else std::memset(row, 0, DEPTH * sizeof(word));
    if (a.scale < 0)  // maxima are taken before scaling, so the sign goes into the query
      for (int d = 0; d < DEPTH * PAIR; ++d) row[d] = -row[d];
  }
  const float sink = a.sinks ? a.sinks[work.h] * LOG2E : NEGATIVE_INFINITY;
  std::fill_n(s.maximum, BLOCK, sink);
  std::fill_n(s.sum, BLOCK, sink == NEGATIVE_INFINITY ? 0.0f : 1.0f);
  std::fill_n(s.scale, BLOCK, 1.0f);
  std::memset(s.out.get(), 0, BLOCK * VALUE_WIDTH * sizeof(float));

  input* out = static_cast<input*>(a.out) + work.b * a.out_batch + work.h * a.out_head +
      n * a.out_row;
  const Exponents exponents(a);
  const Tile* tiles = work.tiles.data();
  const int64_t total = static_cast<int64_t>(work.tiles.size());
  for (int64_t done = 0, count; done < total; done += count) {
    const int64_t left = total - done, strips = (left + STRIP - 1) / STRIP;
    count = (left + strips - 1) / strips;
    const Tile* following = tiles + done + count;
    int64_t known = left - count;
    Ahead ahead;
    if (strips == 1) {
      following = next.tiles.data();
      known = static_cast<int64_t>(next.tiles.size());
      ahead.out = out;
      ahead.out_rows = work.rows;
      if (known) {
        ahead.query = query.at(next.b, next.h, next.first - a.query_offset);
        ahead.query_rows = next.rows;
      }
    }
    for (int64_t t = 0; t < count; ++t)
      ahead.keys[t] = t < known ? following[t].keys : tiles[done + t].values;
    add_strip(a, s, work, tiles + done, static_cast<int>(count), exponents, ahead);
  }
  for (int r = 0; r < work.rows; ++r) {
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
    std::deque<Scratch> scratches(a.threads);
    std::deque<std::array<Work, 2>> works;
    for (int64_t t = 0; t < a.threads; ++t) works.push_back({Work(in), Work(in)});
    int64_t claimed = 0;
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
      // Head by head, the longest rows first: the last tasks are the short ones. A thread takes
      // one task ahead, to know what comes after the one that it computes.
      const auto take = [&](Work& work) {
        int64_t t;
#pragma omp atomic capture
        t = claimed++;
        work.tiles.clear();
        if (t >= tasks) return false;
        list_tiles(a, in, work, t / a.num_blocks / a.heads, t / a.num_blocks % a.heads,
                   a.num_blocks - 1 - t % a.num_blocks);
        return true;
      };
      Work *current = &works[omp_get_thread_num()][0], *next = &works[omp_get_thread_num()][1];
      for (bool some = take(*current), more; some; some = more) {
        more = take(*next);
        attend(a, scratch, *current, *next);
        std::swap(current, next);
      }
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
