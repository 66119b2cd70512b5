// AVX-512 with products of bf16 pairs and of 8-bit numbers.
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

// Stores LANES words, each of a bf16 of the even row and the one below it in the odd row.
inline void store_pairs(uint32_t* out, const uint16_t* even_row, const uint16_t* odd_row) {
  const __m256i even = _mm256_loadu_si256((const __m256i*)even_row);
  const __m256i odd = _mm256_loadu_si256((const __m256i*)odd_row);
  const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                                        _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
  _mm512_storeu_si512(out, pairs);
}

// LANES integers of 32 bits.
using int_vec = __m512i;
inline int_vec zero_ints() { return _mm512_setzero_si512(); }
inline int_vec set1_int(int32_t x) { return _mm512_set1_epi32(x); }
inline int_vec load_ints(const void* p) { return _mm512_loadu_si512(p); }
inline int_vec load_aligned_ints(const void* p) { return _mm512_load_si512(p); }
inline vec to_floats(int_vec x) { return _mm512_cvtepi32_ps(x); }
inline int32_t reduce_add(int_vec x) { return _mm512_reduce_add_epi32(x); }

// Stores x rounded to 8-bit numbers, at an address that 16 divides, and returns `sum` with those
// numbers added.
inline int_vec store_int8(int8_t* p, vec x, int_vec sum) {
  const __m512i levels = _mm512_cvtps_epi32(x);
  const __m128i narrow = _mm512_cvtsepi32_epi8(levels);
  _mm_store_si128(reinterpret_cast<__m128i*>(p), narrow);
  return _mm512_add_epi32(sum, _mm512_cvtepi8_epi32(narrow));
}

// Adds sums of four products to each lane, of unsigned `a` and signed `b`. The instruction is
// named, because with the intrinsic GCC 12 keeps accumulators on the stack, at half the speed.
inline void add_int8_products(int_vec& acc, int_vec a, int_vec b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}

}  // namespace
