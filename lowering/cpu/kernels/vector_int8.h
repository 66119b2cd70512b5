// Products of 8-bit numbers in vector registers of AVX-512.
#pragma once

#include <immintrin.h>
#include <cstdint>

#include "vector.h"

namespace {

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
