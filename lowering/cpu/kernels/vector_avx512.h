// AVX-512, with 16 floats per register.
#pragma once

#include <immintrin.h>
#include <cstdint>

#include "vector_types.h"

namespace {

using vec = __m512;
constexpr int LANES = 16;
constexpr float LOWEST_EXPONENT = -127.0f;  // 2 to it is zero, and to what lies below

inline vec set1(float x) { return _mm512_set1_ps(x); }
inline vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vec x) { _mm512_storeu_ps(p, x); }
inline vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
inline vec sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
inline vec mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
inline vec divide(vec a, vec b) { return _mm512_div_ps(a, b); }
inline vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
inline vec maximum(vec a, vec b) { return _mm512_max_ps(a, b); }  // b where either is NaN
inline float reduce_max(vec x) { return _mm512_reduce_max_ps(x); }
inline float reduce_add(vec x) { return _mm512_reduce_add_ps(x); }
// x where the lane's bit is set, else -inf.
inline vec keep(uint64_t bits, vec x) {
  return _mm512_mask_mov_ps(set1(NEGATIVE_INFINITY), static_cast<__mmask16>(bits), x);
}
// 0 where x is -inf, else x.
inline vec finite_or_zero(vec x) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, set1(NEGATIVE_INFINITY), _CMP_NEQ_UQ), x);
}
inline vec load(const uint16_t* p, bfloat16_tag) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline vec load(const uint16_t* p, float16_tag) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
// x * 2^n, and zero where n is -126 or less. Microcode makes results that are no normal numbers, in
// more than a hundred cycles, and each hidden key would be one.
inline vec scale_by_power(vec x, vec n) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n, set1(-126.0f), _CMP_NLE_UQ), x, n);
}
inline vec round_nearest(vec x) { return _mm512_roundscale_ps(x, 0); }
inline void store(uint16_t* p, vec x, float16_tag) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(uint16_t* p, vec x, bfloat16_tag) {  // to nearest, ties to even
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                                  _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

// Bit n tells whether x[n] >= least[n].
inline uint32_t at_least(vec x, vec least) { return _mm512_cmp_ps_mask(x, least, _CMP_GE_OQ); }

// Every lane becomes the sum of the `count` lanes it stands with. `count` is 1, 2, 4 .. LANES.
inline vec sum_neighbours(vec x, int64_t count) {
  if (count > 1) x = add(x, _mm512_permute_ps(x, 0xb1));
  if (count > 2) x = add(x, _mm512_permute_ps(x, 0x4e));
  if (count > 4) x = add(x, _mm512_shuffle_f32x4(x, x, 0xb1));
  if (count > 8) x = add(x, _mm512_shuffle_f32x4(x, x, 0x4e));
  return x;
}

// Multiplies the lanes by the Hadamard matrix of 1 and -1.
inline vec rotate_lanes(vec x) {
  vec y = _mm512_permute_ps(x, 0xb1);
  x = _mm512_mask_sub_ps(add(y, x), 0xaaaa, y, x);
  y = _mm512_permute_ps(x, 0x4e);
  x = _mm512_mask_sub_ps(add(y, x), 0xcccc, y, x);
  y = _mm512_shuffle_f32x4(x, x, 0xb1);
  x = _mm512_mask_sub_ps(add(y, x), 0xf0f0, y, x);
  y = _mm512_shuffle_f32x4(x, x, 0x4e);
  return _mm512_mask_sub_ps(add(y, x), 0xff00, y, x);
}

// Stores LANES words, each of a 16-bit number of the even row and the one below it in the odd row.
inline void store_pairs(uint32_t* out, const uint16_t* even_row, const uint16_t* odd_row) {
  const __m256i even = _mm256_loadu_si256((const __m256i*)even_row);
  const __m256i odd = _mm256_loadu_si256((const __m256i*)odd_row);
  const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                                        _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
  _mm512_storeu_si512(out, pairs);
}

// Transposes [16, in_stride] words to [16, out_stride] words.
inline void transpose(word* out, int out_stride, const word* in, int in_stride) {
  __m512i x[16], y[16];
  for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(in + i * in_stride);
  for (int i = 0; i < 8; ++i) {
    y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
    y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    x[4 * i] = _mm512_unpacklo_epi64(y[4 * i], y[4 * i + 2]);
    x[4 * i + 1] = _mm512_unpackhi_epi64(y[4 * i], y[4 * i + 2]);
    x[4 * i + 2] = _mm512_unpacklo_epi64(y[4 * i + 1], y[4 * i + 3]);
    x[4 * i + 3] = _mm512_unpackhi_epi64(y[4 * i + 1], y[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88);
    y[4 + i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
    y[8 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
    y[12 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(out + i * out_stride, _mm512_shuffle_i32x4(y[i], y[8 + i], 0x88));
    _mm512_storeu_si512(out + (4 + i) * out_stride,
                        _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0x88));
    _mm512_storeu_si512(out + (8 + i) * out_stride, _mm512_shuffle_i32x4(y[i], y[8 + i], 0xdd));
    _mm512_storeu_si512(out + (12 + i) * out_stride,
                        _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0xdd));
  }
}

}  // namespace
