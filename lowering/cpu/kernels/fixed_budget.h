// The estimators of the patterns whose budgets are fixed, those of MInference 1.0: they share a
// library because models use them together.
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
