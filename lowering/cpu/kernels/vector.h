// The vector layer, on top of the header of an instruction set: vector_<name>.h holds all that
// differs between them, together with gemm_<name>.h.
//
// `vec` holds LANES floats. `word` is what a micro-kernel broadcasts and multiplies: one float, or
// for bf16 arithmetic a pair of bf16 that belong to two neighbouring steps of the reduction.
#pragma once

#include <cstdint>

#include "spec.h"

#include VECTOR_HEADER

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
