// Estimators of MInference 1.0's patterns, and what they share.
#pragma once

#include <new>

#include "block_sparse.h"
#include "vertical_slash.h"

extern "C" int vertical_slash_index(const EstimateArguments* arguments) {
  try {
    return estimate_vertical_slash(*arguments);
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

extern "C" int block_top_k_index(const EstimateArguments* arguments) {
  try {
    return estimate_block_top_k(*arguments);
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
