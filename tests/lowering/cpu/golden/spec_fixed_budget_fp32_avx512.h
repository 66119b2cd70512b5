// mpass CPU kernels. Generated for: fixed_budget, float32, D=64, avx512.
#pragma once

#include <cstdint>

// The headers of the instruction set, and whether products are of bf16 pairs.
#define VECTOR_HEADER "vector_avx512.h"
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
using input = float;
using input_tag = float32_tag;
using packed = float;  // element of packed K and V
using packed_tag = float32_tag;
using word = float;  // what the micro-GEMM broadcasts
using weight = float;  // element of P
using weight_tag = float32_tag;
constexpr int PAIR = 1;  // packed elements per word
constexpr bool INPUT_IS_PACKED = true;

constexpr int HEAD_DIM = 64, VALUE_DIM = 64;
constexpr int DEPTH = 64;  // words of a packed row of queries or keys
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
  const int32_t* first_sizes;
  const int32_t* second_sizes;
  int32_t* first_count;
  int32_t* first_index;
  int32_t* second_count;
  int32_t* second_index;
  const float* distance_bias;
  const float* run_bias;
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
  int64_t bias_head;
  int64_t run_head;
  float scale;
};

}  // namespace
