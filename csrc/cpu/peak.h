// The arithmetic peak of the machine: multiply-adds on registers alone, without memory. The benchmark holds every
// kernel, ours and others', against it.
//
//   chain_j = chain_j * half + half      (1 stays 1: neither subnormals nor Inf slow it down)
//
// Every chain waits for itself, so there must be more of them than latency x units: 4 x 2 on x86-64 cores, 4 x 4 on
// the widest aarch64 ones. They fill the registers, less two for the operands and two for a compiler without FMA.
#pragma once

#include "simd.h"

namespace resnext_kernels::cpu::RK_ISA {

constexpr int kChains = kRegisters - 4;

// Makes the compiler believe that v is read and written here, so nothing is computed ahead or dropped.
RK_INLINE void opaque(Vec& v) { asm volatile("" : "+m"(v)); }

// `rounds` multiply-adds on every chain of every thread; returns the floating-point operations that were made.
inline int64_t multiply_adds(int64_t rounds, int num_threads) {
  int64_t flops = 0;
#pragma omp parallel num_threads(num_threads) reduction(+ : flops)
  {
    Vec half = broadcast(0.5f), chain[kChains];
    opaque(half);
    for (Vec& v : chain) v = half + half;
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 32
      for (int j = 0; j < kChains; ++j) chain[j] = chain[j] * half + half;
    }
    for (Vec& v : chain) opaque(v);
    flops += 2 * kLanes * kChains * rounds;
  }
  return flops;
}

}  // namespace resnext_kernels::cpu::RK_ISA
