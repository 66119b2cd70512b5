// mpass CPU kernels. Generated for: flex_prefill, bfloat16, D=40, avx512_bf16.
#pragma once

#include <cstdint>

// The headers of the instruction set, and whether products are of bf16 pairs.
#define VECTOR_HEADER "vector_avx512_bf16.h"
#define GEMM_HEADER "gemm_vector.h"
#define GEMM_INT8_HEADER "gemm_int8_vnni.h"
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

constexpr int HEAD_DIM = 40, VALUE_DIM = 40;
constexpr int DEPTH = 20;  // words of a packed row of queries or keys
constexpr int INT8_DEPTH = 10;  // words of four 8-bit numbers of such a row
constexpr int VALUE_WIDTH = 48;  // floats of an output row with its padding
constexpr int BLOCK = 64;  // positions per block of queries and of keys
constexpr int STRIP = 4;  // tiles per softmax update
constexpr bool SOFTCAP = false;
constexpr bool INT8_SCORES = false;  // scores of attention are
constexpr bool HALF_VALUES = false;  // P x V is in fp16
constexpr bool SUMS_DISTANCES = true;
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
  int64_t bias_head;
  int64_t run_head;
  float scale;
};

}  // namespace
