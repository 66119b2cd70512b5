// mpass CPU kernels. An example for language servers: the real one is generated (lowering/cpu/source.py).
#pragma once

#include <cstdint>

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

// The numbers of a call: field by field the ctypes structure of the caller.
struct QuantizeArguments {
  const void* rows;
  uint8_t* levels;
  float* steps;
  int64_t num_rows;
  int64_t groups;
  int64_t stride;
  int64_t threads;
};

// The numbers of a call: field by field the ctypes structure of the caller.
struct LinearArguments {
  const void* rows;
  const void* weight;
  const float* bias;
  void* out;
  int64_t num_rows;
  int64_t inputs;
  int64_t outputs;
  int64_t rows_stride;
  int64_t weight_stride;
  int64_t threads;
};

// The numbers of a call: field by field the ctypes structure of the caller.
struct BackwardArguments {
  const void* grad_out;
  const float* dots;
  void* grad_query;
  void* grad_key;
  void* grad_value;
  const float* turned_bias;
  float* grad_bias;
  int64_t grad_out_batch;
  int64_t grad_out_head;
  int64_t grad_out_row;
  int64_t parts;
  int64_t line;
};

// The numbers of a call: field by field the ctypes structure of the caller.
struct RowLossArguments {
  const int64_t* positions;
  float* lost;
  float* exact;
  int64_t count;
};

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
  int64_t list_width;
  int64_t column_width;
  const float* share;
  const int32_t* block_size;
  const float* threshold;
  const int32_t* stride;
  const float* gamma;
  const float* tau;
  const int32_t* min_budget;
  const int32_t* max_budget;
  const float* coverage;
};

}  // namespace
