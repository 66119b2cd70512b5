"""Which products this processor is faster at: pairs of bf16, or fp32.

An instruction that multiplies pairs of bf16 does twice the work of one in fp32. Some processors
start it every cycle or every second one (AMD since Zen 4: twice fp32's rate), and some take so long
over it that fp32 is half as fast again (Intel's without AMX, or with AMX hidden by a virtual
machine). No name of a processor says that; so it is timed. Products of bf16 numbers are exact in
fp32, which loses nothing.
"""

from __future__ import annotations

import ctypes
import functools
import statistics

from mpass.lowering.cpu.library import INSTRUCTION_FLAGS, compile_source

PROBE_SOURCE = """#include <immintrin.h>
#include <x86intrin.h>
#include <algorithm>
#include <cstdint>

constexpr int ACCUMULATORS = 12, STEPS = 128, TURNS = 200;

template <typename Multiply>
uint64_t ticks(const Multiply& multiply, float* out) {
  __m512 acc[ACCUMULATORS];
  for (auto& a : acc) a = _mm512_setzero_ps();
  const uint64_t start = __rdtsc();
  for (int k = 0; k < STEPS; ++k)
#pragma GCC unroll 12
    for (int i = 0; i < ACCUMULATORS; ++i) acc[i] = multiply(acc[i]);
  const uint64_t taken = __rdtsc() - start;
  for (auto& a : acc) *out += _mm512_reduce_add_ps(a);
  return taken;
}

// The least ticks of products of bf16 pairs over those of twice as many products in fp32.
extern "C" double mpass_pair_ticks(float factor, float* out) {
  const __m512 number = _mm512_set1_ps(factor);
  const __m512i words = _mm512_castps_si512(number);
  uint64_t pairs = UINT64_MAX, singles = UINT64_MAX;
  for (int turn = 0; turn < TURNS; ++turn) {
    pairs = std::min(pairs, ticks([&](__m512 a) {
      return _mm512_dpbf16_ps(a, (__m512bh)words, (__m512bh)words); }, out));
    singles = std::min(singles, ticks([&](__m512 a) {
      return _mm512_fmadd_ps(number, number, a); }, out));
  }
  return double(pairs) / (2.0 * double(singles));
}
"""

NOT_FASTER = 0.8
"""Time of pairs over that of fp32 from which on fp32 is chosen. Processors have 0.5, or 1.1 to 1.6,
the less the busier the other thread of a core is: all processes must come to the same."""

LOOKS = 15
"""Of some 0.3 milliseconds each."""


@functools.cache
def pairs_are_slower() -> bool:
    """Whether attention of bf16 numbers is faster in fp32 than by instructions for their pairs.

    Only to be asked where the processor and the compiler have these. Every process must come to the
    same answer, since results differ by a rounding.
    """
    try:
        library = compile_source(PROBE_SOURCE, extra_flags=INSTRUCTION_FLAGS["avx512_bf16"])
    except Exception:  # a compiler that makes the kernels and not this one: they are served
        return False
    return statistics.median(pair_ticks(library) for _ in range(LOOKS)) > NOT_FASTER


def pair_ticks(library: ctypes.CDLL) -> float:
    """Time of a product as one of a pair over its time in fp32."""
    run = library.mpass_pair_ticks
    run.restype, run.argtypes = ctypes.c_double, [ctypes.c_float, ctypes.c_void_p]
    return float(run(1.0, ctypes.byref(ctypes.c_float())))
