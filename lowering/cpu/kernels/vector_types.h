// Constants that every vector header builds on.
#pragma once

#include <limits>

#include "spec.h"

namespace {

constexpr float LOG2E = 1.44269504088896341f;
constexpr float NEGATIVE_INFINITY = -std::numeric_limits<float>::infinity();
constexpr int KEY_WORDS = DEPTH * BLOCK, VALUE_WORDS = BLOCK / PAIR * VALUE_WIDTH;  // of one block

}  // namespace
