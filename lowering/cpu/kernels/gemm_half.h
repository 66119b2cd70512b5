// Products of half-precision numbers in AVX512-FP16 registers, 32 to a register: twice fp32's rate.
//
// RUN products are summed in half precision, two such runs too, and sums of a CHAIN in fp32: so the
// error is that of the roundings to 11 bits in a CHAIN, however long the sum is. Two runs of 16 have
// 1.3 times less of it than one of 32, since short sums are small, for at most 3% of the time.
#pragma once

#include <immintrin.h>
#include <cstdint>

#include "vector.h"

namespace {

constexpr int TILE_ROWS = 12;  // 24 accumulators, 2 registers of columns and 1 of a row
constexpr int TILE_COLUMNS = 64;
constexpr int CHAIN = 32, RUN = CHAIN / 2;
constexpr float MOST_HALF = 32.0f;  // numbers stay below: so do CHAIN products below 65504

// Stores LANES numbers as half precision.
inline void store_half(uint16_t* p, vec x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

// Stores LANES numbers as words that hold the number twice: a word is broadcast without a shuffle.
inline void store_half_twice(uint32_t* p, vec x) {
  const __m512i half = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  _mm512_storeu_si512(p, _mm512_or_si512(half, _mm512_slli_epi32(half, 16)));
}

// Stores the lower and the upper halves of LANES words.
inline void store_halves(uint16_t* lower, uint16_t* upper, const float* words) {
  const __m512i x = _mm512_loadu_si512(words);
  _mm256_storeu_si256((__m256i*)lower, _mm512_cvtepi32_epi16(x));
  _mm256_storeu_si256((__m256i*)upper, _mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16)));
}

// Adds an accumulator to sums of its 32 columns.
inline void add_half(float* sums, __m512h x, bool first) {
  const __m512i bits = _mm512_castph_si512(x);
  const vec low = _mm512_cvtph_ps(_mm512_castsi512_si256(bits));
  const vec high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1));
  store(sums, first ? low : add(low, load(sums)));
  store(sums + LANES, first ? high : add(high, load(sums + LANES)));
}

// Adds the products of TILE_ROWS rows [TILE_ROWS, a_stride] with TILE_COLUMNS columns
// [depth, TILE_COLUMNS] to sums [TILE_ROWS, TILE_COLUMNS], which `first` overwrites. CHAIN divides
// depth.
__attribute__((noinline)) void multiply_half(const uint32_t* a, int64_t a_stride, const uint16_t* b,
                                             int64_t depth, float* sums, bool first) {
  alignas(64) uint16_t run[TILE_ROWS][TILE_COLUMNS];
  for (int64_t start = 0; start < depth; start += RUN, a += RUN) {
    __m512h acc[TILE_ROWS][2];
#pragma GCC unroll 12
    for (int r = 0; r < TILE_ROWS; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_ph();
    for (int k = 0; k < RUN; ++k, b += TILE_COLUMNS) {
      const __m512h left = _mm512_loadu_ph(b), right = _mm512_loadu_ph(b + 32);
#pragma GCC unroll 12
      for (int r = 0; r < TILE_ROWS; ++r) {
        const __m512h factor =
            _mm512_castsi512_ph(_mm512_set1_epi32(static_cast<int>(a[r * a_stride + k])));
        acc[r][0] = _mm512_fmadd_ph(factor, left, acc[r][0]);
        acc[r][1] = _mm512_fmadd_ph(factor, right, acc[r][1]);
      }
    }
    if (start % CHAIN == 0) {
#pragma GCC unroll 12
      for (int r = 0; r < TILE_ROWS; ++r) {
        _mm512_store_ph(run[r], acc[r][0]);
        _mm512_store_ph(run[r] + 32, acc[r][1]);
      }
      continue;
    }
    const bool overwrite = first && start < CHAIN;
#pragma GCC unroll 12
    for (int r = 0; r < TILE_ROWS; ++r) {
      float* out = sums + r * TILE_COLUMNS;
      add_half(out, _mm512_add_ph(_mm512_load_ph(run[r]), acc[r][0]), overwrite);
      add_half(out + 32, _mm512_add_ph(_mm512_load_ph(run[r] + 32), acc[r][1]), overwrite);
    }
  }
}

}  // namespace
