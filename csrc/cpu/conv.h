// The grouped 3x3 convolution with BatchNorm and ReLU around it, forward and backward, for one instruction set.
//
//   a = x or relu(in_scale * x + in_shift)              z[k] = sum_{ky,kx,ci} weight[k][ci][ky][kx] * a[g(k), ci]
//   forward:   y = relu(scale * z + shift [+ residual])  or  z with its per-channel statistics
//   backward:  dz formed from dy and z as they are loaded;   da = conv^T(dz, weight);   dweight = a (x) dz
//
// (Xie et al., 2017, section 3; Ioffe & Szegedy, 2015.) Memory is NHWC, accumulation float32.
//
// A thread copies a unit's input (plan.h) into its own scratch memory first, which is where everything that belongs to
// loading happens once per element: conversion to float32, the prologue, dBN and dReLU, and the zeros around the image.
// The scratch is to stay in the second-level cache. Packed weights, per block of one vector of output channels:
//
//     [block][ci][ky][kx][lane]
//
// winograd.h has its own form of both, for the convolutions that it serves.
#pragma once

#include <type_traits>

#include "narrow.h"
#include "plan.h"
#include "pointwise.h"
#include "tiles.h"
#include "winograd.h"

namespace resnext_kernels::cpu::RK_ISA {

// ---- configuration
constexpr int64_t kLongRow = 14;                 // from here on a row's work hides reading the chunk's weights anew
constexpr int64_t kWeightTileFloats = 4 * 1024;  // 16 KiB of a and dz, half of the first-level cache
constexpr int kWeightInputs = kRegisters == 16 ? 4 : 8;  // channels of a dweight tile, 3 accumulators each

// ---- staging: a window of a chunk's channels as float32, or pairs of bfloat16, [row][column][channel]
struct Staged {
  float* data;
  Window window;
  int64_t pixel;  // floats per pixel
  int64_t line() const { return window.columns * pixel; }
  const float* at(int64_t row, int64_t column) const {
    return data + (row - window.row) * line() + (column - window.column) * pixel;
  }
  // A tile may read one pixel and one vector past the last, for values that nobody uses.
  static int64_t floats(const Window& w, int64_t pixel) {
    return round_up((w.rows * w.columns + 1) * pixel + kLanes, 16);
  }
};

// value(channel, lanes)(element offset) gives the vector at a pixel inside the (H, W, C) image.
template <class F>
RK_INLINE void stage(const Staged& to, int64_t H, int64_t W, int64_t C, int64_t channel, int64_t channels, F&& value) {
  const Window& w = to.window;
  for (int64_t row = max(0, w.row); row < min(H, w.row + w.rows); ++row) {
    float* pixel = to.data + (row - w.row) * to.line();
    for (int64_t column = w.column; column < w.column + w.columns; ++column, pixel += to.pixel) {
      if (column < 0 || column >= W) {
        for (int64_t c = 0; c < to.pixel; c += kLanes) store(pixel + c, Vec{});
        continue;
      }
      const int64_t at = ((w.n * H + row) * W + column) * C + channel;
      for_channels(channels, [&](int64_t c, auto lanes) { store(pixel + c, value(channel + c, lanes)(at + c)); });
    }
  }
}

// f(value) with what gives the operand's vectors, a from x or dz from dy and z: value(channel, lanes)(element offset).
template <class T, class F>
RK_INLINE void with_activation(const T* x, Affine prologue, F&& f) {
  if (prologue.scale)
    f([=](int64_t c, auto lanes) RK_INLINE_LAMBDA {
      const Vec scale = load(prologue.scale + c, lanes), shift = load(prologue.shift + c, lanes);
      return [=](int64_t at) RK_INLINE_LAMBDA { return relu(load(x + at, lanes) * scale + shift); };
    });
  else
    f([=](int64_t, auto lanes)
          RK_INLINE_LAMBDA { return [=](int64_t at) RK_INLINE_LAMBDA { return load(x + at, lanes); }; });
}
template <class T, class F>
RK_INLINE void with_gradient(const ReluBNGradient& gradient, F&& f) {
  if (!gradient.z)
    with_activation((const T*)gradient.dy, {}, f);
  else if (gradient.y)
    f([&](int64_t c, auto lanes) RK_INLINE_LAMBDA { return input_gradient<T, true>(gradient, c, lanes); });
  else
    f([&](int64_t c, auto lanes) RK_INLINE_LAMBDA { return input_gradient<T, false>(gradient, c, lanes); });
}

template <class T>
void stage_activation(const Staged& to, const ConvProblem& p, int64_t channel, int64_t channels, const T* x,
                      Affine prologue) {
  with_activation(x, prologue, [&](auto value) { stage(to, p.H, p.W, p.C, channel, channels, value); });
}
template <class T>
void stage_gradient(const Staged& to, const ConvProblem& p, int64_t channel, int64_t channels,
                    const ReluBNGradient& gradient) {
  with_gradient<T>(gradient, [&](auto value) { stage(to, p.out_h(), p.out_w(), p.K, channel, channels, value); });
}

// ---- weights
// Hands vector j of from(lane)[j] over the lanes to to(j), for j < count in order; lanes from `lanes` on are zero.
template <class T, class F, class G>
RK_INLINE void transpose_rows(int lanes, int64_t count, F&& from, G&& to) {
  int64_t j = 0;
  if (lanes == kLanes) {
    for (; j + kLanes <= count; j += kLanes) {
      Vec rows[kLanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) rows[lane] = load(from(lane) + j);
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to(j + i), rows[i]);
    }
  }
  for (; j < count; j += kLanes) {
    const int64_t n = min(kLanes, count - j);
    Vec rows[kLanes] = {};
    for (int lane = 0; lane < lanes; ++lane)
      rows[lane] = n == kLanes ? load(from(lane) + j) : load_partial(from(lane) + j, (int)n);
    transpose(rows);
    for (int64_t i = 0; i < n; ++i) store(to(j + i), rows[i]);
  }
}

// One block as [ci][tap][lane], forward: lanes are output channels, a lane's row is weight[k].
template <class T>
void pack_block(const ConvProblem& p, const Block& block, int64_t group, const T* weight, float* packed) {
  const int64_t din = p.din(), row = din * 9;
  const T* first = weight + (group * p.dout() + block.out) * row;
  const auto from = [&](int64_t lane) { return first + lane * row; };
  if (!p.weight_channels_last) {
    transpose_rows<T>(block.lanes, row, from, [&](int64_t j) { return packed + j * kLanes; });
    return;
  }
  int64_t ci = 0, tap = 0;
  transpose_rows<T>(block.lanes, row, from, [&](int64_t) {
    float* to = packed + (ci * 9 + tap) * kLanes;
    if (++ci == din) ci = 0, ++tap;
    return to;
  });
}

// One block as [k][tap][lane], transposed: lanes are input channels of the convolution, the sum runs over its output
// channels.
template <class T>
void pack_transposed_block(const ConvProblem& p, const Block& block, int64_t group, const T* weight, float* packed) {
  const int64_t din = p.din(), dout = p.dout();
  if (p.weight_channels_last) {  // the lanes of a group lie side by side
    for (int64_t j = 0; j < dout * 9; ++j) store(packed + j * kLanes, Vec{});
    for (int64_t lane = 0, n; lane < block.lanes; lane += n) {
      const int64_t channel = block.out + lane;
      n = min(din - channel % din, block.lanes - lane);
      const T* from = weight + (group + channel / din) * dout * din * 9 + channel % din;
      for (int64_t j = 0; j < dout * 9; ++j) {
        float* to = packed + j * kLanes + lane;
        n == kLanes ? store(to, load(from + j * din)) : store_partial(to, load_partial(from + j * din, (int)n), (int)n);
      }
    }
    return;
  }
  const T* first[kLanes];  // the nine taps to output channel 0 of the lane's group
  for (int64_t lane = 0; lane < block.lanes; ++lane) {
    const int64_t channel = block.out + lane;
    first[lane] = weight + ((group + channel / din) * dout * din + channel % din) * 9;
  }
  for (int64_t k = 0; k < dout; ++k)
    transpose_rows<T>(
        block.lanes, 9, [&](int64_t lane) { return first[lane] + k * din * 9; },
        [&](int64_t tap) { return packed + (k * 9 + tap) * kLanes; });
}

// A chunk's blocks. At stride 1 the transposed convolution is a convolution with the taps of a row reversed.
template <class T>
void pack_weight(const ConvProblem& p, const Blocks& blocks, bool transposed, int64_t group, int64_t groups,
                 const T* weight, float* packed) {
  const bool reversed = transposed && p.stride == 1 && p.dilation == 1;
  for (int64_t b = 0; b < blocks.count(groups); ++b) {
    const Block block = blocks.block(b, groups);
    if (!transposed) pack_block(p, block, group, weight, packed);
    if (transposed) pack_transposed_block(p, block, group, weight, packed);
    for (int64_t i = 0; i < 3 * blocks.din; ++i, packed += 3 * kLanes) {
      if (!reversed) continue;
      const Vec left = load(packed), right = load(packed + 2 * kLanes);
      store(packed, right);
      store(packed + 2 * kLanes, left);
    }
  }
}

// U of one block that a group fills, forward, by slices of input channels whose taps stay in the first-level cache.
// False if a weight is not finite.
template <class T>
bool pack_winograd_block(const ConvProblem& p, const Block& block, int64_t group, const T* weight, float* packed) {
  const int64_t din = p.din(), row = 9 * din;
  const T* first = weight + (group * p.dout() + block.out) * row;
  alignas(64) float taps[9 * kLanes * kLanes];  // [tap][ci][lane] or [ci][tap][lane], as the weight lies
  const int64_t tap = p.weight_channels_last ? kLanes * kLanes : kLanes;
  const int64_t channel = p.weight_channels_last ? kLanes : 9 * kLanes;
  Vec bad{};
  for (int64_t ci = 0; ci < din; ci += kLanes) {
    const int64_t inputs = min(kLanes, din - ci);
    if (p.weight_channels_last)
      for (int64_t t = 0; t < 9; ++t)  // `row` anew: sixteen multiples of it would be spilled
        transpose_rows<T>(
            block.lanes, inputs, [&, row = fresh(row)](int64_t lane) { return first + lane * row + t * din + ci; },
            [&](int64_t j) { return taps + (t * kLanes + j) * kLanes; });
    else
      transpose_rows<T>(
          block.lanes, 9 * inputs, [&](int64_t lane) { return first + lane * row + 9 * ci; },
          [&](int64_t j) { return taps + j * kLanes; });
    for (int64_t ky = 0; ky < 3; ++ky) {
      const float* g = taps + 3 * ky * tap;
      float* u = packed + (ky * din + ci) * kLanes;
      for (int64_t i = 0; i < inputs; ++i, g += channel, u += kLanes)
        bad += transform_row({load(g), load(g + tap), load(g + 2 * tap)}, u, 3 * din * kLanes) * Vec{};
    }
  }
  return !any_nan(bad);
}

// The same as U. False if a weight is not finite.
template <class T>
bool pack_winograd_weight(const ConvProblem& p, const Blocks& blocks, Access access, bool transposed, int64_t group,
                          int64_t groups, const T* weight, float* taps, float* packed) {
  bool finite = true;
  for (int64_t b = 0; b < blocks.count(groups); ++b, packed += 3 * blocks.din * kPairFloats) {
    const Block block = blocks.block(b, groups);
    if (!transposed && access == Access::broadcast) {
      finite &= pack_winograd_block(p, block, group, weight, packed);
      continue;
    }
    if (transposed)
      pack_transposed_block(p, block, group, weight, taps);
    else
      pack_block(p, block, group, weight, taps);
    finite &= transform_weight(blocks, access, taps, transposed, packed);
  }
  return finite;
}

// A chunk's blocks as pairs of input channels, from bfloat16: [block][pair][tap][lane]. `taps`: memory for a block.
template <class T>
void pack_channel_pairs(const ConvProblem& p, const Blocks& blocks, int64_t group, int64_t groups, const T* weight,
                        float* taps, float* packed) {
  for (int64_t b = 0; b < blocks.count(groups); ++b) {
    pack_block(p, blocks.block(b, groups), group, weight, taps);
    for (int64_t pair = 0; pair < blocks.din; ++pair) {
      for (int64_t tap = 0; tap < 9; ++tap, packed += kLanes) {
        const float* const from = taps + (pair * 18 + tap) * kLanes;  // float32 whose lower half is zero
        const UVec even = (UVec)load(from) >> 16, odd = (UVec)load(from + 9 * kLanes);
        store(packed, (Vec)(even | odd));
      }
    }
  }
}

// Runs the tiles of one unit. `out` is the window to compute, `input` the staged operand. For every block and tile,
// sink.target(tile, block, row, rows, column, column step, count, values) says where its values go, `values` being
// memory for a tile, row after row, and sink.finish(block index, block, row, rows, column, column step, that target)
// follows.
struct UnitPass {
  const ConvProblem& p;
  const Tiles& tiles;
  const Blocks& blocks;
  bool transposed;
  int64_t groups;  // of the chunk
  const float* packed;
  const IVec* index;

  // Output row `row` reads input row `result` through ky; false when there is none.
  bool input_row(int64_t row, int64_t ky, int64_t* result) const {
    const int64_t shift = (ky - 1) * p.dilation;
    if (!transposed) {
      *result = row * p.stride + shift;
      return *result >= 0 && *result < p.H;
    }
    *result = (row - shift) / p.stride;
    return row >= shift && (row - shift) % p.stride == 0 && *result < p.out_h();
  }

  template <class S>
  RK_INLINE void run(const Window& out, const Staged& input, Ahead& ahead, const S& sink) const {
    const bool shared_columns = p.dilation == 1 && p.stride <= 2;
    alignas(64) float values[kTile * kLanes];
    const int64_t block_floats = blocks.din * 9 * kLanes, block_count = blocks.count(groups);
    // All blocks of a row, so that the row is written while it is in the cache; short rows block by block instead.
    const bool rows_first = out.columns >= kLongRow;
    const int64_t steps = out.rows * block_count, quota = ceil_div(ahead.lines, steps);
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t b = rows_first ? step % block_count : step / out.rows;
      const int64_t row = out.row + (rows_first ? step / block_count : step % out.rows);
      const Block block = blocks.block(b, groups);
      const float* weight = packed + b * block_floats;
      ahead.fetch(quota);
      RowTap rows[3];
      int row_count = 0;
      for (int64_t ky = 0; ky < 3; ++ky) {
        int64_t from;
        if (!input_row(row, ky, &from)) continue;
        rows[row_count++] = {input.at(from, input.window.column) + block.in, weight + ky * 3 * kLanes};
      }
      const auto tile = [&](Tile run, const RowTap* taps, int tap_count, int64_t pixel, int64_t column, int64_t stride,
                            int64_t count) {
        TileOut to;
        sink.target(to, block, row, 1, column, stride, count, values);
        run(taps, tap_count, pixel, blocks.din, index, to);
        sink.finish(b, block, row, 1, column, stride, to);
      };
      if (shared_columns)
        run_shared(out, input, rows, row_count, tile);
      else
        run_taps(out, input, rows, row_count, tile);
    }
  }

  // Neighbouring columns share what they read.
  template <class F>
  RK_INLINE void run_shared(const Window& out, const Staged& input, const RowTap* rows, int row_count, F&& run) const {
    const bool pairs = transposed && p.stride == 2;  // a tile starts at an even column
    const int64_t tile_count = ceil_div(out.columns, kTile);
    const int64_t even = pairs ? round_up(ceil_div(out.columns, tile_count), 2) : 0;
    for (int64_t tile = 0, begin = 0; begin < out.columns; ++tile) {
      const int64_t end = pairs ? min(begin + even, out.columns) : (tile + 1) * out.columns / tile_count;
      const int64_t column = out.column + begin;
      const int64_t first = transposed ? (pairs ? column / 2 : column - 1) : column * p.stride - 1;
      RowTap taps[3];
      for (int t = 0; t < row_count; ++t)
        taps[t] = {rows[t].input + (first - input.window.column) * input.pixel, rows[t].weight};
      run(tiles.by_size[end - begin], taps, row_count, input.pixel, column, 1, end - begin);
      begin = end;
    }
  }

  // Any stride and dilation. Columns of one residue modulo the stride read the same taps in the transpose.
  template <class F>
  RK_INLINE void run_taps(const Window& out, const Staged& input, const RowTap* rows, int row_count, F&& run) const {
    const int64_t residues = transposed ? p.stride : 1;
    for (int64_t residue = 0; residue < residues; ++residue) {
      const int64_t total = ceil_div(out.columns - residue, residues);
      for (int64_t begin = 0; begin < total; begin += kTile) {
        const int64_t count = min(kTile, total - begin);
        const int64_t column = out.column + residue + begin * residues;
        RowTap taps[9];
        int tap_count = 0;
        for (int t = 0; t < row_count; ++t) {
          for (int64_t kx = 0; kx < 3; ++kx) {
            const int64_t shift = (kx - 1) * p.dilation;
            int64_t from = column * p.stride + shift;
            if (transposed) {
              from = floor_div(column - shift, p.stride);
              if (from * p.stride != column - shift) continue;
            }
            taps[tap_count++] = {rows[t].input + (from - input.window.column) * input.pixel,
                                 rows[t].weight + kx * kLanes};
          }
        }
        run(tiles.by_size[count], taps, tap_count, (transposed ? 1 : p.stride) * input.pixel, column, residues, count);
      }
    }
  }
};

// ---- forward
// What becomes of the convolution's values.
struct Epilogue {
  Affine affine;  // given: y = relu(affine(z) [+ residual]), else z itself
  const void* residual = nullptr;
};

// Asks for the cache lines that this block of channels starts, in pixels that will be written soon: a store that
// misses waits for memory, and no hardware prefetcher follows the order in which tiles write. Not for tiles of several
// rows: so many lines at once delay the loads behind them more than they help.
template <class T>
RK_INLINE void prefetch_pixels(const T* out, int64_t stride, int64_t count, const Block& block) {
  if (block.out % (64 / (int64_t)sizeof(T))) return;
  for (int64_t i = 0; i < count; ++i) __builtin_prefetch(out + i * stride, 1);
}

template <class T, class I>
RK_INLINE void write_pixels(const Epilogue& epilogue, T* out, const T* residual, int64_t channel, int64_t stride,
                            int64_t count, const float* values, I lanes, bool past_cache) {
  if (!epilogue.affine.scale) {
    for (int64_t i = 0; i < count; ++i) write(out + i * stride, load(values + i * kLanes), lanes, past_cache);
    return;
  }
  const Vec scale = load(epilogue.affine.scale + channel, lanes), shift = load(epilogue.affine.shift + channel, lanes);
  for (int64_t i = 0; i < count; ++i) {
    Vec v = load(values + i * kLanes) * scale + shift;
    if (residual) v += load(residual + i * stride, lanes);
    write(out + i * stride, relu(v), lanes, past_cache);
  }
}

// Whether tiles can write past the cache: each of their vectors is a whole line.
template <class T>
bool streams_tiles(const T* out, int64_t pixels, const Blocks& blocks, int64_t groups) {
  const bool whole_lines = blocks.dout * blocks.groups_per_block % kLanes == 0 && sizeof(T) * kLanes == 64;
  return whole_lines && streams(out, pixels, groups * blocks.dout);
}

// Statistics of one block of channels over one unit: (count, mean, m2) of every tile, merged by Chan's update. Values
// are taken relative to the first tile's mean, so that a mean large against the deviation costs nothing.
struct BlockStatistics {
  Vec origin, mean, m2;
  float count;

  // Of the values of a tile, `rows` rows of n: [row][kTileColumns][lane].
  RK_INLINE void add(const float* values, int64_t rows, int64_t n, bool first) {
    const Vec inverse = broadcast(1.0f / (float)(rows * n));
    // over the values, in four sums for the latency of an addition
    const auto sum_of = [&](auto term) RK_INLINE_LAMBDA {
      Vec sums[4] = {};
      const float* row = values;
      for (int64_t r = 0; r < rows; ++r, row += kTileColumns * kLanes) {
        int64_t i = 0;
        for (; i + 4 <= n; i += 4)
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) sums[k] += term(load(row + (i + k) * kLanes));
        for (; i < n; ++i) sums[0] += term(load(row + i * kLanes));
      }
      return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    };
    if (first) {
      origin = sum_of([](Vec v) RK_INLINE_LAMBDA { return v; }) * inverse;
      mean = m2 = Vec{};
      count = 0;
    }
    const Vec tile_mean = sum_of([&](Vec v) RK_INLINE_LAMBDA { return v - origin; }) * inverse;
    const Vec tile_m2 = sum_of([&](Vec v) RK_INLINE_LAMBDA {
      const Vec d = (v - origin) - tile_mean;
      return d * d;
    });
    merge(tile_mean, tile_m2, (float)(rows * n));
  }
  // The same of values in registers.
  template <int R>
  RK_INLINE void add(const Vec (&values)[R], bool first) {
    const Vec inverse = broadcast(1.0f / (float)R);
    if (first) {
      Vec sum = values[0];
#pragma GCC unroll 16
      for (int r = 1; r < R; ++r) sum += values[r];
      origin = sum * inverse;
      mean = m2 = Vec{};
      count = 0;
    }
    Vec sum{}, tile_m2{};
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum += values[r] - origin;
    const Vec tile_mean = sum * inverse;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec d = (values[r] - origin) - tile_mean;
      tile_m2 += d * d;
    }
    merge(tile_mean, tile_m2, (float)R);
  }
  RK_INLINE void merge(Vec tile_mean, Vec tile_m2, float n) {
    const float share = n / (count + n);
    const Vec delta = tile_mean - mean;
    mean += delta * broadcast(share);
    m2 += tile_m2 + delta * delta * broadcast(share * count);
    count += n;
  }
  // The same update with this unit's statistics, in double.
  void merge_into(double total, int lanes, double* means, double* m2s) const {
    const double share = count / (total + count);
    for (int lane = 0; lane < lanes; ++lane) {
      const double delta = (double)origin[lane] + mean[lane] - means[lane];
      means[lane] += delta * share;
      m2s[lane] += m2[lane] + delta * delta * (share * total);
    }
  }
};

constexpr int64_t kStatisticsFloats = sizeof(BlockStatistics) / sizeof(float);

// Where a thread's tiles of one item go: to memory, and into the statistics [split][K] if there are any.
template <class T>
struct ForwardSink {
  using Stored = T;
  const ConvProblem& p;
  const Epilogue& epilogue;
  T* out;
  int64_t first_channel;
  BlockStatistics* statistics;  // of every block, for the unit at hand
  double *means, *m2s;
  Window window;
  double pixels = 0;  // of the units before
  bool past_cache = false;

  RK_INLINE int64_t at(const Block& block, int64_t row, int64_t column) const {
    return ((window.n * p.out_h() + row) * p.out_w() + column) * p.K + first_channel + block.out;
  }
  template <class U>
  RK_INLINE void target(TileOutOf<U>& tile, const Block& block, int64_t row, int64_t rows, int64_t column, int64_t,
                        int64_t count, float* values) const {
    T* const to = out + at(block, row, column);
    const int64_t row_stride = p.out_w() * p.K;
    if (!past_cache && rows == 1 && row + 1 < p.out_h()) prefetch_pixels(to + row_stride, p.K, count, block);
    const bool direct = std::is_same<T, U>::value && block.lanes == kLanes;
    tile.count = count;
    if (!direct || means) tile.values = values;
    if constexpr (std::is_same<T, U>::value) {
      if (direct) {
        tile.out = to;
        tile.stride = p.K;
        tile.row_stride = row_stride;
        tile.past_cache = past_cache;
        if (epilogue.affine.scale) {
          tile.scale = epilogue.affine.scale + first_channel + block.out;
          tile.shift = epilogue.affine.shift + first_channel + block.out;
          if (epilogue.residual) tile.residual = (const T*)epilogue.residual + at(block, row, column);
        }
      }
    }
  }
  template <class U>
  RK_INLINE void finish(int64_t b, const Block& block, int64_t first_row, int64_t rows, int64_t column, int64_t,
                        const TileOutOf<U>& tile) const {
    const int64_t channel = first_channel + block.out;
    if (!tile.out) {
      for (int64_t r = 0; r < rows; ++r) {
        const float* const values = tile.values + r * kTileColumns * kLanes;
        const int64_t offset = at(block, first_row + r, column);
        const T* const add = epilogue.residual ? (const T*)epilogue.residual + offset : nullptr;
        if (block.lanes == kLanes)
          write_pixels(epilogue, out + offset, add, channel, p.K, tile.count, values, AllLanes{}, past_cache);
        else
          write_pixels(epilogue, out + offset, add, channel, p.K, tile.count, values, FirstLanes{block.lanes},
                       past_cache);
      }
    }
    if (!means) return;
    statistics[b].add(tile.values, rows, tile.count, first_row == window.row && column == window.column);
    if (first_row + rows == window.row + window.rows && column + tile.count == window.column + window.columns)
      statistics[b].merge_into(pixels, block.lanes, means + block.out, m2s + block.out);
  }
};

// How the sum is formed: as written; by Winograd's pairs of columns, from memory or, for narrow groups, in registers;
// from pairs of bfloat16 channels, as written.
enum class Form { direct, winograd, narrow, channel_pairs, narrow_pairs };

// A problem whose input channels come in pairs, 32 bits each.
inline ConvProblem in_channel_pairs(ConvProblem p) {
  p.C /= 2;
  return p;
}

// mean and var: of z's channels, unless null. False, with the results undefined, if it is Winograd's form and an
// operand is not finite.
template <class T, Form form>
bool conv_forward(const ConvProblem& p, const void* x, const void* weight, Affine prologue, const Epilogue& epilogue,
                  void* out, float* mean, float* var, int num_threads) {
  constexpr bool winograd = form == Form::winograd, narrow = form == Form::narrow;
  constexpr bool narrow_pairs = form == Form::narrow_pairs;
  constexpr bool channel_pairs = narrow_pairs || form == Form::channel_pairs;
  const ConvProblem source = channel_pairs ? in_channel_pairs(p) : p;  // as x is read
  const Plan plan(source, num_threads, winograd || narrow || narrow_pairs ? 0 : 1, narrow || narrow_pairs, true);
  const Blocks all_blocks(source.din(), p.dout()), chunk_blocks(source.din(), plan.chunk_outputs);
  const Slots slots(p.din(), p.dout(), plan.chunk_groups);

  const int64_t pixel = staged_pixel(plan.chunk_groups * source.din());
  const Window largest = input_window({0, 0, plan.rows, 0, plan.columns}, p);
  const Pairs<4> shape = winograd ? pairs_for(plan, slots.count, kStepFloats) : Pairs<4>{};
  // at least the taps of a block, which packing turns into another form
  const int64_t input_floats = narrow || narrow_pairs ? kNarrowCopy
                               : winograd             ? shape.floats()
                                                      : Staged::floats(largest, pixel);
  const int64_t stage_floats = max(input_floats, 9 * p.din() * kLanes);
  const int64_t taps = winograd || narrow ? 12 : 9;
  const int64_t weight_floats = chunk_blocks.count(plan.chunk_groups) * chunk_blocks.din * taps * kLanes;
  const int64_t statistics_floats = mean ? chunk_blocks.count(plan.chunk_groups) * kStatisticsFloats : 0;
  const Scratch scratch(num_threads, mean ? 2 * plan.splits * (2 * p.K + 1) : 0,
                        chunk_blocks.index_floats() + statistics_floats + weight_floats + stage_floats);
  double* const means = (double*)scratch.shared;
  double* const m2s = means + plan.splits * p.K;
  double* const counts = m2s + plan.splits * p.K;
  bool finite = true;

  for_items(
      plan, num_threads, [&](int64_t chunk, int64_t split, int64_t first_unit, int64_t last_unit, bool new_chunk) {
        const int64_t group = chunk / plan.parts * plan.chunk_groups, groups = plan.groups(p, chunk);
        const int64_t channel = group * source.din(), output = chunk % plan.parts * plan.chunk_outputs;
        const int64_t out_channel = group * p.dout() + output;
        const Blocks blocks(source.din(), min(plan.chunk_outputs, p.dout() - output));
        const T* const weights = (const T*)weight + output * 9 * p.din();
        IVec* index = (IVec*)scratch.mine();
        BlockStatistics* statistics = (BlockStatistics*)(scratch.mine() + blocks.index_floats());
        float* staged = scratch.mine() + blocks.index_floats() + statistics_floats;
        float* packed = staged + stage_floats;
        fill_index(blocks, winograd, index);

        ForwardSink<T> sink{p, epilogue, (T*)out, out_channel, statistics, nullptr, nullptr, {}};
        if (mean) {
          sink.means = means + split * p.K + out_channel;
          sink.m2s = m2s + split * p.K + out_channel;
          for (int64_t k = 0; k < groups * blocks.dout; ++k) sink.means[k] = sink.m2s[k] = 0;
        }
        // With its statistics z is about to be normalized. Other forms wait too long for the lines they write.
        const bool stays = narrow && mean && p.N * p.H * p.W * p.K <= kCachedFloats;
        sink.past_cache = !stays && streams_tiles((const T*)out, p.N * p.out_h() * p.out_w(), all_blocks, p.groups);
        bool item_finite = true;
        if (new_chunk && (winograd || narrow))
          item_finite = pack_winograd_weight(p, blocks, access_of(blocks, winograd), false, group, groups, weights,
                                             staged, packed);
        else if (new_chunk && channel_pairs)
          pack_channel_pairs(p, blocks, group, groups, weights, staged, packed);
        else if (new_chunk)
          pack_weight(p, blocks, false, group, groups, weights, packed);

        for (int64_t unit = first_unit; unit < last_unit && item_finite; ++unit) {
          const Window window = sink.window = unit_window(plan, p, unit), next = unit_window(plan, p, unit + 1);
          if constexpr (narrow) {
            const float* const in_place = std::is_same<T, float>::value && !prologue.scale ? (const float*)x : nullptr;
            Vec zeros{};
            with_activation((const T*)x, prologue, [&](auto value) {
              for_narrow_tiles(window, next, narrow_rows(p, in_place), [&](const Window& tile, const Window& then) {
                const int64_t walks = blocks.count(groups) * ceil_div(tile.columns, 2 * kNarrowPairs);
                auto ahead = RowsAhead::of<T>({x}, p, then, channel, groups * p.din(), walks);
                for (int64_t b = 0; b < blocks.count(groups); ++b) {
                  const Block block = blocks.block(b, groups);
                  const auto input_of = [&](const Window& part) RK_INLINE_LAMBDA {
                    return input_around(in_place, part, p.H, p.W, p.C, channel + block.in, block.lanes, staged, value,
                                        true);
                  };
                  run_narrow(p.din(), tile, p.H, b, block, packed, input_of, zeros, ahead, sink);
                }
              });
            });
            item_finite = !any_nan(zeros);
          } else if constexpr (narrow_pairs) {
            const float* const pairs = (const float*)x;  // a pair is moved as a float
            for_narrow_tiles(window, next, kNarrowRows, [&](const Window& tile, const Window& then) {
              auto ahead =
                  RowsAhead::of<float>({x}, source, then, channel, groups * source.din(), blocks.count(groups));
              for (int64_t b = 0; b < blocks.count(groups); ++b) {
                const Block block = blocks.block(b, groups);
                const auto value = [&](int64_t, auto) RK_INLINE_LAMBDA {
                  return [=](int64_t at) RK_INLINE_LAMBDA { return load_partial(pairs + at, block.lanes / 2); };
                };
                const NarrowInput input = input_around(block.lanes == kLanes ? pairs : nullptr, tile, p.H, p.W,
                                                       source.C, channel + block.in, kLanes, staged, value);
                const float* const block_weight = packed + b * 9 * blocks.din * kLanes;
                for_register_tiles(tile, kNarrowColumns, p.H, b, block, sink,
                                   [&](const Window& part, Edges edges, const TileOutOf<T>& to) RK_INLINE_LAMBDA {
                                     ahead.begin_walk();
                                     const auto run = narrow_pair_tile_for<T>(source.din(), part.columns);
                                     run(input, part.rows, edges, block_weight, index, to, ahead);
                                   });
              }
            });
          } else if constexpr (winograd) {
            const Slots item_slots(p.din(), p.dout(), groups);
            const WinogradPass pass{p, blocks, item_slots, groups, packed, index};
            const Pairs<4> v = shape.of(staged, item_slots.count, window);
            with_activation((const T*)x, prologue, [&](auto value) {
              for_steps(window, next, v.rows - 2, p.H, [&](const Window& rows, const Window& now, const Window& then) {
                item_finite &= stage_pairs(v, nullptr, item_slots, groups, now, p.H, p.W, p.C, channel, value);
                Ahead ahead;
                ahead.add((const T*)x, p.N, p.H, p.W, p.C, then, channel, groups * p.din());
                pass.run(rows, v, ahead, ahead.lines, sink);
              });
            });
          } else {
            using Stored = std::conditional_t<channel_pairs, float, T>;  // a pair is moved as a float
            const Access access = blocks.access();
            const Tiles& tiles = channel_pairs ? pair_tiles_for(access, p.stride, p.dilation)
                                               : tiles_for(access, false, p.stride, p.dilation);
            const UnitPass pass{p, tiles, blocks, false, groups, packed, index};
            const Staged input{staged, input_window(window, p), pixel};
            stage_activation(input, source, channel, groups * source.din(), (const Stored*)x, prologue);
            Ahead ahead;
            ahead.add((const Stored*)x, p.N, p.H, p.W, source.C, input_window(next, p), channel, groups * source.din());
            pass.run(window, input, ahead, sink);
          }
          sink.pixels += (double)(window.rows * window.columns);
        }
        if (mean && chunk == 0) counts[split] = sink.pixels;  // the same for every chunk
        if (!item_finite) {
#pragma omp atomic write
          finite = false;
        }
      });
  if (mean && finite) merge_statistics(plan.splits, p.K, counts, means, m2s, mean, var);
  return finite;
}

// `channel_pairs`: bfloat16 without a prologue may be multiplied in pairs of channels.
template <class T>
void conv_forward(const ConvProblem& p, const void* x, const void* weight, Affine prologue, const Epilogue& epilogue,
                  void* out, float* mean, float* var, int num_threads, bool channel_pairs) {
  if constexpr (kPairProducts && std::is_same<T, bf16>::value) {
    if (channel_pairs && !prologue.scale && p.din() % 2 == 0) {
      const auto run = narrow_serves(p) ? conv_forward<T, Form::narrow_pairs> : conv_forward<T, Form::channel_pairs>;
      run(p, x, weight, prologue, epilogue, out, mean, var, num_threads);
      return;
    }
  }
  if constexpr (kWinograd) {
    const auto run = narrow_serves(p) ? conv_forward<T, Form::narrow> : conv_forward<T, Form::winograd>;
    if (winograd_serves(p) && run(p, x, weight, prologue, epilogue, out, mean, var, num_threads)) return;
  }
  conv_forward<T, Form::direct>(p, x, weight, prologue, epilogue, out, mean, var, num_threads);
}

template <class T>
void conv_affine_relu(const ConvProblem& p, const void* x, const void* weight, Affine affine, const void* residual,
                      Affine prologue, void* y, int num_threads, bool channel_pairs) {
  conv_forward<T>(p, x, weight, prologue, Epilogue{affine, residual}, y, nullptr, nullptr, num_threads, channel_pairs);
}

template <class T>
void conv_stats(const ConvProblem& p, const void* x, const void* weight, Affine prologue, void* z, float* mean,
                float* var, int num_threads, bool channel_pairs) {
  conv_forward<T>(p, x, weight, prologue, Epilogue{}, z, mean, var, num_threads, channel_pairs);
}

// ---- backward for weight
// Sums over the pixels p of a unit, for one block and ky. Of the two operands one is a vector of channels, the other
// one channel in all lanes of its group, as a rule of a:
//
//     dweight[ci][ky][kx][lane of k] += a[p + kx, ci] * dz[p, lane]
//
// Where square groups share a vector that takes a permutation, and one of dz serves three kx:
//
//     dweight[k][ky][kx][lane of ci] += a[p + kx, lane] * dz[p, k]
inline bool spreads_gradient(const Blocks& blocks) { return blocks.groups_per_block > 1 && blocks.din == blocks.dout; }

struct WeightTileArgs {
  const float* input;                            // staged a, at the row of ky and the first pixel's column of kx = 0
  const float* gradient;                         // staged dz, at the first pixel
  int64_t input_line, input_pixel, input_shift;  // floats per row and pixel of dz, and per step of kx
  int64_t gradient_line, gradient_pixel;
  int64_t rows, columns;
};

// Channels c + kFrom ... c + kFrom + I - 1 of the operand that is spread.
template <Access X, bool kSpreadGradient, int I, int kFrom = 0>
void weight_tile(const WeightTileArgs& args, int64_t c, const IVec* index, float* dweight) {
  Vec acc[I][3] = {};
  IVec lanes[I] = {};
  if (X == Access::lanes)
    for (int i = 0; i < I; ++i) lanes[i] = index[c + i];

  for (int64_t row = 0; row < args.rows; ++row) {
    const float* input = args.input + row * args.input_line + (X == Access::broadcast ? c : 0);
    const float* gradient = args.gradient + row * args.gradient_line;
    for (int64_t column = 0; column < args.columns; ++column) {
      if constexpr (kSpreadGradient) {
        const SpreadInput<X, kFrom> dz(gradient);
#pragma GCC unroll 8
        for (int i = 0; i < I; ++i) {
          const Vec value = dz.at(i, lanes[i]);
          const float* const a = kRegisters > 16 ? input : fresh(input);  // a in registers, if there are any left
#pragma GCC unroll 3
          for (int kx = 0; kx < 3; ++kx) acc[i][kx] += load(a + kx * args.input_shift) * value;
        }
      } else {
        const Vec dz = load(gradient);
#pragma GCC unroll 3
        for (int kx = 0; kx < 3; ++kx) {
          const float* pixel = fresh(input + kx * args.input_shift);
          const SpreadInput<X, kFrom> value(pixel);
#pragma GCC unroll 8
          for (int i = 0; i < I; ++i) acc[i][kx] += value.at(i, lanes[i]) * dz;
        }
      }
      input += args.input_pixel;
      gradient += args.gradient_pixel;
    }
  }
  dweight += (c + kFrom) * 9 * kLanes;
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i, dweight += 9 * kLanes) {
#pragma GCC unroll 3
    for (int kx = 0; kx < 3; ++kx) store(dweight + kx * kLanes, load(dweight + kx * kLanes) + acc[i][kx]);
  }
}

template <Access X, bool kSpreadGradient, int I>
void weight_tiles(const WeightTileArgs& args, int64_t c, int64_t channels, const IVec* index, float* dweight) {
  if constexpr (X == Access::octets) {
    weight_tile<X, kSpreadGradient, 4>(args, 0, index, dweight);
    weight_tile<X, kSpreadGradient, 4, 4>(args, 0, index, dweight);
  } else if constexpr (X == Access::quads) {
    weight_tile<X, kSpreadGradient, 4>(args, 0, index, dweight);
  } else {
    for (; c + I <= channels; c += I) weight_tile<X, kSpreadGradient, I>(args, c, index, dweight);
    if constexpr (I > 1)
      if (c < channels) weight_tiles<X, kSpreadGradient, I / 2>(args, c, channels, index, dweight);
  }
}

// dweight of a chunk, packed as the weights are, or the transposed weights where dz is spread, from one unit.
inline void add_weight_gradient(const ConvProblem& p, const Blocks& blocks, int64_t groups, const Window& window,
                                const Staged& input, const Staged& gradient, const IVec* index, float* dweight) {
  const auto tiles = blocks.access() == Access::broadcast ? weight_tiles<Access::broadcast, false, kWeightInputs>
                     : blocks.access() == Access::quads   ? weight_tiles<Access::quads, true, kWeightInputs>
                     : blocks.access() == Access::octets  ? weight_tiles<Access::octets, true, kWeightInputs>
                     : spreads_gradient(blocks)           ? weight_tiles<Access::lanes, true, kWeightInputs / 2>
                                                          : weight_tiles<Access::lanes, false, kWeightInputs>;
  // A few rows at a time, a cache line of a and one of dz per pixel, stay in the first-level cache for all blocks.
  const int64_t step = max(1, kWeightTileFloats / ((window.columns * p.stride + window.columns) * 16));
  for (int64_t begin = window.row; begin < window.row + window.rows; begin += step) {
    const int64_t end = min(begin + step, window.row + window.rows);
    for (int64_t b = 0; b < blocks.count(groups); ++b) {
      const Block block = blocks.block(b, groups);
      for (int64_t ky = 0; ky < 3; ++ky) {
        // The rows whose row of a lies inside the image.
        const int64_t shift = (ky - 1) * p.dilation;
        const int64_t first = max(begin, ceil_div(max(0, -shift), p.stride));
        const int64_t last = min(end, shift < p.H ? (p.H - 1 - shift) / p.stride + 1 : 0);
        if (first >= last) continue;
        WeightTileArgs args;
        args.input = input.at(first * p.stride + shift, window.column * p.stride - p.dilation) + block.in;
        args.gradient = gradient.at(first, window.column) + block.out;
        args.input_line = p.stride * input.line();
        args.input_pixel = p.stride * input.pixel;
        args.input_shift = p.dilation * input.pixel;
        args.gradient_line = gradient.line();
        args.gradient_pixel = gradient.pixel;
        args.rows = last - first;
        args.columns = window.columns;
        tiles(args, 0, blocks.din, index, dweight + (b * blocks.din * 9 + ky * 3) * kLanes);
      }
    }
  }
}

// Sums the splits' packed dweight of a chunk's block, in place, and writes it as the weight lies; of Winograd's M if
// `pairs`.
template <class T>
void write_weight_gradient(const ConvProblem& p, const Blocks& blocks, Access access, bool pairs, const Plan& plan,
                           int64_t chunk, int64_t b, float* packed, int64_t split_floats, T* dweight) {
  const int64_t group = chunk * plan.chunk_groups, groups = plan.groups(p, chunk), din = p.din(), row = 9 * din;
  if (b >= blocks.count(groups)) return;
  const int64_t vectors = pairs ? 4 : 3;  // of a row of taps
  const int interleave = interleaved_groups(access);
  const IVec order = side_by_side(interleave, blocks.dout);
  packed += b * 3 * din * vectors * kLanes;
  for (int64_t i = 0; i < 3 * din; ++i) {
    float* const taps = packed + i * vectors * kLanes;
    Vec sums[4] = {};
    for (int64_t split = 0; split < plan.splits; ++split)
      for (int64_t v = 0; v < vectors; ++v) sums[v] += load(taps + split * split_floats + v * kLanes);
    if (pairs) weight_gradient_of_pairs(sums);
    for (int64_t kx = 0; kx < 3; ++kx) store(taps + kx * kLanes, interleave > 1 ? permute(sums[kx], order) : sums[kx]);
  }
  const Block block = blocks.block(b, groups);
  T* const to = dweight + (group * p.dout() + block.out) * row;
  const auto write_row = [&](int lane, int64_t j, Vec values) {  // of the weight of output channel `lane`
    T* const at = to + lane * row + j;
    row - j >= kLanes ? store(at, values) : store_partial(at, values, (int)(row - j));
  };
  if (!pairs && spreads_gradient(blocks)) {  // lanes are input channels
    alignas(64) float values[9 * kLanes];
    for (int lane = 0; lane < block.lanes; ++lane) {
      const float* const from = packed + lane % din * 9 * kLanes + lane / din * din;
      for (int64_t tap = 0; tap < 9; ++tap)
        for (int64_t ci = 0; ci < din; ++ci)
          values[p.weight_channels_last ? tap * din + ci : ci * 9 + tap] = from[tap * kLanes + ci];
      for (int64_t j = 0; j < row; j += kLanes) write_row(lane, j, load(values + j));
    }
    return;
  }
  for (int64_t j = 0; j < row; j += kLanes) {
    Vec rows[kLanes] = {};
    for (int64_t i = 0; i < min(kLanes, row - j); ++i) {
      const int64_t ci = p.weight_channels_last ? (j + i) % din : (j + i) / 9;
      const int64_t tap = p.weight_channels_last ? (j + i) / din : (j + i) % 9, ky = tap / 3;
      rows[i] = load(packed + ((pairs ? ky * din + ci : ci * 3 + ky) * vectors + tap % 3) * kLanes);
    }
    transpose(rows);
    for (int lane = 0; lane < block.lanes; ++lane) write_row(lane, j, rows[lane]);
  }
}

// ---- backward: dx and dweight in one pass over dz
template <class T>
struct InputGradientSink {
  using Stored = T;
  const ConvProblem& p;
  T* dx;
  int64_t first_channel;
  Window window;
  bool past_cache = false;

  RK_INLINE T* at(const Block& block, int64_t row, int64_t column) const {
    return dx + ((window.n * p.H + row) * p.W + column) * p.C + first_channel + block.out;
  }
  template <class U>
  RK_INLINE void target(TileOutOf<U>& tile, const Block& block, int64_t row, int64_t rows, int64_t column, int64_t step,
                        int64_t count, float* values) const {
    T* const to = at(block, row, column);
    const int64_t row_stride = p.W * p.C;
    if (!past_cache && rows == 1 && row + 1 < p.H) prefetch_pixels(to + row_stride, step * p.C, count, block);
    tile.count = count;
    if constexpr (std::is_same<T, U>::value) {
      if (block.lanes == kLanes) {
        tile.out = to;
        tile.stride = step * p.C;
        tile.row_stride = row_stride;
        tile.past_cache = past_cache;
        return;
      }
    }
    tile.values = values;
  }
  template <class U>
  RK_INLINE void finish(int64_t, const Block& block, int64_t first_row, int64_t rows, int64_t column, int64_t step,
                        const TileOutOf<U>& tile) const {
    if (tile.out) return;
    for (int64_t r = 0; r < rows; ++r) {
      T* const dx_at = at(block, first_row + r, column);
      const float* const values = tile.values + r * kTileColumns * kLanes;
      if (block.lanes == kLanes)
        write_pixels<T>({}, dx_at, nullptr, 0, step * p.C, tile.count, values, AllLanes{}, past_cache);
      else
        write_pixels<T>({}, dx_at, nullptr, 0, step * p.C, tile.count, values, FirstLanes{block.lanes}, past_cache);
    }
  }
};

// False, with the results undefined, if it is one of Winograd's forms and an operand is not finite.
template <class T, Form form>
bool conv_backward(const ConvProblem& p, const ReluBNGradient& gradient, const void* x, Affine prologue,
                   const void* weight, void* dx, void* dweight, int num_threads) {
  constexpr bool winograd = form == Form::winograd, narrow = form == Form::narrow;
  const Plan plan(p, num_threads, winograd || narrow ? 0 : dweight ? 2 : 1, narrow);
  const Blocks forward(p.din(), p.dout()), backward(p.dout(), p.din());
  const Slots x_slots(p.din(), p.dout(), plan.chunk_groups), z_slots(p.dout(), p.din(), plan.chunk_groups);

  // staged: V of dz, its raw pairs, V of a; without Winograd's pairs, dz and a themselves
  const int64_t x_pixel = staged_pixel(plan.chunk_groups * p.din());
  const int64_t z_pixel = staged_pixel(plan.chunk_groups * p.dout());
  const Window largest{0, 0, plan.rows, 0, plan.columns};
  const Window largest_own{0, 0, plan.rows * p.stride, 0, plan.columns * p.stride};
  Pairs<4> x_shape{}, z_shape{};
  Pairs<2> raw_shape{};
  if (winograd) {
    z_shape = x_shape = pairs_for(plan, max(x_slots.count, z_slots.count), dweight ? kStepFloats * 2 / 5 : kStepFloats);
    x_shape.slots = x_slots.count;
    z_shape.slots = z_slots.count;
    raw_shape = {nullptr, z_shape.rows, z_shape.slots, z_shape.pairs};
  }
  const int64_t x_floats = !dweight   ? 0
                           : narrow   ? kNarrowCopy
                           : winograd ? x_shape.floats() + raw_shape.floats()
                                      : Staged::floats(input_window(largest, p), x_pixel);
  const int64_t z_floats = narrow     ? max(kNarrowCopy, 9 * p.dout() * kLanes)
                           : winograd ? max(z_shape.floats(), 9 * p.dout() * kLanes)
                                      : Staged::floats(gradient_window(largest_own, p), z_pixel);
  const int64_t taps = winograd || narrow ? 12 : 9;
  const int64_t weight_floats = dx ? backward.count(plan.chunk_groups) * p.dout() * taps * kLanes : 0;
  const int64_t dweight_floats = forward.count(plan.chunk_groups) * p.din() * taps * kLanes;  // of a chunk
  const int64_t split_floats = plan.chunks * dweight_floats;
  const Scratch scratch(num_threads, dweight ? plan.splits * split_floats : 0,
                        forward.index_floats() + backward.index_floats() + weight_floats + x_floats + z_floats);
  bool finite = true;

  for_items(
      plan, num_threads, [&](int64_t chunk, int64_t split, int64_t first_unit, int64_t last_unit, bool new_chunk) {
        const int64_t group = chunk * plan.chunk_groups, groups = plan.groups(p, chunk);
        IVec* forward_index = (IVec*)scratch.mine();
        IVec* backward_index = (IVec*)(scratch.mine() + forward.index_floats());
        float* packed = scratch.mine() + forward.index_floats() + backward.index_floats();
        float* x_staged = packed + weight_floats;
        float* z_staged = x_staged + x_floats;
        fill_index(forward, winograd, forward_index);
        fill_index(backward, winograd, backward_index);
        bool item_finite = true;
        if (new_chunk && dx && (winograd || narrow))
          item_finite = pack_winograd_weight(p, backward, access_of(backward, winograd), true, group, groups,
                                             (const T*)weight, z_staged, packed);
        else if (new_chunk && dx)
          pack_weight(p, backward, true, group, groups, (const T*)weight, packed);
        float* chunk_dweight = nullptr;
        if (dweight) {
          chunk_dweight = scratch.shared + split * split_floats + chunk * dweight_floats;
          for (int64_t i = 0; i < dweight_floats; ++i) chunk_dweight[i] = 0;
        }

        const int64_t x_channel = group * p.din(), z_channel = group * p.dout();
        const auto ahead_of = [&](const Window& z_window, const Window& x_window) {
          Ahead ahead;
          ahead.add((const T*)gradient.dy, p.N, p.out_h(), p.out_w(), p.K, z_window, z_channel, groups * p.dout());
          ahead.add((const T*)gradient.z, p.N, p.out_h(), p.out_w(), p.K, z_window, z_channel, groups * p.dout());
          ahead.add(dweight ? (const T*)x : nullptr, p.N, p.H, p.W, p.C, x_window, x_channel, groups * p.din());
          return ahead;
        };
        InputGradientSink<T> sink{p, (T*)dx, x_channel, {}};
        sink.past_cache = dx && streams_tiles((const T*)dx, p.N * p.H * p.W, backward, p.groups);
        for (int64_t unit = first_unit; unit < last_unit && item_finite; ++unit) {
          const Window window = unit_window(plan, p, unit), next = unit_window(plan, p, unit + 1);
          const Window own = sink.window = own_window(window, p);
          if constexpr (narrow) {
            const float* const in_place = std::is_same<T, float>::value && !prologue.scale ? (const float*)x : nullptr;
            Vec zeros{};
            with_gradient<T>(gradient, [&](auto gradient_at) {
              with_activation((const T*)x, prologue, [&](auto value) {
                for_narrow_tiles(window, next, kNarrowBackwardRows, [&](const Window& tile, const Window& then) {
                  const int64_t walks = dx ? ceil_div(tile.columns, 2 * kNarrowPairs) : 1;
                  auto dz_ahead = RowsAhead::of<T>({gradient.dy, gradient.z}, p, then, z_channel, groups * p.dout(),
                                                   backward.count(groups) * walks);
                  auto x_ahead = RowsAhead::of<T>({x}, p, then, x_channel, groups * p.din(), backward.count(groups));
                  for (int64_t b = 0; b < backward.count(groups); ++b) {
                    const Block block = backward.block(b, groups);
                    const int64_t z = z_channel + block.in, c = x_channel + block.out;
                    const NarrowInput e =
                        input_around(nullptr, tile, p.H, p.W, p.K, z, block.lanes, z_staged, gradient_at);
                    const auto part_of_e = [&](const Window& part) RK_INLINE_LAMBDA {
                      return NarrowInput{e.data + (part.column - tile.column) * e.pixel, e.row, e.pixel};
                    };
                    if (dx) run_narrow(p.din(), tile, p.H, b, block, packed, part_of_e, zeros, dz_ahead, sink);
                    if (!dweight) continue;
                    const NarrowInput a = input_around(in_place, tile, p.H, p.W, p.C, c, block.lanes, x_staged, value);
                    const auto run = p.din() == 4 ? narrow_weight_tile<4> : narrow_weight_tile<8>;
                    x_ahead.begin_walk();
                    if (!dx) dz_ahead.begin_walk();
                    run(tile, a, e, chunk_dweight + b * 3 * p.din() * kPairFloats, x_ahead, dx ? nullptr : &dz_ahead);
                  }
                });
              });
            });
            item_finite = !any_nan(zeros);
            continue;
          }
          if constexpr (winograd) {
            const Slots x_item(p.din(), p.dout(), groups), z_item(p.dout(), p.din(), groups);
            const Pairs<4> e = z_shape.of(z_staged, z_item.count, window);
            const Pairs<4> v = x_shape.of(x_staged, x_item.count, window);
            const Pairs<2> raw_e = raw_shape.of(x_staged + x_shape.floats(), z_item.count, window);
            const WinogradPass pass{p, backward, z_item, groups, packed, backward_index};
            for_steps(window, next, e.rows - 2, p.H, [&](const Window& rows, const Window& now, const Window& then) {
              with_gradient<T>(gradient, [&](auto value) {
                item_finite &=
                    stage_pairs(e, dweight ? &raw_e : nullptr, z_item, groups, now, p.H, p.W, p.K, z_channel, value);
              });
              Ahead ahead = ahead_of(then, then);
              const int64_t lines = dx && dweight ? ceil_div(ahead.lines, 2) : ahead.lines;  // during either
              if (dx) pass.run(rows, e, ahead, lines, sink);
              if (!dweight) return;
              with_activation((const T*)x, prologue, [&](auto value) {
                item_finite &= stage_pairs(v, nullptr, x_item, groups, now, p.H, p.W, p.C, x_channel, value);
              });
              add_winograd_weight_gradient(p, forward, x_item, groups, rows, v, e, raw_e, forward_index, chunk_dweight,
                                           ahead, lines);
            });
            continue;
          }
          const Staged dz{z_staged, gradient_window(own, p), z_pixel};
          stage_gradient<T>(dz, p, z_channel, groups * p.dout(), gradient);
          Ahead ahead = ahead_of(gradient_window(own_window(next, p), p), input_window(next, p));
          if (dx)
            UnitPass{p,
                     tiles_for(backward.access(), true, p.stride, p.dilation),
                     backward,
                     true,
                     groups,
                     packed,
                     backward_index}
                .run(own, dz, ahead, sink);
          if (!dweight) continue;
          const Staged input{x_staged, input_window(window, p), x_pixel};
          stage_activation(input, p, x_channel, groups * p.din(), (const T*)x, prologue);
          add_weight_gradient(p, forward, groups, window, input, dz, forward_index, chunk_dweight);
        }
        if (narrow && dweight) {
          Vec zeros{};
          for (int64_t i = 0; i < dweight_floats; i += kLanes) zeros += load(chunk_dweight + i) * Vec{};
          item_finite &= !any_nan(zeros);
        }
        if (!item_finite) {
#pragma omp atomic write
          finite = false;
        }
      });
  if (!dweight || !finite) return finite;

  const int64_t count = forward.count(plan.chunk_groups), blocks = plan.chunks * count;
#pragma omp parallel for num_threads(num_threads) schedule(static) if (num_threads > 1 && blocks > 1)
  for (int64_t block = 0; block < blocks; ++block)
    write_weight_gradient(p, forward, access_of(forward, winograd), winograd || narrow, plan, block / count,
                          block % count, scratch.shared + block / count * dweight_floats, split_floats, (T*)dweight);
  return true;
}

template <class T>
void conv_backward(const ConvProblem& p, const ReluBNGradient& gradient, const void* x, Affine prologue,
                   const void* weight, void* dx, void* dweight, int num_threads) {
  if constexpr (kWinograd) {
    const auto run = narrow_serves(p) ? conv_backward<T, Form::narrow> : conv_backward<T, Form::winograd>;
    if (winograd_serves(p) && run(p, gradient, x, prologue, weight, dx, dweight, num_threads)) return;
  }
  conv_backward<T, Form::direct>(p, gradient, x, prologue, weight, dx, dweight, num_threads);
}

}  // namespace resnext_kernels::cpu::RK_ISA
