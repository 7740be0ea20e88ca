// BatchNorm and ReLU without a convolution, on z as an (M, C) matrix, the second stage of every reduction, and
// BatchNorm's vectors.
//
//   normalize_relu  out = relu(scale * z + shift [+ residual | + res_scale * residual + res_shift])
//   bn_relu_dz      out = a * g [+ b * z + c],  g = dy where the ReLU passed, else 0
//   bn_relu_sums    partial = sum of g, sum of g * (z - mean) * rstd [; out = g, with the mask of y]
//   add_sums        both sums, and b, c of scale * (g - sum_g / M - xhat * sum_g_xhat / M) = scale * g + b * z + c
//   moments         partial = count and Moments of z
//   finish_moments  mean, unbiased var, rstd = 1 / sqrt(var + eps), scale = gamma * rstd, shift = beta - mean * scale
//   bn_vectors      the same from a given mean and var
//
// A block of those over z takes 64 channels (128 bytes of a row, 16 a thread) and every gridDim.y-th run of 32 rows;
// a thread keeps its eight channels and loads some rows before it uses the first: as many as its registers hold.
// Reductions: a thread's rows, the four threads of a channel in a warp, the warps, then add_* and finish_moments over
// the blocks; always in the same order, without atomics.
#include "kernels.h"
#include "mma.cuh"
#include "params.h"

namespace resnext_kernels::cuda {
namespace {

constexpr int kSlots = kMostSlots;
constexpr int kRows = kThreads / kSlots;  // threads of one channel in a block

// Calls load(i, element) for up to kAhead rows, then use(i, element) for the same.
template <int kAhead, class Load, class Use>
__device__ __forceinline__ void each_row(const PointwiseParams& p, int channel, Load load, Use use) {
  const int64_t step = static_cast<int64_t>(p.parts) * kRows;  // rows from one of a thread's to its next
  const int64_t first = blockIdx.y * kRows + threadIdx.x / kSlots;
  const int rows = p.rows - (first + (p.rows - 1) * step >= p.M);
  int64_t element = first * p.C + channel;
  for (int row = 0; row < rows; row += kAhead, element += kAhead * step * p.C) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (row + i < rows) load(i, element + i * step * p.C);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (row + i < rows) use(i, element + i * step * p.C);
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

template <int N>
struct SumOf {
  float value[N] = {};
  __device__ __forceinline__ void add(const SumOf& other) {
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] += other.value[i];
  }
};
struct CountedMoments {
  float n = 0.f;
  Moments moments;
  __device__ __forceinline__ void add(const CountedMoments& other) {
    moments.merge(n, other.n, other.moments);
    n += other.n;
  }
};

// In a warp's first eight lanes: what they and the lanes 8, 16 and 24 behind hold together.
template <class Value>
__device__ __forceinline__ Value over_warp(Value value) {
#pragma unroll
  for (int lanes = 16; lanes >= 8; lanes /= 2) {
    Value other;
#pragma unroll
    for (int i = 0; i < sizeof(Value) / sizeof(float); ++i) {
      reinterpret_cast<float*>(&other)[i] = __shfl_down_sync(~0u, reinterpret_cast<float*>(&value)[i], lanes);
    }
    value.add(other);
  }
  return value;
}

__device__ __forceinline__ int first_channel() { return (blockIdx.x * kSlots + threadIdx.x % kSlots) * 8; }

template <class T, int kAhead, bool kResidual>
__device__ __forceinline__ void normalize_rows(const PointwiseParams& p, int channel) {
  const Vector8 scale(p.scale + channel), shift(p.shift + channel);
  Vector8 res_scale = scale, res_shift = shift;  // used only if given
  if (kResidual && p.res_scale) res_scale = Vector8(p.res_scale + channel), res_shift = Vector8(p.res_shift + channel);
  uint4 z[kAhead], residual[kAhead];
  each_row<kAhead>(
      p, channel,
      [&](int i, int64_t element) {
        z[i] = load<T>(p.z, element);
        if (kResidual) residual[i] = load<T>(p.residual, element);
      },
      [&](int i, int64_t element) {
        float v[8];
        unpack<T>(v, z[i]);
#pragma unroll
        for (int k = 0; k < 8; ++k) v[k] = scale.v[k] * v[k] + shift.v[k];
        if (kResidual) {
          float r[8];
          unpack<T>(r, residual[i]);
#pragma unroll
          for (int k = 0; k < 8; ++k) v[k] += p.res_scale ? res_scale.v[k] * r[k] + res_shift.v[k] : r[k];
        }
        store<T>(p.out, element, pack_relu<T>(v));
      });
}
template <class T>
__device__ __forceinline__ void normalize_relu(const PointwiseParams& p) {
  const int channel = first_channel();
  if (channel >= p.C) return;
  if (p.residual) {
    normalize_rows<T, 3, true>(p, channel);
  } else {
    normalize_rows<T, 4, false>(p, channel);
  }
}

// The ReLU's mask: of the result y, of scale * z + shift, or without a scale none.
template <bool kFromY>
struct Mask;
template <>
struct Mask<true> {
  __device__ __forceinline__ Mask(const PointwiseParams&, int) {}
  __device__ __forceinline__ bool passes(int, float, float y) const { return !(y <= 0.f); }
};
template <>
struct Mask<false> {
  Vector8 scale, shift;
  __device__ __forceinline__ Mask(const PointwiseParams& p, int channel) : scale(0.f), shift(1.f) {
    if (p.scale) scale = Vector8(p.scale + channel), shift = Vector8(p.shift + channel);
  }
  __device__ __forceinline__ bool passes(int k, float z, float) const { return !(scale.v[k] * z + shift.v[k] <= 0.f); }
};

// Calls use(element, g, z) for each row's eight channels, kAhead rows in flight.
template <class T, int kAhead, bool kFromY, class Use>
__device__ __forceinline__ void each_gradient(const PointwiseParams& p, int channel, Use use) {
  const Mask<kFromY> mask(p, channel);
  uint4 dy[kAhead], z[kAhead], y[kAhead];
  each_row<kAhead>(
      p, channel,
      [&](int i, int64_t element) {
        dy[i] = load<T>(p.dy, element);
        z[i] = load<T>(p.z, element);
        if (kFromY) y[i] = load<T>(p.y, element);
      },
      [&](int i, int64_t element) {
        float g[8], v[8], result[8] = {};
        unpack<T>(g, dy[i]);
        unpack<T>(v, z[i]);
        if (kFromY) unpack<T>(result, y[i]);
#pragma unroll
        for (int k = 0; k < 8; ++k) g[k] = mask.passes(k, v[k], result[k]) ? g[k] : 0.f;
        use(element, g, v);
      });
}

template <class T, int kAhead, bool kFromY>
__device__ __forceinline__ void dz_rows(const PointwiseParams& p, int channel) {
  const Vector8 a(p.a + channel);
  Vector8 b = a, c = a;  // used only if given
  if (p.b) b = Vector8(p.b + channel), c = Vector8(p.c + channel);
  each_gradient<T, kAhead, kFromY>(p, channel, [&](int64_t element, float(&g)[8], const float(&z)[8]) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      g[k] *= a.v[k];
      if (p.b) g[k] += b.v[k] * z[k] + c.v[k];
    }
    store<T>(p.out, element, pack<T>(g));
  });
}
template <class T>
__device__ __forceinline__ void bn_relu_dz(const PointwiseParams& p) {
  const int channel = first_channel();
  if (channel >= p.C) return;
  if (p.y) {
    dz_rows<T, 4, true>(p, channel);
  } else {
    dz_rows<T, 4, false>(p, channel);
  }
}

template <class T, int kAhead, bool kFromY>
__device__ __forceinline__ void sum_rows(const PointwiseParams& p, int channel, float (&sum_g)[8], float (&sum_gz)[8]) {
  const Vector8 mean(p.mean + channel);
  each_gradient<T, kAhead, kFromY>(p, channel, [&](int64_t element, const float(&g)[8], const float(&z)[8]) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      sum_g[k] += g[k];
      sum_gz[k] += g[k] * (z[k] - mean.v[k]);
    }
    if (kFromY && p.out) store<T>(p.out, element, pack<T>(g));
  });
}
template <class T>
__device__ __forceinline__ void bn_relu_sums(const PointwiseParams& p) {
  __shared__ alignas(16) float shared[kWarps][2][8 * kSlots];
  const int channel = first_channel(), column = threadIdx.x % kSlots * 8;
  float sum_g[8] = {}, sum_gz[8] = {};
  if (channel < p.C) {
    if (p.y) {
      sum_rows<T, 2, true>(p, channel, sum_g, sum_gz);
    } else {
      sum_rows<T, 3, false>(p, channel, sum_g, sum_gz);
    }
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const SumOf<2> both = over_warp(SumOf<2>{{sum_g[k], sum_gz[k]}});
    sum_g[k] = both.value[0], sum_gz[k] = both.value[1];
  }
  if (threadIdx.x % 32 < kSlots) {
    store_row(&shared[threadIdx.x / 32][0][column], sum_g);
    store_row(&shared[threadIdx.x / 32][1][column], sum_gz);
  }
  __syncthreads();
  const int which = threadIdx.x / 64, out = blockIdx.x * 64 + threadIdx.x % 64;
  if (which > 1 || out >= p.C) return;
  float total = 0.f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += shared[warp][which][threadIdx.x % 64];
  p.partial[(static_cast<int64_t>(blockIdx.y) * 2 + which) * p.C + out] = which ? total * p.rstd[out] : total;
}

template <class T>
__device__ __forceinline__ void moments(const PointwiseParams& p) {
  __shared__ alignas(16) float shared[kWarps][3][8 * kSlots];
  __shared__ float counts[kWarps];
  const int channel = first_channel(), column = threadIdx.x % kSlots * 8, warp = threadIdx.x / 32;
  float n = 0.f;
  Moments own[8];
  constexpr int kAhead = 4;
  uint4 z[kAhead];
  each_row<kAhead>(
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
  CountedMoments all;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    all = over_warp(CountedMoments{n, own[k]});
    values[0][k] = all.moments.origin, values[1][k] = all.moments.mean, values[2][k] = all.moments.m2;
  }
  if (threadIdx.x % 32 < kSlots) {
#pragma unroll
    for (int i = 0; i < 3; ++i) store_row(&shared[warp][i][column], values[i]);
    if (column == 0) counts[warp] = all.n;
  }
  __syncthreads();
  const int at = threadIdx.x, out = blockIdx.x * 64 + at;
  if (at >= 64 || out >= p.C) return;
  all = {};
  for (int w = 0; w < kWarps; ++w) all.add({counts[w], {shared[w][0][at], shared[w][1][at], shared[w][2][at]}});
  float* to = p.partial + static_cast<int64_t>(blockIdx.y) * 4 * p.C + out;
  to[0] = all.n, to[p.C] = all.moments.origin, to[2 * p.C] = all.moments.mean, to[3 * p.C] = all.moments.m2;
}

}  // namespace
}  // namespace resnext_kernels::cuda

using namespace resnext_kernels::cuda;

#define RK_DEFINE_POINTWISE(T, DTYPE, NAME)                                 \
  extern "C" __global__ void __launch_bounds__(kThreads, blocks_held::NAME) \
      NAME##_##DTYPE(const __grid_constant__ PointwiseParams p) {           \
    NAME<T>(p);                                                             \
  }
RK_POINTWISE_KERNELS(RK_DEFINE_POINTWISE, __half, f16)
RK_POINTWISE_KERNELS(RK_DEFINE_POINTWISE, __nv_bfloat16, bf16)

// ---- Second stages over `parts` -------------------------------------------------------------------------------------
//
// A block: 8 columns (of dweight 8 x 4), so that a warp reads four whole sectors, and as many rows as it takes for a
// thread to have about four parts, whose loads it issues at once.

namespace resnext_kernels::cuda {
namespace {

// In the block's first row: what load(part) gives for all parts of a column together.
template <class Value, class Load>
__device__ __forceinline__ Value over_parts(int parts, bool in_range, Load load) {
  __shared__ Value shared[1024 / 32][kReduceColumns];
  const int column = threadIdx.x % kReduceColumns, row = threadIdx.x / kReduceColumns;
  const int rows = blockDim.x / kReduceColumns, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  Value own;
#pragma unroll 1
  for (int part = in_range ? row : parts; part < parts; part += kReduceParts * rows) {
    Value loaded[kReduceParts];
#pragma unroll
    for (int i = 0; i < kReduceParts; ++i) {
      if (part + i * rows < parts) loaded[i] = load(part + i * rows);
    }
#pragma unroll
    for (int i = 0; i < kReduceParts; ++i) own.add(loaded[i]);
  }
  own = over_warp(own);
  if (threadIdx.x % 32 < kReduceColumns) shared[warp][column] = own;
  __syncthreads();
  Value all;
  if (warp == 0) {
#pragma unroll 1
    for (int w = row; w < warps; w += 32 / kReduceColumns) all.add(shared[w][column]);
    all = over_warp(all);
  }
  return all;
}

// In T; size is a multiple of 8.
template <class T>
__device__ __forceinline__ void add_dweight(const AddDweightParams& p) {
  const int64_t i = (blockIdx.x * static_cast<int64_t>(kReduceColumns) + threadIdx.x % kReduceColumns) * 4;
  const auto sum = over_parts<SumOf<4>>(p.parts, i < p.size, [&](int part) {
    const float4 v = *reinterpret_cast<const float4*>(p.partial + part * p.size + i);
    return SumOf<4>{{v.x, v.y, v.z, v.w}};
  });
  if (threadIdx.x >= kReduceColumns || i >= p.size) return;
  T* out = static_cast<T*>(p.dweight);
  if (!p.D) {
    *reinterpret_cast<uint2*>(out + i) =
        make_uint2(pack<T>(sum.value[0], sum.value[1]), pack<T>(sum.value[2], sum.value[3]));
    return;
  }
  const int length = 9 * p.D;  // of a row; four elements may reach into the next
  const int64_t row = i / length * length;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int next = i + e - row < length ? 0 : length, at = static_cast<int>(i + e - row) - next;
    out[row + next + at % 9 * p.D + at / 9] = T(sum.value[e]);
  }
}

__device__ __forceinline__ int reduced_channel() { return blockIdx.x * kReduceColumns + threadIdx.x % kReduceColumns; }

// mean, unbias * var and rstd in three rows of C, scale and shift in two; the first may be null.
__device__ __forceinline__ void store_vectors(const float* gamma, const float* beta, float mean, float var, float eps,
                                              float unbias, float* statistics, float* affine, int64_t C, int c) {
  const ScaleAndShift of = scale_and_shift(gamma, beta, mean, var, eps, c);
  affine[c] = of.scale, affine[C + c] = of.shift;
  if (statistics) statistics[c] = mean, statistics[C + c] = unbias * var, statistics[2 * C + c] = of.rstd;
}

}  // namespace
}  // namespace resnext_kernels::cuda

extern "C" __global__ void __launch_bounds__(1024, 1) add_sums(const __grid_constant__ AddSumsParams p) {
  const int c = reduced_channel();
  const auto sums = over_parts<SumOf<2>>(p.parts, c < p.C, [&](int part) {
    const float* from = p.partial + int64_t{2} * part * p.C + c;
    return SumOf<2>{{from[0], from[p.C]}};
  });
  if (threadIdx.x >= kReduceColumns || c >= p.C) return;
  const float *mean = p.vectors, *rstd = mean + int64_t{2} * p.C, *scale = rstd + p.C;
  const float sum_g = sums.value[0], sum_g_xhat = sums.value[1];
  const float of_mean = -scale[c] / p.count, b = of_mean * rstd[c] * sum_g_xhat;
  p.sum_g[c] = sum_g, p.sum_g_xhat[c] = sum_g_xhat;
  p.coefficients[c] = b, p.coefficients[p.C + c] = of_mean * sum_g - b * mean[c];
}

extern "C" __global__ void __launch_bounds__(1024, 1) finish_moments(const __grid_constant__ FinishMomentsParams p) {
  const int c = reduced_channel();
  const auto all = over_parts<CountedMoments>(p.parts, c < p.C, [&](int part) {
    const float* from = p.partial + int64_t{4} * part * p.C + c;
    return CountedMoments{from[0], {from[p.C], from[2 * p.C], from[3 * p.C]}};
  });
  if (threadIdx.x >= kReduceColumns || c >= p.C) return;
  store_vectors(p.gamma, p.beta, all.moments.origin + all.moments.mean, all.moments.m2 / fmaxf(all.n, 1.f), p.eps,
                all.n / fmaxf(all.n - 1.f, 1.f), p.vectors, p.vectors + int64_t{3} * p.C, p.C, c);
}

extern "C" __global__ void __launch_bounds__(1024, 1) add_dweight_f16(const __grid_constant__ AddDweightParams p) {
  add_dweight<__half>(p);
}
extern "C" __global__ void __launch_bounds__(1024, 1) add_dweight_bf16(const __grid_constant__ AddDweightParams p) {
  add_dweight<__nv_bfloat16>(p);
}

// ---- Vectors: a thread a channel ------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(kThreads) bn_vectors(const __grid_constant__ BatchNormParams bn) {
  const int c = blockIdx.x * kThreads + threadIdx.x;
  if (c >= bn.C) return;
  store_vectors(bn.gamma, bn.beta, bn.mean[c], bn.var[c], bn.eps, bn.unbias, bn.statistics, bn.affine, bn.C, c);
}
