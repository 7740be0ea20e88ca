// BatchNorm and ReLU on z seen as an (M, C) matrix, one row per pixel: statistics, normalisation, backward.
//
//   y  = relu(scale * z + shift [+ residual])
//   g  = dy where the ReLU passed, else 0          xhat = (z - mean) * rstd
//   dbeta = sum g      dgamma = sum g * xhat       dz = a * g + b * z + c
//
// A thread takes a band of rows. Sums run over at most kRowsPerSum rows in float32 and are then added in double, so
// they depend on the number of threads but on nothing else. (Ioffe & Szegedy, 2015; Chan et al., 1979 for the merge.)
#pragma once

#include "kernels.h"
#include "plan.h"
#include "simd.h"

namespace resnext_kernels::cpu::RK_ISA {

// ---- a vector of channels, whole or the last few
struct AllLanes {};
struct FirstLanes {
  int n;
};
template <class T>
RK_INLINE Vec load(const T* p, AllLanes) {
  return load(p);
}
template <class T>
RK_INLINE Vec load(const T* p, FirstLanes lanes) {
  return load_partial(p, lanes.n);
}
template <class T>
RK_INLINE void store(T* p, Vec v, AllLanes) {
  store(p, v);
}
template <class T>
RK_INLINE void store(T* p, Vec v, FirstLanes lanes) {
  store_partial(p, v, lanes.n);
}

template <class T>
RK_INLINE void write(T* p, Vec v, AllLanes, bool past_cache) {
  past_cache ? stream(p, v) : store(p, v);
}
template <class T>
RK_INLINE void write(T* p, Vec v, FirstLanes lanes, bool) {
  store(p, v, lanes);
}

// f(channel, lanes) for every vector of the C channels.
template <class F>
RK_INLINE void for_channels(int64_t C, F&& f) {
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) f(c, AllLanes{});
  if (c < C) f(c, FirstLanes{(int)(C - c)});
}

template <class I>
RK_INLINE Vec apply(Affine affine, int64_t c, Vec v, I lanes) {
  return v * load(affine.scale + c, lanes) + load(affine.shift + c, lanes);
}

// g, and dz, at one vector of channels as functions of the element's offset (and z there): what belongs to the channels
// is loaded once.
template <class T, bool kMaskFromY, class I>
RK_INLINE auto masked_gradient(const ReluBNGradient& gradient, int64_t c, I lanes) {
  const T *const dy = (const T*)gradient.dy, *const y = (const T*)gradient.y;
  Vec scale{}, shift = Vec{} + 1.f;  // without an affine everything passes
  if (!kMaskFromY && gradient.affine.scale) {
    scale = load(gradient.affine.scale + c, lanes), shift = load(gradient.affine.shift + c, lanes);
  }
  return [=](int64_t at, Vec z) RK_INLINE_LAMBDA {
    return where_positive(kMaskFromY ? load(y + at, lanes) : z * scale + shift, load(dy + at, lanes));
  };
}

template <class T, bool kMaskFromY, class I>
RK_INLINE auto input_gradient(const ReluBNGradient& gradient, int64_t c, I lanes) {
  const auto masked = masked_gradient<T, kMaskFromY>(gradient, c, lanes);
  const T* const z = (const T*)gradient.z;
  const bool frozen = !gradient.b;
  Vec slope{}, offset{};
  if (!frozen) slope = load(gradient.b + c, lanes), offset = load(gradient.c + c, lanes);
  const Vec a = load(gradient.a + c, lanes);
  return [=](int64_t at) RK_INLINE_LAMBDA {
    const Vec value = load(z + at, lanes);
    const Vec g = masked(at, value);
    return frozen ? a * g : a * g + (slope * value + offset);
  };
}

// ---- bands of rows
constexpr int64_t kRowsPerSum = 256;

struct RowBands {
  int64_t M, bands;
  RowBands(int64_t M, int num_threads) : M(M), bands(M < 2 * num_threads ? M : 2 * num_threads) {}
  int64_t begin(int64_t band) const { return band * M / bands; }
};

template <class F>
void for_bands(RowBands rows, int num_threads, F f) {
  Shares shares(rows.bands, num_threads);
#pragma omp parallel num_threads(num_threads) if (rows.bands > 1 && num_threads > 1)
  shares.run([&](int64_t band) {
    f(band, rows.begin(band), rows.begin(band + 1));
    end_streaming();
  });
}

// f(row, count) with a constant count.rows of 4, then 1: sums of four rows are kept in registers.
template <int N>
struct Rows {
  static constexpr int rows = N;
};
template <class F>
RK_INLINE void for_rows(int64_t begin, int64_t end, F&& f) {
  for (; begin + 4 <= end; begin += 4) f(begin, Rows<4>{});
  for (; begin < end; ++begin) f(begin, Rows<1>{});
}

// Merges `parts` triples (count, mean, m2 = sum of squared deviations) per channel into mean and biased variance.
inline void merge_statistics(int64_t parts, int64_t C, const double* counts, const double* means, const double* m2s,
                             float* mean, float* var) {
  for (int64_t c = 0; c < C; ++c) {
    double n = 0, mu = 0, m2 = 0;
    for (int64_t part = 0; part < parts; ++part) {
      const double count = counts[part], delta = means[part * C + c] - mu;
      if (count == 0) continue;
      n += count;
      mu += delta * (count / n);
      m2 += m2s[part * C + c] + delta * delta * (count * (n - count) / n);
    }
    mean[c] = (float)mu;
    var[c] = (float)(m2 / n);
  }
}

// ---- statistics of z
// Mean and squared deviations of a few rows at a time in registers, merged by Chan's update: in float32 over a block of
// rows, relative to the mean of its first few, then in double.
template <class T>
void batch_stats(int64_t M, int64_t C, const void* z_, float* mean, float* var, int num_threads) {
  const T* z = (const T*)z_;
  const RowBands rows(M, num_threads);
  const Scratch scratch(num_threads, 2 * (2 * rows.bands * C + rows.bands), 3 * (C + kLanes));
  double* means = (double*)scratch.shared;
  double* m2s = means + rows.bands * C;
  double* counts = m2s + rows.bands * C;

  for_bands(rows, num_threads, [&](int64_t band, int64_t begin, int64_t end) {
    double* band_mean = means + band * C;
    double* band_m2 = m2s + band * C;
    float* origin = scratch.mine();
    float* block_mean = origin + C + kLanes;
    float* block_m2 = block_mean + C + kLanes;
    for (int64_t c = 0; c < C; ++c) band_mean[c] = band_m2[c] = 0;
    for (int64_t block = begin; block < end; block += kRowsPerSum) {
      const int64_t stop = block + kRowsPerSum < end ? block + kRowsPerSum : end;
      for_rows(block, stop, [&](int64_t row, auto n) {
        const float before = (float)(row - block), share = n.rows / (before + n.rows);
        for_channels(C, [&](int64_t c, auto lanes) {
          Vec v[n.rows], sum{}, m2{};
#pragma GCC unroll 4
          for (int r = 0; r < n.rows; ++r) {
            prefetch_ahead(z + (row + r) * C + c);
            v[r] = load(z + (row + r) * C + c, lanes);
          }
          if (row == block) {
            for (int r = 0; r < n.rows; ++r) sum += v[r];
            store(origin + c, sum * broadcast(1.0f / n.rows));
            store(block_mean + c, Vec{});
            store(block_m2 + c, Vec{});
            sum = Vec{};
          }
          const Vec zero = load(origin + c), so_far = load(block_mean + c);
#pragma GCC unroll 4
          for (int r = 0; r < n.rows; ++r) sum += v[r] -= zero;
          const Vec rows_mean = sum * broadcast(1.0f / n.rows), delta = rows_mean - so_far;
#pragma GCC unroll 4
          for (int r = 0; r < n.rows; ++r) m2 += (v[r] - rows_mean) * (v[r] - rows_mean);
          store(block_mean + c, so_far + delta * broadcast(share));
          store(block_m2 + c, load(block_m2 + c) + (m2 + delta * delta * broadcast(share * before)));
        });
      });
      const double before = (double)(block - begin), share = (double)(stop - block) / (double)(stop - begin);
      for (int64_t c = 0; c < C; ++c) {
        const double delta = (double)origin[c] + block_mean[c] - band_mean[c];
        band_mean[c] += delta * share;
        band_m2[c] += block_m2[c] + delta * delta * (share * before);
      }
    }
    counts[band] = (double)(end - begin);
  });
  merge_statistics(rows.bands, C, counts, means, m2s, mean, var);
}

// ---- y = relu(scale * z + shift [+ residual_affine(residual)])
template <class T>
void normalize_relu(int64_t M, int64_t C, const void* z_, Affine affine, const void* residual_, Affine residual_affine,
                    void* y_, int num_threads) {
  const T* z = (const T*)z_;
  const T* residual = (const T*)residual_;
  T* y = (T*)y_;
  const bool past_cache = y_ != z_ && y_ != residual_ && streams(y, M, C);
  for_bands(RowBands(M, num_threads), num_threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for_channels(C, [&](int64_t c, auto lanes) {
        const int64_t at = row * C + c;
        prefetch_ahead(z + at);
        Vec v = apply(affine, c, load(z + at, lanes), lanes);
        if (residual) {
          prefetch_ahead(residual + at);
          const Vec r = load(residual + at, lanes);
          v += residual_affine.scale ? apply(residual_affine, c, r, lanes) : r;
        }
        write(y + at, relu(v), lanes, past_cache);
      });
    }
  });
}

// ---- sum_g, sum_g_xhat, and g unless null
template <class T, bool kMaskFromY>
void bn_relu_backward(int64_t M, int64_t C, const ReluBNGradient& gradient, const float* mean, const float* rstd,
                      float* sum_g, float* sum_g_xhat, void* g_out, int num_threads) {
  const T* z = (const T*)gradient.z;
  const bool past_cache = streams((const T*)g_out, M, C);
  const RowBands rows(M, num_threads);
  const Scratch scratch(num_threads, 2 * 2 * rows.bands * C, 2 * (C + kLanes));
  double* sums = (double*)scratch.shared;

  for_bands(rows, num_threads, [&](int64_t band, int64_t begin, int64_t end) {
    double* sum = sums + 2 * band * C;
    float* partial = scratch.mine();
    float* partial_centred = partial + C + kLanes;
    for (int64_t c = 0; c < 2 * C; ++c) sum[c] = 0;
    for (int64_t block = begin; block < end; block += kRowsPerSum) {
      const int64_t stop = block + kRowsPerSum < end ? block + kRowsPerSum : end;
      for (int64_t c = 0; c < C + kLanes; ++c) partial[c] = partial_centred[c] = 0;
      for_rows(block, stop, [&](int64_t row, auto n) {
        for_channels(C, [&](int64_t c, auto lanes) {
          Vec s = load(partial + c), s_centred = load(partial_centred + c);
          const Vec mu = load(mean + c, lanes);
          const auto masked = masked_gradient<T, kMaskFromY>(gradient, c, lanes);
#pragma GCC unroll 4
          for (int r = 0; r < n.rows; ++r) {
            const int64_t at = (row + r) * C + c;
            prefetch_ahead(z + at);
            prefetch_ahead((const T*)gradient.dy + at);
            const Vec v = load(z + at, lanes);
            const Vec g = masked(at, v);
            if (g_out) write((T*)g_out + at, g, lanes, past_cache);
            s += g;
            s_centred += g * (v - mu);
          }
          store(partial + c, s);
          store(partial_centred + c, s_centred);
        });
      });
      for (int64_t c = 0; c < C; ++c) sum[c] += partial[c], sum[C + c] += partial_centred[c];
    }
  });

  for (int64_t c = 0; c < C; ++c) {
    double g = 0, g_centred = 0;
    for (int64_t band = 0; band < rows.bands; ++band) {
      g += sums[2 * band * C + c];
      g_centred += sums[(2 * band + 1) * C + c];
    }
    sum_g[c] = (float)g;
    sum_g_xhat[c] = (float)(g_centred * rstd[c]);
  }
}

// ---- dz = a * g + b * z + c
template <class T, bool kMaskFromY>
void bn_relu_input_gradient(int64_t M, int64_t C, const ReluBNGradient& gradient, void* dz, int num_threads) {
  const bool past_cache = dz != gradient.dy && streams((const T*)dz, M, C);
  for_bands(RowBands(M, num_threads), num_threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for_channels(C, [&](int64_t c, auto lanes) {
        const int64_t at = row * C + c;
        prefetch_ahead((const T*)gradient.z + at);
        prefetch_ahead((const T*)gradient.dy + at);
        write((T*)dz + at, input_gradient<T, kMaskFromY>(gradient, c, lanes)(at), lanes, past_cache);
      });
    }
  });
}

// ---- per-channel vectors
struct ChannelVectors {
  float mean, var, rstd, scale, shift;
  ChannelVectors(const BatchNorm& bn, int64_t c)
      : mean(bn.mean[c]),
        var(bn.var[c]),
        rstd(1 / __builtin_sqrtf(var + bn.eps)),
        scale(bn.gamma ? bn.gamma[c] * rstd : rstd),
        shift((bn.beta ? bn.beta[c] : 0) - mean * scale) {}
};

inline void bn_affine(int64_t C, const BatchNorm& bn, float* scale, float* shift) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) {
    const ChannelVectors of(bn, c);
    scale[c] = of.scale, shift[c] = of.shift;
  }
}

inline void bn_vectors(int64_t C, const BatchNorm& bn, float unbias, float* vectors) {
  float *mean = vectors, *var = mean + C, *rstd = var + C, *scale = rstd + C, *shift = scale + C;
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) {
    const ChannelVectors of(bn, c);
    mean[c] = of.mean, var[c] = unbias * of.var;
    rstd[c] = of.rstd, scale[c] = of.scale, shift[c] = of.shift;
  }
}

inline void update_running(int64_t C, const float* vectors, double momentum, float* mean, float* var) {
  const float keep = (float)(1 - momentum), take = (float)momentum;
  const float *batch_mean = vectors, *batch_var = vectors + C;
  for (int64_t c = 0; c < C; ++c) mean[c] = keep * mean[c] + take * batch_mean[c];
  for (int64_t c = 0; c < C; ++c) var[c] = keep * var[c] + take * batch_var[c];
}

// dz = scale * (g - sum_g / M - xhat * sum_g_xhat / M)
inline void bn_gradient_vectors(int64_t C, const float* sum_g, const float* sum_g_xhat, const float* vectors,
                                float count, float* b, float* c) {
  const float *mean = vectors, *rstd = mean + 2 * C, *scale = mean + 3 * C;
  for (int64_t i = 0; i < C; ++i) {
    const float of_mean = -scale[i] / count;
    b[i] = of_mean * rstd[i] * sum_g_xhat[i];
    c[i] = of_mean * sum_g[i] - b[i] * mean[i];
  }
}

}  // namespace resnext_kernels::cpu::RK_ISA
