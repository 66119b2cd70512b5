// mpass CPU kernels. Generated for: attention, float16, D=64, DV=80, strips of 4 tiles, softcap, avx2.
#pragma once

#include <cstdint>

// The headers of the instruction set, and whether products are of bf16 pairs.
#define VECTOR_HEADER "vector_avx2.h"
#define GEMM_HEADER "gemm_vector.h"
#define GEMM_INT8_HEADER "gemm_int8_vnni.h"
#define POOLED_KEYS_HEADER "pooled_keys_packed.h"
#define SCORES_HEADER "scores_packed.h"
#define WEIGHTS_HEADER "weights_packed.h"
#define USES_BF16 0

namespace {

struct float32_tag {};
struct bfloat16_tag {};
struct float16_tag {};
using input = uint16_t;
using input_tag = float16_tag;
using packed = float;  // element of packed K and V
using packed_tag = float32_tag;
using word = float;  // what the micro-GEMM broadcasts
using weight = float;  // element of P
using weight_tag = float32_tag;
constexpr int PAIR = 1;  // packed elements per word
constexpr bool INPUT_IS_PACKED = false;

constexpr int HEAD_DIM = 64, VALUE_DIM = 80;
constexpr int DEPTH = 64;  // words of a packed row of queries or keys
constexpr int INT8_DEPTH = 16;  // words of four 8-bit numbers of such a row
constexpr int VALUE_WIDTH = 80;  // floats of an output row with its padding
constexpr int BLOCK = 64;  // positions per block of queries and of keys
constexpr int STRIP = 4;  // tiles per softmax update
constexpr bool SOFTCAP = true;
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
