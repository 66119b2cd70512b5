// AVX-512 with arithmetic in fp16: 32 numbers per register.
#pragma once

#include <immintrin.h>
#include <cstdint>

#include "vector.h"

namespace {

using half_vec = __m512h;
inline half_vec zero_halves() { return _mm512_setzero_ph(); }
inline half_vec load_halves(const uint32_t* pairs) { return (half_vec)_mm512_loadu_si512(pairs); }
inline half_vec set1_pair(uint32_t pair) {
  return (half_vec)_mm512_set1_epi32(static_cast<int>(pair));
}

// Adds products, each rounded with its sum. The instruction is named so that accumulators stay in
// registers.
inline void add_half_products(half_vec& acc, half_vec a, half_vec b) {
  asm("vfmadd231ph %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}

// The sums of the two numbers of each pair.
inline vec sum_pairs(half_vec x) {
  const __m512i turned = _mm512_rol_epi32((__m512i)x, 16);
  const __m512h sums = _mm512_add_ph(x, (__m512h)turned);
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)sums));
}

// Stores two vectors in fp16, `low` first.
inline void store(uint16_t* p, vec low, vec high, float16_tag) {
  store(p, low, float16_tag{});
  store(p + LANES, high, float16_tag{});
}

}  // namespace
