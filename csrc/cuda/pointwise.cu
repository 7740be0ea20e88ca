// BatchNorm and ReLU without a convolution, on z as an (M, C) matrix, and the second stage of every reduction.
//
//   normalize_relu   out = relu(scale * z + shift [+ residual | + res_scale * residual + res_shift])
//   bn_relu_dz       out = a * g [+ b * z + c],  g = dy where the ReLU passed, else 0
//   bn_relu_sums     partial = sum of g, sum of g * (z - mean) * rstd
//   moments          partial = count and Moments of z
//
// A block takes 64 channels (128 bytes of a row, 16 a thread) and every gridDim.y-th run of 32 rows; a thread keeps
// its eight channels and has four rows in flight. Reductions: a thread's rows, then the block's 32 threads of a
// channel, then add_* and merge_* over the blocks; always in the same order, without atomics.
#include "kernels.h"
#include "mma.cuh"
#include "params.h"

namespace resnext_kernels::cuda {
namespace {

constexpr int kSlots = kMostSlots;
constexpr int kRows = kThreads / kSlots;  // threads of one channel in a block
constexpr int kFlight = 4;                // rows that a thread loads before it uses the first
constexpr int kSumsFlight = 2;            // the same where the sums need the registers

// Calls load(i, element) for up to kAhead rows, then use(i, element) for the same.
template <int kAhead, class Load, class Use>
__device__ __forceinline__ void each_row(const PointwiseParams& p, int channel, Load load, Use use) {
  const int64_t step = static_cast<int64_t>(p.parts) * kRows;
  for (int64_t m = blockIdx.y * kRows + threadIdx.x / kSlots; m < p.M; m += kAhead * step) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (m + i * step < p.M) load(i, (m + i * step) * p.C + channel);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (m + i * step < p.M) use(i, (m + i * step) * p.C + channel);
    }
  }
}

template <class T>
__device__ __forceinline__ uint4 load(const void* from, int64_t element) {
  return *reinterpret_cast<const uint4*>(static_cast<const T*>(from) + element);
}
template <class T>
__device__ __forceinline__ void store(void* to, int64_t element, uint4 v) {
  *reinterpret_cast<uint4*>(static_cast<T*>(to) + element) = v;
}

// Eight floats, in two stores of 16 bytes: without bank conflicts.
__device__ __forceinline__ void store_row(float* to, const float (&v)[8]) {
  reinterpret_cast<float4*>(to)[0] = make_float4(v[0], v[1], v[2], v[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(v[4], v[5], v[6], v[7]);
}

__device__ __forceinline__ int first_channel() { return (blockIdx.x * kSlots + threadIdx.x % kSlots) * 8; }

template <class T>
__device__ __forceinline__ void normalize_relu(const PointwiseParams& p) {
  const int channel = first_channel();
  if (channel >= p.C) return;
  const Vector8 scale(p.scale + channel), shift(p.shift + channel);
  Vector8 res_scale = scale, res_shift = shift;  // used only if given
  if (p.res_scale) res_scale = Vector8(p.res_scale + channel), res_shift = Vector8(p.res_shift + channel);
  uint4 z[kFlight], residual[kFlight];
  each_row<kFlight>(
      p, channel,
      [&](int i, int64_t element) {
        z[i] = load<T>(p.z, element);
        if (p.residual) residual[i] = load<T>(p.residual, element);
      },
      [&](int i, int64_t element) {
        float v[8];
        unpack<T>(v, z[i]);
#pragma unroll
        for (int k = 0; k < 8; ++k) v[k] = scale.v[k] * v[k] + shift.v[k];
        if (p.residual) {
          float r[8];
          unpack<T>(r, residual[i]);
#pragma unroll
          for (int k = 0; k < 8; ++k) v[k] += p.res_scale ? res_scale.v[k] * r[k] + res_shift.v[k] : r[k];
        }
#pragma unroll
        for (int k = 0; k < 8; ++k) v[k] = relu(v[k]);
        store<T>(p.out, element, pack<T>(v));
      });
}

// g of dy, in place.
template <class T>
__device__ __forceinline__ void mask(float (&g)[8], const float (&z)[8], const PointwiseParams& p, uint4 y,
                                     const Vector8& scale, const Vector8& shift) {
  float before[8];
  if (p.y) unpack<T>(before, y);
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    if (!p.y) before[k] = scale.v[k] * z[k] + shift.v[k];
    g[k] = before[k] <= 0.f ? 0.f : g[k];
  }
}

template <class T>
__device__ __forceinline__ void bn_relu_dz(const PointwiseParams& p) {
  const int channel = first_channel();
  if (channel >= p.C) return;
  const Vector8 scale(p.scale + channel), shift(p.shift + channel), a(p.a + channel);
  Vector8 b = a, c = a;  // used only if given
  if (p.b) b = Vector8(p.b + channel), c = Vector8(p.c + channel);
  uint4 dy[kFlight], z[kFlight], y[kFlight];
  each_row<kFlight>(
      p, channel,
      [&](int i, int64_t element) {
        dy[i] = load<T>(p.dy, element);
        z[i] = load<T>(p.z, element);
        if (p.y) y[i] = load<T>(p.y, element);
      },
      [&](int i, int64_t element) {
        float g[8], v[8];
        unpack<T>(g, dy[i]);
        unpack<T>(v, z[i]);
        mask<T>(g, v, p, y[i], scale, shift);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          g[k] *= a.v[k];
          if (p.b) g[k] += b.v[k] * v[k] + c.v[k];
        }
        store<T>(p.out, element, pack<T>(g));
      });
}

template <class T>
__device__ __forceinline__ void bn_relu_sums(const PointwiseParams& p) {
  __shared__ alignas(16) float shared[kRows][2][8 * kSlots];
  const int channel = first_channel(), row = threadIdx.x / kSlots, column = threadIdx.x % kSlots * 8;
  float sum_g[8] = {}, sum_g_xhat[8] = {};
  if (channel < p.C) {
    const Vector8 scale(p.scale + channel), shift(p.shift + channel), mean(p.mean + channel), rstd(p.rstd + channel);
    uint4 dy[kSumsFlight], z[kSumsFlight], y[kSumsFlight];
    each_row<kSumsFlight>(
        p, channel,
        [&](int i, int64_t element) {
          dy[i] = load<T>(p.dy, element);
          z[i] = load<T>(p.z, element);
          if (p.y) y[i] = load<T>(p.y, element);
        },
        [&](int i, int64_t) {
          float g[8], v[8];
          unpack<T>(g, dy[i]);
          unpack<T>(v, z[i]);
          mask<T>(g, v, p, y[i], scale, shift);
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            sum_g[k] += g[k];
            sum_g_xhat[k] += g[k] * ((v[k] - mean.v[k]) * rstd.v[k]);
          }
        });
  }
  store_row(&shared[row][0][column], sum_g);
  store_row(&shared[row][1][column], sum_g_xhat);
  __syncthreads();
  const int which = threadIdx.x / 64, out = blockIdx.x * 64 + threadIdx.x % 64;
  if (which > 1 || out >= p.C) return;
  float total = 0.f;
  for (int r = 0; r < kRows; ++r) total += shared[r][which][threadIdx.x % 64];
  p.partial[(static_cast<int64_t>(blockIdx.y) * 2 + which) * p.C + out] = total;
}

template <class T>
__device__ __forceinline__ void moments(const PointwiseParams& p) {
  __shared__ alignas(16) float shared[kRows][3][8 * kSlots];
  __shared__ float counts[kRows];
  const int channel = first_channel(), row = threadIdx.x / kSlots, column = threadIdx.x % kSlots * 8;
  float n = 0.f;
  Moments own[8];
  uint4 z[kFlight];
  each_row<kFlight>(
      p, channel,
      [&](int i, int64_t element) {
        if (channel < p.C) z[i] = load<T>(p.z, element);
      },
      [&](int i, int64_t) {
        n += 1.f;
        if (channel >= p.C) return;
        float v[8];
        unpack<T>(v, z[i]);
        const float inverse = __fdividef(1.f, n);
#pragma unroll
        for (int k = 0; k < 8; ++k) own[k].add(v[k], n, inverse);
      });
  float values[3][8];
#pragma unroll
  for (int k = 0; k < 8; ++k) values[0][k] = own[k].origin, values[1][k] = own[k].mean, values[2][k] = own[k].m2;
#pragma unroll
  for (int i = 0; i < 3; ++i) store_row(&shared[row][i][column], values[i]);
  if (column == 0) counts[row] = n;
  __syncthreads();
  const int out = blockIdx.x * 64 + threadIdx.x;
  if (threadIdx.x >= 64 || out >= p.C) return;
  float total = 0.f;
  Moments all;
  for (int r = 0; r < kRows; ++r) {
    const auto& from = shared[r];
    const Moments other{from[0][threadIdx.x], from[1][threadIdx.x], from[2][threadIdx.x]};
    all.merge(total, counts[r], other);
    total += counts[r];
  }
  float* to = p.partial + static_cast<int64_t>(blockIdx.y) * 4 * p.C + out;
  to[0] = total, to[p.C] = all.origin, to[2 * p.C] = all.mean, to[3 * p.C] = all.m2;
}

}  // namespace
}  // namespace resnext_kernels::cuda

using namespace resnext_kernels::cuda;

#define RK_DEFINE_POINTWISE(T, DTYPE, NAME)                       \
  extern "C" __global__ void __launch_bounds__(kThreads, 2)       \
      NAME##_##DTYPE(const __grid_constant__ PointwiseParams p) { \
    NAME<T>(p);                                                   \
  }
RK_POINTWISE_KERNELS(RK_DEFINE_POINTWISE, __half, f16)
RK_POINTWISE_KERNELS(RK_DEFINE_POINTWISE, __nv_bfloat16, bf16)

// Second stages over `parts`. A block: 32 columns, each the work of up to 32 threads.

// (parts, 2, C) -> out0 (C), out1 (C); size == C.
extern "C" __global__ void __launch_bounds__(1024) add_sums(const __grid_constant__ ReduceParams p) {
  __shared__ float shared[32][33];
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32, rows = blockDim.x / 32;
  const int64_t i = blockIdx.x * 32ll + lane;
  float sum = 0.f;
  if (i < 2 * p.size) {
    for (int part = row; part < p.parts; part += rows) sum += p.partial[part * 2 * p.size + i];
  }
  shared[row][lane] = sum;
  __syncthreads();
  if (row || i >= 2 * p.size) return;
  sum = 0.f;
  for (int r = 0; r < rows; ++r) sum += shared[r][lane];
  static_cast<float*>(i < p.size ? p.out0 : p.out1)[i < p.size ? i : i - p.size] = sum;
}

// (parts, 4, C) count and Moments -> out0 mean (C), out1 biased variance (C).
extern "C" __global__ void __launch_bounds__(1024) finish_moments(const __grid_constant__ ReduceParams p) {
  __shared__ float shared[4][32][33];
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32, rows = blockDim.x / 32;
  const int64_t i = blockIdx.x * 32ll + lane;
  float n = 0.f;
  Moments own;
  if (i < p.size) {
    for (int part = row; part < p.parts; part += rows) {
      const float* from = p.partial + part * 4 * p.size + i;
      const Moments other{from[p.size], from[2 * p.size], from[3 * p.size]};
      own.merge(n, from[0], other);
      n += from[0];
    }
  }
  shared[0][row][lane] = n, shared[1][row][lane] = own.origin;
  shared[2][row][lane] = own.mean, shared[3][row][lane] = own.m2;
  __syncthreads();
  if (row || i >= p.size) return;
  for (int r = 1; r < rows; ++r) {
    const Moments other{shared[1][r][lane], shared[2][r][lane], shared[3][r][lane]};
    own.merge(n, shared[0][r][lane], other);
    n += shared[0][r][lane];
  }
  static_cast<float*>(p.out0)[i] = own.origin + own.mean;
  static_cast<float*>(p.out1)[i] = n > 0.f ? own.m2 / n : 0.f;
}

// (parts, size) -> out0 (size) in T; size is a multiple of 8.
template <class T>
__device__ __forceinline__ void add_dweight(const ReduceParams& p) {
  const int64_t i = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) * 4;
  if (i >= p.size) return;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
  for (int part = 0; part < p.parts; ++part) {
    const float4 v = *reinterpret_cast<const float4*>(p.partial + part * p.size + i);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  *reinterpret_cast<uint2*>(static_cast<T*>(p.out0) + i) = make_uint2(pack<T>(sum.x, sum.y), pack<T>(sum.z, sum.w));
}
extern "C" __global__ void __launch_bounds__(kThreads) add_dweight_f16(const __grid_constant__ ReduceParams p) {
  add_dweight<__half>(p);
}
extern "C" __global__ void __launch_bounds__(kThreads) add_dweight_bf16(const __grid_constant__ ReduceParams p) {
  add_dweight<__nv_bfloat16>(p);
}
