// The grouped 3x3 convolution with BatchNorm and ReLU around it, forward and backward, for one instruction set.
//
//   a = x or relu(in_scale * x + in_shift)              z[k] = sum_{ky,kx,ci} weight[k][ci][ky][kx] * a[g(k), ci]
//   forward:   y = relu(scale * z + shift [+ residual])  or  z with its per-channel statistics
//   backward:  dz formed from dy and z as they are loaded;   da = conv^T(dz, weight);   dweight = a (x) dz
//
// (Xie et al., 2017, section 3; Ioffe & Szegedy, 2015.) Memory is NHWC, accumulation float32.
//
// Lanes of a vector are neighbouring output channels. The nine taps of an input channel need its value in all lanes of
// its group, which is a broadcast from memory when a group fills a vector, and a permutation of the loaded vector when
// several groups share one:
//
//     4 channels a group, 8 lanes       pixel  | a0 a1 a2 a3 | b0 b1 b2 b3 |      groups a and b
//                                       ci = 1 | a1 a1 a1 a1 | b1 b1 b1 b1 |
//
// A tile is one vector of channels times A neighbouring pixels of a row, accumulated in registers. For one (ky, ci) it
// holds the three weights of kx and walks the columns once, so a value read serves three FMAs:
//
//     q = 0 1 2 3 4 ...    acc[q - kx] += w[kx] * a[q]
//
// Work is cut into chunks (whole groups, about kChunkChannels channels) x units (an image's band of pixels). A thread
// copies a unit's input into its own scratch memory first, which is where everything that belongs to loading happens
// once per element: conversion to float32, the prologue, dBN and dReLU, and the zeros around the image. The scratch is
// sized for the second-level cache. Packed weights, per block of one vector of output channels:
//
//     [block][ci][ky][kx][lane]
#pragma once

#include "kernels.h"
#include "pointwise.h"
#include "simd.h"

namespace resnext_kernels::cpu::RK_ISA {

// ---- configuration
constexpr int64_t kChunkChannels = 128;        // wide pieces of a pixel touch few memory pages at a time
constexpr int64_t kChunkWeights = 2048;        // but channels * channels per group no more than this
constexpr int64_t kScratchFloats = 40 * 1024;  // 160 KiB, a third of the smallest second-level cache in use
constexpr int64_t kBandColumns = 64;
constexpr int64_t kLongRow = 14;                   // from here on a row's work hides reading the chunk's weights anew
constexpr int64_t kWeightTileFloats = 4 * 1024;    // 16 KiB of a and dz, half of the first-level cache
constexpr int kTile = kRegisters == 16 ? 10 : 14;  // accumulators; + 3 weights + index + input
constexpr int kWeightInputs = kRegisters == 16 ? 4 : 8;  // input channels of a dweight tile, 3 accumulators each

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// ---- how groups map to vectors
enum class Access { broadcast, quads, lanes };  // how an input channel reaches the lanes of its group

// One vector of output channels: offsets within the chunk.
struct Block {
  int64_t out, in;
  int lanes;
};

// A convolution from din to dout channels per group.
struct Blocks {
  int64_t din, dout;
  int64_t groups_per_block;  // > 1: a vector holds several whole groups
  int64_t blocks_per_group;  // of a group wider than half a vector

  Blocks(int64_t din, int64_t dout)
      : din(din),
        dout(dout),
        groups_per_block(max(1, kLanes / max(din, dout))),
        blocks_per_group(groups_per_block > 1 ? 1 : ceil_div(dout, kLanes)) {}

  int64_t count(int64_t groups) const {
    return groups_per_block > 1 ? ceil_div(groups, groups_per_block) : groups * blocks_per_group;
  }
  Block block(int64_t index, int64_t groups) const {
    if (groups_per_block > 1) {
      const int64_t group = index * groups_per_block;
      return {group * dout, group * din, (int)(min(groups_per_block, groups - group) * dout)};
    }
    const int64_t group = index / blocks_per_group, part = index % blocks_per_group * kLanes;
    return {group * dout + part, group * din, (int)min(kLanes, dout - part)};
  }
  Access access() const {
    if (groups_per_block == 1) return Access::broadcast;
    return din == 4 && dout == 4 ? Access::quads : Access::lanes;
  }
  // index[ci]: the lane of the block's input vector that holds channel ci of the lane's group
  void fill_index(IVec* index) const {
    if (groups_per_block == 1) return;
    for (int64_t ci = 0; ci < din; ++ci)
      for (int lane = 0; lane < kLanes; ++lane)
        ((int32_t*)&index[ci])[lane] = (int32_t)min(lane / dout * din + ci, kLanes - 1);
  }
  int64_t index_floats() const { return groups_per_block == 1 ? 0 : din * kLanes; }
  int64_t weight_floats(int64_t groups) const { return count(groups) * din * 9 * kLanes; }
};

// Floats from one staged pixel to the next: an odd number of cache lines, so that the same channels of neighbouring
// pixels do not compete for the same sets of the cache.
inline int64_t staged_pixel(int64_t channels) {
  const int64_t floats = round_up(channels, kLanes);
  return floats > 32 && floats % 32 == 0 ? floats + 16 : floats;
}

// ---- how the problem is cut into work
struct Plan {
  int64_t chunk_groups, chunks;  // channels
  int64_t rows, columns;         // of z, per unit
  int64_t row_bands, column_bands, units;
  int64_t splits;  // runs of units: the items of one chunk

  // `staged`: how many windows of a unit are in scratch memory at a time.
  Plan(const ConvProblem& p, int num_threads, int staged) {
    const int64_t width = max(p.din(), p.dout());
    const int64_t step = Blocks(p.din(), p.dout()).groups_per_block;
    chunk_groups = min(p.groups, round_up(max(1, min(kChunkChannels, kChunkWeights / width) / width), step));
    chunks = ceil_div(p.groups, chunk_groups);

    const int64_t out_h = p.out_h(), out_w = p.out_w();
    column_bands = ceil_div(out_w, kBandColumns);
    columns = round_up(ceil_div(out_w, column_bands), 2);
    column_bands = ceil_div(out_w, columns);
    const int64_t row_floats = (columns * p.stride + 2 * p.dilation) * staged_pixel(chunk_groups * width);
    rows = max(4, (kScratchFloats / staged / row_floats - 2 * p.dilation) / p.stride);
    rows = ceil_div(out_h, ceil_div(out_h, rows));
    while (rows > 4 && chunks * p.N * ceil_div(out_h, rows) * column_bands < 2 * num_threads) rows = ceil_div(rows, 2);
    row_bands = ceil_div(out_h, rows);
    units = p.N * row_bands * column_bands;
    splits = max(1, min(units, ceil_div(4 * num_threads, chunks)));
  }
  int64_t items() const { return chunks * splits; }
  int64_t groups(const ConvProblem& p, int64_t chunk) const {
    return min(chunk_groups, p.groups - chunk * chunk_groups);
  }
};

// A band of pixels of image n: of z while planning, of anything while staging. Rows and columns may lie outside the
// image; columns outside are staged as zeros, rows outside are never read.
struct Window {
  int64_t n, row, rows, column, columns;
};

inline Window unit_window(const Plan& plan, const ConvProblem& p, int64_t unit) {
  const int64_t column_band = unit % plan.column_bands;
  const int64_t row_band = unit / plan.column_bands % plan.row_bands;
  const int64_t row = row_band * plan.rows, column = column_band * plan.columns;
  return {unit / plan.column_bands / plan.row_bands, row, min(plan.rows, p.out_h() - row), column,
          min(plan.columns, p.out_w() - column)};
}

// The pixels of x that z's window reads.
inline Window input_window(const Window& z, const ConvProblem& p) {
  const int64_t halo = 2 * p.dilation;
  return {z.n, z.row * p.stride - p.dilation, (z.rows - 1) * p.stride + 1 + halo, z.column * p.stride - p.dilation,
          (z.columns - 1) * p.stride + 1 + halo};
}

// The pixels of x that belong to z's window: these windows tile x.
inline Window own_window(const Window& z, const ConvProblem& p) {
  const int64_t row = z.row * p.stride, column = z.column * p.stride;
  return {z.n, row, min(z.rows * p.stride, p.H - row), column, min(z.columns * p.stride, p.W - column)};
}

// The pixels of z that the gradient of x's window reads.
inline Window gradient_window(const Window& x, const ConvProblem& p) {
  const int64_t first_row = floor_div(x.row - p.dilation, p.stride);
  const int64_t first_column = floor_div(x.column - p.dilation, p.stride);
  return {x.n, first_row, floor_div(x.row + x.rows - 1 + p.dilation, p.stride) - first_row + 1, first_column,
          floor_div(x.column + x.columns - 1 + p.dilation, p.stride) - first_column + 1};
}

// f(chunk, split, first unit, last unit) for every item; an item's work does not depend on the thread that does it.
template <class F>
void for_items(const Plan& plan, int num_threads, F f) {
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1) if (num_threads > 1 && plan.items() > 1)
  for (int64_t item = 0; item < plan.items(); ++item) {
    const int64_t split = item / plan.chunks;
    f(item % plan.chunks, split, split * plan.units / plan.splits, (split + 1) * plan.units / plan.splits);
  }
}

// ---- staging: a window of a chunk's channels as float32 [row][column][channel]
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

// value(element offset, channel, lanes) gives the vector at a pixel inside the (H, W, C) image.
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
      for_channels(channels, [&](int64_t c, auto lanes) { store(pixel + c, value(at + c, channel + c, lanes)); });
    }
  }
}

template <class T>
void stage_activation(const Staged& to, const ConvProblem& p, int64_t channel, int64_t channels, const T* x,
                      Affine prologue) {
  if (prologue.scale) {
    stage(to, p.H, p.W, p.C, channel, channels,
          [&](int64_t at, int64_t c, auto lanes) { return relu(apply(prologue, c, load(x + at, lanes), lanes)); });
  } else {
    stage(to, p.H, p.W, p.C, channel, channels, [&](int64_t at, int64_t, auto lanes) { return load(x + at, lanes); });
  }
}

template <class T>
void stage_gradient(const Staged& to, const ConvProblem& p, int64_t channel, int64_t channels,
                    const ReluBNGradient& gradient) {
  const int64_t H = p.out_h(), W = p.out_w();
  if (!gradient.z) {
    stage(to, H, W, p.K, channel, channels,
          [&](int64_t at, int64_t, auto lanes) { return load((const T*)gradient.dy + at, lanes); });
  } else if (gradient.y) {
    stage(to, H, W, p.K, channel, channels,
          [&](int64_t at, int64_t c, auto lanes) { return input_gradient<T, true>(gradient, at, c, lanes); });
  } else {
    stage(to, H, W, p.K, channel, channels,
          [&](int64_t at, int64_t c, auto lanes) { return input_gradient<T, false>(gradient, at, c, lanes); });
  }
}

// ---- weights
// to[j][lane] = from(lane)[j] for j < count; lanes from `lanes` on become zero.
template <class T, class F>
RK_INLINE void transpose_rows(int lanes, int64_t count, F&& from, float* to) {
  for (int64_t j = 0; j < count; j += kLanes) {
    const int64_t n = min(kLanes, count - j);
    Vec rows[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      rows[lane] = Vec{};
      if (lane < lanes) rows[lane] = n == kLanes ? load(from(lane) + j) : load_partial(from(lane) + j, (int)n);
    }
    transpose(rows);
    for (int64_t i = 0; i < n; ++i) store(to + (j + i) * kLanes, rows[i]);
  }
}

// Forward: lanes are output channels, a lane's row is weight[k].
template <class T>
void pack_weight(const ConvProblem& p, const Blocks& blocks, int64_t group, int64_t groups, const T* weight,
                 float* packed) {
  const int64_t row = p.din() * 9;
  for (int64_t index = 0; index < blocks.count(groups); ++index, packed += row * kLanes) {
    const Block block = blocks.block(index, groups);
    const T* first = weight + (group * p.dout() + block.out) * row;
    transpose_rows<T>(
        block.lanes, row, [&](int64_t lane) { return first + lane * row; }, packed);
  }
}

// Transposed: lanes are input channels of the convolution, the sum runs over its output channels. At stride 1 the
// transposed convolution is a convolution with the taps of a row reversed.
template <class T>
void pack_transposed_weight(const ConvProblem& p, const Blocks& blocks, int64_t group, int64_t groups, const T* weight,
                            bool reversed, float* packed) {
  const int64_t din = p.din(), dout = p.dout();
  for (int64_t index = 0; index < blocks.count(groups); ++index) {
    const Block block = blocks.block(index, groups);
    const T* first[kLanes];  // the nine taps to output channel 0 of the lane's group
    for (int64_t lane = 0; lane < block.lanes; ++lane) {
      const int64_t channel = block.out + lane;
      first[lane] = weight + ((group + channel / din) * dout * din + channel % din) * 9;
    }
    for (int64_t k = 0; k < dout; ++k, packed += 9 * kLanes) {
      transpose_rows<T>(
          block.lanes, 9, [&](int64_t lane) { return first[lane] + k * din * 9; }, packed);
      if (!reversed) continue;
      for (int64_t ky = 0; ky < 3; ++ky) {
        float* taps = packed + ky * 3 * kLanes;
        const Vec left = load(taps), right = load(taps + 2 * kLanes);
        store(taps, right);
        store(taps + 2 * kLanes, left);
      }
    }
  }
}

// ---- the register tile
// Which accumulator the value of column q feeds through the tap kx, as the tile counts columns.
enum class Map {
  stride1,      // conv, stride 1, and its transpose: q - kx
  stride2,      // conv, stride 2: (q - kx) / 2 where it divides
  transposed2,  // transpose of stride 2: 2 q + kx - 1
};

template <Map M, int A>
constexpr int kColumnsRead = M == Map::stride1   ? A + 2
                             : M == Map::stride2 ? 2 * A + 1
                                                 : A / 2 + 1;

template <Map M, int A>
constexpr int accumulator(int q, int kx) {
  const int at = M == Map::stride1 ? q - kx : M == Map::stride2 ? ((q - kx) % 2 ? -1 : (q - kx) / 2) : 2 * q + kx - 1;
  return at < A ? at : -1;
}

// One row of input that a row of output reads: the first column of the tile and the three weights of its ky.
struct RowTap {
  const float* input;
  const float* weight;
};

template <Access X>
RK_INLINE Vec read(const float* pixel, int64_t ci, IVec index) {
  if (X == Access::broadcast) return broadcast(pixel[ci]);
  return X == Access::quads ? spread_quads(load(pixel), (int)ci) : permute(load(pixel), index);
}

// Hides where a pointer comes from: keeps the compiler from holding what it read for one ci in registers, of which
// there are none to spare, or on the stack.
RK_INLINE const float* fresh(const float* p) {
  asm volatile("" : "+r"(p));
  return p;
}

// f(ci) for the din input channels of a group. Groups of four: bound and ci become constants, as permutations need.
template <Access X, class F>
RK_INLINE void for_inputs(int64_t din, F&& f) {
  if (X == Access::quads) {
#pragma GCC unroll 4
    for (int ci = 0; ci < 4; ++ci) f(ci);
  } else {
    for (int64_t ci = 0; ci < din; ++ci) f(ci);
  }
}

template <Access X, Map M, int A>
void conv_tile(const RowTap* taps, int tap_count, int64_t pixel, int64_t din, const IVec* index, float* out) {
  Vec acc[A] = {};
  for (int t = 0; t < tap_count; ++t) {
    for_inputs<X>(din, [&](int64_t ci) RK_INLINE_LAMBDA {
      const float* weight = taps[t].weight + ci * (9 * kLanes);
      const Vec w[3] = {load(weight), load(weight + kLanes), load(weight + 2 * kLanes)};
      const IVec lanes = X == Access::lanes ? index[ci] : IVec{};
      const float* input = fresh(taps[t].input);
#pragma GCC unroll 64
      for (int q = 0; q < kColumnsRead<M, A>; ++q, input += pixel) {
        const Vec value = read<X>(input, ci, lanes);
#pragma GCC unroll 3
        for (int kx = 0; kx < 3; ++kx) {
          const int at = accumulator<M, A>(q, kx);
          if (at >= 0) acc[at] += w[kx] * value;
        }
      }
    });
  }
#pragma GCC unroll 64
  for (int i = 0; i < A; ++i) store(out + i * kLanes, acc[i]);
}

// Any stride and dilation: a list of taps, one FMA per value read; accumulator i reads `step` floats after i - 1.
template <Access X, int A>
void tap_tile(const RowTap* taps, int tap_count, int64_t step, int64_t din, const IVec* index, float* out) {
  Vec acc[A] = {};
  for (int t = 0; t < tap_count; ++t) {
    for_inputs<X>(din, [&](int64_t ci) RK_INLINE_LAMBDA {
      const Vec w = load(taps[t].weight + ci * (9 * kLanes));
      const IVec lanes = X == Access::lanes ? index[ci] : IVec{};
      const float* input = fresh(taps[t].input);
#pragma GCC unroll 64
      for (int i = 0; i < A; ++i, input += step) acc[i] += w * read<X>(input, ci, lanes);
    });
  }
#pragma GCC unroll 64
  for (int i = 0; i < A; ++i) store(out + i * kLanes, acc[i]);
}

// The tiles by number of accumulators.
using Tile = void (*)(const RowTap*, int, int64_t, int64_t, const IVec*, float*);
struct Tiles {
  Tile by_size[kTile + 1];
};

template <Access X, Map M, int A>
constexpr void fill_conv_tiles(Tiles& tiles) {
  if constexpr (A > 0) {
    tiles.by_size[A] = conv_tile < X, M, M == Map::transposed2 ? (A + 1) / 2 * 2 : A > ;
    fill_conv_tiles<X, M, A - 1>(tiles);
  }
}
template <Access X, int A>
constexpr void fill_tap_tiles(Tiles& tiles) {
  if constexpr (A > 0) {
    tiles.by_size[A] = tap_tile<X, A>;
    fill_tap_tiles<X, A - 1>(tiles);
  }
}

template <Access X>
const Tiles& tiles_for(bool transposed, int64_t stride, int64_t dilation) {
  struct All {
    Tiles stride1{}, stride2{}, transposed2{}, any{};
    constexpr All() {
      fill_conv_tiles<X, Map::stride1, kTile>(stride1);
      fill_conv_tiles<X, Map::stride2, kTile>(stride2);
      fill_conv_tiles<X, Map::transposed2, kTile>(transposed2);
      fill_tap_tiles<X, kTile>(any);
    }
  };
  static constexpr All all;
  if (dilation != 1 || stride > 2) return all.any;
  if (stride == 1) return all.stride1;
  return transposed ? all.transposed2 : all.stride2;
}

inline const Tiles& tiles_for(Access access, bool transposed, int64_t stride, int64_t dilation) {
  switch (access) {
    case Access::broadcast: return tiles_for<Access::broadcast>(transposed, stride, dilation);
    case Access::quads: return tiles_for<Access::quads>(transposed, stride, dilation);
    default: return tiles_for<Access::lanes>(transposed, stride, dilation);
  }
}

// Runs the tiles of one unit. `out` is the window to compute, `input` the staged operand. For every block and tile
// calls finish(block index, block, row, column, column step, count, values[count][lane]).
struct UnitPass {
  const ConvProblem& p;
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

  template <class F>
  RK_INLINE void run(const Window& out, const Staged& input, F&& finish) const {
    const Tiles& tiles = tiles_for(blocks.access(), transposed, p.stride, p.dilation);
    const bool shared_columns = p.dilation == 1 && p.stride <= 2;
    alignas(64) float values[kTile * kLanes];
    const int64_t block_floats = blocks.din * 9 * kLanes, block_count = blocks.count(groups);
    // All blocks of a row, so that the row is written while it is in the cache; short rows block by block instead.
    const bool rows_first = out.columns >= kLongRow;
    const int64_t steps = out.rows * block_count;
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t b = rows_first ? step % block_count : step / out.rows;
      const int64_t row = out.row + (rows_first ? step / block_count : step % out.rows);
      const Block block = blocks.block(b, groups);
      const float* weight = packed + b * block_floats;
      RowTap rows[3];
      int row_count = 0;
      for (int64_t ky = 0; ky < 3; ++ky) {
        int64_t from;
        if (!input_row(row, ky, &from)) continue;
        rows[row_count++] = {input.at(from, input.window.column) + block.in, weight + ky * 3 * kLanes};
      }
      if (shared_columns) {
        run_shared(out, input, tiles, rows, row_count, values,
                   [&](int64_t column, int64_t count) { finish(b, block, row, column, 1, count, values); });
      } else {
        run_taps(out, input, tiles, rows, row_count, values, [&](int64_t column, int64_t stride, int64_t count) {
          finish(b, block, row, column, stride, count, values);
        });
      }
    }
  }

  // Neighbouring columns share what they read.
  template <class F>
  RK_INLINE void run_shared(const Window& out, const Staged& input, const Tiles& tiles, const RowTap* rows,
                            int row_count, float* values, F&& finish) const {
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
      tiles.by_size[end - begin](taps, row_count, input.pixel, blocks.din, index, values);
      finish(column, end - begin);
      begin = end;
    }
  }

  // Any stride and dilation. Columns of one residue modulo the stride read the same taps in the transpose.
  template <class F>
  RK_INLINE void run_taps(const Window& out, const Staged& input, const Tiles& tiles, const RowTap* rows, int row_count,
                          float* values, F&& finish) const {
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
        tiles.by_size[count](taps, tap_count, (transposed ? 1 : p.stride) * input.pixel, blocks.din, index, values);
        finish(column, residues, count);
      }
    }
  }
};

// ---- forward
// What becomes of the convolution's values.
struct Epilogue {
  Affine affine;  // given: y = relu(affine(z) [+ residual]), else z itself
  const void* residual = nullptr;
  double* means = nullptr;  // given: statistics [split][K], and counts [split]
  double* m2s = nullptr;
  double* counts = nullptr;
};

// Asks for the cache lines that this block of channels starts, in pixels that will be written soon: a store that
// misses waits for memory, and no hardware prefetcher follows the order in which tiles write.
template <class T>
RK_INLINE void prefetch_pixels(const T* out, int64_t stride, int64_t count, const Block& block) {
  if (block.out % (64 / (int64_t)sizeof(T))) return;
  for (int64_t i = 0; i < count; ++i) __builtin_prefetch(out + i * stride, 1);
}

template <class T, class I>
RK_INLINE void write_pixels(const Epilogue& epilogue, T* out, const T* residual, int64_t channel, int64_t stride,
                            int64_t count, const float* values, I lanes) {
  if (!epilogue.affine.scale) {
    for (int64_t i = 0; i < count; ++i) store(out + i * stride, load(values + i * kLanes), lanes);
    return;
  }
  const Vec scale = load(epilogue.affine.scale + channel, lanes), shift = load(epilogue.affine.shift + channel, lanes);
  for (int64_t i = 0; i < count; ++i) {
    Vec v = load(values + i * kLanes) * scale + shift;
    if (residual) v += load(residual + i * stride, lanes);
    store(out + i * stride, relu(v), lanes);
  }
}

// Statistics of one block of channels over one unit: (count, mean, m2) of every tile, merged by Chan's update. Values
// are taken relative to the first tile's mean, so that a mean large against the deviation costs nothing.
struct BlockStatistics {
  Vec origin, mean, m2;
  float count;

  RK_INLINE void add(const float* values, int64_t n, bool first) {
    const Vec inverse = broadcast(1.0f / (float)n);
    Vec sum{};
    if (first) {
      for (int64_t i = 0; i < n; ++i) sum += load(values + i * kLanes);
      origin = sum * inverse;
      sum = mean = m2 = Vec{};
      count = 0;
    }
    for (int64_t i = 0; i < n; ++i) sum += load(values + i * kLanes) - origin;
    const Vec tile_mean = sum * inverse;
    Vec tile_m2{};
    for (int64_t i = 0; i < n; ++i) {
      const Vec d = (load(values + i * kLanes) - origin) - tile_mean;
      tile_m2 += d * d;
    }
    const float share = (float)n / (count + (float)n);
    const Vec delta = tile_mean - mean;
    mean += delta * broadcast(share);
    m2 += tile_m2 + delta * delta * broadcast(share * count);
    count += (float)n;
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

template <class T>
void conv_forward(const ConvProblem& p, const Plan& plan, const void* x, const void* weight, Affine prologue,
                  const Epilogue& epilogue, void* out_, int num_threads) {
  const Blocks blocks(p.din(), p.dout());
  const int64_t out_h = p.out_h(), out_w = p.out_w();
  T* const out = (T*)out_;
  const T* const residual = (const T*)epilogue.residual;

  const int64_t pixel = staged_pixel(plan.chunk_groups * p.din());
  const Window largest = input_window({0, 0, plan.rows, 0, plan.columns}, p);
  const int64_t stage_floats = Staged::floats(largest, pixel);
  const int64_t weight_floats = blocks.weight_floats(plan.chunk_groups);
  constexpr int64_t kStatisticsFloats = sizeof(BlockStatistics) / sizeof(float);
  const int64_t statistics_floats = epilogue.means ? blocks.count(plan.chunk_groups) * kStatisticsFloats : 0;

  for_items(plan, num_threads, [&](int64_t chunk, int64_t split, int64_t first_unit, int64_t last_unit) {
    const int64_t group = chunk * plan.chunk_groups, groups = plan.groups(p, chunk);
    float* scratch =
        workspace(Slot::item, (size_t)(blocks.index_floats() + statistics_floats + weight_floats + stage_floats));
    IVec* index = (IVec*)scratch;
    BlockStatistics* statistics = (BlockStatistics*)(scratch + blocks.index_floats());
    float* packed = scratch + blocks.index_floats() + statistics_floats;
    float* staged = packed + weight_floats;
    blocks.fill_index(index);
    pack_weight(p, blocks, group, groups, (const T*)weight, packed);

    double *means = nullptr, *m2s = nullptr;
    if (epilogue.means) {
      means = epilogue.means + split * p.K + group * p.dout();
      m2s = epilogue.m2s + split * p.K + group * p.dout();
      for (int64_t k = 0; k < groups * p.dout(); ++k) means[k] = m2s[k] = 0;
    }
    double pixels = 0;

    const UnitPass pass{p, blocks, false, groups, packed, index};
    for (int64_t unit = first_unit; unit < last_unit; ++unit) {
      const Window window = unit_window(plan, p, unit);
      const Staged input{staged, input_window(window, p), pixel};
      stage_activation(input, p, group * p.din(), groups * p.din(), (const T*)x, prologue);

      pass.run(
          window, input,
          [&](int64_t b, const Block& block, int64_t row, int64_t column, int64_t, int64_t count, const float* values) {
            const int64_t channel = group * p.dout() + block.out;
            const int64_t at = ((window.n * out_h + row) * out_w + column) * p.K + channel;
            const T* const add = residual ? residual + at : nullptr;
            if (row + 1 < out_h) prefetch_pixels(out + at + out_w * p.K, p.K, count, block);
            if (block.lanes == kLanes)
              write_pixels(epilogue, out + at, add, channel, p.K, count, values, AllLanes{});
            else
              write_pixels(epilogue, out + at, add, channel, p.K, count, values, FirstLanes{block.lanes});
            if (!epilogue.means) return;
            statistics[b].add(values, count, row == window.row && column == window.column);
            if (row == window.row + window.rows - 1 && column + count == window.column + window.columns)
              statistics[b].merge_into(pixels, block.lanes, means + block.out, m2s + block.out);
          });
      pixels += (double)(window.rows * window.columns);
    }
    if (epilogue.counts && chunk == 0) epilogue.counts[split] = pixels;  // the same for every chunk
  });
}

template <class T>
void conv_affine_relu(const ConvProblem& p, const void* x, const void* weight, Affine affine, const void* residual,
                      Affine prologue, void* y, int num_threads) {
  conv_forward<T>(p, Plan(p, num_threads, 1), x, weight, prologue, Epilogue{affine, residual}, y, num_threads);
}

template <class T>
void conv_stats(const ConvProblem& p, const void* x, const void* weight, Affine prologue, void* z, float* mean,
                float* var, int num_threads) {
  const Plan plan(p, num_threads, 1);
  if (!mean) return conv_forward<T>(p, plan, x, weight, prologue, Epilogue{}, z, num_threads);
  double* means = (double*)workspace(Slot::call, (size_t)(2 * plan.splits * (2 * p.K + 1)));
  double* m2s = means + plan.splits * p.K;
  double* counts = m2s + plan.splits * p.K;
  conv_forward<T>(p, plan, x, weight, prologue, Epilogue{{}, nullptr, means, m2s, counts}, z, num_threads);
  merge_statistics(plan.splits, p.K, counts, means, m2s, mean, var);
}

// ---- backward for weight
// acc[i][kx] += a[p + kx, ci + i] * dz[p] over the pixels p of a unit, for one block, ky and I input channels.
struct WeightTileArgs {
  const float* input;                            // staged a, at the row of ky and the first pixel's column of kx = 0
  const float* gradient;                         // staged dz, at the first pixel
  int64_t input_line, input_pixel, input_shift;  // floats per row and pixel of dz, and per step of kx
  int64_t gradient_line, gradient_pixel;
  int64_t rows, columns;
};

template <Access X, int I>
void weight_tile(const WeightTileArgs& args, int64_t ci, const IVec* index, float* dweight) {
  Vec acc[I][3] = {};
  IVec lanes[I] = {};
  if (X == Access::lanes)
    for (int i = 0; i < I; ++i) lanes[i] = index[ci + i];
  if (X == Access::quads) ci = 0;  // a constant to the compiler

  for (int64_t row = 0; row < args.rows; ++row) {
    const float* input = args.input + row * args.input_line;
    const float* gradient = args.gradient + row * args.gradient_line;
    for (int64_t column = 0; column < args.columns; ++column) {
      const Vec dz = load(gradient);
#pragma GCC unroll 3
      for (int kx = 0; kx < 3; ++kx) {
        const float* pixel = fresh(input + kx * args.input_shift);
#pragma GCC unroll 8
        for (int i = 0; i < I; ++i) acc[i][kx] += read<X>(pixel, ci + i, lanes[i]) * dz;
      }
      input += args.input_pixel;
      gradient += args.gradient_pixel;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i) {
#pragma GCC unroll 3
    for (int kx = 0; kx < 3; ++kx) {
      float* to = dweight + ((ci + i) * 9 + kx) * kLanes;
      store(to, load(to) + acc[i][kx]);
    }
  }
}

template <Access X, int I>
void weight_tiles(const WeightTileArgs& args, int64_t ci, int64_t din, const IVec* index, float* dweight) {
  if constexpr (X == Access::quads) return weight_tile<X, 4>(args, 0, index, dweight);
  for (; ci + I <= din; ci += I) weight_tile<X, I>(args, ci, index, dweight);
  if constexpr (I > 1)
    if (ci < din) weight_tiles<X, I / 2>(args, ci, din, index, dweight);
}

// dweight of a chunk, packed as the weights are, from one unit.
inline void add_weight_gradient(const ConvProblem& p, const Blocks& blocks, int64_t groups, const Window& window,
                                const Staged& input, const Staged& gradient, const IVec* index, float* dweight) {
  const auto tiles = blocks.access() == Access::broadcast ? weight_tiles<Access::broadcast, kWeightInputs>
                     : blocks.access() == Access::quads   ? weight_tiles<Access::quads, kWeightInputs>
                                                          : weight_tiles<Access::lanes, kWeightInputs>;
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

// Sums the splits' packed dweight of a chunk and writes it as OIHW.
template <class T>
void write_weight_gradient(const ConvProblem& p, const Blocks& blocks, const Plan& plan, int64_t chunk,
                           const float* packed, int64_t split_floats, T* dweight) {
  const int64_t group = chunk * plan.chunk_groups, groups = plan.groups(p, chunk), row = p.din() * 9;
  for (int64_t b = 0; b < blocks.count(groups); ++b, packed += row * kLanes) {
    const Block block = blocks.block(b, groups);
    T* to = dweight + (group * p.dout() + block.out) * row;
    for (int64_t j = 0; j < row; ++j) {
      Vec sum = load(packed + j * kLanes);
      for (int64_t split = 1; split < plan.splits; ++split) sum += load(packed + split * split_floats + j * kLanes);
      T converted[kLanes];
      store(converted, sum);
      for (int lane = 0; lane < block.lanes; ++lane) to[lane * row + j] = converted[lane];
    }
  }
}

// ---- backward: dx and dweight in one pass over dz
template <class T>
void conv_backward(const ConvProblem& p, const ReluBNGradient& gradient, const void* x, Affine prologue,
                   const void* weight, void* dx_, void* dweight, int num_threads) {
  const Plan plan(p, num_threads, dweight ? 2 : 1);
  const Blocks forward(p.din(), p.dout()), backward(p.dout(), p.din());
  T* const dx = (T*)dx_;

  const int64_t x_pixel = staged_pixel(plan.chunk_groups * p.din());
  const int64_t z_pixel = staged_pixel(plan.chunk_groups * p.dout());
  const Window largest{0, 0, plan.rows, 0, plan.columns};
  const Window largest_own{0, 0, plan.rows * p.stride, 0, plan.columns * p.stride};
  const int64_t x_floats = dweight ? Staged::floats(input_window(largest, p), x_pixel) : 0;
  const int64_t z_floats = Staged::floats(gradient_window(largest_own, p), z_pixel);
  const int64_t weight_floats = dx ? backward.weight_floats(plan.chunk_groups) : 0;
  const int64_t dweight_floats = forward.weight_floats(plan.chunk_groups);  // of a chunk
  const int64_t split_floats = plan.chunks * dweight_floats;
  float* const partial = dweight ? workspace(Slot::call, (size_t)(plan.splits * split_floats)) : nullptr;
  const bool reversed = p.stride == 1 && p.dilation == 1;

  for_items(plan, num_threads, [&](int64_t chunk, int64_t split, int64_t first_unit, int64_t last_unit) {
    const int64_t group = chunk * plan.chunk_groups, groups = plan.groups(p, chunk);
    float* scratch = workspace(
        Slot::item, (size_t)(forward.index_floats() + backward.index_floats() + weight_floats + x_floats + z_floats));
    IVec* forward_index = (IVec*)scratch;
    IVec* backward_index = (IVec*)(scratch + forward.index_floats());
    float* packed = scratch + forward.index_floats() + backward.index_floats();
    float* x_staged = packed + weight_floats;
    float* z_staged = x_staged + x_floats;
    forward.fill_index(forward_index);
    backward.fill_index(backward_index);
    if (dx) pack_transposed_weight(p, backward, group, groups, (const T*)weight, reversed, packed);
    float* chunk_dweight = nullptr;
    if (dweight) {
      chunk_dweight = partial + split * split_floats + chunk * dweight_floats;
      for (int64_t i = 0; i < dweight_floats; ++i) chunk_dweight[i] = 0;
    }

    const UnitPass pass{p, backward, true, groups, packed, backward_index};
    for (int64_t unit = first_unit; unit < last_unit; ++unit) {
      const Window window = unit_window(plan, p, unit);
      const Window own = own_window(window, p);
      const Staged dz{z_staged, gradient_window(own, p), z_pixel};
      stage_gradient<T>(dz, p, group * p.dout(), groups * p.dout(), gradient);
      if (dx) {
        pass.run(own, dz,
                 [&](int64_t, const Block& block, int64_t row, int64_t column, int64_t step, int64_t count,
                     const float* values) {
                   const int64_t channel = group * p.din() + block.out;
                   T* to = dx + ((own.n * p.H + row) * p.W + column) * p.C + channel;
                   if (row + 1 < p.H) prefetch_pixels(to + p.W * p.C, step * p.C, count, block);
                   if (block.lanes == kLanes)
                     write_pixels<T>({}, to, nullptr, channel, step * p.C, count, values, AllLanes{});
                   else
                     write_pixels<T>({}, to, nullptr, channel, step * p.C, count, values, FirstLanes{block.lanes});
                 });
      }
      if (dweight) {
        const Staged input{x_staged, input_window(window, p), x_pixel};
        stage_activation(input, p, group * p.din(), groups * p.din(), (const T*)x, prologue);
        add_weight_gradient(p, forward, groups, window, input, dz, forward_index, chunk_dweight);
      }
    }
  });

  if (dweight) {
#pragma omp parallel for num_threads(num_threads) schedule(static) if (num_threads > 1 && plan.chunks > 1)
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk)
      write_weight_gradient(p, forward, plan, chunk, partial + chunk * dweight_floats, split_floats, (T*)dweight);
  }
}

}  // namespace resnext_kernels::cpu::RK_ISA
