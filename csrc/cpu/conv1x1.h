// The dense 1x1 convolution as matrix products, for one instruction set: x (M, C), weight (K, C), z and dz (M, K).
//
//   z = a weight^T        da = dz weight        dweight = dz^T a        a = x or relu(in_scale * x + in_shift)
//   y = relu(scale * z + shift [+ residual])      mean and variance of z per channel, taken from the registers
//
// A thread copies the rows that a product walks down into its own scratch memory, with a pitch known to the compiler
// and free of cache conflicts, and multiplies there by register tiles of R rows times two vectors:
//
//     acc[r][0..1] += a[r][d] * b[d][0..1]          one broadcast and two FMAs a row, d runs over the sum
//
// In z and da, b are panels of the weight, [panel][d][two vectors], sized for the second-level cache; in dweight the
// sum runs over pixels and both operands are such copies. C and K are multiples of kLanes. (Goto & van de Geijn,
// "Anatomy of high-performance matrix multiplication", 2008.)
#pragma once

#include "conv.h"
#include "kernels.h"
#include "plan.h"
#include "pointwise.h"
#include "simd.h"
#include "tiles.h"

namespace resnext_kernels::cpu::RK_ISA {

// ---- configuration
constexpr int kProductRows = kRegisters == 16 ? 6 : 14;  // times two vectors of accumulators
constexpr int kWeightRows = kRegisters == 16 ? 4 : 8;    // the same for dweight: a divisor of 16, as of K
constexpr int64_t kPanel = 2 * kLanes;
constexpr int64_t kPart = 256;          // columns of a copy; wider ones are cut into parts
constexpr int64_t kPitch = kPart + 16;  // floats from row to row of a copy: an odd number of cache lines
constexpr int64_t kPanelFloats = (kLanes == 16 ? 128 : 64) * 1024;  // of panels at a time, half of a usual L2
constexpr int64_t kPixels = 128;                                    // of the copies that a dweight tile walks
constexpr int64_t kFetch = 16;
constexpr int64_t kTilesPerSum = kRowsPerSum / kProductRows;  // of statistics in float32

// sum[v][r] = sum over d < depth of a[r * kRow + d * kStep] * b[d * kStepB + v * kLanes ...]
template <int R, int64_t kRow, int64_t kStep, int64_t kStepB>
RK_INLINE void multiply(int64_t depth, const float* a, const float* b, Vec (&sum)[2][R]) {
  for (int64_t d = 0; d < depth; ++d, a += kStep, b += kStepB) {
    const Vec b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec value = broadcast(a[r * kRow]);
      sum[0][r] += value * b0;
      sum[1][r] += value * b1;
    }
  }
}

// `rows` rows of `columns` channels, as [part][row][kPitch], part_rows rows to a part.
template <class F>
RK_INLINE void copy_rows(int64_t rows, int64_t part_rows, int64_t columns, float* to, F&& value) {
  for (int64_t part = 0; part < columns; part += kPart, to += part_rows * kPitch) {
    const int64_t end = min(columns, part + kPart);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t c = part; c < end; c += kLanes) store(to + row * kPitch + (c - part), value(row, c));
  }
}

inline Affine from_channel(Affine affine, int64_t c) {
  return affine.scale ? Affine{affine.scale + c, affine.shift + c} : affine;
}

inline void copy_activations(int64_t rows, int64_t part_rows, int64_t columns, const float* from, int64_t stride,
                             Affine prologue, float* to) {
  if (prologue.scale)
    copy_rows(rows, part_rows, columns, to, [&](int64_t row, int64_t c) RK_INLINE_LAMBDA {
      return relu(apply(prologue, c, load(from + row * stride + c), AllLanes{}));
    });
  else
    copy_rows(rows, part_rows, columns, to,
              [&](int64_t row, int64_t c) RK_INLINE_LAMBDA { return load(from + row * stride + c); });
}

// ---- z, y and da
template <int R>
void product_tile(int64_t depth, const float* a, const float* panel, const TileOut& to, int vectors,
                  BlockStatistics* statistics, bool first) {
  Vec sum[2][R] = {};
  multiply<R, kPitch, 1, kPanel>(min(depth, kPart), a, panel, sum);
  while ((depth -= kPart) > 0) {  // a sum of sums of kPart terms: its error grows with the parts, not the terms
    a += kProductRows * kPitch;
    panel += kPart * kPanel;
    Vec part[2][R] = {};
    multiply<R, kPitch, 1, kPanel>(min(depth, kPart), a, panel, part);
    for (int v = 0; v < 2; ++v)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum[v][r] += part[v][r];
  }
  TileOut second = to;
  second.out += kLanes;
  if (to.scale) second.scale += kLanes, second.shift += kLanes;
  if (to.residual) second.residual += kLanes;
  emit(to, sum[0]);
  if (vectors > 1) emit(second, sum[1]);
  if (!statistics) return;
  statistics[0].add(sum[0], first);
  statistics[1].add(sum[1], first);
}

using ProductTile = void (*)(int64_t, const float*, const float*, const TileOut&, int, BlockStatistics*, bool);
struct ProductTiles {
  ProductTile by_rows[kProductRows + 1] = {};
  template <int R = kProductRows>
  constexpr void fill() {
    if constexpr (R > 0) {
      by_rows[R] = product_tile<R>;
      fill<R - 1>();
    }
  }
  constexpr ProductTiles() { fill(); }
};

// Panels [first, last) of b(d, n), d < depth, n < columns: weight[n][d] transposed, or weight[d][n].
inline void pack_panels(int64_t first, int64_t last, int64_t depth, int64_t columns, bool transposed,
                        const float* weight, float* packed) {
  for (int64_t panel = first; panel < last; ++panel, packed += depth * kPanel) {
    for (int64_t v = 0; v < 2; ++v) {
      const int64_t n = panel * kPanel + v * kLanes;
      if (n >= columns) {
        for (int64_t d = 0; d < depth; ++d) store(packed + d * kPanel + v * kLanes, Vec{});
      } else if (!transposed) {
        for (int64_t d = 0; d < depth; ++d) store(packed + d * kPanel + v * kLanes, load(weight + d * columns + n));
      } else {
        for (int64_t d = 0; d < depth; d += kLanes) {
          Vec rows[kLanes];
          for (int i = 0; i < kLanes; ++i) rows[i] = load(weight + (n + i) * depth + d);
          transpose(rows);
          for (int i = 0; i < kLanes; ++i) store(packed + (d + i) * kPanel + v * kLanes, rows[i]);
        }
      }
    }
  }
}

// out (M, columns) = relu(prologue(a)) or a (M, depth) times b, the weight as `pack_panels` takes it; mean and var of
// the product's columns unless null.
inline void product(int64_t M, int64_t depth, int64_t columns, const float* a, Affine prologue, const float* weight,
                    bool transposed, TileOut out, float* mean, float* var, int num_threads) {
  static constexpr ProductTiles tiles;
  const int64_t panels = ceil_div(columns, kPanel);
  const int64_t blocks = min(panels, ceil_div(panels * depth * kPanel, kPanelFloats));
  const int64_t block = ceil_div(panels, blocks);
  const int64_t row_tiles = ceil_div(M, kProductRows);
  const int64_t pieces = min(row_tiles, num_threads == 1 ? 1 : max(2, ceil_div(8 * num_threads, blocks)));
  const int64_t parts = ceil_div(depth, kPart);
  const int64_t statistics_floats = mean ? block * 2 * kStatisticsFloats : 0;
  const Scratch scratch(num_threads, mean ? 2 * pieces * (2 * columns + 1) : 0,
                        statistics_floats + block * depth * kPanel + parts * kProductRows * kPitch);
  double* const counts = (double*)scratch.shared;
  double *const means = counts + pieces, *const m2s = means + pieces * columns;
  out.past_cache = out.residual != out.out && streams(out.out, M, columns);
  Shares shares(blocks * pieces, num_threads);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1 && blocks * pieces > 1)
  {
    BlockStatistics* const statistics = mean ? (BlockStatistics*)scratch.mine() : nullptr;
    float* packed = scratch.mine() + statistics_floats;
    float* rows = packed + block * depth * kPanel;
    int64_t have = -1;
    shares.run([&](int64_t item) {
      const int64_t index = item / pieces, piece = item % pieces;
      const int64_t first = index * panels / blocks, last = (index + 1) * panels / blocks;
      if (have != first) pack_panels(first, last, depth, columns, transposed, weight, packed);
      have = first;
      const int64_t begin = piece * row_tiles / pieces, end = (piece + 1) * row_tiles / pieces;
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t m = tile * kProductRows, count = min(kProductRows, M - m);
        const float* from = a + m * depth;
        copy_activations(count, kProductRows, depth, from, depth, prologue, rows);
        const char* next = (const char*)(from + kProductRows * depth);
        const int64_t lines = tile + 1 < end ? min(kProductRows, M - m - kProductRows) * depth / 16 : 0;
        const int64_t quota = ceil_div(lines, last - first);
        int64_t line = 0;
        const bool first_of_sum = (tile - begin) % kTilesPerSum == 0;
        for (int64_t panel = first; panel < last; ++panel) {
          for (int64_t stop = min(lines, line + quota); line < stop; ++line) __builtin_prefetch(next + line * 64, 0, 2);
          const int64_t n = panel * kPanel;
          TileOut to = out;
          to.out += m * columns + n;
          to.stride = columns;
          to.count = count;
          if (to.scale) to.scale += n, to.shift += n;
          if (to.residual) to.residual += m * columns + n;
          tiles.by_rows[count](depth, rows, packed + (panel - first) * depth * kPanel, to, columns - n > kLanes ? 2 : 1,
                               statistics ? statistics + 2 * (panel - first) : nullptr, first_of_sum);
        }
        if (statistics && ((tile + 1 - begin) % kTilesPerSum == 0 || tile + 1 == end)) {
          const double before = (double)((tile - begin) / kTilesPerSum * kTilesPerSum * kProductRows);
          const int64_t at = piece * columns + first * kPanel,
                        vectors = min(columns, last * kPanel) / kLanes - 2 * first;
          if (before == 0)
            for (int64_t n = 0; n < vectors * kLanes; ++n) means[at + n] = m2s[at + n] = 0;
          for (int64_t v = 0; v < vectors; ++v)
            statistics[v].merge_into(before, kLanes, means + at + v * kLanes, m2s + at + v * kLanes);
        }
      }
      end_streaming();
    });
  }
  if (!mean) return;
  for (int64_t piece = 0; piece < pieces; ++piece)
    counts[piece] =
        (double)(min(M, (piece + 1) * row_tiles / pieces * kProductRows) - piece * row_tiles / pieces * kProductRows);
  merge_statistics(pieces, columns, counts, means, m2s, mean, var);
}

inline void conv1x1(int64_t M, int64_t C, int64_t K, const float* x, Affine prologue, const float* weight,
                    Affine affine, const float* residual, float* y, float* mean, float* var, int num_threads) {
  product(M, C, K, x, prologue, weight, true, {y, K, 0, affine.scale, affine.shift, residual}, mean, var, num_threads);
}

// ---- dweight
// `quota` lines are fetched ahead every kFetch pixels: many at once would hold up the loads of the product.
inline void weight_tile(int64_t pixels, const float* dz, const float* x, float* out, int64_t stride, int vectors,
                        bool add, Ahead& ahead, int64_t quota) {
  Vec sum[2][kWeightRows] = {};
  for (int64_t p = 0; p < pixels; p += kFetch) {
    ahead.fetch(quota);
    multiply<kWeightRows, 1, kPitch, kPitch>(min(kFetch, pixels - p), dz + p * kPitch, x + p * kPitch, sum);
  }
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    if (v == vectors) break;
#pragma GCC unroll 16
    for (int r = 0; r < kWeightRows; ++r) {
      float* to = out + r * stride + v * kLanes;
      store(to, add ? load(to) + sum[v][r] : sum[v][r]);
    }
  }
}

inline void conv1x1_dweight(int64_t M, int64_t C, int64_t K, const float* dz, const float* x, Affine prologue,
                            float* dweight, int num_threads) {
  const int64_t blocks_c = ceil_div(C, kPart), blocks_k = ceil_div(K, kPart), blocks = blocks_c * blocks_k;
  const int64_t chunks = max(1, ceil_div(M, kPixels));  // one of no pixels writes zeros
  const int64_t splits = min(chunks, blocks >= 2 * num_threads ? 1 : ceil_div(4 * num_threads, blocks));
  const Scratch scratch(num_threads, (splits - 1) * K * C, 2 * kPixels * kPitch);
  Shares shares(blocks * splits, num_threads);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1 && blocks * splits > 1)
  {
    float* dz_rows = scratch.mine();
    float* x_rows = dz_rows + kPixels * kPitch;
    shares.run([&](int64_t item) {
      const int64_t split = item / blocks, k0 = item % blocks / blocks_c * kPart, c0 = item % blocks_c * kPart;
      const int64_t ks = min(kPart, K - k0), cs = min(kPart, C - c0);
      float* out = (split ? scratch.shared + (split - 1) * K * C : dweight) + k0 * C + c0;
      const int64_t begin = split * chunks / splits, end = (split + 1) * chunks / splits;
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t m = chunk * kPixels, pixels = min(kPixels, M - m);
        copy_activations(pixels, pixels, ks, dz + m * K + k0, K, {}, dz_rows);
        copy_activations(pixels, pixels, cs, x + m * C + c0, C, from_channel(prologue, c0), x_rows);
        Ahead ahead;
        if (chunk + 1 < end) {
          const Window next{0, 0, 1, m + kPixels, kPixels};
          ahead.add(dz, 1, 1, M, K, next, k0, ks);
          ahead.add(x, 1, 1, M, C, next, c0, cs);
        }
        const int64_t fetches = ceil_div(cs, kPanel) * (ks / kWeightRows) * max(1, ceil_div(pixels, kFetch));
        for (int64_t c = 0; c < cs; c += kPanel)
          for (int64_t k = 0; k < ks; k += kWeightRows)
            weight_tile(pixels, dz_rows + k, x_rows + c, out + k * C + c, C, cs - c > kLanes ? 2 : 1, chunk > begin,
                        ahead, ceil_div(ahead.lines, fetches));
      }
    });
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t at = 0; at < K * C; at += kLanes) {
      Vec sum = load(dweight + at);
      for (int64_t split = 1; split < splits; ++split) sum += load(scratch.shared + (split - 1) * K * C + at);
      store(dweight + at, sum);
    }
  }
}

inline void conv1x1_backward(int64_t M, int64_t C, int64_t K, const float* dz, const float* x, Affine prologue,
                             const float* weight, float* da, bool add, float* dweight, int num_threads) {
  const TileOut out{da, C, 0, nullptr, nullptr, add ? da : nullptr};
  if (da) product(M, K, C, dz, {}, weight, false, out, nullptr, nullptr, num_threads);
  if (dweight) conv1x1_dweight(M, C, K, dz, x, prologue, dweight, num_threads);
}

}  // namespace resnext_kernels::cpu::RK_ISA
