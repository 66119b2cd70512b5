#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <immintrin.h>
#include <iterator>
#include <limits>
#include <mutex>
#include <new>
#include <omp.h>
#include <sys/mman.h>
#include <utility>
#include <vector>

// ---- spec.h
// mpass CPU kernels. Generated for: union, bfloat16, D=64, avx512_bf16.

// The headers of the instruction set, and whether products are of bf16 pairs.
#define VECTOR_HEADER "vector_avx512_bf16.h"
#define GEMM_HEADER "gemm_vector.h"
#define GEMM_INT8_HEADER "gemm_int8_vnni.h"
#define POOLED_KEYS_HEADER "pooled_keys_int8.h"
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

constexpr int HEAD_DIM = 64, VALUE_DIM = 64;
constexpr int DEPTH = 32;  // words of a packed row of queries or keys
constexpr int INT8_DEPTH = 16;  // words of four 8-bit numbers of such a row
constexpr int VALUE_WIDTH = 64;  // floats of an output row with its padding
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
struct EstimateArguments {
  const void* query;
  const void* key;
  const uint8_t* key_mask;
  const int32_t* heads;
  const float* distance_bias;
  const float* run_bias;
  const float* mass;
  const float* row_share;
  const int32_t* columns;
  const int32_t* sink_blocks;
  const int32_t* local_blocks;
  const int32_t* last_blocks;
  const int32_t* rows;
  const int32_t* pool;
  const int32_t* max_blocks;
  const int32_t* last_queries;
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
  int64_t bias_head;
  int64_t run_head;
  float scale;
};

}  // namespace

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

// ---- inputs.h
// What all estimators read of a call: its arguments, and which of its positions are padding.
//
// b batch row     h entry of `heads`, one query head each     j key position     n row of `query`

namespace {

inline bool key_is_real(const EstimateArguments& a, int64_t b, int64_t j) {
  return !a.key_mask || a.key_mask[b * a.num_keys + j];
}

inline bool query_is_real(const EstimateArguments& a, int64_t b, int64_t n) {
  // Padding can be told of queries too where their positions are keys.
  return a.num_keys < a.query_offset + a.num_queries || key_is_real(a, b, a.query_offset + n);
}

// The span of each batch row that is not padding.
struct Extent {
  std::vector<int64_t> first_key;   // 0 where there is none
  std::vector<int64_t> last_query;  // row of `query`, -1 where there is none

  explicit Extent(const EstimateArguments& a) : first_key(a.batch), last_query(a.batch) {
    for (int64_t b = 0; b < a.batch; ++b) {
      int64_t first = 0, last = a.num_queries - 1;
      while (first < a.num_keys && !key_is_real(a, b, first)) ++first;
      while (last >= 0 && !query_is_real(a, b, last)) --last;
      first_key[b] = first == a.num_keys ? 0 : first;
      last_query[b] = last;
    }
  }
};

}  // namespace

// ---- block_lists.h
// What the estimators of block lists share: which key blocks a block of queries keeps, by score.
// lowering/reference/block_lists.py says what it means.
//
// b batch row     h entry of `heads`, one query head each     kb key block     p position of a query
// size  positions per block of queries and of keys, a multiple of BLOCK

namespace {

// The choice of one block of queries. Forced blocks are kept at once, then others by score while
// there is room. Sums over scores run over the blocks that the mask allows.
struct BlockSelection {
  using Entry = std::pair<float, int32_t>;  // score and -kb: ties go to the smaller block
  int64_t block, low, high;                 // the mask allows key blocks low <= kb < high
  int64_t room;
  float total, held, best;
  bool everything;
  std::vector<float> scores;  // of all key blocks, set by the caller
  std::vector<uint8_t> kept;
  std::vector<Entry> rest;  // allowed and not kept so far

  void start(const EstimateArguments& a, const Extent& extent, int64_t b, int64_t h,
             int64_t of_block, int64_t size) {
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

  // Keeps the best entries of a range of `rest` for as long as `wanted()` is true and there is
  // room.
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

  // Keeps the entries of a range, or the best of them where there is not room for all.
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

  // Keeps the best others until `mass` of the scores is held. A mass of 1 keeps all.
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

  // Writes the lists of the query blocks that this block of queries consists of.
  void write(const EstimateArguments& a, int64_t b, int64_t h, int64_t size) const {
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

// ---- gemm_vector.h
// The micro-GEMM in vector registers. gemm.h says what its arguments are.

namespace {

constexpr int ROW_STEP = 2, COLUMN_STEP = LANES;
// The register tile has 8 x 3 or 6 x 4 accumulators of 32 registers, or 6 x 2 of AVX2's 16. The
// others hold a row of B and a number of A. 8 divides the rows of a block, which is worth 2%;
// products of bf16 pairs gain nothing by it.
constexpr int VECTORS = LANES == 8 ? 2 : USES_BF16 ? 4 : 3;
constexpr int ROWS = VECTORS == 3 ? 8 : 6;
// So many columns of B cost little more than a vector of them.
constexpr int COLUMNS_AT_ONCE = VECTORS * LANES;
constexpr int FEW_ROWS = 12, FEW_ROW_STEP = 2;  // of a product of few rows

struct TileScope {};

// Says how many bytes to fetch per step, so that a product of BLOCK rows and `steps` x `columns` of
// B fetches `words`. It is no more at a time, or the fetches hold up the loads of the product
// itself.
constexpr int fetch_step(int words, int steps, int columns) {
  const int passes = std::max(1, columns / (VECTORS * LANES)) * ((BLOCK + ROWS - 1) / ROWS);
  return (words * int(sizeof(word)) + passes * steps - 1) / (passes * steps);
}

// Multiplies R rows from `row` on with V vectors from `column` on. It is not inlined: within its
// callers, GCC 12 runs out of registers for the accumulators.
template <int R, int V, bool ACCUMULATE, int FETCH>
__attribute__((noinline)) void multiply_tile(const word* a, int lda, const word* const* panels,
                                             int num_panels, int steps, int row, int column,
                                             int ldb, float* c, int ldc, const float* row_scale,
                                             const TileBounds* bounds,
                                             const word* const* prefetch) {
  if constexpr (!ACCUMULATE && V > 1) {
    if (bounds && bounds->of_row(row + R - 1) <= column + (V - 1) * LANES)
      return multiply_tile<R, V - 1, ACCUMULATE, FETCH>(
          a, lda, panels, num_panels, steps, row, column, ldb, c, ldc, row_scale, bounds, prefetch);
  }
  a += row * lda;
  c += row * ldc + column;
  const int done = (column / (VECTORS * LANES) * ((BLOCK + ROWS - 1) / ROWS) + row / ROWS) * steps;
  vec acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      acc[r][v] =
          ACCUMULATE ? mul(load(c + r * ldc + v * LANES), set1(row_scale[row + r])) : set1(0.0f);
  }
  for (int p = 0; p < num_panels; ++p) {
    const word* b = panels[p] + column;
    const char* line = FETCH ? reinterpret_cast<const char*>(prefetch[p]) + done * FETCH : nullptr;
    const int seen =
        ACCUMULATE && bounds ? (bounds[p].of_row(row + R - 1) + PAIR - 1) / PAIR : steps;
    for (int k = 0; k < seen; ++k, b += ldb) {
      if constexpr (FETCH > 0) __builtin_prefetch(line + k * FETCH, 0, 2);
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
                             const float* row_scale, const TileBounds* bounds,
                             const word* const* prefetch) {
  int r = 0;
  if constexpr (!ACCUMULATE) {
    while (bounds && r + ROWS <= rows && bounds->of_row(r + ROWS - 1) <= column) r += ROWS;
  }
  for (; r + ROWS <= rows; r += ROWS)
    multiply_tile<ROWS, V, ACCUMULATE, FETCH>(a, lda, panels, num_panels, steps, r, column, ldb, c,
                                              ldc, row_scale, bounds, prefetch);
  for (; r + 4 <= rows; r += 4)
    multiply_tile<4, V, ACCUMULATE, FETCH>(a, lda, panels, num_panels, steps, r, column, ldb, c,
                                           ldc, row_scale, bounds, prefetch);
  for (; r < rows; r += 2)
    multiply_tile<2, V, ACCUMULATE, FETCH>(a, lda, panels, num_panels, steps, r, column, ldb, c,
                                           ldc, row_scale, bounds, prefetch);
}

template <bool ACCUMULATE, int FETCH = 0>
void multiply(const word* a, int lda, const word* const* panels, int num_panels, int steps, int ldb,
              float* c, int ldc, int rows, int columns, const float* row_scale,
              const TileBounds* bounds = nullptr, const word* const* prefetch = nullptr) {
  int n = 0;
  for (; n + VECTORS * LANES <= columns; n += VECTORS * LANES)
    multiply_columns<VECTORS, ACCUMULATE, FETCH>(a, lda, panels, num_panels, steps, n, ldb, c, ldc,
                                                 rows, row_scale, bounds, prefetch);
  for (; n < columns; n += LANES)
    multiply_columns<1, ACCUMULATE, 0>(a, lda, panels, num_panels, steps, n, ldb, c, ldc, rows,
                                       row_scale, bounds, prefetch);
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

// ---- sum_rows.h
// Sums of rows of the inputs, which means are made of.

namespace {

constexpr int POOLED = (HEAD_DIM + LANES - 1) / LANES * LANES;  // floats of one sum or mean

// Sums the rows first <= n < stop for which `real(n)` into `sum` [POOLED], and returns how many
// there are.
template <typename Real>
int64_t sum_rows(float* sum, const TensorView& rows, int64_t b, int64_t head, int64_t first,
                 int64_t stop, const Real& real) {
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

}  // namespace

// ---- key_runs.h
// Runs of keys. A run is what one column of a product stands for: the mean of `length` keys
// (pooled_keys in lowering/reference/pooled_keys.py), or `length` keys one after the other, which
// meet as many queries (lowering/reference/x_attention.py).
//
// s  run

namespace {

// The runs of one kv head's keys, packed in panels of 64 runs each: as B operands, or as rows one
// after the other.
struct KeyRuns {
  int64_t count, padded;
  int64_t parts;  // rows of keys that a run consists of
  word* panels;   // [padded / 64, parts, DEPTH, 64] or [padded, DEPTH]
  float* weight;  // [padded] what is added to a product, in units of log2; -inf for no keys
};

// The runs of all heads. Heads with the same kv head and the same length share them.
class AllKeyRuns {
 public:
  // `length` has the positions per run, by entry of `heads`. With `whole` a run keeps its rows,
  // else it is their mean.
  AllKeyRuns(const EstimateArguments& a, const int32_t* length, bool whole)
      : heads_(lay_out(a, length, whole)),
        panels_(a.batch * words_),
        weights_(a.batch * runs_) {}

  int64_t owner(int64_t h) const { return heads_[h].owner; }
  bool owns(int64_t h) const { return owner(h) == h; }
  int64_t width() const { return width_; }  // runs of the longest, padded
  int64_t parts() const { return parts_; }  // rows of keys of the deepest

  KeyRuns of(int64_t b, int64_t h) const {
    const Head& head = heads_[heads_[h].owner];
    return {head.count, head.padded, head.parts, panels_.get() + b * words_ + head.first_word,
            weights_.get() + b * runs_ + head.first_run};
  }

 private:
  struct Head {
    int64_t owner, count, padded, parts, first_run, first_word;
  };

  std::vector<Head> lay_out(const EstimateArguments& a, const int32_t* length, bool whole) {
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

// Packs the mean of the `count` rows of such a sum, or zeros if there are none.
inline void pack_mean(packed* out, const float* sum, int64_t count) {
  const vec total = set1(static_cast<float>(std::max<int64_t>(count, 1)));
  packed wide[POOLED];
  for (int d = 0; d < POOLED; d += LANES)
    store(wide + d, divide(load(sum + d), total), packed_tag{});
  std::memset(out, 0, DEPTH * sizeof(word));
  std::memcpy(out, wide, HEAD_DIM * sizeof(packed));
}

// Packs the means of the 64 runs of one panel, a row of DEPTH words each. `sum` has room for POOLED
// floats. With `log_size` a run weighs as many keys as it has, else as one.
void pool_runs(const EstimateArguments& a, const KeyRuns& runs, float* sum, const TensorView& key,
               int64_t b, int64_t kv_head, int64_t length, int64_t panel, bool log_size,
               word* out) {
  for (int r = 0; r < BLOCK; ++r) {
    const int64_t run = panel * BLOCK + r, first = run * length;
    const int64_t count =
        sum_rows(sum, key, b, kv_head, first, std::min(a.num_keys, first + length),
                 [&](int64_t j) { return key_is_real(a, b, j); });
    runs.weight[run] = count == 0 ? NEGATIVE_INFINITY
        : log_size                ? std::log2(static_cast<float>(count))
                                  : 0.0f;
    pack_mean(reinterpret_cast<packed*>(out + r * DEPTH), sum, count);
  }
}

// The runs that a query row sees are low <= s < high.
struct RunRange {
  int64_t low, high;
};

}  // namespace

// ---- evenly_spaced_rows.h
// Some rows of a query that stand for all of it. evenly_spaced_rows in
// lowering/reference/query_rows.py says which they are.

namespace {

// Rows spread evenly over the real ones of a batch row, the last one included.
struct EvenlySpacedRows {
  int64_t first = 0, count, rows;

  EvenlySpacedRows(const EstimateArguments& a, const Extent& extent, int64_t b, int64_t of_rows)
      : count(extent.last_query[b] + 1),
        rows(of_rows) {
    const bool padding_shows = a.num_keys >= a.query_offset + a.num_queries;
    if (padding_shows && count > 0)
      first = std::max<int64_t>(0, extent.first_key[b] - a.query_offset);
    count -= first;
  }
  // The n-th of them. It may lie before the first or be padding.
  int64_t at(int64_t n) const { return first + (n + 1) * count / rows - 1; }
};

}  // namespace

// ---- last_queries.h
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

// ---- vertical_columns.h
// Finds the vertical columns: the single keys that get most attention of the last queries, or of
// evenly spaced ones where attention is not causal. last_query_sums in
// lowering/reference/vertical_slash.py and spread_sums in union.py say what it means. The weights of
// one head stay in a strip of N rows, so memory is O(N) per thread.

namespace {

// Query heads of a kv head that look at its keys together.
template <int QUERIES>
constexpr int HEADS_AT_ONCE = COLUMNS_AT_ONCE < 2 * QUERIES ? 1 : COLUMNS_AT_ONCE / QUERIES;

constexpr int MOST_HEADS_AT_ONCE = HEADS_AT_ONCE<16>;

struct VerticalColumnScratch {
  Buffer<packed> staging;
  Buffer<word> queries;           // [DEPTH, LAST_QUERIES] words: a B operand
  Buffer<float> scores;           // of one block of keys
  Buffer<uint16_t> weights;       // [padded keys, LAST_QUERIES]
  Buffer<float> factors, totals;  // [key blocks, LAST_QUERIES]
  std::vector<float> sums;        // [heads, padded keys]
  std::vector<float> ranked;

  explicit VerticalColumnScratch(int64_t padded)
      : staging(BLOCK * DEPTH * PAIR),
        queries(DEPTH * LAST_QUERIES),
        scores(BLOCK * LAST_QUERIES),
        weights(padded * LAST_QUERIES),
        factors(padded / BLOCK * LAST_QUERIES),
        totals(padded / BLOCK * LAST_QUERIES),
        sums(MOST_HEADS_AT_ONCE * padded) {}
};

// Entries of `heads` that look together, `count` from `first` on.
struct HeadsTogether {
  int64_t first;
  int count;
};

// Puts together neighbouring query heads of a kv head that have as many queries.
inline std::vector<HeadsTogether> put_together(const EstimateArguments& a) {
  std::vector<HeadsTogether> found;
  for (int64_t h = 0; h < a.num_heads; ++h) {
    const int most = a.last_queries[h] == 16 ? HEADS_AT_ONCE<16>
        : a.last_queries[h] == 32            ? HEADS_AT_ONCE<32>
                                             : 1;
    const bool joins = !found.empty() && found.back().count < most &&
        a.heads[found.back().first] / a.group == a.heads[h] / a.group &&
        a.last_queries[found.back().first] == a.last_queries[h];
    if (joins) ++found.back().count;
    else found.push_back({h, 1});
  }
  return found;
}

// Packs QUERIES queries of each of HEADS heads as a B operand, and says which are real. row(q) is the
// row of a head's q-th query.
template <int QUERIES, int HEADS, typename Row>
uint64_t pack_queries_of_heads(const EstimateArguments& a, VerticalColumnScratch& s,
                               const TensorView& query, int64_t b, int64_t h, const Row& row) {
  uint64_t real = 0;
  pack_queries(a, s.queries.get(), s.staging.get(), [&](int q) -> const input* {
    const int64_t n = q < QUERIES * HEADS ? row(q % QUERIES) : -1;
    if (n < 0) return nullptr;
    real |= uint64_t(1) << q;
    return query.at(b, a.heads[h + q / QUERIES], n);
  });
  return real;
}

// Sums the attention of QUERIES queries of each of HEADS heads, from entry h on, per key into `sums`:
// of the last queries, or of evenly spaced ones where attention is not causal.
template <int QUERIES, int HEADS>
void sum_vertical_columns(const EstimateArguments& a, VerticalColumnScratch& s,
                          const TensorView& query, const TensorView& key, const Extent& extent,
                          int64_t b, int64_t h) {
  constexpr int WIDTH = QUERIES * HEADS, VECTORS_PER_HEAD = QUERIES / LANES;
  const int64_t padded = round_up(a.num_keys, BLOCK);
  const int64_t last = extent.last_query[b];
  const int64_t first_row = a.causal ? last - (QUERIES - 1) : 0;
  const int64_t reach = std::min(a.num_keys, a.causal ? a.query_offset + last + 1 : a.num_keys);
  const int64_t blocks = (reach + BLOCK - 1) / BLOCK;
  std::fill(s.sums.begin(), s.sums.begin() + HEADS * padded, 0.0f);
  uint64_t looking = ~uint64_t(0);
  if (a.causal) {
    pack_queries_of_heads<QUERIES, HEADS>(a, s, query, b, h, [&](int q) { return first_row + q; });
  } else {
    const EvenlySpacedRows spaced(a, extent, b, QUERIES);
    looking = pack_queries_of_heads<QUERIES, HEADS>(a, s, query, b, h, [&](int q) {
      const int64_t n = spaced.at(q);
      return n >= 0 && query_is_real(a, b, n) ? n : -1;
    });
  }
  const vec exponent = exponent_of_product(a);
  for (int64_t n = 0; n < blocks; ++n) {
    score_block<QUERIES, HEADS>(a, s.queries.get(), s.staging.get(), key, b, a.heads[h] / a.group,
                                n * BLOCK, first_row, s.scores.get());
    if constexpr (BIASED)
      add_bias_to_block<QUERIES, HEADS>(a, h, n * BLOCK, s.scores.get(), [&](int q) {
        return a.causal ? first_row + q : EvenlySpacedRows(a, extent, b, QUERIES).at(q);
      });
    exponentiate_block<WIDTH>(s.scores.get(), exponent, s.weights.get() + n * BLOCK * WIDTH,
                              s.factors.get() + n * WIDTH, s.totals.get() + n * WIDTH);
  }
  find_factors<WIDTH>(s.factors.get(), s.totals.get(), blocks);
  for (int64_t n = 0; n < blocks; ++n) {
    vec factor[WIDTH / LANES];
    for (int v = 0; v < WIDTH / LANES; ++v) {
      float* of_block = s.factors.get() + n * WIDTH + v * LANES;
      for (int lane = 0; lane < LANES && looking != ~uint64_t(0); ++lane)
        if (!(looking >> (v * LANES + lane) & 1)) of_block[lane] = 0.0f;
      factor[v] = load(of_block);
    }
    const uint16_t* weights = s.weights.get() + n * BLOCK * WIDTH;
    for (int r = 0; r < BLOCK; ++r) {
      for (int head = 0; head < HEADS; ++head) {
        vec sum = set1(0.0f);
        for (int i = 0; i < VECTORS_PER_HEAD; ++i) {
          const int v = head * VECTORS_PER_HEAD + i;
          sum = fma(load(weights + r * WIDTH + v * LANES, float16_tag{}), factor[v], sum);
        }
        const float total = reduce_add(sum);
        s.sums[head * padded + n * BLOCK + r] = total > 0.0f ? total : 0.0f;  // NaN has no rank
      }
    }
  }
}

// Does the same with as many heads as look together.
template <int QUERIES, int HEADS>
void sum_vertical_columns(const EstimateArguments& a, VerticalColumnScratch& s,
                          const TensorView& query, const TensorView& key, const Extent& extent,
                          int64_t b, const HeadsTogether& together) {
  if constexpr (HEADS > 1) {
    if (together.count < HEADS)
      return sum_vertical_columns<QUERIES, HEADS - 1>(a, s, query, key, extent, b, together);
  }
  sum_vertical_columns<QUERIES, HEADS>(a, s, query, key, extent, b, together.first);
}

// Does the same with as many queries as the heads' rules say.
void sum_vertical_columns(const EstimateArguments& a, VerticalColumnScratch& s,
                          const TensorView& query, const TensorView& key, const Extent& extent,
                          int64_t b, const HeadsTogether& heads) {
  switch (a.last_queries[heads.first]) {
    case 16: return sum_vertical_columns<16, HEADS_AT_ONCE<16>>(a, s, query, key, extent, b, heads);
    case 32: return sum_vertical_columns<32, HEADS_AT_ONCE<32>>(a, s, query, key, extent, b, heads);
    default: return sum_vertical_columns<LAST_QUERIES, 1>(a, s, query, key, extent, b, heads);
  }
}

// Returns the value of rank `count` among n values, 1 for the largest. One of every 16 tells which
// are too small, so that few have to be put in order.
float find_ranked(std::vector<float>& few, const float* values, int64_t n, int64_t count) {
  constexpr int64_t STEP = 16;
  few.clear();
  for (int64_t j = 0; j < n; j += STEP) few.push_back(values[j]);
  const int64_t rank = 2 * count / STEP + 8;  // among these: likely below the one in question
  float bound = NEGATIVE_INFINITY;
  if (rank < static_cast<int64_t>(few.size())) {
    std::nth_element(few.begin(), few.begin() + rank, few.end(), std::greater<float>());
    bound = few[rank];
  }
  few.clear();
  std::copy_if(values, values + n, std::back_inserter(few), [&](float x) { return x >= bound; });
  if (static_cast<int64_t>(few.size()) < count) few.assign(values, values + n);
  std::nth_element(few.begin(), few.begin() + (count - 1), few.end(), std::greater<float>());
  return few[count - 1];
}

// Writes the `columns` keys of the head with the largest sums [padded keys]. Those without any are
// not kept.
void write_vertical_columns(const EstimateArguments& a, VerticalColumnScratch& s, const float* sums,
                            int64_t b, int64_t h) {
  int64_t left = std::min<int64_t>(a.columns[h], a.num_keys);
  const float least = left > 0 ? find_ranked(s.ranked, sums, a.num_keys, left) : NEGATIVE_INFINITY;
  for (int64_t j = 0; j < a.num_keys; ++j) left -= sums[j] > least;  // what is left: equal ones
  const int64_t head = b * a.num_heads + h;
  int32_t* entries = a.column_index + head * a.column_width;
  int32_t written = 0;
  for (int64_t j = 0; j < a.num_keys && a.columns[h] > 0; ++j) {
    if (sums[j] < least || sums[j] <= 0.0f) continue;
    if (sums[j] == least && left-- <= 0) continue;
    entries[written++] = static_cast<int32_t>(j);
  }
  a.column_count[head] = written;
}

}  // namespace

// ---- vector_int8.h
// Products of 8-bit numbers in vector registers of AVX-512.

namespace {

// LANES integers of 32 bits.
using int_vec = __m512i;
inline int_vec zero_ints() { return _mm512_setzero_si512(); }
inline int_vec set1_int(int32_t x) { return _mm512_set1_epi32(x); }
inline int_vec load_ints(const void* p) { return _mm512_loadu_si512(p); }
inline int_vec load_aligned_ints(const void* p) { return _mm512_load_si512(p); }
inline vec to_floats(int_vec x) { return _mm512_cvtepi32_ps(x); }
inline int32_t reduce_add(int_vec x) { return _mm512_reduce_add_epi32(x); }

// Stores x rounded to 8-bit numbers, at an address that 16 divides, and returns `sum` with those
// numbers added.
inline int_vec store_int8(int8_t* p, vec x, int_vec sum) {
  const __m512i levels = _mm512_cvtps_epi32(x);
  const __m128i narrow = _mm512_cvtsepi32_epi8(levels);
  _mm_store_si128(reinterpret_cast<__m128i*>(p), narrow);
  return _mm512_add_epi32(sum, _mm512_cvtepi8_epi32(narrow));
}

// Adds sums of four products to each lane, of unsigned `a` and signed `b`. The instruction is
// named, because with the intrinsic GCC 12 keeps accumulators on the stack, at half the speed.
inline void add_int8_products(int_vec& acc, int_vec a, int_vec b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}

}  // namespace

// ---- int8_rows.h
// Rows of numbers, each rounded to 255 levels of its greatest one.

namespace {

// Says what a level is worth if 127 of them are the greatest number of a row [POOLED]. A row of
// zeros gets 1.
inline float step_of(const float* row) {
  vec most = set1(0.0f);
  for (int d = 0; d < POOLED; d += LANES) {
    const vec x = load(row + d);
    most = maximum(maximum(x, sub(set1(0.0f), x)), most);
  }
  const float greatest = reduce_max(most);
  return greatest > 0.0f ? greatest / 127 : 1.0f;
}

// Writes a row [POOLED] in steps, as [INT8_DEPTH] words, and returns the sum of all its numbers.
inline int32_t pack_int8(uint32_t* out, const float* row, float step) {
  const vec inverse = set1(1.0f / step);
  alignas(16) int8_t bytes[POOLED];
  int_vec sum = zero_ints();
  for (int d = 0; d < POOLED; d += LANES)
    sum = store_int8(bytes + d, mul(load(row + d), inverse), sum);
  constexpr int BYTES = INT8_DEPTH * 4, SHARED = POOLED < BYTES ? POOLED : BYTES;
  std::memset(out, 0, BYTES);
  std::memcpy(out, bytes, SHARED);
  return reduce_add(sum);
}

// Widens a row of HEAD_DIM inputs to POOLED floats, with zeros at the end.
inline void widen_row(float* out, const input* in) {
  int d = 0;
  for (; d + LANES <= HEAD_DIM; d += LANES) store(out + d, load(in + d, input_tag{}));
  if (d == HEAD_DIM) return;
  input tail[LANES] = {};
  std::memcpy(tail, in + d, (HEAD_DIM - d) * sizeof(input));
  store(out + d, load(tail, input_tag{}));
}

}  // namespace

// ---- gemm_int8_vnni.h
// Products of 8-bit numbers in vector registers.

namespace {

constexpr bool INT8_ROWS_ARE_UNSIGNED = true;
constexpr int INT8_ROWS = 6;  // of a register tile, R x 4 accumulators, 4 of columns and 1 of a row

// Multiplies R rows with all columns. Each step fetches LINES lines from `fetched` on.
template <int R, int LINES>
__attribute__((noinline)) void multiply_int8_rows(const uint32_t* a, const float* a_step,
                                                  const uint32_t* b, const float* b_step,
                                                  const int32_t* start, float* products, int stride,
                                                  const char* fetched) {
  constexpr int VECTORS_PER_ROW = BLOCK / LANES;
  int_vec acc[R][VECTORS_PER_ROW];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS_PER_ROW; ++v) acc[r][v] = load_aligned_ints(start + v * LANES);
  for (int k = 0; k < INT8_DEPTH; ++k, b += BLOCK) {
#pragma GCC unroll 8
    for (int n = 0; n < LINES; ++n) __builtin_prefetch(fetched + (k * LINES + n) * 64, 0, 2);
    int_vec factor[VECTORS_PER_ROW];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS_PER_ROW; ++v) factor[v] = load_ints(b + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const int_vec broadcast = set1_int(static_cast<int>(a[r * INT8_DEPTH + k]));
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS_PER_ROW; ++v) add_int8_products(acc[r][v], broadcast, factor[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const vec step = set1(a_step ? a_step[r] : 1.0f);
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS_PER_ROW; ++v) {
      vec sum = to_floats(acc[r][v]);
      if (a_step) sum = mul(sum, step);
      store(products + r * stride + v * LANES, mul(sum, load(b_step + v * LANES)));
    }
  }
}

// Computes products [rows, BLOCK] of `rows` packed rows, a multiple of 2, with BLOCK others, `stride`
// floats per row. The steps are what 1 is worth in each row (null: 1 in all) and in each column; sums
// begin with `start`. Memory of BYTES bytes that is read soon is fetched meanwhile.
template <int BYTES = 0>
inline void multiply_int8(const uint32_t* a, const float* a_step, const uint32_t* b,
                          const float* b_step, const int32_t* start, int rows, float* products,
                          int stride = BLOCK, const char* fetched = nullptr) {
  constexpr int GROUPS = (BLOCK + INT8_ROWS - 1) / INT8_ROWS;
  constexpr int LINES = (BYTES / 64 + GROUPS * INT8_DEPTH - 1) / (GROUPS * INT8_DEPTH);
  const auto step_at = [&](int r) { return a_step ? a_step + r : nullptr; };
  int r = 0;
  for (; r + INT8_ROWS <= rows; r += INT8_ROWS)
    multiply_int8_rows<INT8_ROWS, LINES>(a + r * INT8_DEPTH, step_at(r), b, b_step, start,
                                         products + r * stride, stride,
                                         fetched + r / INT8_ROWS * INT8_DEPTH * LINES * 64);
  for (; r + 4 <= rows; r += 4)
    multiply_int8_rows<4, 0>(a + r * INT8_DEPTH, step_at(r), b, b_step, start,
                             products + r * stride, stride, nullptr);
  for (; r < rows; r += 2)
    multiply_int8_rows<2, 0>(a + r * INT8_DEPTH, step_at(r), b, b_step, start,
                             products + r * stride, stride, nullptr);
}

}  // namespace

// ---- pooled_keys_int8.h
// Products of pooled keys with query rows in 8-bit numbers, at twice the rate of bf16 pairs. They
// only choose blocks, so each row is rounded to 255 levels of its greatest number.
//
// The same vector, the mean of some keys, is subtracted from all pooled keys first: softmax is
// invariant to it, and what all keys share would take most of the levels (SageAttention, arXiv
// 2410.02367, section 4.2).
//
// runs        [padded, INT8_DEPTH] words of four numbers each  (A operand)
// query rows  [INT8_DEPTH, BLOCK] words                        (B operand)

namespace {

constexpr int64_t CENTRE_STEP = BLOCK;  // every so many keys make the vector that is subtracted

// The pooled keys of one kv head. `weight` is as in KeyRuns.
struct PooledKeys {
  int64_t count, padded;
  uint32_t* panels;
  float *weight, *step;  // [padded] step: what 1 is worth in a run's row
  float* centre;         // [POOLED]
};

// The pooled keys of all heads.
class AllPooledKeys {
 public:
  explicit AllPooledKeys(const EstimateArguments& a)
      : all_(a, a.pool, /*whole=*/false),
        heads_(a.num_heads),
        steps_(a.batch * heads_ * all_.width()),
        centres_(a.batch * heads_ * POOLED) {}

  bool owns(int64_t h) const { return all_.owner(h) == h; }
  int64_t width() const { return all_.width(); }

  PooledKeys of(int64_t b, int64_t h) const {
    const KeyRuns runs = all_.of(b, h);
    const int64_t slot = b * heads_ + all_.owner(h);
    return {runs.count,
            runs.padded,
            reinterpret_cast<uint32_t*>(runs.panels),
            runs.weight,
            steps_.get() + slot * all_.width(),
            centres_.get() + slot * POOLED};
  }

 private:
  AllKeyRuns all_;
  int64_t heads_;
  Buffer<float> steps_, centres_;
};

// Finds the vector that is subtracted from all pooled keys of a kv head.
void find_centre(const EstimateArguments& a, const PooledKeys& runs, const TensorView& key,
                 int64_t b, int64_t kv_head) {
  float* centre = runs.centre;
  const int64_t count = sum_rows(centre, key, b, kv_head, 0, a.num_keys, [&](int64_t j) {
    return j % CENTRE_STEP == 0 && key_is_real(a, b, j);
  });
  const vec total = set1(static_cast<float>(std::max<int64_t>(count, 1)));
  for (int d = 0; d < POOLED; d += LANES) store(centre + d, divide(load(centre + d), total));
}

// Pools the keys of the 64 runs of one panel. `mean` has room for POOLED floats.
void pool_keys(const EstimateArguments& a, const PooledKeys& runs, float* mean,
               const TensorView& key, int64_t b, int64_t kv_head, int64_t length, int64_t panel) {
  for (int64_t run = panel * BLOCK; run < (panel + 1) * BLOCK; ++run) {
    const int64_t count =
        sum_rows(mean, key, b, kv_head, run * length, std::min(a.num_keys, (run + 1) * length),
                 [&](int64_t j) { return key_is_real(a, b, j); });
    runs.weight[run] = count == 0 ? NEGATIVE_INFINITY : std::log2(static_cast<float>(count));
    const vec total = set1(static_cast<float>(std::max<int64_t>(count, 1)));
    for (int d = 0; d < POOLED; d += LANES)
      store(mean + d, sub(divide(load(mean + d), total), load(runs.centre + d)));
    uint32_t* out = runs.panels + run * INT8_DEPTH;
    runs.step[run] = step_of(mean);
    pack_int8(out, mean, runs.step[run]);
    if constexpr (INT8_ROWS_ARE_UNSIGNED)
      for (int k = 0; k < INT8_DEPTH; ++k) out[k] ^= 0x80808080u;  // 128 more
  }
}

// BLOCK query rows as a B operand, with what a product is to be multiplied with.
struct PackedQueryRows {
  Buffer<uint32_t> rows, words;
  Buffer<float> row;
  alignas(64) float step[BLOCK];
  alignas(64) int32_t start[BLOCK];  // of a product's sum: it takes 128 off from the runs' numbers

  PackedQueryRows() : rows(BLOCK * INT8_DEPTH), words(BLOCK * INT8_DEPTH), row(POOLED) {}

  // row_at(r) is row r of the input, or null. The sign of the scale goes into the steps.
  template <typename RowAt>
  void pack(const EstimateArguments& a, const RowAt& row_at) {
    for (int r = 0; r < BLOCK; ++r) {
      const input* in = a.scale != 0 ? row_at(r) : nullptr;
      step[r] = 0.0f, start[r] = 0;
      uint32_t* out = rows.get() + r * INT8_DEPTH;
      if (!in) {
        std::memset(out, 0, INT8_DEPTH * sizeof(uint32_t));
        continue;
      }
      widen_row(row.get(), in);
      const float own = step_of(row.get());
      start[r] = -128 * pack_int8(out, row.get(), own);
      step[r] = a.scale < 0 ? -own : own;
    }
    transpose_rows(reinterpret_cast<word*>(words.get()), reinterpret_cast<word*>(rows.get()),
                   INT8_DEPTH);
  }
};

// Computes products [rows, BLOCK] of `rows` runs, a multiple of ROW_STEP, from `first` on, with all
// query rows.
inline void multiply_pooled_keys(const PooledKeys& runs, int64_t first, int rows,
                                 const PackedQueryRows& query_rows, float* products) {
  multiply_int8(runs.panels + first * INT8_DEPTH, runs.step + first, query_rows.words.get(),
                query_rows.step, query_rows.start, rows, products);
}

}  // namespace

// ---- union.h
// Estimates lists of key blocks and vertical columns in one pass. lowering/reference/union.py says
// what it means; the scores are row_scores of lowering/reference/pooled_keys.py.
//
// row    a query row that is looked at; BLOCK of them, of BLOCK / rows query blocks, make one product
// panel  64 runs of keys
//
// Products are taken transposed, a row of query rows per run: the softmax of a query row runs down
// the rows, and so do the sums over the runs of a key block. The exponentials of a panel are
// relative to its own greatest, so that no score is looked at twice. What a query row of a panel is
// to be multiplied with follows when all are done.

namespace {

struct UnionScratch {
  PackedQueryRows query_rows;
  Buffer<float> mean;
  Buffer<float> products;         // [BLOCK, BLOCK] of one panel
  Buffer<float> sums;             // [key blocks, BLOCK] relative to the greatest of their panel
  Buffer<float> factors, totals;  // [panels, BLOCK]
  Buffer<float> scores;           // [query blocks of a product, key blocks]
  std::vector<uint64_t> sharp;    // per key block: for which query blocks of the product it is
  BlockSelection selection;

  UnionScratch(int64_t width, int64_t key_blocks)  // width: runs of the longest, padded
      : mean(POOLED),
        products(BLOCK * BLOCK),
        sums((key_blocks + BLOCK) * BLOCK),
        factors(width),
        totals(width),
        scores(BLOCK * key_blocks),
        sharp(key_blocks) {}
};

// What BLOCK query rows see: run s if low[row] <= s < high[row].
struct VisibleRuns {
  float low[BLOCK], high[BLOCK];                                  // whole numbers
  int64_t first = std::numeric_limits<int64_t>::max(), stop = 0;  // runs that any row sees
  int64_t low_of_all = 0, high_of_all = std::numeric_limits<int64_t>::max();  // that every row sees

  void set(int row, RunRange seen) {
    low[row] = static_cast<float>(seen.low);
    high[row] = static_cast<float>(seen.high);
    low_of_all = std::max(low_of_all, seen.low);
    high_of_all = std::min(high_of_all, seen.high);
    if (seen.low >= seen.high) return;
    first = std::min(first, seen.low);
    stop = std::max(stop, seen.high);
  }
};

// Hides what query rows do not see in the products of one panel.
void hide_unseen(float* products, const VisibleRuns& visible, int64_t panel, int64_t runs) {
  for (int64_t r = 0; r < runs; ++r) {
    const vec run = set1(static_cast<float>(panel * BLOCK + r));
    const vec next = add(run, set1(1.0f));
    for (int n = 0; n < BLOCK; n += LANES) {
      float* row = products + r * BLOCK + n;
      const uint32_t seen =
          at_least(run, load(visible.low + n)) & at_least(load(visible.high + n), next);
      store(row, keep(seen, load(row)));
    }
  }
}

// Adds what a bias by distance gives to runs, for query rows; -1 is none.
void add_run_bias(const EstimateArguments& a, float* products, const int64_t* query_rows, int64_t h,
                  int64_t first, int64_t runs) {
  const float unit = a.scale == 0 ? LOG2E : 1.0f / std::abs(a.scale);
  for (int row = 0; row < BLOCK; ++row) {
    if (query_rows[row] < 0) continue;
    const float* bias = a.run_bias + h * a.run_head + (a.num_queries - 1 - query_rows[row]);
    for (int64_t r = 0; r < runs; ++r)
      products[r * BLOCK + row] += bias[(first + r) * a.pool[h]] * unit;
  }
}

// Takes the exponentials of the first `runs` of a panel, summed over the runs of each key block,
// `ratio` each.
void sum_panel(const float* products, const float* weight, vec exponent, int64_t runs,
               int64_t ratio, float* sums, float* greatest, float* total) {
  constexpr int VECTORS_PER_ROW = BLOCK / LANES;
  vec most[VECTORS_PER_ROW], all[VECTORS_PER_ROW];
  for (int v = 0; v < VECTORS_PER_ROW; ++v) most[v] = set1(NEGATIVE_INFINITY), all[v] = set1(0.0f);
  for (int64_t r = 0; r < runs; ++r)
    for (int v = 0; v < VECTORS_PER_ROW; ++v)
      most[v] =
          maximum(most[v], fma(load(products + r * BLOCK + v * LANES), exponent, set1(weight[r])));
  for (int v = 0; v < VECTORS_PER_ROW; ++v) {
    store(greatest + v * LANES, most[v]);
    most[v] = finite_or_zero(most[v]);
  }
  for (int64_t first = 0; first < runs; first += ratio, sums += BLOCK) {
    vec block[VECTORS_PER_ROW];
    for (int v = 0; v < VECTORS_PER_ROW; ++v) block[v] = set1(0.0f);
    for (int64_t r = first; r < first + ratio; ++r)
      for (int v = 0; v < VECTORS_PER_ROW; ++v)
        block[v] =
            add(block[v],
                exp2_vec(sub(fma(load(products + r * BLOCK + v * LANES), exponent, set1(weight[r])),
                             most[v])));
    for (int v = 0; v < VECTORS_PER_ROW; ++v) {
      store(sums + v * LANES, block[v]);
      all[v] = add(all[v], block[v]);
    }
  }
  for (int v = 0; v < VECTORS_PER_ROW; ++v) store(total + v * LANES, all[v]);
}

// Takes softmax shares of the key blocks first <= kb < stop. They are summed over the query rows of
// each query block into `scores`, and marked in `sharp` where that of one row is at least `least`.
void score_blocks(UnionScratch& s, int64_t first, int64_t stop, int64_t ratio, int64_t rows,
                  float least) {
  const int64_t key_blocks = static_cast<int64_t>(s.sharp.size()), at_once = BLOCK / rows;
  for (int64_t kb = first; kb < stop; ++kb) {
    const float* sums = s.sums.get() + kb * BLOCK;
    const float* factors = s.factors.get() + kb * ratio / BLOCK * BLOCK;
    uint64_t sharp = 0;
    vec sum = set1(0.0f);
    for (int n = 0; n < BLOCK; n += LANES) {
      const vec share = mul(load(sums + n), load(factors + n));
      sharp |= uint64_t(at_least(share, set1(least))) << n;
      sum = add(sum, share);
      if ((n + LANES) % rows != 0 && rows >= LANES) continue;
      float of_blocks[LANES];
      sum = sum_neighbours(sum, std::min<int64_t>(rows, LANES));
      store(of_blocks, maximum(sum, set1(0.0f)));  // NaN cannot be ranked
      for (int64_t lane = 0; lane < LANES; lane += rows)
        s.scores.get()[(n + lane) / rows * key_blocks + kb] = of_blocks[lane];
      sum = set1(0.0f);
    }
    s.sharp[kb] = 0;
    for (int64_t i = 0; i < at_once; ++i)
      s.sharp[kb] |= uint64_t((sharp >> i * rows & low_bits(rows)) != 0) << i;
  }
}

// Scores all key blocks, for the query rows of `blocks` query blocks from `first` on.
void score_query_rows(const EstimateArguments& a, UnionScratch& s, const PooledKeys& runs,
                      const TensorView& query, int64_t b, int64_t h, int64_t first,
                      int64_t blocks) {
  const int64_t rows = a.rows[h], pool = a.pool[h], ratio = BLOCK / pool;
  const int64_t end = a.query_offset + a.num_queries;
  const int64_t key_blocks = static_cast<int64_t>(s.sharp.size());
  VisibleRuns visible;
  const input* query_rows[BLOCK] = {};
  int64_t looking[BLOCK];  // these rows of the queries; -1 for none
  for (int row = 0; row < BLOCK; ++row) {
    const int64_t block = first + row / rows;
    const int64_t last = std::min(end, (block + 1) * BLOCK) - 1;
    const int64_t p = last - (rows - 1 - row % rows) * (BLOCK / rows), n = p - a.query_offset;
    RunRange seen{0, 0};
    looking[row] = -1;
    if (row < blocks * rows && n >= 0 && p >= block * BLOCK && query_is_real(a, b, n)) {
      query_rows[row] = query.at(b, a.heads[h], n);
      looking[row] = n;
      const int64_t hidden = a.window > 0 ? p - a.window - (pool - 1) : -1;
      seen = {hidden < 0 ? 0 : hidden / pool + 1,
              a.causal ? std::min(runs.count, p / pool + 1) : runs.count};
    }
    visible.set(row, seen);
  }
  s.query_rows.pack(a, [&](int row) { return query_rows[row]; });
  const vec exponent = exponent_of_product(a);
  const int64_t first_panel = std::min(visible.first, visible.stop) / BLOCK;
  const int64_t stop_panel = (visible.stop + BLOCK - 1) / BLOCK;
  for (int64_t panel = first_panel; panel < stop_panel; ++panel) {
    const int64_t start = panel * BLOCK;
    const int64_t seen = std::min<int64_t>(BLOCK, round_up(visible.stop - start, ratio));
    multiply_pooled_keys(runs, start, static_cast<int>(round_up(seen, ROW_STEP)), s.query_rows,
                         s.products.get());
    if constexpr (BIASED)
      add_run_bias(a, s.products.get(), looking, h, start, std::min(seen, runs.count - start));
    if (start < visible.low_of_all || start + seen > visible.high_of_all)
      hide_unseen(s.products.get(), visible, panel, seen);
    sum_panel(s.products.get(), runs.weight + start, exponent, seen, ratio,
              s.sums.get() + start / ratio * BLOCK, s.factors.get() + start,
              s.totals.get() + start);
  }
  find_factors(s.factors.get() + first_panel * BLOCK, s.totals.get() + first_panel * BLOCK,
               stop_panel - first_panel);
  const int64_t low = first_panel * BLOCK / ratio;
  const int64_t high = std::min(key_blocks, (visible.stop + ratio - 1) / ratio);
  std::fill(s.sharp.begin(), s.sharp.end(), 0);
  for (int64_t i = 0; i < blocks; ++i) {
    float* scores = s.scores.get() + i * key_blocks;
    std::fill(scores, scores + low, 0.0f);
    std::fill(scores + high, scores + key_blocks, 0.0f);
  }
  score_blocks(s, low, high, ratio, rows, a.row_share[h]);
}

// Writes the lists of the query blocks from `first` on whose query rows make one product.
void choose_blocks(const EstimateArguments& a, UnionScratch& s, const PooledKeys& runs,
                   const Extent& extent, const TensorView& query, int64_t b, int64_t h,
                   int64_t first, int64_t blocks) {
  score_query_rows(a, s, runs, query, b, h, first, blocks);
  const int64_t key_blocks = static_cast<int64_t>(s.sharp.size());
  for (int64_t i = 0; i < blocks; ++i) {
    const float* scores = s.scores.get() + i * key_blocks;
    s.selection.scores.assign(scores, scores + key_blocks);
    s.selection.start(a, extent, b, h, first + i, BLOCK);
    auto& rest = s.selection.rest;
    const auto others = std::partition(rest.begin(), rest.end(), [&](const auto& entry) {
      return s.sharp[-entry.second] >> i & 1;
    });
    s.selection.take_all(rest.begin(), others);
    s.selection.take_mass(others, a.mass[h]);
    s.selection.write(a, b, h, BLOCK);
  }
}

int estimate_union(const EstimateArguments& a) {
  const TensorView query{static_cast<const input*>(a.query), a.query_batch, a.query_head,
                         a.query_row};
  const TensorView key{static_cast<const input*>(a.key), a.key_batch, a.key_head, a.key_row};
  const AllPooledKeys all(a);
  const Extent extent(a);
  const int64_t padded = round_up(a.num_keys, BLOCK), first_block = a.query_offset / BLOCK;
  const std::vector<HeadsTogether> together = put_together(a);
  const int64_t looks = static_cast<int64_t>(together.size());
  int64_t most = 0;  // products of the head with the most of them
  for (int64_t h = 0; h < a.num_heads; ++h)
    most = std::max(most, round_up(a.num_blocks * a.rows[h], BLOCK) / BLOCK);
#pragma omp parallel num_threads(a.threads)
  {
    UnionScratch s(all.width(), padded / BLOCK);
    for (int64_t t = 0; t < a.batch * a.num_heads; ++t) {
      const int64_t b = t / a.num_heads, h = t % a.num_heads;
      if (!all.owns(h)) continue;
      const PooledKeys runs = all.of(b, h);
#pragma omp single
      find_centre(a, runs, key, b, a.heads[h] / a.group);
#pragma omp for schedule(static) nowait
      for (int64_t panel = 0; panel < runs.padded / BLOCK; ++panel)
        pool_keys(a, runs, s.mean.get(), key, b, a.heads[h] / a.group, a.pool[h], panel);
    }
#pragma omp barrier
    const TileScope tiles;
    if (a.column_width > 0) {
      VerticalColumnScratch columns(padded);
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t t = 0; t < a.batch * looks; ++t) {
        const int64_t b = t / looks;
        const HeadsTogether& heads = together[t % looks];
        sum_vertical_columns(a, columns, query, key, extent, b, heads);
        for (int head = 0; head < heads.count; ++head)
          write_vertical_columns(a, columns, columns.sums.data() + head * padded, b,
                                 heads.first + head);
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < a.batch * a.num_heads * most; ++t) {
      const int64_t b = t / most / a.num_heads, h = t / most % a.num_heads;
      const int64_t at_once = BLOCK / a.rows[h];
      const int64_t i = (most - 1 - t % most) * at_once;  // the longest first
      if (i < a.num_blocks)
        choose_blocks(a, s, all.of(b, h), extent, query, b, h, first_block + i,
                      std::min(at_once, a.num_blocks - i));
    }
  }
  return 0;
}

}  // namespace

extern "C" int union_index(const EstimateArguments* arguments) {
  try {
    return estimate_union(*arguments);
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
