// AVX2, with 8 floats per register.
#pragma once

#include <immintrin.h>
#include <cstdint>

#include "vector_types.h"

namespace {

using vec = __m256;
constexpr int LANES = 8;
constexpr float LOWEST_EXPONENT = -127.0f;  // 2 to it is zero, and to what lies below

inline vec set1(float x) { return _mm256_set1_ps(x); }
inline vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, vec x) { _mm256_storeu_ps(p, x); }
inline vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
inline vec sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
inline vec mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
inline vec divide(vec a, vec b) { return _mm256_div_ps(a, b); }
inline vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
inline vec maximum(vec a, vec b) { return _mm256_max_ps(a, b); }  // b where either is NaN
inline float reduce_max(vec x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
}
inline float reduce_add(vec x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_shuffle_ps(y, y, 1)));
}
// x where the lane's bit is set, else -inf.
inline vec keep(uint64_t bits, vec x) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i on = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), lane), lane);
  return _mm256_blendv_ps(set1(NEGATIVE_INFINITY), x, _mm256_castsi256_ps(on));
}
// 0 where x is -inf, else x.
inline vec finite_or_zero(vec x) {
  return _mm256_and_ps(x, _mm256_cmp_ps(x, set1(NEGATIVE_INFINITY), _CMP_NEQ_UQ));
}
inline vec load(const uint16_t* p, bfloat16_tag) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline vec load(const uint16_t* p, float16_tag) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
inline vec scale_by_power(vec x, vec n) {  // n in [-127, 127]; -127 gives zero
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return mul(x, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
}
inline vec round_nearest(vec x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline void store(uint16_t* p, vec x, float16_tag) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(uint16_t* p, vec x, bfloat16_tag) {  // to nearest, ties to even
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(sum, _mm256_set1_epi32(0x7fc00000), nan), 16);
  high = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(high));
}

// Bit n tells whether x[n] >= least[n].
inline uint32_t at_least(vec x, vec least) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x, least, _CMP_GE_OQ)));
}

// Every lane becomes the sum of the `count` lanes it stands with. `count` is 1, 2, 4 .. LANES.
inline vec sum_neighbours(vec x, int64_t count) {
  if (count > 1) x = add(x, _mm256_permute_ps(x, 0xb1));
  if (count > 2) x = add(x, _mm256_permute_ps(x, 0x4e));
  if (count > 4) x = add(x, _mm256_permute2f128_ps(x, x, 0x01));
  return x;
}

// Multiplies the lanes by the Hadamard matrix of 1 and -1.
inline vec rotate_lanes(vec x) {
  vec y = _mm256_permute_ps(x, 0xb1);
  x = _mm256_blend_ps(add(y, x), sub(y, x), 0xaa);
  y = _mm256_permute_ps(x, 0x4e);
  x = _mm256_blend_ps(add(y, x), sub(y, x), 0xcc);
  y = _mm256_permute2f128_ps(x, x, 0x01);
  return _mm256_blend_ps(add(y, x), sub(y, x), 0xf0);
}

// Transposes [8, in_stride] words to [8, out_stride] words.
inline void transpose(word* out, int out_stride, const word* in, int in_stride) {
  __m256 x[8], y[8];
  for (int i = 0; i < 8; ++i) x[i] = load(in + i * in_stride);
  for (int i = 0; i < 4; ++i) {
    y[2 * i] = _mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]);
    y[2 * i + 1] = _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    x[4 * i] = _mm256_shuffle_ps(y[4 * i], y[4 * i + 2], 0x44);
    x[4 * i + 1] = _mm256_shuffle_ps(y[4 * i], y[4 * i + 2], 0xee);
    x[4 * i + 2] = _mm256_shuffle_ps(y[4 * i + 1], y[4 * i + 3], 0x44);
    x[4 * i + 3] = _mm256_shuffle_ps(y[4 * i + 1], y[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    store(out + i * out_stride, _mm256_permute2f128_ps(x[i], x[4 + i], 0x20));
    store(out + (4 + i) * out_stride, _mm256_permute2f128_ps(x[i], x[4 + i], 0x31));
  }
}

}  // namespace
