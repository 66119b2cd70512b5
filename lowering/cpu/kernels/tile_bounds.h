// Which part of a tile of scores any row sees.
#pragma once

#include <algorithm>

#include "spec.h"

namespace {

// The keys of a tile that a row sees: those of the first `keys`, and for row r at most `first + r`.
struct TileBounds {
  int keys = BLOCK, first = BLOCK;
  int of_row(int r) const { return std::min(keys, first + r); }
};

}  // namespace
