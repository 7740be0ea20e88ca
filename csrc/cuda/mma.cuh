// Tensor-core instructions, shared-memory moves and conversions, one thin function per PTX instruction.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace resnext_kernels::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes to shared memory: `size` of them from global memory, then zeros.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, uint32_t size) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
}
__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ uint4 load_shared(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_shared(uint32_t to, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
template <int kOffset = 0>
__device__ __forceinline__ uint32_t load_shared_word(uint32_t from) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(v) : "r"(from), "n"(kOffset) : "memory");
  return v;
}
template <int kOffset = 0>
__device__ __forceinline__ void store_shared_word(uint32_t to, uint32_t v) {
  asm volatile("st.shared.u32 [%0 + %2], %1;" ::"r"(to), "r"(v), "n"(kOffset) : "memory");
}

__device__ __forceinline__ uint32_t load_shared_half(uint32_t from) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(from) : "memory");
  return v;
}

// 8x8 matrices of 16-bit elements; lane l of 8 i + r gives the address of row r of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ void load_matrices(uint32_t (&r)[2], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ uint32_t transposed(uint32_t matrix) {
  uint32_t v;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(v) : "r"(matrix));
  return v;
}

// d (16 x 8) += a (16 x 16) b (16 x 8), and the same with 8 columns of a.
template <class T>
struct Mma;
#define RK_MMA(T, TYPE)                                                                                           \
  template <>                                                                                                     \
  struct Mma<T> {                                                                                                 \
    __device__ static __forceinline__ void k16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, \
                                               uint32_t b0, uint32_t b1) {                                        \
      asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                                  \
          ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                  \
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                        \
          : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                                \
    }                                                                                                             \
    __device__ static __forceinline__ void k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {             \
      asm("mma.sync.aligned.m16n8k8.row.col.f32." TYPE "." TYPE                                                   \
          ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"                                              \
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                        \
          : "r"(a0), "r"(a1), "r"(b0));                                                                           \
    }                                                                                                             \
  };
RK_MMA(__half, "f16")
RK_MMA(__nv_bfloat16, "bf16")
#undef RK_MMA

// Two 16-bit elements in a word <-> two floats.
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t word);
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t word) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
template <class T>
__device__ __forceinline__ uint32_t pack(float lo, float hi);
template <class T>
__device__ __forceinline__ uint32_t pack_relu(float lo, float hi);  // passes NaN, as torch's relu
#define RK_PACK(T, TYPE)                                                        \
  template <>                                                                   \
  __device__ __forceinline__ uint32_t pack<T>(float lo, float hi) {             \
    uint32_t v;                                                                 \
    asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(v) : "f"(hi), "f"(lo));      \
    return v;                                                                   \
  }                                                                             \
  template <>                                                                   \
  __device__ __forceinline__ uint32_t pack_relu<T>(float lo, float hi) {        \
    uint32_t v;                                                                 \
    asm("cvt.rn.relu." TYPE "x2.f32 %0, %1, %2;" : "=r"(v) : "f"(hi), "f"(lo)); \
    return v;                                                                   \
  }
RK_PACK(__half, "f16")
RK_PACK(__nv_bfloat16, "bf16")
#undef RK_PACK

// 0 * a + b of two elements each; zero stays zero unless `a` holds a NaN or an infinity.
template <class T>
__device__ __forceinline__ uint32_t times_zero_plus(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t times_zero_plus<__half>(uint32_t a, uint32_t b) {
  asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(b) : "r"(a), "r"(0));
  return b;
}
template <>
__device__ __forceinline__ uint32_t times_zero_plus<__nv_bfloat16>(uint32_t a, uint32_t b) {
  asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(b) : "r"(a), "r"(0));
  return b;
}

// relu that passes NaN, as torch's.
__device__ __forceinline__ float relu(float v) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(v));
  return y;
}

// To the last bit or one off, in one instruction.
__device__ __forceinline__ float reciprocal(float v) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(v));
  return y;
}

// Of one channel of a BatchNorm.
struct ScaleAndShift {
  float scale, shift, rstd;
};
__device__ __forceinline__ ScaleAndShift scale_and_shift(const float* gamma, const float* beta, float mean, float var,
                                                         float eps, int channel) {
  const float rstd = 1.f / sqrtf(var + eps), scale = gamma ? gamma[channel] * rstd : rstd;
  return {scale, (beta ? beta[channel] : 0.f) - mean * scale, rstd};
}

// Eight consecutive floats of a per-channel vector.
struct Vector8 {
  float v[8];
  __device__ __forceinline__ explicit Vector8(float value) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = value;
  }
  __device__ __forceinline__ explicit Vector8(const float* from) {
    const float4 lo = __ldg(reinterpret_cast<const float4*>(from));
    const float4 hi = __ldg(reinterpret_cast<const float4*>(from) + 1);
    v[0] = lo.x, v[1] = lo.y, v[2] = lo.z, v[3] = lo.w, v[4] = hi.x, v[5] = hi.y, v[6] = hi.z, v[7] = hi.w;
  }
};

template <class T>
__device__ __forceinline__ void unpack(float (&to)[8], uint4 from) {
  const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = unpack<T>(words[i]);
    to[2 * i] = f.x, to[2 * i + 1] = f.y;
  }
}
template <class T>
__device__ __forceinline__ uint4 pack(const float (&v)[8]) {
  return make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
}

template <class T>
__device__ __forceinline__ uint4 pack_relu(const float (&v)[8]) {
  return make_uint4(pack_relu<T>(v[0], v[1]), pack_relu<T>(v[2], v[3]), pack_relu<T>(v[4], v[5]),
                    pack_relu<T>(v[6], v[7]));
}

// Of a few values, relative to an origin near them.
struct Sums {
  float sum = 0.f, squares = 0.f;
  __device__ __forceinline__ void add(float value, float origin) {
    const float centred = value - origin;
    sum += centred;
    squares += centred * centred;
  }
};

// Moments of a channel: mean and sum of squared deviations. The mean is origin + mean: a thread's values are taken from
// the first of them, so that a mean far larger than the deviation costs no digits, and the origin is moved to the mean
// when sets are merged, so that a first value far off the others costs none either. The count is kept beside it: it is
// the same for many channels.
struct Moments {
  float origin = 0.f, mean = 0.f, m2 = 0.f;

  // The n-th value; inverse = 1 / n (Welford, 1962).
  __device__ __forceinline__ void add(float value, float n, float inverse) {
    if (n == 1.f) origin = value;
    const float centred = value - origin, delta = centred - mean;
    mean += delta * inverse;
    m2 += delta * (centred - mean);
  }
  // n values here, and sums relative to `origin`; inverse = 1 / their count, share = count / (n + count). The origin
  // moves to the mean.
  __device__ __forceinline__ void take(const Sums& s, float n, float share, float inverse) {
    const float other = s.sum * inverse, delta = other - mean;
    m2 += (s.squares - s.sum * other) + delta * delta * (n * share);
    mean += delta * share;
    const float sum = origin + mean;
    mean -= sum - origin;
    origin = sum;
  }
  // n values here, other_n there (Chan, Golub and LeVeque, 1979).
  __device__ __forceinline__ void merge(float n, float other_n, const Moments& other) {
    if (n == 0.f) *this = other;
    if (n > 0.f && other_n > 0.f) {
      const float share = other_n / (n + other_n);
      const float delta = (other.origin - origin) + (other.mean - mean);
      mean += delta * share;
      m2 += other.m2 + delta * delta * n * share;
    }
    const float sum = origin + mean, part = sum - origin;  // Knuth's exact sum
    mean = (origin - (sum - part)) + (mean - part);
    origin = sum;
  }
};

}  // namespace resnext_kernels::cuda
