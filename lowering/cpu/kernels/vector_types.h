// Constants that every vector header builds on.
#pragma once

#include <limits>

#include "spec.h"

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
