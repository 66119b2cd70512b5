// AVX-512 with products of bf16 pairs.
#pragma once

#include <immintrin.h>
#include <cstdint>

#include "vector_avx512.h"

namespace {

// Adds a.even * b.even + a.odd * b.odd to each lane.
inline vec dot(vec acc, uint32_t a, __m512i b) {
  return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
}
inline __m512i load_words(const uint32_t* b) { return _mm512_loadu_si512(b); }

// Stores two vectors, `low` first.
inline void store(uint16_t* p, vec low, vec high, bfloat16_tag) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

}  // namespace
